"""Page memory, and pulling pages from another process through shared memory."""

import dataclasses
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import msgpack
import pytest
import torch

from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.memory import PageMemory
from kvmanager.errors import InvalidValue, KVError, LayoutMismatch, NoConversion, WrongState

LAYOUT = LatentLayout(32, 16, 3, 16, "float16")


def segment_of(export: dict[str, Any]) -> str:
    return f"/dev/shm/{export['transports']['shm']['name']}"


def owner(pipe: Connection) -> None:
    """A process that owns pages (page p holds p everywhere) until told to close them."""
    memory = PageMemory(LAYOUT, 20)
    memory.pages.copy_(torch.arange(20).view(20, 1, 1, 1).expand(memory.pages.shape))
    pipe.send(memory.export())
    pipe.recv()
    memory.close()
    pipe.send("closed")
    pipe.recv()


def reader(export: dict[str, Any]) -> None:
    memory = PageMemory(LAYOUT, 2)
    peer = memory.open_peer(export)
    memory.pull(peer, [1], [0])
    os._exit(0 if bool((memory.pages[0] == 1).all()) else 1)


@pytest.fixture
def remote() -> Iterator[tuple[Any, Connection, dict[str, Any]]]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=owner, args=(there,), daemon=True)
    process.start()
    assert here.poll(60)
    yield process, here, here.recv()
    process.kill()
    process.join()


def test_pull_brings_exactly_the_pages_asked_for(remote: tuple[Any, Connection, dict[str, Any]]) -> None:
    """All layers of each page, in the order given; every other page stays as it was. What crosses the pipe is plain ints, strings and bytes."""
    _, pipe, export = remote
    assert msgpack.unpackb(msgpack.packb(export)) == export and len(msgpack.packb(export)) < 1024
    memory = PageMemory(LAYOUT, 9)
    memory.pages.fill_(float("nan"))
    peer = memory.open_peer(export)
    memory.pull(peer, [19, 0, 7], [1, 8, 3])
    memory.pull(peer, [], [])
    for page, value in ((1, 19), (8, 0), (3, 7)):
        assert (memory.pages[page] == value).all()
    assert torch.isnan(memory.pages[[0, 2, 4, 5, 6, 7]]).all()
    pipe.send("close")
    assert pipe.recv() == "closed"
    memory.pull(peer, [5], [0])  # the mapping outlives the owner's close; whether the pages still mean anything is the manager's to know
    with pytest.raises(InvalidValue, match=r"^name: expected the shared memory of a live peer"):
        memory.open_peer(export)
    peer.close()
    with pytest.raises(WrongState):
        memory.pull(peer, [5], [0])


def test_reader_that_exits_does_not_take_the_owner_s_memory_with_it() -> None:
    """Python 3.11's SharedMemory registers what it merely attaches to, and unlinks it when the attaching process ends."""
    memory = PageMemory(LAYOUT, 4)
    memory.pages[1] = 1
    export = memory.export()
    process = multiprocessing.get_context("spawn").Process(target=reader, args=(export,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert os.path.exists(segment_of(export))
    reading = PageMemory(LAYOUT, 1)
    reading.open_peer(export).close()
    memory.close()
    memory.close()
    assert not os.path.exists(segment_of(export))


def test_segment_goes_when_the_memory_is_forgotten_and_views_stay_good() -> None:
    """A tensor taken from the pages holds the mapping; nobody else can open it any more."""
    memory = PageMemory(LAYOUT, 2)
    path, view = segment_of(memory.export()), memory.layer(1)
    view.fill_(3)
    assert oct(os.stat(path).st_mode & 0o777) == "0o600"
    del memory
    assert not os.path.exists(path)
    assert (view == 3).all()


def test_layer_is_a_strided_view_of_page_major_memory() -> None:
    memory = PageMemory(LAYOUT, 5)
    assert memory.pages.shape == (5, 3, 16, 48) and memory.pages.is_contiguous()
    assert memory.layer(2).shape == (5, 16, 48)
    assert memory.layer(2).stride() == (3 * 16 * 48, 48, 1)
    assert memory.pages.numel() * 2 == 5 * LAYOUT.page_bytes
    for bad in (-1, 3):
        with pytest.raises(InvalidValue, match=r"^layer: expected 0 to 2"):
            memory.layer(bad)


@pytest.mark.parametrize("num_pages", [0, -1, 2**31, 1.5, True, None])
def test_number_of_pages_is_bounded(num_pages: Any) -> None:
    with pytest.raises(InvalidValue, match=r"^num_pages: expected an integer from 1 to"):
        PageMemory(LAYOUT, num_pages)


def test_more_than_the_host_has_is_an_error_not_a_crash() -> None:
    """A sparse segment would give SIGBUS at the first touch."""
    with pytest.raises(InvalidValue, match=r"^num_pages: expected .* bytes to fit in /dev/shm"):
        PageMemory(LatentLayout(512, 64, 61), 2**21)
    assert [name for name in os.listdir("/dev/shm") if name.startswith("kvmanager-") and os.stat(f"/dev/shm/{name}").st_size > 2**40] == []


@pytest.mark.parametrize(
    "src,dst,field",
    [
        ([4], [0], "src_page_ids"), ([-1], [0], "src_page_ids"), ([0], [3], "dst_page_ids"), ([0], [2**40], "dst_page_ids"),
        ([0, 1], [0], "dst_page_ids"), ([0, 1], [2, 2], "dst_page_ids"), ([0.5], [0], "src_page_ids"), ([[0]], [0], "src_page_ids"),
    ],
)  # fmt: skip
def test_pull_refuses_ids_that_are_not_pages(src: Any, dst: Any, field: str) -> None:
    theirs, ours = PageMemory(LAYOUT, 4), PageMemory(LAYOUT, 3)
    peer = ours.open_peer(theirs.export())
    with pytest.raises(InvalidValue, match=f"^{field}: "):
        ours.pull(peer, src, dst)


def test_other_layout_is_refused() -> None:
    """Also one of equal size that lists k_pe in another order."""
    theirs, ours = PageMemory(LAYOUT, 2), PageMemory(LatentLayout(32, 16, 3, 16, "float16", "half"), 2)
    with pytest.raises(LayoutMismatch):
        ours.open_peer(theirs.export())
    other = PageMemory(LAYOUT, 2)
    with pytest.raises(InvalidValue, match=r"^peer: expected a peer that this memory opened"):
        other.pull(PageMemory(LAYOUT, 2).open_peer(theirs.export()), [0], [0])


FP8 = [LatentLayout(512, 64, 2, 16, "fp8_ds_mla"), LatentLayout(48, 16, 2, 16, "float8_e4m3fn", scales=(0.5, 0.25))]


@pytest.mark.parametrize("layout", FP8, ids=lambda layout: layout.dtype)
def test_pages_of_eight_bits_are_exported_pulled_and_copied_byte_for_byte(layout: LatentLayout) -> None:
    """Every byte pattern is kept, those that are no numbers too."""
    theirs, ours = PageMemory(layout, 5), PageMemory(layout, 4)
    for memory in (theirs, ours):
        memory.pages.view(torch.uint8).copy_(torch.randint(0, 256, memory.pages.view(torch.uint8).shape, dtype=torch.uint8))
    want = ours.pages.view(torch.uint8).clone()
    ours.pull(ours.open_peer(theirs.export()), [4, 1], [0, 2], expected=theirs.checksums([4, 1]))
    want[[0, 2]] = theirs.pages.view(torch.uint8)[[4, 1]]
    ours.copy_pages([0], [3], [7])
    want[3, :, :7] = want[0, :, :7]
    assert torch.equal(ours.pages.view(torch.uint8), want)
    assert theirs.export()["bytes"] == theirs.pages.view(torch.uint8).numel() == 5 * layout.page_bytes
    assert ours.layer(1).shape == (4, 16, layout.storage_width)


def test_other_formats_and_scales_are_refused_by_name() -> None:
    """The same bytes a page, other numbers: the error says which formats met."""
    layout = FP8[1]
    other = dataclasses.replace(layout, scales=(0.5, 0.5))
    memory = PageMemory(layout, 2)
    with pytest.raises(NoConversion, match=f"stores or converts {layout.format}, got one of {other.format}"):
        PageMemory(other, 2).open_peer(memory.export())


@pytest.mark.parametrize(
    "change",
    [
        {"bytes": 1}, {"bytes": 2**60}, {"format": 5}, {"format": "bfloat16"}, {"num_pages": 0}, {"num_pages": -1}, {"num_pages": 3}, {"num_pages": True}, {"content": 5},
        {"num_pages": 4, "bytes": 4 * LAYOUT.page_bytes}, {"page_size": 32}, {"page_size": 17}, {"page_size": None}, {"device": "cuda"}, {"device": 1},
        {"host": "elsewhere"}, {"host": b"x"}, {"transports": {}}, {"transports": None}, {"transports": {"shm": 1}}, {"transports": {"tcp": {}}},
        *({"transports": {"shm": {"name": name}}} for name in ("../etc/passwd", "kvmanager-", b"x", None, "kvmanager-" + "0" * 32, "x" * 999)),
        {"transports": {"cuda_ipc": {}}},
    ],
    ids=str,
)  # fmt: skip
def test_export_from_the_wire_is_checked_field_by_field(change: dict[str, Any]) -> None:
    """A peer's message must not open another file, allocate by its own integer, or crash."""
    memory = PageMemory(LAYOUT, 2)
    with pytest.raises(KVError):
        memory.open_peer({**memory.export(), **change})
    for name in memory.export():
        with pytest.raises(KVError):
            memory.open_peer({key: value for key, value in memory.export().items() if key != name})


def test_unknown_device_and_closed_memory_are_refused() -> None:
    with pytest.raises(InvalidValue, match=r"^device: "):
        PageMemory(LAYOUT, 2, "meta")
    memory = PageMemory(LAYOUT, 2)
    memory.close()
    with pytest.raises(WrongState):
        memory.export()


def test_copy_takes_the_leading_slots_of_all_layers() -> None:
    """What forked and truncated sequences ask for; everything else stays as it was, padding does nothing."""
    memory = PageMemory(LAYOUT, 9)
    memory.pages.copy_(torch.randn(memory.pages.shape))
    want = memory.pages.clone()
    want[4, :, :5] = want[0, :, :5]
    want[5, :, :16] = want[0, :, :16]
    memory.copy_pages([0, 0, 1, -1, 1], [4, 5, 6, 7, -1], [5, 16, 0, 3, 3])
    assert torch.equal(memory.pages, want)
    memory.copy_pages([], [], [])
    memory.close()
    with pytest.raises(WrongState):
        memory.copy_pages([0], [1], [1])


@pytest.mark.parametrize(
    ("source", "target", "tokens"),
    [
        ([0], [9], [1]),
        ([-2], [1], [1]),
        ([0], [1], [17]),
        ([0], [1], [-1]),
        ([0, 1], [2, 2], [1, 1]),
        ([0, 1], [1, 2], [1, 1]),
        ([0], [1, 2], [1]),
    ],
)
def test_copies_that_no_step_asks_for_are_refused(source: list[int], target: list[int], tokens: list[int]) -> None:
    memory = PageMemory(LAYOUT, 9)
    with pytest.raises(InvalidValue):
        memory.copy_pages(source, target, tokens)
    memory.close()
