"""Bugs planted in what only a whole system has: replicas, journal, restarts, late messages. The simulator has to find each.

`python -m tests.control.test_simulated_bugs` plants these and those of test_planted_bugs in the simulated system, and prints after how
many steps each is found: the table of docs/simulator.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvmanager import manager as manager_module
from kvmanager.log.journal import Journal, Segment
from kvmanager.machine import decide as decide_module
from kvmanager.machine import explain as explain_module
from kvmanager.machine import handoffs as handoffs_module
from kvmanager.machine import lives
from kvmanager.machine import publishing as publishing_module
from kvmanager.machine import workers as workers_module
from kvmanager.machine.draft import Draft, PoolDraft
from kvmanager.machine.state import State
from kvmanager.pages.handoff import HandoffState
from kvmanager.pages.pool import Pool
from kvmanager.simulator import system as system_module
from kvmanager.simulator.books import PAGE
from kvmanager.simulator.faults import FAULTS
from kvmanager.simulator.hunt import Outcome, live
from kvmanager.worker import replica as replica_module
from kvmanager.worker.ahead import Aheads
from kvmanager.worker.replica import AckContent, Replica
from tests.control.test_planted_bugs import PLANTS as STATE_MACHINE_PLANTS

SEEDS, STEPS = 60, 1500
SHORT = {"handoff_that_lacked_pages_is_not_tried_again": 300}  # steps of a seed where what gives the bug away comes at the end
# Faults of the days in which it happens often.
ONLY = {"result_counts_though_its_pull_failed": ("skip", "reorder"), "step_run_ahead_not_waited_for": ("dup", "reorder")}
PLANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {}


def plant(function: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
    PLANTS[function.__name__] = function
    return function


# --- journal and restart ---------------------------------------------------------------------------------------------------------


@plant
def acknowledged_before_it_is_written(patch: pytest.MonkeyPatch) -> None:
    """The record goes to the file when the next one comes."""
    honest = Journal.append

    def append(self: Any, version: int, data: bytes, now_ms: int, *, sync: bool = False) -> None:
        waiting, self.waiting = getattr(self, "waiting", None), (version, data, now_ms)
        if waiting is not None and waiting[0] == self.version + 1:  # else a snapshot has it
            honest(self, *waiting)
        if sync:
            self.waiting = None
            honest(self, version, data, now_ms, sync=True)

    patch.setattr(Journal, "append", append)


@plant
def torn_tail_not_cut(patch: pytest.MonkeyPatch) -> None:
    honest = Journal.resume

    def resume(self: Journal, segment: Segment) -> int:
        segment.torn = 0
        return honest(self, segment)

    patch.setattr(Journal, "resume", resume)


@plant
def free_pages_not_held_over_a_restart(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Pool, "hold_free", lambda self, version: None)


@plant
def evicted_before_the_new_life_is_acknowledged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PoolDraft, "acked", property(lambda self: self._draft.acked(self.pool.index)))


@plant
def epoch_not_checked(patch: pytest.MonkeyPatch) -> None:
    """A worker that acted on what was lost is believed, and never hears of it."""
    patch.setattr(lives, "check_ack", lambda state, epoch, version: None)
    honest = Replica.load

    def load(self: Replica, data: bytes) -> None:
        honest(self, data)
        self.stranded = False

    patch.setattr(Replica, "load", load)


@plant
def lost_replies_acted_upon(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lives, "check_seen", lambda state, version, client: None)


@plant
def request_table_forgotten_over_a_restart(patch: pytest.MonkeyPatch) -> None:
    honest = lives.begin_life

    def begin_life(state: Any, config: Any, epoch: int) -> Any:
        for client in state.clients.values():
            client.number = 0
        return honest(state, config, epoch)

    patch.setattr(manager_module, "begin_life", begin_life)


# --- replicas --------------------------------------------------------------------------------------------------------------------


@plant
def gap_in_the_log_ignored(patch: pytest.MonkeyPatch) -> None:
    honest = Replica.feed

    def feed(self: Replica, data: bytes) -> None:
        version = manager_module.decode_batch(data).version
        if self.known and self.known < version < self.known + 1000:
            self.known = version - 1
        honest(self, data)

    patch.setattr(Replica, "feed", feed)


@plant
def steps_that_a_snapshot_skipped_count_as_run(patch: pytest.MonkeyPatch) -> None:
    honest = Replica.load

    def load(self: Replica, data: bytes) -> None:
        honest(self, data)
        self._written = {each: self.tables.length(each) for each in self._broken}
        self._broken = {}

    patch.setattr(Replica, "load", load)


@plant
def sequences_left_out_of_a_step_count_as_written(patch: pytest.MonkeyPatch) -> None:
    honest = Replica.finish
    patch.setattr(Replica, "finish", lambda self, version, sequences: honest(self, version, list(self._step_ids)))


@plant
def step_acknowledged_before_it_has_run(patch: pytest.MonkeyPatch) -> None:
    honest = Replica.ack

    def ack(self: Replica) -> AckContent | None:
        content = honest(self)
        return content._replace(version=self.version) if content is not None else None

    patch.setattr(Replica, "ack", ack)


@plant
def pull_in_progress_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Replica, "begin_pull", lambda self, handoff: None)


@plant
def early_pull_in_progress_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    """Reserved pages are let go of, by an abort or because they are shared meanwhile, while an early pull writes them."""
    honest = Replica.begin_pull

    def begin_pull(self: Replica, handoff: int) -> None:
        early = self._pulls[handoff].early
        honest(self, handoff)
        if early:
            del self._copying[handoff]

    patch.setattr(Replica, "begin_pull", begin_pull)


@plant
def result_counts_though_its_pull_failed(patch: pytest.MonkeyPatch) -> None:
    """What was run ahead is published although what it read had to be pulled again, over what it wrote."""
    honest = Aheads._spoil
    patch.setattr(Aheads, "_spoil", lambda self, ahead, why: None if "pull" in why else honest(self, ahead, why))


@plant
def layers_called_there_before_they_are(patch: pytest.MonkeyPatch) -> None:
    """The step that is run ahead does not wait for the pages of a layer."""
    patch.setattr(Replica, "layers_there", lambda self, handoff: 1 << 30)


@plant
def result_taken_on_other_pages(patch: pytest.MonkeyPatch) -> None:
    """Whatever has become of the sequence since: closed, truncated, moved, or its pages swapped."""
    honest = Replica.ran_ahead

    def ran_ahead(self: Replica, version: int, sequence: int) -> bool:
        return honest(self, version, sequence) or self._aheads.result_of(sequence) is not None

    patch.setattr(Replica, "ran_ahead", ran_ahead)
    patch.setattr(Aheads, "spoil_of", lambda self, sequence, why: None)


@plant
def step_run_ahead_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    """Pages that an aborted handoff lets go of are handed out while the step still writes into them."""
    patch.setattr(Aheads, "held", lambda self: [])


@plant
def step_does_not_wait_for_what_runs_ahead(patch: pytest.MonkeyPatch) -> None:
    """The sequence is here and goes on, and what was begun before writes over what its step has written."""
    patch.setattr(Aheads, "running", lambda self, sequences: False)


@plant
def published_pages_not_swapped(patch: pytest.MonkeyPatch) -> None:
    """The replica goes on with the copy that is to be freed."""
    patch.setitem(replica_module._HANDLERS, replica_module.ev.PagesPublished, lambda self, event: None)


# --- pages of other sizes and formats ---------------------------------------------------------------------------------------------------------


def _regather(patch: pytest.MonkeyPatch, change: Callable[[Any], dict[str, Any]]) -> None:
    """What a replica says of a pull between pools of different page sizes, changed."""
    honest = Replica._pull

    def pull(self: Replica, *args: Any) -> Any:
        made = honest(self, *args)
        return made._replace(**change(made)) if made is not None and made.source_page_size != made.target_page_size else made

    patch.setattr(Replica, "_pull", pull)


@plant
def last_partial_page_not_regathered(patch: pytest.MonkeyPatch) -> None:
    _regather(patch, lambda pull: {"tokens": pull.tokens // pull.target_page_size * pull.target_page_size})


@plant
def slots_before_a_shared_prefix_s_end_pulled_again(patch: pytest.MonkeyPatch) -> None:
    """From the first slot of a source page that the shared prefix ends within. Rare, so all runs draw pages of which four make one."""
    patch.setattr(system_module, "draw_sizes", lambda rng: (PAGE // 4, PAGE))
    _regather(patch, lambda pull: {"source_skip": 0})


@plant
def formats_that_nobody_converts_not_refused(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(handoffs_module, "why_not", lambda *args: None)


# --- messages --------------------------------------------------------------------------------------------------------------------


@plant
def late_copy_of_an_older_request_carried_out(patch: pytest.MonkeyPatch) -> None:
    """And nobody looks at what its sender had seen when it asked."""

    def decide(state: Any, command: Any, now_ms: int, client: int, number: int) -> Any:
        record = state.clients.get(client)
        if record is not None and number < record.number:
            number = record.number + 1
        return decide_module.decide(state, command, now_ms, client, number)

    patch.setattr(manager_module, "decide", decide)
    patch.setattr(lives, "check_seen", lambda state, version, client: None)


@plant
def given_up_and_carried_out_not_noticed(patch: pytest.MonkeyPatch) -> None:
    honest = lives.check_seen

    def check_seen(state: Any, version: int, client: int) -> None:
        honest(state, version, 0)

    patch.setattr(lives, "check_seen", check_seen)


@plant
def joining_that_was_given_up_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A worker that nobody has heard of: pages wait for it for ever."""
    patch.setattr(workers_module, "_unheard", lambda state, pool, command, client: None)


@plant
def pages_not_held_for_workers_of_other_pools(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(State, "reusable", State.acked)
    patch.setattr(Draft, "reusable", Draft.acked)


# --- liveness --------------------------------------------------------------------------------------------------------------------


@plant
def handoff_that_lacked_pages_is_not_tried_again(patch: pytest.MonkeyPatch) -> None:
    honest = handoffs_module._advance

    def advance(draft: Draft, handoff_id: int, sequence_id: int, target: int, at: HandoffState, handoff: Any) -> Any:
        return None if at is HandoffState.RESERVING else honest(draft, handoff_id, sequence_id, target, at, handoff)

    patch.setattr(handoffs_module, "_advance", advance)


@plant
def question_that_changes_the_state(patch: pytest.MonkeyPatch) -> None:
    """Explaining a prompt counts as using what is found of it."""
    honest = explain_module._explain

    def explain(state: State, pool: Pool, prompt: Any) -> list[Any]:
        for node in list(pool.prefix.order)[:1]:
            node.last_used += 1
        return honest(state, pool, prompt)

    patch.setattr(explain_module, "_explain", explain)


@plant
def quarantine_that_never_ends(patch: pytest.MonkeyPatch) -> None:
    """Nobody gets a wrong answer, and no page ever comes home."""
    patch.setattr(publishing_module, "_release", lambda *args: None)


def find(name: str, steps_max: int = SEEDS * STEPS) -> tuple[int, Outcome | None]:
    """Steps lived through until the simulator found the bug, and how; None if it did not."""
    done, steps = 0, SHORT.get(name, STEPS)
    for seed in range(steps_max // steps):
        outcome = live(seed, steps, ONLY.get(name, tuple(FAULTS)))
        done += outcome.steps
        if outcome.error:
            return done, outcome
    return done, None


# Found, but after more steps than a test has time for: docs/simulator.md says how many. Each has tests of its own, in test_restart.py,
# test_requests.py, test_handoff.py and tests/wire/test_replica_ahead.py.
RARE = (
    "epoch_not_checked",
    "lost_replies_acted_upon",
    "given_up_and_carried_out_not_noticed",
    "joining_that_was_given_up_is_forgotten",
    "handoff_that_lacked_pages_is_not_tried_again",
    "step_does_not_wait_for_what_runs_ahead",
)


@pytest.mark.parametrize("name", [name for name in PLANTS if name not in RARE])
def test_simulator_finds_the_planted_bug(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTS[name](monkeypatch)
    steps, outcome = find(name)
    assert outcome is not None, f"{name}: not found in {steps} steps"
    unfit = outcome.error.startswith(("TypeError", "AttributeError", "NameError"))
    assert not unfit, f"the plant no longer fits what it is planted in: {outcome.trace}"
    print(f"{name}: after {steps} steps: {outcome.error}")


def main() -> None:
    """The table, in Markdown."""
    print("| planted bug | found after (steps) | seen as |\n|---|---|---|")
    for name, sow in {**STATE_MACHINE_PLANTS, **PLANTS}.items():
        with pytest.MonkeyPatch.context() as patch:
            sow(patch)
            steps, outcome = find(name)
        words = name.replace("_", " ")
        seen = outcome.error.replace("|", "/").splitlines()[0][:110] if outcome is not None else "-"
        print(f"| {words} | {f'{steps:,}' if outcome is not None else f'not in {steps:,}'} | {seen} |", flush=True)


if __name__ == "__main__":
    main()
