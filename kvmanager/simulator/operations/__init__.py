"""One file for each operation: how a day draws it, what each of its events does to the model's books, and what must hold at it.

Imported for what they register, in the order in which a step's fields are drawn.
"""

# isort: off
from kvmanager.simulator.operations import closing, truncation, growth, tokens, handoffs, forks, opening  # noqa: F401
from kvmanager.simulator.operations import waiting, pins, tenants, pages, workers, clients, questions  # noqa: F401
