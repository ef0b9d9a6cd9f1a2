"""One request at a time, in file order, prompts only: what any simulator of a prefix cache can be compared with, to the page.

The rules: a hit is the longest prefix of the prompt's whole pages that are all cached; then all its whole pages become resident and
none of them is evicted for its own sake; only a page without a resident one below it is evicted, that of the request longest ago
first, of one request the deepest first.

One adjustment: a manager never takes a prompt's last token from the cache, since somebody has to compute its logits. So each prompt is
opened as its whole pages and one token more, and slots are reserved for the whole pages only: the extra token takes no page. A
prompt of as many whole pages as the pool has is refused, because with that token it could not run.

With a queue of n the manager is told the n prompts after the one being served, and spares their pages while anything else can go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from kvmanager.config import PoolConfig
from kvmanager.errors import SequenceTooLarge
from kvmanager.replay.meter import Meter
from kvmanager.replay.traces import TokensOf, TracedRequest

__all__ = ["SequentialRun"]


class SequentialRun:
    """Iterate over `run()`: it gives the number of requests done after each. `meter` has what came of it so far."""

    def __init__(self, requests: Sequence[TracedRequest], *, pages: int, page_size: int, queue: int = 0) -> None:
        self.requests = requests
        self.page_size = page_size
        self.queue = queue
        self.meter = Meter([PoolConfig("pool", pages, page_size)], clock=lambda: 0, sequences=2, queue=queue)

    def run(self) -> Iterator[int]:
        meter, size = self.meter, self.page_size
        counts = meter.counts
        worker = meter.join("pool")
        running: list[int] = []  # the sequence before, closed in the step that opens the next
        waiting: deque[int] = deque()  # ids of the prompts in the queue, nearest first; the very first was never in it
        for done, request in enumerate(self.requests, 1):
            whole = request.input_length // size
            waited = waiting.popleft() if waiting else 0
            opening = {"tokens": self._prompt(request), "pool": "pool", "waiting": waited}
            told = self.requests[done + len(waiting) : done + self.queue]
            reply = meter.step(close=running, opens=[opening], enqueue=[{"tokens": self._prompt(each), "pool": "pool"} for each in told])
            waiting += reply.queued
            counts.requests += 1
            for refusal in reply.refused:
                if not isinstance(refusal.error, SequenceTooLarge):
                    raise refusal.error
            opened, running = reply.opened[0], []
            if opened is None:
                if waited:  # what is refused still waits
                    meter.step(dequeue=[waited])
                counts.too_large += 1
                yield done
                continue
            counts.pages_whole += whole
            counts.pages_hit += opened.cached_tokens // size
            counts.tokens_prompt += request.input_length
            counts.tokens_hit += opened.cached_tokens
            # Nothing runs any more for the sequence just closed: its pages may give way to this one.
            meter.ack(worker, reply.version, (), ())
            missing = whole * size - opened.cached_tokens
            if missing:
                reply = meter.step(grow=[opened.sequence], grow_counts=[missing])
                for refusal in reply.refused:
                    raise refusal.error
            meter.sample(done)
            meter.ack(worker, reply.version, [opened.sequence], [whole * size])
            running = [opened.sequence]
            yield done
        if running:
            meter.step(close=running)

    def _prompt(self, request: TracedRequest) -> np.ndarray:
        return TokensOf.prompt(request, request.input_length // self.page_size * self.page_size + 1)
