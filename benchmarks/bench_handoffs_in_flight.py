"""What a handoff costs the manager, with few and with many under way, in microseconds on one core. No byte moves.

One of the handoffs in flight ends, and the sequence begins the next one, to the other pool and back: hand_off, an acknowledgement of each
side, the report of the pull. The issue asks for 1,000 in flight within 1.3 times of 10.

    python benchmarks/bench_handoffs_in_flight.py [--tokens 320] [--repeats 400]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import numpy as np

from kvmanager import KVManager, ManagerConfig, PoolConfig

PAGE = 16


def measure(in_flight: int, tokens: int, repeats: int) -> float:
    """Median microseconds of the manager for one handoff, all its commands together."""
    pages = 2 * (in_flight + 2) * -(-tokens // PAGE)
    pools = (PoolConfig("A", pages, PAGE), PoolConfig("B", pages, PAGE))
    manager = KVManager(ManagerConfig(pools, lease_ms=86_400_000, handoff_timeout_ms=0, handoff_wait_ms=0))
    workers = {name: manager.join(name, name, "x") for name in "AB"}
    prompts = [np.arange(each * tokens, (each + 1) * tokens, dtype=np.int32) for each in range(in_flight)]
    sequences = [manager.open(prompt, "A", chunk=tokens).sequence for prompt in prompts]
    manager.ack(workers["A"], manager.state.version, ids=sequences, tokens=[tokens] * in_flight)
    flying = [(sequence, manager.hand_off(sequence, "B")) for sequence in sequences]
    assert len(manager.stats()["handoffs"]) == in_flight
    times = []
    gc.disable()
    for _ in range(repeats):
        sequence, handoff = flying.pop(0)
        start = time.perf_counter()
        manager.ack(workers["B"], manager.state.version, pulled=[handoff])
        manager.ack(workers["A"], manager.state.version)
        back = manager.hand_off(sequence, "A")
        manager.ack(workers["A"], manager.state.version, pulled=[back])
        manager.ack(workers["B"], manager.state.version)
        again = manager.hand_off(sequence, "B")
        times.append((time.perf_counter() - start) / 2)
        flying.append((sequence, again))
    gc.enable()
    assert len(manager.stats()["handoffs"]) == in_flight  # nobody was left behind
    return statistics.median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=320)
    parser.add_argument("--repeats", type=int, default=400)
    options = parser.parse_args()
    base = 0.0
    for in_flight in (10, 100, 1000):
        spent = min(measure(in_flight, options.tokens, options.repeats) for _ in range(3))
        base = base or spent
        print(f"{in_flight:5} in flight: {spent:6.0f} us a handoff, {spent / base:.2f} of that with 10")


if __name__ == "__main__":
    main()
