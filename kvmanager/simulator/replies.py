"""Replies: what a naive reader of the books would have answered. Where that is determined, the manager's reply has to agree.

Which items are refused, and why, follows from what is open, what is being handed off and which pools are ready. How many pages could
have been evicted does not; but a pool that surely has free pages must not refuse for want of them.
"""

from __future__ import annotations

from kvmanager.machine.commands import Step
from kvmanager.simulator.books import Turn, demand
from kvmanager.simulator.model import Model
from kvmanager.simulator.registry import REFUSALS

__all__ = ["check_refusals", "check_reply"]

DETERMINED = ("no_conversion", "unknown", "wrong_state", "sequence_too_large", "too_many", "pool_not_ready", "pool_draining")


def check_reply(model: Model, turn: Turn) -> None:
    """Before the model reads the batch: it knows what the decision could know."""
    if not isinstance(turn.command, Step):
        return
    refused = {(kind, index): code for kind, index, code, *_ in turn.reply.get("refused", [])}
    expected = _Expected(model, turn.command, refused)
    for item, code in expected.codes.items():
        got = refused.get(item)
        if code is not None or got in DETERMINED:
            demand(got == code, f"{item[0]} {item[1]}: {got or 'done'}, expected {code or 'anything but that'}")
    names = [pool.name for pool in model.config.pools]
    for _, _, code, _, details in turn.reply.get("refused", []):
        if code == "out_of_pages":
            pool = names.index(str(details["pool"]))
            turn.free[pool] = _surely_free(model, pool)


class _Expected:
    """codes: (list of the step, place) -> why it has to be refused, None if for none of the determined reasons."""

    def __init__(self, model: Model, step: Step, refused: dict[tuple[str, int], str]) -> None:
        self.model, self.refused = model, refused
        self.codes: dict[tuple[str, int], str | None] = {}
        self.open = dict.fromkeys(model.texts)
        self.moving = {move.sequence: handoff for handoff, move in model.moves.items() if move.state != "aborted"}
        self.cut = dict.fromkeys(step.truncate[:, 0].tolist())
        self.over = {handoff for handoff, move in model.moves.items() if move.state == "aborted"}
        self.places_kept = 0  # what is to be forgotten is closed after everything else
        for kind, sequences in (("close", step.close.tolist()), ("forget", step.forget.tolist())):
            for index, sequence in enumerate(sequences):
                if self._alive(kind, index, sequence):
                    del self.open[sequence]
                    self._abort(self.moving.get(sequence, 0))
                    self.places_kept += kind == "forget"
        for index, handoff in enumerate(step.abort.tolist()):
            over = "wrong_state" if handoff in self.over else None
            self.codes["abort", index] = over if handoff in model.moves else "unknown"
            if self.codes["abort", index] is None:
                self._abort(handoff)
        for index, (sequence, _) in enumerate(step.tokens):
            self._alive("tokens", index, sequence)
        self._hand_offs(step)
        for index, sequence in enumerate(step.grow.tolist()):
            if self._alive("grow", index, sequence):
                handoff = self.moving.get(sequence)
                held = handoff is not None and handoff in model.moves and model.moves[handoff].state != "prefilling"
                self.codes["grow", index] = "wrong_state" if held else None
                if not held and sequence in self.cut:
                    del self.codes["grow", index]  # whether it was cut is not known here
                elif not held:
                    text, count = model.texts[sequence], int(step.grow_counts[index])
                    if model.pages_of(text.pool, text.length + count) > model.config.pools[text.pool].num_pages:
                        self.codes["grow", index] = "sequence_too_large"
        self._opens(step)

    def _alive(self, kind: str, index: int, sequence: int) -> bool:
        alive = sequence in self.open
        self.codes[kind, index] = None if alive else "unknown"
        return alive

    def _abort(self, handoff: int) -> None:
        if handoff:
            self.over.add(handoff)
            self.moving = {sequence: each for sequence, each in self.moving.items() if each != handoff}

    def _not_ready(self, pool: int) -> str | None:
        """Why the pool takes nothing."""
        if pool in self.model.draining:
            return "pool_draining"
        crew = self.model.crew(pool, fenced=True)
        ready = len(crew) == self.model.config.pools[pool].workers and not any(worker.fenced for worker in crew)
        return None if ready else "pool_not_ready"

    def _hand_offs(self, step: Step) -> None:
        model, begun, perhaps = self.model, 0, 0
        names = [pool.name for pool in model.config.pools]
        for index, asked in enumerate(step.hand_off):
            sequence, target = asked.sequence, asked.pool
            if not self._alive("hand_off", index, sequence):
                continue
            code = None
            if sequence in self.moving:
                code = "wrong_state"
            elif target and names[model.texts[sequence].pool] == target:
                code = "invalid_value"
            elif target and not asked.reserve and not model.may_move(model.texts[sequence].pool, names.index(target)):
                code = "no_conversion"
            elif (
                sequence in self.cut or asked.group or asked.reserve
            ):  # how many pages that needs and which pools have them is not known here
                del self.codes["hand_off", index]
                if ("hand_off", index) not in self.refused:
                    perhaps += 1
                    self.moving[sequence] = -1
                continue
            elif model.pages_in(model.texts[sequence], names.index(target)) > model.config.pools[names.index(target)].num_pages:
                code = "sequence_too_large"
            elif why := self._not_ready(names.index(target)):
                code = why
            elif self.refused.get(("hand_off", index)) == "over_quota":
                continue
            elif len(model.moves) + begun + perhaps >= model.config.handoffs_max:
                code = "too_many"
            self.codes["hand_off", index] = code
            if code is None:
                begun += 1
                self.moving[sequence] = -1

    def _opens(self, step: Step) -> None:
        """Forks come before, and how many of those are done is not known here: the last free place may be anybody's."""
        model = self.model
        left = model.config.sequences_max - len(self.open) - self.places_kept - sum(count for _, count in step.fork.tolist())
        names = [pool.name for pool in model.config.pools]
        for index, asked in enumerate(step.opens):
            left -= 1
            if not asked.pool:
                continue
            pool = names.index(asked.pool)
            if why := self._not_ready(pool):
                self.codes["open", index] = why
            elif model.pages_of(pool, len(asked.tokens) + asked.reserve) > model.config.pools[pool].num_pages:
                self.codes["open", index] = "sequence_too_large"
            elif left >= 0:
                self.codes["open", index] = None


def _surely_free(model: Model, pool: int) -> int:
    """Pages that nobody has, nobody finds, and every worker has let go of. More may be had by evicting."""
    acked = model.let_go_up_to(pool)
    owners, indexed = model.owners(pool), {page for page, _ in model.index[pool].values()}
    return sum(
        not owners[page] and page not in indexed and model.dropped[pool].get(page, 0) <= acked
        for page in range(model.config.pools[pool].num_pages)
    )


def check_refusals(model: Model, turn: Turn) -> None:
    """After the model has read the batch: what operations demand where an item was refused, and that pages were not refused for nothing."""
    command = turn.command
    if not isinstance(command, Step):
        return
    names = [pool.name for pool in model.config.pools]
    for kind, index, code, _, details in turn.reply.get("refused", []):
        if kind == "open" and code in REFUSALS:
            REFUSALS[code](model, command.opens[index], details, turn)
        if code == "out_of_pages":
            pool, what = names.index(str(details["pool"])), f"{kind} {index} refused in pool {details['pool']}"
            demand(details["free"] < details["needed"], f"{what}: {details['free']} free, {details['needed']} needed")
            least = turn.free[pool] - model.taken[pool]
            demand(details["free"] >= least, f"{what}: {details['free']} free, the model has {turn.free[pool]}, {model.taken[pool]} taken")
