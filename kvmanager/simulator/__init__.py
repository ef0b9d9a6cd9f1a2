"""Simulator: random days of a manager, drawn from one seed, against a model that shares no code with the state machine.

    books       records: stamps, texts, works in flight, pulls, moves
    model       follows the event stream with those books; the page memories of all workers
    operations  one file for each operation: how a day draws it, and what its events do to the books
    driver      one day: draws, sends, compares the books, a replayed and a reloaded state after every command, heals in the end

To add an operation, write `operations/<noun>.py`, name it in `operations/__init__.py`, and register there

    @draws                    def f(driver) -> dict       fields of a Step: items drawn with `driver.rng` from `driver.model.texts` and
                                                          kin; draw wrong ones now and then, a refusal must change nothing.
                                                          `driver.drawn("rate", 0, 0.1)`: drawn once a day
    @action(0, 0.3, 1)        def f(driver)               something that happens on its own, such as another command, by
                                                          `driver.send(command, client)`; the numbers are the rates a day draws from
    @follows(ev.SomeEvent)    def f(model, event, turn)   what the event does to the books, and `demand(condition, text)` for what must
                                                          hold at it. `turn` has the command, its client and the reply
    @refused(code)            def f(model, item, details, turn)   the same for an open that was refused with this code

For pages use `model.take` (handed out: nobody may own, find, read or write them), `model.let_go` (after the books forgot the owner),
`model.check_content` (every worker holds these stamps); a new kind of owner belongs in `Model.owners`. What workers have to write is
`turn.starts[sequence] = first slot`. Rules of thumb: an event without a follower changes no book; `Model.compare` then finds it out.
Bugs to plant, one for each promise of the operation, go into tests/control/test_planted_bugs.py; every event has to be seen in
tests/control/test_random_days.py.
"""

from kvmanager.simulator.books import PAGE, Broken
from kvmanager.simulator.driver import Driver, live_through
from kvmanager.simulator.model import Model

__all__ = ["PAGE", "Broken", "Driver", "Model", "live_through"]
