"""The control plane's cost on one core: what a scheduler step, an open, a close and an eviction take, in microseconds.

Each row checks the answer before it is timed, and gives the median of many repeats. Everything is measured in one run on one machine; raw
ZMQ is an echo of messages of the same sizes between the same two kinds of process. Peers are measured in the same run where they are at
hand (see peers_control), and otherwise are figures that were read, on this kind of machine, another day.

    python benchmarks/bench_control.py [--quick] [--json] [--rows PART]

plot_control makes a picture of the JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import zmq

from kvmanager.arrays import as_tokens, bytes_of
from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.machine.apply import apply
from kvmanager.machine.batch import EventBatch, decode_batch, encode_batch
from kvmanager.machine.commands import Open, Step
from kvmanager.machine.decide import decide
from kvmanager.machine.draft import Draft
from kvmanager.machine.invariants import check_invariants
from kvmanager.machine.snapshot import load_snapshot, snapshot, state_digest
from kvmanager.manager import KVManager
from kvmanager.service.client import KVClient
from kvmanager.service.server import Server
from kvmanager.worker.replica import Replica

if __package__:
    from benchmarks.peers_control import measure_peers
else:
    from peers_control import measure_peers

PAGE = 64
BATCH = 256
# Read, not measured in this run: vLLM 0.33 (its KVCacheManager's code) and SGLang 0.5.23 on this kind of CPU machine, one core, 2026-11-24.
PEERS = {
    "decode_4": "vLLM 905, SGLang's allocator alone 27",
    "decode_256": "vLLM 1,044",
    "hit_1_lookup": "vLLM 1,393, SGLang Rust 13",
    "hit_64_lookup": "SGLang Rust 29",
    "miss": "vLLM 108 + 300 hashing",
    "free_512_more": "vLLM 46",
    "evict_10k_more": "SGLang 1,122",
}


def expect(condition: object, text: str) -> None:
    if not condition:
        raise SystemExit(f"bench_control: wrong answer, not timed: {text}")


def timed(call: Callable[[], Any]) -> float:
    """Microseconds of one call."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e3


class Rig:
    """An embedded manager of one pool with one worker, which acknowledges when told to."""

    def __init__(self, num_pages: int, page_size: int = PAGE, **limits: int) -> None:
        self.config = ManagerConfig((PoolConfig("A", num_pages, page_size),), sequence_tokens_max=1 << 22, **limits)
        self.now = 0
        self.kv = KVManager(self.config, clock=lambda: self.now)
        self.page_size = page_size
        self.worker = self.kv.join("w", "A", "bf16")
        self.number = 1_000_000
        self.rng = np.random.default_rng(1)

    def tokens(self, count: int) -> np.ndarray:
        return self.rng.integers(0, 150_000, count, dtype=np.int32)

    def execute(self, command: Any) -> bytes:
        """One command of another client: built by the caller, decided, encoded, applied; the reply's bytes."""
        self.number += 1
        return self.kv.execute(command, 2, self.number)

    def step(self, **items: Any) -> bytes:
        return self.execute(Step(**items))

    def ack(self, ids: Any = (), lengths: Any = ()) -> None:
        self.kv.ack(self.worker, self.kv.state.version, ids=ids, tokens=lengths)

    def open(self, tokens: np.ndarray, written: bool = True) -> int:
        opened = self.kv.open(tokens, "A", chunk=len(tokens))
        if written:
            self.ack([opened.sequence], [opened.length])
        return opened.sequence

    def cache(self, tokens: np.ndarray) -> None:
        self.kv.close(self.open(tokens))
        self.ack()

    def cache_leaves(self, count: int) -> None:
        """`count` prompts of one page each, no two alike, open to nobody: the prefix index at its worst."""
        done = 0
        while done < count:
            size = min(2048, count - done)
            block = self.rng.integers(0, 150_000, (size, self.page_size), dtype=np.int32)
            block[:, 0] = np.arange(done, done + size)
            reply = self.kv.step(opens=[Open(row, "A", chunk=self.page_size) for row in block])
            ids = np.array([each.sequence for each in reply.opened if each is not None], np.int64)
            expect(len(ids) == size and not any(each.cached_tokens for each in reply.opened if each), "leaves were found in an empty index")
            self.ack(ids, np.full(size, self.page_size, np.int64))
            self.kv.step(close=ids)
            self.ack()
            done += size

    def decoding(self, batch: int, staggered: bool) -> np.ndarray:
        """Sequences in the middle of decoding; staggered: a 64th of them ends a page in each step."""
        opens = [
            Open(self.tokens(self.page_size * 2 + (index % self.page_size if staggered else 0)), "A", chunk=1 << 20)
            for index in range(batch)
        ]
        opened = self.kv.step(opens=opens).opened
        return np.array([each.sequence for each in opened if each is not None], np.int64)


# --- rows ------------------------------------------------------------------------------------------------------------------------


def decode_step(rig: Rig, ids: np.ndarray, steps: int, crossing: int) -> list[float]:
    """Microseconds of each step in which `crossing` sequences took a page: command built, decided, encoded, applied."""
    tables = rig.kv.state.tables
    lengths = [tables.length(each) for each in ids.tolist()]
    samples = []
    for _ in range(steps):
        before = rig.kv.state.pools[0].counts().free
        spent = timed(lambda: rig.step(grow=ids))
        if before - rig.kv.state.pools[0].counts().free == crossing:
            samples.append(spent)
    expect([tables.length(each) for each in ids.tolist()] == [each + steps for each in lengths], "lengths after the decode steps")
    expect(len(samples) > steps // 100, f"steps in which {crossing} sequences cross a page")
    return samples


def bench_decode(quick: bool) -> dict[str, list[float]]:
    rows = {}
    rig = Rig(100_000)
    ids = rig.decoding(BATCH, staggered=True)
    decode_step(rig, ids, 64, 4)
    rows["decode_4"] = decode_step(rig, ids, 256 if quick else 2048, 4)
    batch, _ = decide(rig.kv.state, Step(grow=ids), 0, 2, rig.number + 1)
    rows["decode_4_bytes"] = [float(len(encode_batch(batch)))] if batch else []
    check_invariants(rig.kv.state)
    rig = Rig(100_000)
    ids = rig.decoding(BATCH, staggered=False)
    decode_step(rig, ids, 65, BATCH)
    rows["decode_256"] = decode_step(rig, ids, 64 * (10 if quick else 150), BATCH)
    check_invariants(rig.kv.state)
    rows["decode_0"] = decode_step(rig, ids, 256 if quick else 1024, 0)
    rows["decode_changed"] = changed_steps(rig, ids, 60 if quick else 250)
    rows["decode_speculative"] = speculative_steps(rig, ids, 60 if quick else 250)
    check_invariants(rig.kv.state)
    return rows


def changed_steps(rig: Rig, ids: np.ndarray, steps: int) -> list[float]:
    """Steps of a batch in which another sequence has taken one's place each time."""
    batch, samples = ids.copy(), []
    others = rig.decoding(steps, staggered=True)
    for step, other in enumerate(others.tolist()):
        batch[step % len(batch)] = other
        samples.append(timed(lambda: rig.step(grow=batch)))
    expect(rig.kv.state.tables.length(int(others[-1])) == PAGE * 2 + (steps - 1) % PAGE + 1, "the newcomer's length")
    return samples


def speculative_steps(rig: Rig, ids: np.ndarray, steps: int) -> list[float]:
    """Steps that give back two of four slots and reserve four more, all sequences at once."""
    tables, counts, samples = rig.kv.state.tables, np.full(len(ids), 4, np.int64), []
    rig.step(grow=ids, grow_counts=counts)
    rows = tables.rows(ids)
    for _ in range(steps):
        before = tables.lengths[rows]
        cuts = np.stack([ids, before - 2], axis=1)
        samples.append(timed(lambda cuts=cuts: rig.step(grow=ids, grow_counts=counts, truncate=cuts)))
        expect((tables.lengths[rows] == before + 2).all(), "lengths after a speculative step")
        rig.ack()
    return samples


def bench_hit(quick: bool, edges: int) -> dict[str, list[float]]:
    """A prompt of 32,768 tokens, all cached, in `edges` runs of pages: a command that opens it, one open more in such a command, lookups.

    A lookup takes the token ids as an int32 array and gives the page ids as one: in a loop, as peers are measured, and between commands that
    have moved on to other memory. The command does all that an open needs.
    """
    rig = Rig(100_000)
    prompt = rig.tokens(32_768)
    for edge in range(1, edges):  # each of these turns off after another run of the prompt: a node there, with two children
        rig.cache(np.concatenate([prompt[: 32_768 * edge // edges], rig.tokens(PAGE)]))
    rig.cache(prompt)
    found = rig.kv.state.pools[0].prefix.match(b"\0\0\0\0", prompt.tobytes(), 512)
    expect(len(found.nodes) == edges, f"{edges} edges, found {len(found.nodes)}")
    whole, more, cold = [], [], []
    replies: list[bytes] = []
    prefix = rig.kv.state.pools[0].prefix
    again = Open(prompt, "A", chunk=64)
    for _ in range(40 if quick else 400):
        replies.clear()
        whole.append(timed(lambda: replies.append(rig.step(opens=(Open(prompt, "A", chunk=64),)))))
        opened = msgpack.unpackb(replies[0])["opened"][0]
        expect(opened[1:3] == [511 * PAGE, 32_768], "511 pages are cached; the last token is never taken from the cache")
        rig.step(close=np.array([opened[0]], np.int64))
        rig.ack()
        eight = timed(lambda: replies.append(rig.step(opens=(again,) * 9)))
        one = timed(lambda: replies.append(rig.step(opens=(again,))))
        more.append((eight - one) / 8)
        ids = np.array([each[0] for reply in replies[1:] for each in msgpack.unpackb(reply)["opened"]], np.int64)
        expect(len(ids) == 10, "ten prompts opened")
        rig.step(close=ids)
        rig.ack()
        cold.append(timed(lambda: look_up(prefix, prompt)))
    check_invariants(rig.kv.state)
    warm = [timed(lambda: look_up(prefix, prompt)) for _ in range(100 if quick else 1000)]
    return {"": whole, "_more": more, "_lookup": warm, "_lookup_cold": cold}


def look_up(prefix: Any, prompt: np.ndarray) -> np.ndarray:
    """The pages of a prompt, from an int32 array of token ids to one of page ids; the copy and the check of the tokens included."""
    pages = prefix.match(b"\0\0\0\0", bytes_of(as_tokens("tokens", prompt)), 511).pages()
    expect(len(pages) == 511, "511 pages are found")
    return pages


def bench_miss(rig: Rig, count: int, repeats: int) -> tuple[list[float], list[float], list[float]]:
    """(open of `count` new tokens and their pages, close of as many unwritten pages, the acknowledgement that frees them)"""
    opened, closed, freed = [], [], []
    for _ in range(repeats):
        prompt = rig.tokens(count)
        free = rig.kv.state.pools[0].counts().free
        opened.append(timed(lambda prompt=prompt: rig.step(opens=(Open(prompt, "A", chunk=count),))))
        expect(rig.kv.state.pools[0].counts().free == free - count // rig.page_size, "pages after a miss")
        sequence = next(reversed(rig.kv.state.sequences))
        closed.append(timed(lambda sequence=sequence: rig.step(close=np.array([sequence], np.int64))))
        freed.append(timed(rig.ack))
        expect(rig.kv.state.pools[0].counts().free == free, "pages after the acknowledgement")
    return opened, closed, freed


def bench_free(rig: Rig, repeats: int, written: bool) -> tuple[list[float], list[float], list[float]]:
    """Sequences of 512 pages: (a command that closes one, one close more in such a command, the acknowledgement that frees one's pages).

    written: their pages stay cached; otherwise they go to quarantine until the acknowledgement.
    """
    closed, more, freed = [], [], []
    prompt = rig.tokens(512 * rig.page_size)
    free = rig.kv.state.pools[0].counts().free
    for _ in range(repeats):
        ids = [rig.open(prompt if written else rig.tokens(512 * rig.page_size), written) for _ in range(10)]
        closed.append(timed(lambda ids=ids: rig.step(close=np.array(ids[:1], np.int64))))
        one_freed = timed(rig.ack)
        nine = timed(lambda ids=ids: rig.step(close=np.array(ids[1:], np.int64)))
        more.append((nine - closed[-1]) / 8)
        nine_freed = timed(rig.ack)
        freed.append((nine_freed - one_freed) / 8)
        counts = rig.kv.state.pools[0].counts()
        expect(counts.free == free - 512 * written and counts.cached == 512 * written, "pages after the closes")
    return closed, more, freed


def evictions(rig: Rig, count: int) -> float:
    """Microseconds to choose so many pages, log them, encode the event and apply it. The pool has no free page left."""
    state = rig.kv.state
    cached = state.pools[0].counts().cached
    start = time.perf_counter_ns()
    draft = Draft(state)
    pages = draft.pool(0)
    can = pages.can_take(count)
    taken = pages.take(count)
    batch = EventBatch(state.epoch, state.version + 1, 0, draft.events)
    encode_batch(batch)
    apply(state, batch)
    spent = (time.perf_counter_ns() - start) / 1e3
    expect(can == count and len(taken) == count and state.pools[0].counts().cached == cached - count, f"{count} pages evicted")
    rig.kv.open(rig.tokens(count * rig.page_size), "A", chunk=count * rig.page_size)  # takes the pages that are free now
    return spent


def bench_evict(rig: Rig, repeats: int) -> tuple[list[float], list[float]]:
    """(one eviction that is a batch of its own, one more in such a batch)"""
    alone, more = [], []
    for _ in range(repeats):
        alone.append(evictions(rig, 1))
        more.append((evictions(rig, 33) - alone[-1]) / 32)
    return alone, more


def fill(rig: Rig) -> None:
    """Take every free page, so that the next one has to be evicted."""
    free = rig.kv.state.pools[0].counts().free
    while free:
        count = min(free, 8192)
        rig.open(rig.tokens(count * rig.page_size), written=False)
        free -= count


def bench_evictions(quick: bool) -> dict[str, list[float]]:
    rows = {}
    for name, leaves in (("evict_10k", 10_000),) if quick else (("evict_10k", 10_000), ("evict_1m", 1_000_000)):
        rig = Rig(leaves, 16)
        rig.cache_leaves(leaves)
        rows[name], rows[name + "_more"] = bench_evict(rig, 50 if quick else 250)
        del rig
        gc.collect()
    return rows


def bench_replica(quick: bool) -> dict[str, list[float]]:
    """A worker takes the decode step's bytes, applies them, and builds its tables of about 64 pages a sequence."""
    rig = Rig(100_000)
    published: list[bytes] = []
    replica = Replica("A")
    replica.load(rig.kv.tables_snapshot())
    rig.kv.subscribe(lambda batch, data: published.append(data))
    prompts = [Open(rig.tokens(PAGE * 60 + index % PAGE), "A", chunk=1 << 20) for index in range(BATCH)]
    ids = np.array([each.sequence for each in rig.kv.step(opens=prompts).opened if each], np.int64)
    asked = ids.tolist()
    applied, built = [], []
    for step in range(64 if quick else 640):
        for data in published[:-1]:
            replica.feed(data)
            if replica.step:
                replica.finish(replica.step, asked)
        if published:
            applied.append(timed(lambda: replica.feed(published[-1])))
            version = replica.version
            built.append(timed(lambda version=version: replica.batch(version, asked)))
            tables = replica.batch(version, asked)
            if step % 16 == 0:
                expect(replica.tables.digest() == rig.kv.state.tables.digest(), "replica and manager differ")
                expect(
                    all(tables.pages_of(row).tolist() == rig.kv.state.tables.pages_of(each).tolist() for row, each in enumerate(asked)),
                    "tables",
                )
            replica.finish(version, asked)
        published.clear()
        rig.step(grow=ids)
    return {"replica_apply": applied[2:], "replica_tables": built[2:]}


# --- round trip ------------------------------------------------------------------------------------------------------------------


def serve_main(address: str, publish: str) -> None:
    server = Server(KVManager(ManagerConfig((PoolConfig("A", 100_000, PAGE),))), address=address, publish=publish)
    server.run()


def echo_main(address: str, reply_bytes: int) -> None:
    router = zmq.Context().socket(zmq.ROUTER)
    router.bind(address)
    reply = b"x" * reply_bytes
    while True:
        frames = router.recv_multipart()
        frames[-1] = reply
        router.send_multipart(frames)


def bench_round_trip(quick: bool) -> dict[str, list[float]]:
    """A decode step of 256 sequences from a client to its decoded reply, and a raw REQ/ROUTER echo of the same sizes, in turns."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        at = f"ipc://{folder}/kv"
        request_bytes, reply_bytes = 2 * 1024 + 64, 40
        processes = [
            spawn.Process(target=serve_main, args=(at, at + ".pub"), daemon=True),
            spawn.Process(target=echo_main, args=(at + ".raw", reply_bytes), daemon=True),
        ]
        for process in processes:
            process.start()
        client = KVClient(at)
        worker = client.join("w", "A", "bf16")
        rng = np.random.default_rng(1)
        opens = [Open(rng.integers(0, 1000, 128 + index % PAGE, dtype=np.int32), "A", chunk=1 << 20) for index in range(BATCH)]
        ids = np.array([each.sequence for each in client.step(opens=opens).opened if each], np.int64)
        expect(len(ids) == BATCH and worker, "256 sequences opened over the wire")
        raw = zmq.Context.instance().socket(zmq.REQ)
        raw.connect(at + ".raw")
        message = b"y" * request_bytes

        def echo() -> None:
            raw.send(message)
            expect(len(raw.recv()) == reply_bytes, "echo")

        trips: list[float] = []
        echoes: list[float] = []
        for _ in range(4 if quick else 40):
            trips += [timed(lambda: client.step(grow=ids)) for _ in range(50)][5:]
            echoes += [timed(echo) for _ in range(50)][5:]
        client.disconnect()
        raw.close(0)
        for process in processes:
            process.terminate()
            process.join()
    return {"round_trip": trips, "raw_zmq": echoes}


# --- size ------------------------------------------------------------------------------------------------------------------------


def bench_size(size: int, quick: bool) -> dict[str, float]:
    """The same work in a pool of `size` pages, half of them cached prompts of one page each."""
    rig = Rig(size, 16)
    rig.cache_leaves(size // 2)
    ids = rig.decoding(BATCH, staggered=True)
    decode_step(rig, ids, 16, 16)
    row = {"decode_16_crossing": decode_step(rig, ids, 32 if quick else 48, 16)}
    prompt, hits = rig.tokens(1024), []
    rig.cache(prompt)
    for _ in range(20 if quick else 200):
        hits.append(timed(lambda: rig.step(opens=(Open(prompt, "A", chunk=64),))))
        rig.kv.close(next(reversed(rig.kv.state.sequences)))
        rig.ack()
    row["hit_64_pages"] = hits
    row["miss_64_pages"], row["close_64_pages"], row["ack_64_pages_freed"] = bench_miss(rig, 1024, 20 if quick else 200)
    row["tick"] = [timed(rig.kv.tick) for _ in range(100)]
    fill(rig)
    row["evict_one"], row["evict_one_more"] = bench_evict(rig, 20 if quick else 100)
    return {name: statistics.median(samples) for name, samples in row.items()}


def bench_scaling(sizes: list[int], quick: bool) -> dict[str, dict[str, float]]:
    return {f"{size:,} pages": bench_size(size, quick) for size in sizes}


def rss_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def memory_main(num_pages: int, page_size: int) -> None:
    """In a process of its own: resident memory of an empty pool, and of one that is all cached prompts of one page each."""
    gc.collect()
    figures = {"before_mb": rss_mb()}
    start = time.perf_counter()
    rig = Rig(num_pages, page_size)
    figures["create_ms"] = (time.perf_counter() - start) * 1e3
    figures["empty_mb"] = rss_mb() - figures["before_mb"]
    rig.cache_leaves(num_pages)
    gc.collect()
    expect(rig.kv.state.pools[0].counts().cached == num_pages, "a pool that is all cached")
    figures["cached_mb"] = rss_mb() - figures["before_mb"]
    figures["token_ids_mb"] = num_pages * page_size * 4 / 1e6
    start = time.perf_counter()
    gc.collect()
    figures["gc_full_ms"] = (time.perf_counter() - start) * 1e3  # of the interpreter's collector, if nobody freezes the index
    start = time.perf_counter()
    data = encode_batch(snapshot(rig.kv.state))
    figures["snapshot_s"] = time.perf_counter() - start
    figures["snapshot_mb"] = len(data) / 1e6
    start = time.perf_counter()
    state = load_snapshot(rig.config, decode_batch(data))
    figures["load_s"] = time.perf_counter() - start
    expect(state_digest(state) == state_digest(rig.kv.state), "a snapshot that was loaded is another state")
    print(json.dumps(figures))


def bench_memory(num_pages: int, page_size: int) -> dict[str, float]:
    command = [sys.executable, os.path.abspath(__file__), "--memory", str(num_pages), str(page_size)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def bench_replay(quick: bool) -> dict[str, list[float]]:
    """Microseconds a batch to decode and apply a log of decode steps, 4 of 256 sequences crossing: what a restart replays."""
    rig = Rig(100_000)
    ids = rig.decoding(BATCH, staggered=True)
    data, config = rig.kv.snapshot(), rig.config
    log: list[bytes] = []
    rig.kv.subscribe(lambda batch, data: log.append(data))
    for _ in range(500 if quick else 5000):
        rig.step(grow=ids)
    state = load_snapshot(config, decode_batch(data))
    start = time.perf_counter_ns()
    for each in log:
        apply(state, decode_batch(each))
    spent = (time.perf_counter_ns() - start) / 1e3 / len(log)
    expect(state_digest(state) == state_digest(rig.kv.state), "the replayed state is another")
    return {"replay": [spent]}


# --- report ----------------------------------------------------------------------------------------------------------------------

REACH = [  # name, text, reach in us
    ("decode_4", "decode step, 256 sequences, 4 crossing a page", 25.0),
    ("decode_256", "decode step, all 256 crossing", 60.0),
    ("decode_0", "decode step, nobody crossing", None),
    ("decode_changed", "decode step, one of the 256 is another", None),
    ("decode_speculative", "speculative step: 256 cut by 2 tokens and grown by 4", None),
    ("hit_1_lookup", "32,768 tokens, all cached, one edge: tokens to pages", 10.0),
    ("hit_1_lookup_cold", "  between other commands", None),
    ("hit_1_more", "  one more open of it in a step", None),
    ("hit_1", "  opened by a command of its own", None),
    ("hit_64_lookup", "32,768 tokens, all cached, 64 edges: tokens to pages", 25.0),
    ("hit_64_lookup_cold", "  between other commands", None),
    ("hit_64_more", "  one more open of it in a step", None),
    ("hit_64", "  opened by a command of its own", None),
    ("miss", "open 8,192 new tokens, 128 pages", 30.0),
    ("free_512_more", "close 512 pages that stay cached, one more in a step", 10.0),
    ("free_512", "  by a command of its own", 10.0),
    ("free_512_unwritten_more", "close 512 pages into quarantine, one more in a step", 10.0),
    ("free_512_unwritten", "  by a command of its own", 10.0),
    ("free_512_ack", "  and free them in an acknowledgement, one more", None),
    ("evict_10k_more", "evict one page more among 10,000 leaves", 3.0),
    ("evict_1m_more", "evict one page more among 1,000,000 leaves", 3.0),
    ("evict_10k", "  the first of a step, its event and draft, 10,000", 3.0),
    ("evict_1m", "  the first of a step, its event and draft, 1,000,000", 3.0),
    ("replica_apply", "replica: decode and apply the step of 4 crossings", 10.0),
    ("replica_tables", "replica: tables of 256 sequences, 60 pages each", 30.0),
    ("replay", "a batch of the log, decoded and applied (restart)", None),
    ("raw_zmq", "raw ZMQ echo of the same sizes over ipc", None),
    ("round_trip", "step round trip over ipc, client to reply", None),
]


def measure(quick: bool, wanted: str) -> dict[str, Any]:
    rows: dict[str, list[float]] = {}

    def run(name: str, call: Callable[[], dict[str, list[float]]]) -> None:
        if wanted in name:
            print(f"... {name}", file=sys.stderr)
            rows.update(call())
            gc.collect()

    def hits() -> dict[str, list[float]]:
        found = {}
        for edges in (1, 64):
            found |= {f"hit_{edges}{name}": samples for name, samples in bench_hit(quick, edges).items()}
        return found

    def frees() -> dict[str, list[float]]:
        found = {}
        found["free_512"], found["free_512_more"], _ = bench_free(Rig(100_000), 10 if quick else 100, True)
        found["free_512_unwritten"], found["free_512_unwritten_more"], found["free_512_ack"] = bench_free(
            Rig(100_000), 10 if quick else 100, False
        )
        return found

    run("decode", lambda: bench_decode(quick))
    run("hit", hits)
    run("miss", lambda: {"miss": bench_miss(Rig(100_000), 8192, 20 if quick else 300)[0]})
    run("free", frees)
    run("evict", lambda: bench_evictions(quick))
    run("replica", lambda: bench_replica(quick))
    run("replay", lambda: bench_replay(quick))
    run("round_trip", lambda: bench_round_trip(quick))
    report: dict[str, Any] = {"rows": rows, "peers": measure_peers(quick) if wanted in "peers" else {}}
    if wanted in "scaling":
        print("... scaling", file=sys.stderr)
        report["scaling"] = bench_scaling([10_000, 100_000] if quick else [10_000, 100_000, 1_000_000], quick)
    if wanted in "memory":
        print("... memory", file=sys.stderr)
        count = 100_000 if quick else 1_000_000
        report["memory"] = {f"{count:,} pages of {size} tokens": bench_memory(count, size) for size in ((16,) if quick else (16, 64))}
    return report


def print_report(report: dict[str, Any]) -> None:
    rows: dict[str, list[float]] = report["rows"]
    print(
        f"python {platform.python_version()}  numpy {np.__version__}  pyzmq {zmq.__version__}  msgpack {'.'.join(map(str, msgpack.version))}"
    )
    print(f"\n{'work':<58}{'reach us':>9}{'median us':>11}{'p90 us':>9}  peers, us (read, where not of this run)")
    for name, text, reach in REACH:
        samples = rows.get(name)
        if samples:
            ninth = sorted(samples)[int(len(samples) * 0.9)]
            own_run = ", ".join(f"{each} {median:,.0f}" for each, median in report["peers"].get(name, {}).items())
            peer = f"{own_run} (this run)" if own_run else PEERS.get(name, "")
            print(f"{text:<58}{'' if reach is None else f'{reach:.0f}':>9}{statistics.median(samples):>11.1f}{ninth:>9.1f}  {peer}")
    if "round_trip" in rows:
        ratio = statistics.median(rows["round_trip"]) / statistics.median(rows["raw_zmq"])
        print(f"{'round trip / raw ZMQ of this run (ratio)':<58}{'1.5 x':>9}{ratio:>9.2f} x")
    for name, peers in report["peers"].items():
        if name not in {row for row, *_ in REACH}:
            print(f"peers, {name}: " + ", ".join(f"{peer} {median:.1f} us" for peer, median in peers.items()))
    if rows.get("decode_4_bytes"):
        print(f"bytes of the log for the decode step with 4 crossings: {rows['decode_4_bytes'][0]:.0f}")
    for name, table in (("median us by pool size, half of it cached prompts of one page of 16 tokens", report.get("scaling")),):
        if table:
            print(f"\n{name}\n{'':<22}" + "".join(f"{each:>18}" for each in table))
            for row in next(iter(table.values())):
                print(f"{row:<22}" + "".join(f"{table[each][row]:>18.1f}" for each in table))
    for name, figures in report.get("memory", {}).items():
        print(f"\n{name}, all cached, no two alike: " + ", ".join(f"{key} {value:.1f}" for key, value in figures.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, small pools: half a minute")
    parser.add_argument("--json", action="store_true", help="medians as JSON, for plot_control and other programs")
    parser.add_argument("--rows", default="", help="only the parts whose name contains this (decode, hit, miss, free, evict, replica, ...)")
    parser.add_argument("--memory", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        memory_main(*options.memory)
        return
    report = measure(options.quick, options.rows)
    if options.json:
        report["rows"] = {name: statistics.median(samples) for name, samples in report["rows"].items()}
        print(json.dumps(report, indent=1))
    else:
        print_report(report)


if __name__ == "__main__":
    main()
