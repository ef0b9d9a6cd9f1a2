"""Pulls between real processes, by every transport for host memory: the bytes, many at once, cancelling, and what a frozen or dead peer can still do."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.memory import PageMemory, PeerMemory
from kvmanager.attention.transports import nixl as nixl_transport
from kvmanager.attention.transports.base import Pull, PullState
from kvmanager.attention.transports.choice import choose
from kvmanager.attention.transports.move import plan_move
from kvmanager.errors import ChecksumMismatch, InvalidValue, KVError, PullFailed, TransportUnavailable, WrongState
from kvmanager.tables import div_ceil
from tests.attention.owner import Owner, as_bytes, content, owning

NIXL = any(importlib.util.find_spec(name) for name in nixl_transport.MODULES)
needs_nixl = pytest.mark.skipif(not NIXL, reason="nixl is not installed: pip install 'kvmanager[nixl]'")
ROOM = shutil.disk_usage("/dev/shm").free
needs_room = pytest.mark.skipif(ROOM < 1 << 30, reason=f"needs 1 GiB in /dev/shm, {ROOM >> 20} MiB are free")
TRANSPORTS = ["shm", pytest.param("nixl", marks=needs_nixl)]
LAYERS = 3


def layout_of(page_size: int) -> LatentLayout:
    return LatentLayout(32, 16, LAYERS, page_size, "float16")


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    monkeypatch.setattr(nixl_transport, "GRACE_S", 1.0)


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def owner(transport: str) -> Iterator[Owner]:
    with owning(layout_of(64), 12, transports=(transport,)) as started:
        yield started


def target_memory(page_size: int, num_pages: int, transport: str) -> PageMemory:
    memory = PageMemory(layout_of(page_size), num_pages, transports=(transport,), copy_threads=2)
    as_bytes(memory).fill_(0xEE)
    return memory


def moved(
    source: torch.Tensor, target: torch.Tensor, src: Any, dst: Any, tokens: int, skips: tuple[int, int], layers: tuple[int, int]
) -> None:
    """The model, a token at a time."""
    for token in range(tokens):
        (s, a), (d, b) = divmod(token + skips[0], source.shape[2]), divmod(token + skips[1], target.shape[2])
        target[int(dst[d]), layers[0] : layers[1], b] = source[int(src[s]), layers[0] : layers[1], a]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("theirs", "ours"), [(64, 64), (64, 16), (16, 64), (48, 32)])
def test_every_byte_lands_where_it_should_and_nowhere_else(transport: str, theirs: int, ours: int) -> None:
    """Pages of equal and of different sizes, all layers and a group of them, from the middle of a page: all at once, then compared."""
    source_layout = layout_of(theirs)
    with owning(source_layout, 40, transports=(transport,)) as owner:
        memory = target_memory(ours, 60, transport)
        peer = memory.open_peer(owner.export)
        source, want = content(source_layout, 40, 7), torch.full(as_bytes(memory).shape, 0xEE, dtype=torch.uint8)
        rng = np.random.default_rng(3)
        free, pulls = rng.permutation(60), []
        for tokens, skips, layers in ((150, (0, 0), (0, 3)), (97, (5, 9), (1, 2)), (1, (15, 15), (0, 1)), (200, (8, 0), (1, 3))):
            counts = [div_ceil(skip + tokens, size) for skip, size in zip(skips, (theirs, ours), strict=True)]
            src, dst, free = rng.permutation(40)[: counts[0]], free[: counts[1]], free[counts[1] :]
            options = {"tokens": tokens, "source_skip": skips[0], "target_skip": skips[1], "layers": layers}
            pulls.append(memory.begin_pull(peer, src, dst, **options))
            moved(source, want, src, dst, tokens, skips, layers)
        assert [pull.wait(30) for pull in pulls] == [PullState.DONE] * 4
        assert torch.equal(as_bytes(memory), want)
        assert memory.pulls == []
        memory.close()


def test_layer_groups_of_one_sequence_arrive_apart(owner: Owner, transport: str) -> None:
    """A stream: each group is there when its own pull is done, and the groups together are the pages."""
    memory = target_memory(64, 4, transport)
    peer = memory.open_peer(owner.export)
    source = content(layout_of(64), 12, 7)
    for layer in range(LAYERS):
        assert memory.begin_pull(peer, [11, 2], [0, 3], layers=(layer, layer + 1)).wait(30) is PullState.DONE
        assert torch.equal(as_bytes(memory)[[0, 3], : layer + 1], source[[11, 2], : layer + 1])
        assert (as_bytes(memory)[[0, 3], layer + 1 :] == 0xEE).all()
    memory.close()


def test_hundred_pulls_at_once(owner: Owner, transport: str) -> None:
    memory = target_memory(64, 100, transport)
    peer = memory.open_peer(owner.export)
    pulls = [memory.begin_pull(peer, [index % 12], [index]) for index in range(100)]
    assert {pull.wait(60) for pull in pulls} == {PullState.DONE}
    assert torch.equal(as_bytes(memory), content(layout_of(64), 12, 7)[torch.arange(100) % 12])
    memory.close()


def test_checksums_of_the_source_are_verified_on_arrival(owner: Owner, transport: str) -> None:
    """The right sums pass, whatever the target's page size; one wrong sum fails the pull by the page's name."""
    for ours, dst in ((64, [1, 0]), (16, [3, 1, 4, 0, 5, 2, 7])):
        memory = target_memory(ours, 8, transport)
        peer = memory.open_peer(owner.export)
        sums = owner.sums([4, 9], 101)
        pull = memory.begin_pull(peer, [4, 9], dst, tokens=101, expected=sums)
        assert pull.wait(30) is PullState.DONE
        pull.result()
        wrong = sums ^ np.array([0, 1], np.uint64)
        bad = memory.begin_pull(peer, [4, 9], dst, tokens=101, expected=wrong)
        assert bad.wait(30) is PullState.FAILED
        with pytest.raises(ChecksumMismatch, match=f"page 9: expected checksum {int(wrong[1]):016x}, got {int(sums[1]):016x}"):
            bad.result()
        with pytest.raises(InvalidValue, match=r"^expected: "):
            memory.begin_pull(peer, [4, 9], dst, tokens=101, expected=sums[:1])
        memory.close()


def test_result_of_a_pull_that_is_not_done_is_refused(owner: Owner, transport: str) -> None:
    memory = target_memory(64, 2, transport)
    pull = Pull("shm", plan_move(np.array([0]), np.array([0]), 64, 64, LAYERS))
    with pytest.raises(WrongState, match="expected done, got running"):
        pull.result()
    assert pull.cancel() is PullState.CANCELLING and not pull.settled
    pull._settle()
    assert pull.settled and pull.state is PullState.CANCELLED
    with pytest.raises(WrongState, match="expected done, got cancelled"):
        pull.result()
    done = memory.begin_pull(memory.open_peer(owner.export), [0], [0])
    assert done.wait(30) is PullState.DONE and done.cancel() is PullState.DONE
    memory.close()


class Held:
    """Copying that stops before each stretch until it is let on."""

    def __init__(self, peer: PeerMemory) -> None:
        self.go, self.begun, source = threading.Event(), threading.Event(), peer._source
        copy = source.copy  # type: ignore[attr-defined]

        def held(move: Any, stretch: slice, summed: bool) -> Any:
            self.begun.set()
            assert self.go.wait(60)
            return copy(move, stretch, summed)

        source.copy = held  # type: ignore[attr-defined]


def test_pages_of_a_cancelled_pull_are_nobody_s_until_it_has_settled() -> None:
    """Shared memory: the thread in the middle of a stretch may still write; the pages cannot be a target again before it has ended."""
    with owning(layout_of(64), 12) as owner:
        memory = target_memory(64, 6, "shm")
        peer = memory.open_peer(owner.export)
        held = Held(peer)
        pull = memory.begin_pull(peer, [1, 2], [3, 4])
        assert held.begun.wait(30)
        assert pull.cancel() is PullState.CANCELLING
        assert not pull.settled and memory.pulls == [pull]
        with pytest.raises(WrongState, match="page 4: expected free of transfers"):
            memory.begin_pull(peer, [5], [4])
        held.go.set()
        assert pull.wait(30) is PullState.CANCELLED
        assert memory.begin_pull(peer, [5], [4]).wait(30) is PullState.DONE
        memory.close()


def test_cancelled_pull_that_waits_for_its_turn_writes_nothing() -> None:
    with owning(layout_of(64), 12) as owner:
        memory = PageMemory(layout_of(64), 6)
        as_bytes(memory).fill_(0xEE)
        peer = memory.open_peer(owner.export)
        held = Held(peer)
        first, second = memory.begin_pull(peer, [1], [0]), memory.begin_pull(peer, [2], [1])
        assert held.begun.wait(30)
        assert second.cancel() is PullState.CANCELLING
        held.go.set()
        assert (first.wait(30), second.wait(30)) == (PullState.DONE, PullState.CANCELLED)
        assert (as_bytes(memory)[1] == 0xEE).all()
        memory.close()


def test_closing_memory_ends_every_pull_first() -> None:
    """Nothing is unmapped or given back under a writer; the pull knows it was cancelled."""
    with owning(layout_of(64), 12) as owner:
        memory = target_memory(64, 6, "shm")
        peer = memory.open_peer(owner.export)
        held = Held(peer)
        pull = memory.begin_pull(peer, [1], [0])
        assert held.begun.wait(30)
        closing = threading.Thread(target=memory.close)
        closing.start()
        time.sleep(0.05)
        assert closing.is_alive() and not pull.settled
        held.go.set()
        closing.join(30)
        assert pull.settled and not closing.is_alive()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_shared_memory_of_a_frozen_or_dead_peer_is_still_there(end: str) -> None:
    """The reader copies: no peer's state can hold it up, and nothing of the peer's can write here later."""
    with owning(layout_of(64), 12) as owner:
        memory = target_memory(64, 6, "shm")
        peer = memory.open_peer(owner.export)
        getattr(owner, end)()
        assert memory.begin_pull(peer, [1, 2], [3, 4]).wait(30) is PullState.DONE
        assert torch.equal(as_bytes(memory)[[3, 4]], content(layout_of(64), 12, 7)[[1, 2]])
        peer.gone()
        with pytest.raises(WrongState):
            memory.begin_pull(peer, [1], [0])
        memory.close()


# --- which transport, and why ------------------------------------------------------------------------------------------------


def test_choice_is_a_value_with_its_reason() -> None:
    both = {"device": "cpu", "host": "a", "cards": (), "transports": {"shm": {}, "nixl": {}}}
    assert str(choose(both, both)) == "shm: both in this host's memory: the reader maps the pages and copies"
    far = choose(both, {**both, "host": "b"})
    assert far.transport == "nixl" and far.passed_over[0] == ("shm", "the peer is on another host, or sees another /dev/shm")
    assert choose(both, both, "nixl").transport == "nixl" and "forced" in str(choose(both, both, "nixl"))
    cards = {"device": "cuda", "host": "a", "cards": ("x",), "transports": {"cuda_ipc": {"card": "x"}, "nixl": {}}}
    assert choose(cards, cards).transport == "cuda_ipc"
    hidden = choose({**cards, "cards": ("y",)}, cards)
    assert hidden.transport == "nixl" and "card x is not visible" in str(hidden)
    assert choose({**cards, "transports": {"cuda_ipc": {}, "nixl": {}}}, both).transport == "nixl"


def test_no_way_between_two_memories_names_every_reason_and_what_to_install() -> None:
    local = {"device": "cpu", "host": "a", "cards": (), "transports": {"shm": {}}}
    with pytest.raises(TransportUnavailable) as caught:
        choose(local, {**local, "host": "b"})
    text = str(caught.value)
    assert "shm: the peer is on another host" in text and "nixl: not offered by this memory" in text and "kvmanager[nixl]" in text
    with pytest.raises(TransportUnavailable, match="carrier-pigeon: unknown"):
        choose(local, local, "carrier-pigeon")


def test_transport_that_cannot_be_had_here_is_named_at_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    nixl_transport.api.cache_clear()
    monkeypatch.setattr(nixl_transport.importlib, "import_module", missing)
    with pytest.raises(TransportUnavailable, match=r"transport nixl: not installed .*pip install 'kvmanager\[nixl\]'"):
        PageMemory(layout_of(16), 2, transports=("shm", "nixl"))
    assert nixl_transport.api.cache_info().currsize == 0
    with pytest.raises(TransportUnavailable, match="cuda_ipc: cpu memory moves by shm"):
        PageMemory(layout_of(16), 2, transports=("cuda_ipc",))
    for bad in ("shm", ("tcp",), (1,)):
        with pytest.raises(InvalidValue, match=r"^transports: "):
            PageMemory(layout_of(16), 2, transports=bad)  # type: ignore[arg-type]


# --- NIXL: what a frozen or dead peer can still do --------------------------------------------------------------------------

BIG = LatentLayout(512, 64, 8, 64)  # 590 kB a page
BIG_PAGES = 256  # 151 MB
OLD, NEW, MINE = 0xEE, 0x5A, 0xA5


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Owner, PageMemory, PeerMemory, Pull]]:
    """A pull by TCP that has begun to land when its peer is stopped, and then stands still."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    with owning(BIG, BIG_PAGES, seed=-NEW, transports=("nixl",)) as owner:
        memory = PageMemory(BIG, 2 * BIG_PAGES, transports=("nixl",))
        as_bytes(memory).fill_(OLD)
        peer = memory.open_peer(owner.export)
        assert memory.begin_pull(peer, [0], [2 * BIG_PAGES - 1]).wait(60) is PullState.DONE  # connected
        pull = memory.begin_pull(peer, range(BIG_PAGES), range(BIG_PAGES))
        flat = memory.pages.view(torch.uint8).view(-1)
        until = time.monotonic() + 60
        while not (flat[::65536] == NEW).any() and time.monotonic() < until:
            pass
        owner.stop()
        time.sleep(0.3)
        assert pull.poll() is PullState.RUNNING, "the pull was over before its peer could be stopped"
        yield owner, memory, peer, pull
        memory.close()


def landed(memory: PageMemory, value: int = NEW) -> int:
    return int((as_bytes(memory)[:BIG_PAGES] == value).sum())


@needs_room
@needs_nixl
def test_frozen_peer_s_late_writes_land_in_quarantined_pages_only(
    frozen: tuple[Owner, PageMemory, PeerMemory, Pull], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a grace longer than the freeze: while the pull has not settled nothing may be reused, and rightly so - the woken peer does write there."""
    owner, memory, peer, pull = frozen
    monkeypatch.setattr(nixl_transport, "GRACE_S", 600.0)
    assert pull.cancel() is PullState.CANCELLING
    assert pull.wait(0.5) is PullState.CANCELLING and not pull.settled
    with pytest.raises(WrongState, match="expected free of transfers"):
        memory.begin_pull(peer, [0], [3])
    before = landed(memory)
    owner.wake()
    assert pull.wait(60) is PullState.CANCELLED
    assert landed(memory) > before, "nothing landed after the cancel: this test would not notice a missing quarantine"
    assert (as_bytes(memory)[BIG_PAGES : 2 * BIG_PAGES - 1] == OLD).all()
    as_bytes(memory)[:BIG_PAGES] = MINE  # settled: somebody else's now
    time.sleep(1.0)
    assert landed(memory, MINE) == BIG_PAGES * BIG.page_bytes


@needs_room
@needs_nixl
@pytest.mark.parametrize("fence", ["grace", "gone", "close"])
def test_settled_pull_of_a_peer_that_wakes_later_writes_nothing(
    frozen: tuple[Owner, PageMemory, PeerMemory, Pull], fence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounded in time although the peer never answers: the reader's agent for this peer is destroyed before the pull is settled."""
    owner, memory, peer, pull = frozen
    began = time.monotonic()
    if fence == "grace":
        assert pull.cancel() is PullState.CANCELLING
        assert pull.wait(10) is PullState.CANCELLED
    else:
        getattr(peer, fence)()
        assert pull.state is (PullState.FAILED if fence == "gone" else PullState.CANCELLED)
    took = time.monotonic() - began
    assert (0 if fence == "gone" else 0.9 * nixl_transport.GRACE_S) < took < nixl_transport.GRACE_S + 3
    as_bytes(memory)[:BIG_PAGES] = MINE  # settled: somebody else's now
    owner.wake()
    time.sleep(1.5)
    assert landed(memory, MINE) == BIG_PAGES * BIG.page_bytes


@needs_room
@needs_nixl
def test_other_peers_go_on_while_one_is_fenced(frozen: tuple[Owner, PageMemory, PeerMemory, Pull]) -> None:
    _, memory, _, pull = frozen
    with owning(BIG, 4, seed=-0x33, transports=("nixl",)) as other:
        second = memory.open_peer(other.export)
        pull.cancel()
        for target in (BIG_PAGES, BIG_PAGES + 1):
            assert memory.begin_pull(second, [1], [target]).wait(60) is PullState.DONE
            assert (as_bytes(memory)[target] == 0x33).all()
            assert pull.wait(10) is PullState.CANCELLED
        assert other.sums([1]).shape == (1,)


@needs_room
@needs_nixl
@pytest.mark.parametrize("tls", ["tcp", "all"])
def test_reader_that_leaves_in_the_middle_of_a_pull_does_not_harm_its_source(tls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX aborts a source that is answering over TCP when the reader's agent goes: closing waits for what is under way."""
    monkeypatch.setenv("UCX_TLS", tls)
    with owning(BIG, BIG_PAGES, seed=-NEW, transports=("nixl",)) as owner:
        for _ in range(2):
            memory = PageMemory(BIG, BIG_PAGES, transports=("nixl",))
            peer = memory.open_peer(owner.export)
            assert memory.begin_pull(peer, [0], [1]).wait(60) is PullState.DONE
            pull = memory.begin_pull(peer, range(BIG_PAGES), range(BIG_PAGES))
            time.sleep(0.02)
            peer.close()
            assert pull.settled
            memory.close()
        time.sleep(0.3)
        assert owner.sums([1]).shape == (1,)


@needs_room
@needs_nixl
@pytest.mark.parametrize("tls", ["tcp", "all"])
def test_peer_that_dies_fails_the_pull_within_a_bounded_time(tls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the pull runs (TCP) or before it: an error, no hang, and nothing lands afterwards."""
    monkeypatch.setenv("UCX_TLS", tls)
    with owning(BIG, BIG_PAGES, seed=-NEW, transports=("nixl",)) as owner:
        memory = PageMemory(BIG, BIG_PAGES, transports=("nixl",))
        as_bytes(memory).fill_(OLD)
        peer = memory.open_peer(owner.export)
        assert memory.begin_pull(peer, [0], [1]).wait(60) is PullState.DONE
        if tls == "tcp":
            pull = memory.begin_pull(peer, range(BIG_PAGES), range(BIG_PAGES))
            owner.kill()
        else:
            owner.kill()
            pull = memory.begin_pull(peer, range(BIG_PAGES), range(BIG_PAGES))
        assert pull.wait(20) is PullState.FAILED
        with pytest.raises(PullFailed):
            pull.result()
        as_bytes(memory).fill_(MINE)
        time.sleep(0.5)
        assert landed(memory, MINE) == BIG_PAGES * BIG.page_bytes
        memory.close()


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace joined to ours by one virtual cable: kvm0 here, kvm1 there. Skipped where that is not allowed."""
    name = f"kvmanager-{os.getpid()}"
    commands = [
        f"ip netns add {name}", f"ip link add kvm0 type veth peer name kvm1 netns {name}", "ip addr add 10.213.77.1/30 dev kvm0", "ip link set kvm0 up",
        f"ip -n {name} addr add 10.213.77.2/30 dev kvm1", f"ip -n {name} link set kvm1 up", f"ip -n {name} link set lo up",
    ]  # fmt: skip
    if shutil.which("ip") is None:
        pytest.skip("needs the program ip")
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"{command}: {done.stderr.strip()}")
        yield name
    finally:
        subprocess.run(["ip", "link", "del", "kvm0"], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@needs_nixl
def test_pages_cross_from_one_network_namespace_to_another(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts, as far as sockets can tell: nothing but the cable joins them, and it carries the pages."""

    def received() -> int:
        with open("/sys/class/net/kvm0/statistics/rx_bytes") as file:
            return int(file.read())

    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setenv("UCX_NET_DEVICES", "kvm1")
    with owning(layout_of(64), 12, transports=("nixl",), namespace=namespace) as owner:
        monkeypatch.setenv("UCX_NET_DEVICES", "kvm0")
        memory = target_memory(16, 48, "nixl")
        peer = memory.open_peer(owner.export)
        before = received()
        src, dst = [7, 3, 11], [5, 9, 1, 0, 40, 44, 20, 21, 22, 30, 31, 3]
        pull = memory.begin_pull(peer, src, dst, expected=owner.sums(src))
        assert pull.wait(60) is PullState.DONE, pull.error
        want = torch.full(as_bytes(memory).shape, 0xEE, dtype=torch.uint8)
        moved(content(layout_of(64), 12, 7), want, src, dst, 192, (0, 0), (0, LAYERS))
        assert torch.equal(as_bytes(memory), want)
        assert received() - before > 3 * layout_of(64).page_bytes
        memory.close()


@needs_nixl
def test_announcement_that_was_changed_on_the_way_is_refused() -> None:
    """Every byte of the metadata: a mutated blob can abort the process that loads it, so it must not get that far."""
    theirs, ours = PageMemory(layout_of(16), 2, transports=("nixl",)), PageMemory(layout_of(16), 2, transports=("nixl",))
    export = theirs.export()
    fields = export["transports"]["nixl"]
    assert len(fields["metadata"]) <= nixl_transport.METADATA_BYTES_MAX
    for index in range(0, len(fields["metadata"]), 7):
        blob = bytearray(fields["metadata"])
        blob[index] ^= 0xFF
        with pytest.raises(InvalidValue, match=r"^metadata: "):
            ours.open_peer({**export, "transports": {"nixl": {**fields, "metadata": bytes(blob)}}})
    bad: list[dict[str, Any]] = [
        {"metadata": b"x" * (nixl_transport.METADATA_BYTES_MAX + 1)}, {"metadata": "text"}, {"address": 0}, {"address": -1}, {"address": 2**63},
        {"device": 1024}, {"device": None}, {"digest": 5},
    ]  # fmt: skip
    for change in bad:
        with pytest.raises(KVError):
            ours.open_peer({**export, "transports": {"nixl": {**fields, **change}}})
    ours.close()
    theirs.close()


@needs_nixl
def test_address_outside_the_peer_s_memory_fails_the_pull() -> None:
    """An address is an integer off the wire: the library refuses what the peer did not register."""
    with owning(layout_of(64), 4, transports=("nixl",)) as owner:
        memory = target_memory(64, 4, "nixl")
        fields = owner.export["transports"]["nixl"]
        export = {**owner.export, "transports": {"nixl": {**fields, "address": fields["address"] + (1 << 30)}}}
        assert memory.begin_pull(memory.open_peer(export), [0], [0]).wait(30) is PullState.FAILED
        assert (as_bytes(memory) == 0xEE).all()
        memory.close()


@needs_nixl
def test_idle_memory_costs_no_processor_time() -> None:
    """NIXL's own Python wrapper has an idle agent's thread spin."""
    memory = PageMemory(layout_of(16), 2, transports=("nixl",))
    time.sleep(0.2)
    before = os.times()
    time.sleep(1.0)
    after = os.times()
    memory.close()
    assert after.user + after.system - before.user - before.system < 0.2
