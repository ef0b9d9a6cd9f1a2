"""The table of docs/handoff.md: each fault of a handoff with real processes, SIGKILL and SIGSTOP.

In every one of them: the request is told what comes of it within 5 s after the fault is known, it is retried elsewhere or refused with a
reason; its bytes are its own; no page is given to anybody while somebody might still write it; the bystanders decode on; and in the end
every page is free or cached. Workers read all of a sequence before they write it and end themselves if a slot is not its own.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from kvmanager.errors import KVError, OutOfPages, Unknown, WrongState
from tests.handoff.conftest import BOUND_S, PAGE, TIMEOUT_MS, Fleet

MakeFleet = Callable[..., Fleet]
LENGTH = 3 * PAGE + 5  # four pages


def moving(fleet: Fleet, gate: str = "pull.1", group: str = "") -> tuple[int, int]:
    """(sequence, handoff): prefilled in P, on its way to D, whose worker has come as far as the gate."""
    fleet.shut("D0", gate)
    sequence = fleet.open("P", LENGTH)
    handoff = fleet.kv.hand_off(sequence, "" if group else "D", group=group)
    fleet.reached("D0", gate)
    return sequence, handoff


def again(fleet: Fleet, pool: str, target: str) -> None:
    """The request is computed anew and handed over: what is retried elsewhere succeeds."""
    sequence = fleet.open(pool, LENGTH)
    fleet.kv.hand_off(sequence, target)
    fleet.hear(sequence, "resident")
    fleet.check(sequence, target)


@pytest.mark.parametrize("when", ["before-sealing", "while-sealing", "after-sealing"])
def test_prefill_worker_dies(make_fleet: MakeFleet, when: str) -> None:
    fleet = make_fleet(P=24, P2=24, D=24)
    if when == "after-sealing":
        sequence, handoff = moving(fleet)
    else:
        point = "write" if when == "before-sealing" else "written"
        fleet.shut("P0", point)
        sequence = fleet.open("P", LENGTH)
        handoff = fleet.kv.hand_off(sequence, "D")
        fleet.reached("P0", point)
    known = fleet.kill("P0")
    notice = fleet.hear(sequence, "aborted", known)
    assert (notice.handoff, notice.code) == (handoff, "lost")
    fleet.hear(sequence, "lost", known)
    if when == "after-sealing":
        assert fleet.kv.stats()["pools"]["P"]["pages"]["used"] == 4  # D's worker may be reading: held until it has heard of the end
        fleet.open_gate("D0", "pull.1")
    again(fleet, "P2", "D")
    fleet.at_rest()


@pytest.mark.parametrize("when", ["before-pulling", "while-pulling", "after-pulling", "when-resident"])
def test_decode_worker_dies(make_fleet: MakeFleet, when: str) -> None:
    """Until it is resident the sequence is where it was, and the manager itself sends it to the next pool of the group."""
    fleet = make_fleet(P=24, D=24, E=24)
    gate = {"before-pulling": "pull.0", "while-pulling": "pull.2", "after-pulling": "pulled", "when-resident": "pull.0"}[when]
    sequence, handoff = moving(fleet, gate, group="decode")
    if when == "when-resident":
        fleet.open_gate("D0", gate)
        fleet.hear(sequence, "resident")
        known = fleet.kill("D0")
        assert fleet.hear(sequence, "lost", known).code == "lost"
        again(fleet, "P", "E")
    else:
        known = fleet.kill("D0")
        assert fleet.hear(sequence, "aborted", known).handoff == handoff
        assert fleet.hear(sequence, "moving", known).reason == "E"
        fleet.hear(sequence, "resident", known)
        fleet.check(sequence, "E")
    fleet.at_rest()


@pytest.mark.parametrize("when", ["sealing", "moving"])
def test_both_workers_die(make_fleet: MakeFleet, when: str) -> None:
    fleet = make_fleet(P=24, P2=24, D=24, E=24)
    if when == "moving":
        sequence, _ = moving(fleet, group="decode")
    else:
        fleet.shut("P0", "written")
        sequence = fleet.open("P", LENGTH)
        fleet.kv.hand_off(sequence, group="decode")
        fleet.reached("P0", "written")
    known = fleet.kill(
        "P0", "D0"
    )  # heard of the other way round, the sequence may have been saved by a third before its source is known dead
    fleet.hear(sequence, "aborted", known)
    fleet.hear(sequence, "lost", known)
    again(fleet, "P2", "E")
    fleet.at_rest()


@pytest.mark.parametrize("state", ["prefilling", "reserved", "reserving", "moving", "aborted", "resident"])
def test_manager_dies(make_fleet: MakeFleet, state: str) -> None:
    """SIGKILL in each state; the next one goes on from the journal, and nobody else has to end for it."""
    fleet = make_fleet(P=24, D=10)
    blocker = 0
    if state in ("prefilling", "reserved"):
        fleet.shut("P0", "write")
        sequence = fleet.open("P", LENGTH, chunk=LENGTH)
        handoff = fleet.kv.hand_off(sequence, "D", reserve=state == "reserved")
        fleet.reached("P0", "write")
        expected = "prefilling"
    elif state == "reserving":
        blocker = fleet.open("D", 8 * PAGE)
        sequence = fleet.open("P", LENGTH)
        handoff, expected = fleet.kv.hand_off(sequence, "D"), "reserving"
        fleet.is_at(handoff, "reserving")
    else:
        sequence, handoff = moving(fleet)
        expected = {"moving": "moving", "aborted": "aborted", "resident": "over"}[state]
        if state == "aborted":
            fleet.kv.abort(handoff)
        elif state == "resident":
            fleet.open_gate("D0", "pull.1")
            fleet.hear(sequence, "resident")
    assert fleet.handoff_state(handoff) == expected
    fleet.kill_manager()
    assert fleet.handoff_state(handoff) == expected
    if state in ("prefilling", "reserved"):
        fleet.open_gate("P0", "write")
    elif state == "reserving":
        fleet.kv.close(blocker)
    elif state in ("moving", "aborted"):
        fleet.open_gate("D0", "pull.1")
    if state == "aborted":
        fleet.is_at(handoff, "over")
        fleet.check(sequence, "P")
    else:
        fleet.hear(sequence, "resident")
        fleet.check(sequence, "D")
    fleet.at_rest()


def test_pull_hangs_because_the_puller_is_stopped(make_fleet: MakeFleet) -> None:
    """It is aborted in bounded time and goes elsewhere. What the stopped one writes when it wakes lands in pages that nobody has."""
    fleet = make_fleet(P=24, D=24, E=24)
    sequence, handoff = moving(fleet, group="decode")
    pages = fleet.state.handoffs[handoff].target_pages
    fleet.bystanders.pop("D")
    fleet.signal("D0", signal.SIGSTOP)
    known = time.monotonic() + TIMEOUT_MS / 1000
    notice = fleet.hear(sequence, "aborted", known)
    assert notice.code == "timed_out" and "not pulled by D0" in notice.reason
    fleet.hear(sequence, "resident", known)
    fleet.check(sequence, "E")
    fleet.until(lambda: fleet.kv.stats()["pools"]["D"]["fenced"], "its lease ends")
    state = fleet.state.pool("D")
    held = [page for entry in state.quarantine.values() for page in entry.pages.tolist()]
    assert set(pages) <= set(held) and not set(pages) & set(state.free.array().tolist())
    fleet.open_gate("D0", "pull.1")
    fleet.signal("D0", signal.SIGCONT)  # it writes on, hears that its word is void, and ends itself
    fleet.reap("D0")
    fleet.at_rest()


def test_pull_hangs_while_everybody_lives(make_fleet: MakeFleet) -> None:
    """A transfer that never ends: the worker renews its lease all the time. Its pages stay held for as long as the transfer may write."""
    fleet = make_fleet(P=24, D=24, E=24)
    sequence, handoff = moving(fleet, group="decode")
    pages = fleet.state.handoffs[handoff].target_pages
    known = time.monotonic() + TIMEOUT_MS / 1000
    assert fleet.hear(sequence, "aborted", known).code == "timed_out"
    fleet.hear(sequence, "resident", known)
    fleet.check(sequence, "E")
    until = time.monotonic() + 2
    while time.monotonic() < until:
        fleet.turn()
        assert not set(pages) & set(fleet.state.pool("D").free.array().tolist())
    assert not fleet.kv.stats()["pools"]["D"]["fenced"]
    fleet.open_gate("D0", "pull.1")
    fleet.until(lambda: set(pages) <= set(fleet.state.pool("D").free.array().tolist()), "its pages come home")
    fleet.at_rest()


@pytest.mark.parametrize("when", ["before-sealing", "while-moving"])
def test_source_is_stopped(make_fleet: MakeFleet, when: str) -> None:
    """Unsealed, its lease ends and the sequence with it. Sealed, nobody needs it any more: a pull is one-sided."""
    fleet = make_fleet(P=24, P2=24, D=24)
    fleet.bystanders.pop("P")
    if when == "while-moving":
        sequence, _ = moving(fleet)
        fleet.signal("P0", signal.SIGSTOP)
        fleet.open_gate("D0", "pull.1")
        fleet.hear(sequence, "resident")
        fleet.check(sequence, "D")
    else:
        fleet.shut("P0", "written")
        sequence = fleet.open("P", LENGTH)
        fleet.kv.hand_off(sequence, "D")
        fleet.reached("P0", "written")
        fleet.signal("P0", signal.SIGSTOP)
        fleet.hear(sequence, "aborted", time.monotonic())
        fleet.hear(sequence, "lost")
        again(fleet, "P2", "D")
        fleet.open_gate("P0", "written")
    fleet.until(lambda: fleet.kv.stats()["pools"]["P"]["fenced"], "its lease ends")
    fleet.signal("P0", signal.SIGCONT)
    fleet.reap("P0")
    fleet.at_rest()


@pytest.mark.parametrize("stream", [False, True], ids=["not-streamed", "streamed"])
def test_source_gets_on_with_nothing(make_fleet: MakeFleet, stream: bool) -> None:
    """It lives, renews its lease and says again what it has said: the request is told in bounded time who has not written it, and goes elsewhere."""
    fleet = make_fleet(P=24, P2=24, D=24, bounds={"handoff_prefill_ms": TIMEOUT_MS})
    sequence = fleet.open("P", LENGTH, chunk=2 * PAGE)
    handoff = fleet.kv.hand_off(sequence, "D", reserve=True, stream=stream)
    worker, epoch, _ = fleet.joined("P0")
    fleet.until(lambda: min(fleet.state.sequences[sequence].written.values(), default=0) == 2 * PAGE, "half of it is written")
    fleet.bystanders.pop("P")
    fleet.shut("P0", "write")
    fleet.kv.grow(sequence, LENGTH - 2 * PAGE)
    known = time.monotonic() + TIMEOUT_MS / 1000
    while not fleet.news(sequence, "aborted"):
        assert time.monotonic() - known < BOUND_S
        fleet.kv.ack(worker, 0, ids=[sequence], tokens=[2 * PAGE], epoch=epoch)
        fleet.turn()
        time.sleep(0.02)
    notice = fleet.hear(sequence, "aborted", known)
    assert (notice.handoff, notice.code) == (handoff, "stalled")
    assert notice.reason.endswith(f"not written by P0, {2 * PAGE} of {LENGTH} tokens are")
    fleet.kv.close(sequence)
    again(fleet, "P2", "D")
    fleet.open_gate("P0", "write")
    fleet.at_rest()


def streaming(fleet: Fleet, group: str = "") -> tuple[int, int]:
    """(sequence, handoff): half of it is written, and D's worker is in the middle of pulling that; nothing is sealed."""
    fleet.shut("D0", "pull.1")
    sequence = fleet.open("P", LENGTH, chunk=2 * PAGE)
    handoff = fleet.kv.hand_off(sequence, "" if group else "D", group=group, reserve=True, stream=True)
    fleet.reached("D0", "pull.1")
    assert fleet.handoff_state(handoff) == "prefilling"
    return sequence, handoff


def compute_the_rest(fleet: Fleet, sequence: int) -> None:
    def grown() -> bool:
        try:
            fleet.kv.grow(sequence, LENGTH - 2 * PAGE)
        except OutOfPages:  # after a restart, until everybody has heard of it
            return False
        return True

    fleet.until(grown, "the rest is computed")


@pytest.mark.parametrize("what", ["prefill-worker-killed", "decode-worker-killed", "manager-killed", "aborted", "nothing"])
def test_streamed_handoff(make_fleet: MakeFleet, what: str) -> None:
    """Reserved pages that an early pull writes are nobody's until it has ended; and what was pulled early is what was written."""
    fleet = make_fleet(P=24, P2=24, D=24, E=24)
    sequence, handoff = streaming(fleet, "decode" if what == "decode-worker-killed" else "")
    if what == "prefill-worker-killed":
        known = fleet.kill("P0")
        assert fleet.hear(sequence, "aborted", known).code == "lost"
        fleet.hear(sequence, "lost", known)
    elif what == "decode-worker-killed":
        known = fleet.kill("D0")
        assert fleet.hear(sequence, "aborted", known).handoff == handoff
        assert fleet.hear(sequence, "moving", known).reason == "E"
        compute_the_rest(fleet, sequence)
        fleet.hear(sequence, "resident")
        fleet.check(sequence, "E")
    elif what == "aborted":
        fleet.kv.abort(handoff)
        assert fleet.hear(sequence, "aborted", time.monotonic()).code == "asked"
    elif what == "manager-killed":
        fleet.kill_manager()
    if what in ("prefill-worker-killed", "aborted"):
        for _ in range(10):
            fleet.turn()
            assert fleet.kv.stats()["pools"]["D"]["pages"]["quarantined"] >= 4
        fleet.open_gate("D0", "pull.1")
        if what == "aborted":
            compute_the_rest(fleet, sequence)
            fleet.check(sequence, "P")
        again(fleet, "P2", "D")
    elif what != "decode-worker-killed":
        fleet.open_gate("D0", "pull.1")
        compute_the_rest(fleet, sequence)
        fleet.hear(sequence, "resident")
        fleet.check(sequence, "D")
    fleet.at_rest()


@pytest.mark.parametrize("what", ["prefill-worker-killed", "checksum-mismatch", "manager-killed", "aborted", "puller-hangs", "nothing"])
def test_decode_step_that_was_begun_early(make_fleet: MakeFleet, what: str) -> None:
    """Between two groups of layers, the first of which it has written and read: its result is thrown away with the pull, or it is taken."""
    bounds = {} if what == "puller-hangs" else {"handoff_timeout_ms": 20_000}
    fleet = make_fleet(bounds=bounds, by_layers=True, P=24, P2=24, D=24, E=24)
    fleet.shut("D0", "layers.1")
    sequence = fleet.open("P", LENGTH)
    handoff = fleet.kv.hand_off(sequence, "" if what == "puller-hangs" else "D", group="decode" if what == "puller-hangs" else "")
    fleet.run_ahead("D0", handoff, sequence)
    fleet.reached("D0", "layers.1")
    fleet.until(lambda: fleet.said("D0", "ran.0"), "layer 0 has been computed")
    pages = fleet.state.handoffs[handoff].target_pages
    assert not fleet.said("D0", "ran.1") and fleet.handoff_state(handoff) == "moving"
    if what == "prefill-worker-killed":
        known = fleet.kill("P0")
        assert fleet.hear(sequence, "aborted", known).code == "lost"
        fleet.hear(sequence, "lost", known)
    elif what == "checksum-mismatch":
        (fleet.folder / "D0.spoil").write_text("1")
    elif what == "manager-killed":
        fleet.kill_manager()
    elif what == "aborted":
        fleet.kv.abort(handoff)
        assert fleet.hear(sequence, "aborted", time.monotonic()).code == "asked"
    elif what == "puller-hangs":
        known = time.monotonic() + TIMEOUT_MS / 1000
        assert fleet.hear(sequence, "aborted", known).code == "timed_out"
        fleet.hear(sequence, "resident", known)
    if what in ("prefill-worker-killed", "aborted", "puller-hangs"):
        fleet.until(lambda: fleet.said("D0", "dropped"), "it is thrown away")
        for _ in range(5):
            fleet.turn()
            assert not set(pages) & set(fleet.state.pool("D").free.array().tolist())  # the pull has not ended
    fleet.open_gate("D0", "layers.1")
    if what == "prefill-worker-killed":
        again(fleet, "P2", "D")
    elif what == "aborted":
        fleet.check(sequence, "P")
    elif what == "puller-hangs":
        fleet.check(sequence, "E")
    else:
        fleet.hear(sequence, "resident")
        fleet.check(sequence, "D")
    assert fleet.said("D0", "took") == (what in ("manager-killed", "nothing"))
    assert fleet.said("D0", "dropped") == (what not in ("manager-killed", "nothing"))
    fleet.at_rest()


@pytest.mark.parametrize("what", ["killed", "goes-on", "closed-by-its-client"])
def test_source_between_two_groups_of_layers(make_fleet: MakeFleet, what: str) -> None:
    """Layer 0 of a step that still runs is on the target already. If the source dies there, nothing of it is ever the sequence's."""
    fleet = make_fleet(P=24, P2=24, D=24)
    fleet.shut("P0", "wrote.0")
    sequence = fleet.open("P", LENGTH, chunk=0)
    handoff = fleet.kv.hand_off(sequence, "D", reserve=True, stream=True)
    fleet.bystanders.pop("P")
    fleet.kv.grow(sequence, LENGTH)
    fleet.reached("P0", "wrote.0")
    fleet.until(lambda: fleet.said("D0", "early.0"), "layer 0 is pulled")
    assert fleet.handoff_state(handoff) == "prefilling" and fleet.kv.stats()["pools"]["P"]["pages"]["used"] >= 4
    if what == "killed":
        known = fleet.kill("P0")
        assert fleet.hear(sequence, "aborted", known).code == "lost"
        fleet.hear(sequence, "lost", known)
        again(fleet, "P2", "D")
    else:
        if what == "closed-by-its-client":
            fleet.kv.close(sequence)
        fleet.open_gate("P0", "wrote.0")
        if what == "goes-on":
            fleet.hear(sequence, "resident")
            fleet.check(sequence, "D")
    fleet.at_rest()


@pytest.mark.parametrize("when", ["after-the-abort", "twice", "of-an-older-handoff"])
def test_completion_comes_late(make_fleet: MakeFleet, when: str) -> None:
    fleet = make_fleet(P=24, D=24)
    sequence, handoff = moving(fleet, "pulled")
    worker, epoch, _ = fleet.joined("D0")

    def report(*handoffs: int) -> None:
        fleet.kv.ack(worker, 0, pulled=list(handoffs), epoch=epoch)

    if when == "twice":
        fleet.open_gate("D0", "pulled")
        fleet.hear(sequence, "resident")
        for _ in range(2):
            report(handoff)
        assert len(fleet.news(sequence, "resident")) == 1
        fleet.check(sequence, "D")
    else:
        fleet.kv.abort(handoff)
        report(handoff)
        assert fleet.place(sequence) == "P"
        second = 0
        if when == "of-an-older-handoff":
            fleet.open_gate("D0", "pulled")
            fleet.is_at(handoff, "over")
            (fleet.folder / "D0.pulled.reached").unlink()
            fleet.shut("D0", "pulled")
            second = fleet.kv.hand_off(sequence, "D")
            fleet.reached("D0", "pulled")
            report(handoff)
            assert fleet.handoff_state(second) == "moving" and fleet.place(sequence) == "P"
        fleet.open_gate("D0", "pulled")
        if second:
            fleet.hear(sequence, "resident")
        fleet.check(sequence, "D" if second else "P")
    fleet.at_rest()


@pytest.mark.parametrize("state", ["prefilling", "reserved", "reserving", "moving", "copied"])
def test_client_aborts(make_fleet: MakeFleet, state: str) -> None:
    """The sequence is where it was, whole; it can be handed over again."""
    fleet = make_fleet(P=24, D=14)
    blocker = 0
    if state in ("prefilling", "reserved"):
        fleet.shut("P0", "write")
        sequence = fleet.open("P", LENGTH)
        handoff = fleet.kv.hand_off(sequence, "D", reserve=state == "reserved")
        fleet.reached("P0", "write")
    elif state == "reserving":
        blocker = fleet.open("D", 12 * PAGE)
        sequence = fleet.open("P", LENGTH)
        handoff = fleet.kv.hand_off(sequence, "D")
        fleet.is_at(handoff, "reserving")
    else:
        sequence, handoff = moving(fleet, "pull.2" if state == "moving" else "pulled")
    fleet.kv.abort(handoff)
    assert fleet.hear(sequence, "aborted", time.monotonic()).code == "asked"
    with pytest.raises((Unknown, WrongState)):
        fleet.kv.abort(handoff)
    for name, gate in (("P0", "write"), ("D0", "pull.2"), ("D0", "pulled")):
        (fleet.folder / f"{name}.{gate}").unlink(missing_ok=True)
    if blocker:
        fleet.kv.close(blocker)
    fleet.check(sequence, "P")
    fleet.kv.hand_off(sequence, "D")
    fleet.hear(sequence, "resident")
    fleet.check(sequence, "D")
    fleet.at_rest()


@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed-meanwhile"])
def test_source_is_under_pressure_while_pages_move(make_fleet: MakeFleet, closed: bool) -> None:
    """Whoever wants pages of the source gets others or none: those that move cannot be evicted, nor reused once the sequence is closed."""
    fleet = make_fleet(P=14, D=24)
    sequence, handoff = moving(fleet)
    pages = fleet.state.handoffs[handoff].source_pages
    if closed:
        fleet.kv.close(sequence)
    refused = 0
    for _ in range(12):
        try:
            other = fleet.open("P", 4 * PAGE)
            fleet.until(lambda other=other: min(fleet.state.sequences[other].written.values(), default=0) == 4 * PAGE, "it is written")
            assert not set(pages) & set(fleet.state.tables.pages_of(other).tolist())
            fleet.kv.close(other)
        except OutOfPages:
            refused += 1
            fleet.turn()
    assert fleet.state.handoffs[handoff].source_pages == pages
    fleet.open_gate("D0", "pull.1")
    if closed:
        fleet.is_at(handoff, "over")
    else:
        fleet.hear(sequence, "resident")
        fleet.check(sequence, "D")
    fleet.at_rest()


@pytest.mark.parametrize("times", [1, 1000], ids=["once", "always"])
def test_checksum_mismatch(make_fleet: MakeFleet, times: int) -> None:
    """What arrived with other bytes is pulled again, three times in all; then the request hears why."""
    fleet = make_fleet(P=24, D=24, E=24)
    (fleet.folder / "D0.spoil").write_text(str(times))
    sequence = fleet.open("P", LENGTH)
    handoff = fleet.kv.hand_off(sequence, "D")
    if times == 1:
        fleet.hear(sequence, "resident")
        fleet.check(sequence, "D")
        assert not fleet.news(sequence, "aborted")
    else:
        notice = fleet.hear(sequence, "aborted", time.monotonic())
        assert (notice.handoff, notice.code) == (handoff, "pull_failed")
        assert notice.reason.startswith("worker D0, 3 tries: page") and "expected checksum" in notice.reason
        fleet.kv.hand_off(sequence, "E")
        fleet.hear(sequence, "resident")
        fleet.check(sequence, "E")
    fleet.at_rest()


def test_full_target_holds_back_what_is_not_computed_yet(make_fleet: MakeFleet) -> None:
    """Back-pressure: with a reservation nothing is computed that has nowhere to go."""
    fleet = make_fleet(P=24, D=12)
    blocker = fleet.open("D", 9 * PAGE)
    sequence = fleet.open("P", LENGTH, chunk=0)
    with pytest.raises(OutOfPages):
        fleet.kv.hand_off(sequence, "D", reserve=True)
    fleet.kv.close(blocker)

    def reserved() -> bool:
        try:
            fleet.kv.hand_off(sequence, "D", reserve=True)
        except OutOfPages:
            return False
        return True

    fleet.until(reserved, "there is room")
    fleet.kv.grow(sequence, LENGTH)
    fleet.hear(sequence, "resident")
    fleet.check(sequence, "D")
    fleet.at_rest()


@pytest.mark.parametrize(("source", "into"), [(64, 16), (16, 64)])
def test_pages_of_another_size_arrive_as_they_were(make_fleet: MakeFleet, source: int, into: int) -> None:
    fleet = make_fleet(sizes={"P": source, "D": into}, P=24, D=24)
    for length in (1, 63, 64, 65, 150):
        sequence = fleet.open("P", length)
        fleet.kv.hand_off(sequence, "D")
        fleet.hear(sequence, "resident")
        fleet.check(sequence, "D")
        fleet.kv.close(sequence)
    fleet.at_rest()


def test_drain_moves_running_sequences_and_workers_come_and_go_under_traffic(make_fleet: MakeFleet) -> None:
    """A rolling upgrade of every decode worker: nothing is lost, nobody computes anything again."""
    fleet = make_fleet(P=24, D=40, E=40)
    running = []
    for _ in range(4):
        sequence = fleet.open("P", LENGTH)
        fleet.kv.hand_off(sequence, group="decode")
        fleet.hear(sequence, "resident")
        running.append(sequence)
    for pool, other in (("D", "E"), ("E", "D")):
        fleet.bystanders.pop(pool, None)
        fleet.kv.drain(pool)

        def decoded(pool: str = pool) -> bool:
            for sequence in running:
                try:
                    fleet.kv.grow(sequence)
                except WrongState:
                    pass  # it moves: the next step has it again
                except KVError as error:
                    raise AssertionError(f"{sequence}: {error}") from None
            return bool(fleet.kv.stats()["pools"][pool]["drained"])

        fleet.until(decoded, f"{pool} is empty")
        fleet.kill(f"{pool}0")
        fleet.expected_ends.pop(f"{pool}0")
        fleet.start_worker(pool)
        fleet.until((fleet.folder / f"{pool}0.joined").exists, f"{pool}0 joins again")
        for sequence in running:
            fleet.check(sequence, other)
    assert not [notice for _, notice in fleet.notices if notice.kind == "lost"]
    fleet.at_rest()
