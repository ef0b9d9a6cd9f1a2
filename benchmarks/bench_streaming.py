"""How long after a prompt's last layer its decode worker can go on: moved once it is computed, streamed while it is, and beginning on layer 0.

    python3 benchmarks/bench_streaming.py                       two cards: prefill on the first, decode on the last
    python3 benchmarks/bench_streaming.py --device cpu --tokens 1024,2048 --chunk 512 --heads 1 --hidden 64

Manager, workers, scheduler and transport are the example engine's; the model is not: layers of DeepSeek-V3's latent width that write, attend and
multiply as such a model does, with latents whose values say what they are. Each request is a prompt of random ids and
four generated tokens. Measured on the host's clock, which its processes share: from the end of the prompt's last layer, seen by the prefill worker,
to the begin of the first decode step on the decode worker; beside it what the scheduler sees, from the first token to the second, and a decode step,
from the third token to the fourth. With --group layers at a time on their way, "from layer 0" begins the first decode step as soon as layer 0 is
there and is taken once the rest is, so that what counts for it is the second token. The decode worker checks every latent that came. --trace prints
who did what when for the last request of each kind.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from kvmanager import KVClient, PoolConfig, Replica
from kvmanager.attention import LatentLayout, MLABackend
from kvmanager.attention.plan import Plan
from kvmanager.attention.transports.base import Pull as Transfer
from kvmanager.examples.engine.ahead import StepsAhead
from kvmanager.examples.engine.channel import SchedulerChannel, WorkerChannel
from kvmanager.examples.engine.launch import Fleet
from kvmanager.examples.engine.request import Request
from kvmanager.examples.engine.scheduler import Scheduler
from kvmanager.examples.engine.worker import Worker
from kvmanager.worker.replica import AckContent, Pull

RANK, ROPE = 512, 64
PAGE_SIZE = 64
GENERATED = 4
KINDS = WHOLE, STREAMED, EARLY = "moved when whole", "streamed", "streamed, from layer 0"
POOLS = ("prefill0", "decode0")


class Layers:
    """Stands where a model does: the work of `num_layers` layers, and latents that are a function of layer, position and place."""

    softmax_scale = (RANK + ROPE) ** -0.5

    def __init__(self, device: str, num_layers: int, heads: int, hidden: int, prompts: list[int]) -> None:
        self.num_heads, self.hidden = heads, hidden
        self.device, self.num_layers = torch.device(device), num_layers
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.weights = [torch.randn(hidden, 4 * hidden, device=device, dtype=self.dtype) * 0.02 for _ in range(2)]
        self.entry = torch.arange(RANK + ROPE, device=device)
        self.prompts = prompts

    def layout(self, page_size: int) -> LatentLayout:
        return LatentLayout(RANK, ROPE, self.num_layers, page_size, str(self.dtype).removeprefix("torch."))  # type: ignore[arg-type]

    def latents(self, layer: int, positions: Tensor) -> Tensor:
        """[tokens, 576]: numbers from -0.5 to 0.5 that hold 7 bits, so that bf16 has them exactly."""
        return (((positions[:, None] * 37 + layer * 11 + self.entry * 5) % 128) / 128 - 0.5).to(self.dtype)

    @torch.inference_mode()
    def forward(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        backend: MLABackend,
        plan: Plan,
        on_layer: Callable[[int], None] | None = None,
        before_layer: Callable[[int], None] | None = None,
        long_prefill: None = None,
    ) -> Tensor:
        where = torch.from_numpy(positions).to(self.device)
        q = torch.randn(plan.num_tokens, self.num_heads, RANK + ROPE, device=self.device, dtype=self.dtype)
        hidden = torch.randn(plan.num_tokens, self.hidden, device=self.device, dtype=self.dtype)
        for layer in range(self.num_layers):
            if before_layer is not None:
                before_layer(layer)
            backend.write(plan, layer, self.latents(layer, where))
            backend.decode(plan, layer, q[: plan.num_decode])
            backend.prefill(plan, layer, q[plan.num_decode :])
            hidden = torch.nn.functional.silu(hidden @ self.weights[0]) @ self.weights[1].T
            if on_layer is not None:
                on_layer(layer + 1)
        if plan.num_decode and len(tokens) == plan.num_decode == 1 and int(plan.lengths[0]) - (GENERATED - 1) in self.prompts:
            self.check(backend, plan)  # with the last token, so that no time that counts has it in it
        return torch.zeros(plan.batch, 8, device=self.device)

    def check(self, backend: MLABackend, plan: Plan) -> None:
        """Every slot of the sequence in every layer, prompt and generated."""
        length = int(plan.lengths[0])
        table = plan.pages_of(0)
        ids = torch.from_numpy(plan.page_ids[table]) if plan.device is None else plan.device.pages_at(table)
        pages = ids.long().to(self.device)
        where = torch.arange(length, device=self.device)
        for layer in range(self.num_layers):
            got = backend.memory.layer(layer)[pages].flatten(0, 1)[:length]
            wrong = (got != self.latents(layer, where)).any(1).nonzero().flatten().tolist()
            if wrong:
                found = got[wrong[0], :8].tolist()
                raise SystemExit(
                    f"layer {layer}: {len(wrong)} of {length} latents are not those that were written, tokens {wrong[0]} to {wrong[-1]}; "
                    f"the first begins with {found}, expected {self.latents(layer, where[wrong[:1]])[0, :8].tolist()}"
                )


class TracedSteps(StepsAhead):
    def _wait(self, handoff: int, layer: int) -> None:
        super()._wait(handoff, layer)
        if layer == 0:
            self._worker.note("begin", 1, "ahead")  # type: ignore[attr-defined]

    def _compute(self, *args: Any) -> Tensor | None:
        logits = super()._compute(*args)
        self._worker.note("ran ahead" if logits is not None else "gave way")  # type: ignore[attr-defined]
        return logits


class TracedWorker(Worker):
    """Writes down when its steps begin and end, and when pages begin to move and have arrived: lines of seconds, pool and words."""

    trace: TextIO
    early: Path  # a file: pull by layers while it is there

    def pull(self) -> None:
        self.replica.pull_by_layers(self.model.num_layers, self.stream_layers if self.early.exists() else 0)
        super().pull()

    def note(self, *words: object) -> None:
        print(f"{time.monotonic():.6f}", self.pool, *words, file=self.trace)

    def run_next(self) -> bool:
        if ready := self.replica.ready(self.runs[0]["version"]):
            self.note("begin", sum(len(item[2]) // 4 for item in self.runs[0]["items"]))
        self.trace.flush()
        done = super().run_next()
        if ready:
            self.trace.flush()
        return done

    def finished(self, version: int, sequences: list[int]) -> None:
        self.note("end")
        Replica.finish(self.replica, version, sequences)

    def begin_pull(self, pull: Pull) -> None:
        self.note("pulls", pull.tokens, "tokens of layers", *pull.layers(self.memory.layout.num_layers), "early" if pull.early else "")
        super().begin_pull(pull)

    def end_pull(self, pull: Pull, transfer: Transfer) -> None:
        self.note("pulled")
        super().end_pull(pull, transfer)

    def send_ack(self, content: AckContent) -> None:
        super().send_ack(content)
        self.note("acknowledged")


class BenchFleet(Fleet):
    """The engine's processes, with this file for a worker."""

    def start(self, pool: str, device: str, args: argparse.Namespace) -> None:
        own = ["--as-worker", pool, "--device", device, "--trace-file", str(self.folder / f"{pool}.trace")]
        for name in ("layers", "chunk", "group", "heads", "hidden", "tokens"):
            own += [f"--{name}", str(getattr(args, name))]
        self._start(pool, [os.path.abspath(__file__), *own, "--manager", self.manager_address, "--scheduler", self.scheduler_address])


def work(args: argparse.Namespace) -> None:
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    torch.set_num_threads(1)
    channel = WorkerChannel(args.scheduler, args.as_worker)
    with KVClient(args.manager, timeout_ms=30_000, resend_ms=200) as client:
        model: Any = Layers(args.device, args.layers, args.heads, args.hidden, [int(each) for each in args.tokens.split(",")])
        worker = TracedWorker(
            model, client, channel, args.as_worker,
            max_tokens=args.chunk, max_batch=4, lease_ms=60_000, keep_logits=False, stream_layers=args.group,
        )  # fmt: skip
        worker.trace = open(args.trace_file, "w")  # noqa: SIM115  (closed with the process)
        worker.early = Path(args.trace_file).parent / "early"
        worker.ahead = TracedSteps(worker)
        worker.replica.finish = worker.finished  # type: ignore[method-assign]
        try:
            worker.serve()
        finally:
            worker.follower.close()
            worker.memory.close()


def run(scheduler: Scheduler, tokens: int, kind: str, rng: np.random.Generator) -> Request:
    scheduler.stream, scheduler.decode_early = kind != WHOLE, kind == EARLY
    early, before = scheduler.supervisor.folder / "early", scheduler.early_tokens  # type: ignore[attr-defined]
    if kind == EARLY:
        early.touch()
    else:
        early.unlink(missing_ok=True)
    request = scheduler.submit(rng.integers(0, 30_000, tokens).tolist(), GENERATED)
    deadline = time.monotonic() + 120
    while not scheduler.idle:
        scheduler.turn(1)
        if time.monotonic() > deadline:
            raise SystemExit(f"{tokens} tokens: not served within 120 s: {request}"[:600])
    if request.error or request.lost or request.moves != 1:
        raise SystemExit(f"{tokens} tokens: {request.error or 'lost, or not moved'}")
    if kind == EARLY and scheduler.early_tokens == before:
        print(f"{tokens} tokens: what was run ahead was not taken, or was not begun")
    return request


def trace_of(fleet: Fleet, since: float) -> list[tuple[float, str, str]]:
    """What the workers wrote down after `since`, in the order of time: seconds, pool, words."""
    lines = []
    for pool in POOLS:
        for line in (fleet.folder / f"{pool}.trace").read_text().splitlines():
            at, name, words = line.split(" ", 2)
            if float(at) >= since:
                lines.append((float(at), name, words))
    return sorted(lines)


def gap_of(trace: list[tuple[float, str, str]]) -> tuple[float, float]:
    """When the prompt's last step ended, and when the first decode step began."""
    end = max(at for at, pool, words in trace if pool == POOLS[0] and words == "end")
    return end, min(at for at, pool, words in trace if pool == POOLS[1] and words.startswith("begin"))


def measure(args: argparse.Namespace, lengths: list[int]) -> list[dict[str, Any]]:
    devices = [args.device] * 2 if args.device == "cpu" else ["cuda:0", f"cuda:{torch.cuda.device_count() - 1}"]
    pages = -(-(max(lengths) + GENERATED) // PAGE_SIZE) + 4
    rows = []
    with BenchFleet() as fleet:
        try:
            pools = [PoolConfig(pool, pages, PAGE_SIZE, pool[:-1]) for pool in POOLS]
            fleet.start_manager(pools, lease_ms=60_000, handoff_prefill_ms=60_000)  # a first step compiles for a while
            client, channel = KVClient(fleet.manager_address, timeout_ms=30_000, resend_ms=200), SchedulerChannel(fleet.scheduler_address)
            for pool, device in zip(POOLS, devices, strict=True):
                fleet.start(pool, device, args)
            scheduler = Scheduler(
                client, channel, fleet, {pool: pool[:-1] for pool in POOLS}, page_size=PAGE_SIZE, chunk_tokens=args.chunk, on_event=print
            )
            scheduler.wait_ready(180)
            rng = np.random.default_rng(0)
            for tokens in lengths:
                times: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in KINDS}
                for repeat in range(args.repeats + 1):
                    for kind in KINDS:
                        request = run(scheduler, tokens, kind, rng)
                        at = request.token_times
                        trace = trace_of(fleet, request.submitted)
                        end, begin = gap_of(trace)
                        if repeat:  # the first of each kind compiles and maps
                            times[kind].append((begin - end, at[1] - at[0], at[3] - at[2], at[0] - request.submitted))
                        if args.trace and repeat == args.repeats:
                            print(*(f"{(when - end) * 1e3:10.2f} ms  {pool:>8}  {words}" for when, pool, words in trace), sep="\n")
                for kind, each in times.items():
                    gap, second, step, first = (float(np.median([row[which] for row in each])) * 1e3 for which in range(4))
                    rows.append({"tokens": tokens, "kind": kind, "streamed": kind != WHOLE, "gap_ms": gap, "second_token_ms": second, "decode_step_ms": step,
                                 "first_token_ms": first, "gaps_ms": [row[0] * 1e3 for row in each]})  # fmt: skip
                    print(
                        f"{tokens:>7} tokens  {kind:>22}  last layer to first decode step {gap:8.2f} ms  "
                        f"first token after {first:9.1f} ms, second {second:8.1f} ms after it, a decode step {step:6.1f} ms",
                        flush=True,
                    )
            channel.close()
            client.disconnect()
        except BaseException:
            if args.trace:
                print(*(f"{at:.6f}  {pool:>8}  {words}" for at, pool, words in trace_of(fleet, 0)), sep="\n", file=sys.stderr)
            print(fleet.log("prefill0"), fleet.log("decode0"), sep="\n", file=sys.stderr)
            raise
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda (two cards, or one for both), or cpu")
    parser.add_argument("--tokens", default="8192,32768", help="prompt lengths")
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--group", type=int, default=8, help="layers after which progress is told")
    parser.add_argument("--chunk", type=int, default=8192, help="prompt tokens a step")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--trace", action="store_true", help="print who did what when, for the last request of each kind")
    for name in ("--as-worker", "--manager", "--scheduler", "--trace-file"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_worker:
        return work(args)
    lengths = [int(each) for each in args.tokens.split(",")]
    cards = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if args.device != "cpu" else "cpu"
    print(
        f"{cards}  torch {torch.__version__}  python {platform.python_version()}  {args.layers} layers, chunks of {args.chunk}, groups of {args.group}"
    )
    rows = measure(args, lengths)
    if args.json:
        args.json.write_text(json.dumps({"cards": cards, "torch": torch.__version__, "layers": args.layers, "chunk": args.chunk,
                                         "group": args.group, "rows": rows}, indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
