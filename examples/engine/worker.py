"""A worker process: owns page memory and a copy of the model, follows the manager's log, runs the steps it is told to.

Prefill and decode workers are the same program; what they are given to do differs. One loop, no threads: take in the log, pull pages
that are to move here, acknowledge, run the next step.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import Any

import click
import msgpack
import numpy as np
import torch
import zmq

from kvmanager import BatchTables, Follower, KVClient, Replica
from kvmanager.attention import LongPrefill, MLABackend, PageMemory, PeerMemory
from kvmanager.attention.choice import choose_library, choose_prefill
from kvmanager.attention.transports.base import Pull as Transfer
from kvmanager.attention.transports.base import PullState
from kvmanager.errors import Fenced, KVError, PullFailed, StaleEpoch, StaleStep
from kvmanager.examples.engine.ahead import StepsAhead
from kvmanager.examples.engine.channel import WorkerChannel
from kvmanager.examples.engine.model import LatentModel
from kvmanager.worker.replica import AckContent, Pull

__all__ = ["EXIT_FENCED", "Worker", "main"]

LAYER_GROUP = 8  # in which pages come for a decode step that waits for them, if prompts are not streamed in groups anyway
EXIT_FENCED = 3  # the manager took this worker for dead, or knows nothing of what it did: it has stopped touching pages and ends


class Worker:
    """model, page memory and backend of one pool, and the replica that says what is where."""

    def __init__(
        self,
        model: LatentModel,
        client: KVClient,
        channel: WorkerChannel,
        pool: str,
        *,
        max_tokens: int,
        max_batch: int,
        lease_ms: int,
        keep_logits: bool,
        stream_layers: int = 0,
        decode_early: bool = False,
    ) -> None:
        self.model, self.client, self.channel, self.pool = model, client, channel, pool
        self.keep_logits, self.stream_layers = keep_logits, stream_layers
        shape = client.stats()["pools"][pool]
        pages = shape["pages"]["total"]
        self.memory = PageMemory(model.layout(shape["page_size"]), pages, model.device)
        self.backend = MLABackend(
            self.memory, model.num_heads, model.softmax_scale, max_tokens, max_batch, max_pages=pages * max_batch, sequence_pages=pages
        )
        self.long_prefill = long_prefill_for(model, self.backend, max_tokens)
        self.warm_up(min(max_tokens, shape["page_size"] * pages) // 2)
        # Follow first, join then: nothing that happens to this worker's pool can be missed.
        self.replica = Replica(pool)
        self.ahead = StepsAhead(self)
        if decode_early:
            self.replica.pull_by_layers(model.num_layers, stream_layers or LAYER_GROUP)
        self.follower = Follower(client, self.replica)
        memory = msgpack.packb(self.memory.export())
        self.worker_id = client.join(
            pool, pool, self.memory.layout.fingerprint, memory=memory, lease_ms=lease_ms, page_bytes=self.memory.layout.page_bytes
        )
        self.replica.joined(self.worker_id)
        self.renew_s = lease_ms / 1000 / 4
        self.acked_at = time.monotonic()
        self.peers: dict[int, PeerMemory] = {}
        self.pulling: dict[int, tuple[Pull, Transfer]] = {}
        self.runs: deque[dict[str, Any]] = deque()
        channel.send({"t": "ready", "pool": pool, "worker": self.worker_id, "epoch": client.epoch_of(self.worker_id), "pid": os.getpid()})

    def warm_up(self, tokens: int) -> None:
        """Have all kernels compiled and loaded before the first request waits for them. No page holds anything yet."""
        if self.long_prefill is not None:
            self.long_prefill.warm_up(self.backend.limits.max_tokens)
        size = self.memory.layout.page_size
        lengths = np.array([1, max(2, tokens)], np.int32)
        counts = -(-lengths // size)
        tables = BatchTables(0, size, lengths, np.arange(counts.sum(), dtype=np.int32), np.array([0, counts[0], counts.sum()], np.int64))
        if counts.sum() > len(self.memory.pages):
            return  # a pool of a page or two: for tests
        for rows in (tables, BatchTables(0, size, lengths[:1], tables.page_ids[: counts[0]], tables.page_indptr[:2])):
            query_lens = rows.lengths  # everything is new
            plan = self.backend.plan(rows, query_lens)
            positions = np.concatenate([np.arange(length) for length in query_lens])
            self.model.forward(np.zeros(plan.num_tokens, np.int64), positions, self.backend, plan).argmax(-1).tolist()

    def serve(self) -> None:
        """Work until told to stop, or until the scheduler's process is gone."""
        parent = os.getppid()
        poller = zmq.Poller()
        poller.register(self.channel.socket, zmq.POLLIN)
        poller.register(self.follower.socket, zmq.POLLIN)
        while os.getppid() == parent:
            poller.poll(1 if self.pulling or self.replica.pulls() or self.ahead else int(self.renew_s * 500))
            self.follower.poll(0)
            self.copy()
            self.pull()
            for message in self.channel.receive():
                if message["t"] == "stop":
                    return
                if message["t"] == "run":
                    self.runs.append(message)
                elif message["t"] == "ahead":
                    self.ahead.ask(message)
                elif message["t"] == "dump":
                    self.dump(message["sequence"])
            while self.runs and self.run_next():
                self.follower.poll(0)
                self.copy()
                self.pull()
            if not self.runs:
                self.ahead.run()
            self.acknowledge()

    # --- steps ---------------------------------------------------------------------------------------------------------------

    def run_next(self) -> bool:
        """Run the oldest step if the replica has reached it; whether it is done with."""
        run = self.runs[0]
        version = run["version"]
        try:
            if not self.replica.ready(version):
                return False
        except StaleStep:
            self.runs.popleft()
            self.channel.send({"t": "stale", "version": version})
            return True
        self.runs.popleft()
        items = run["items"]
        ahead = self.ahead.take(version, items)
        logits = self.compute(version, [item for item in items if item[0] not in ahead])
        if ahead:
            computed = iter(logits)
            logits = torch.stack([ahead[item[0]] if item[0] in ahead else next(computed) for item in items])
        wanted = [row for row, item in enumerate(items) if item[3]]
        picked = logits[wanted]
        chosen = picked.argmax(-1).tolist()
        self.wait_for_device()  # a prompt's middle wants no token, so nothing has waited for it yet: from here on the step has been run
        self.replica.finish(version, [item[0] for item in items])
        # Acknowledged before the scheduler hears of it, so that what it does next finds these pages shareable and movable.
        self.acknowledge()
        out = [[items[row][0], token] for row, token in zip(wanted, chosen, strict=True)]
        data = picked.cpu().numpy().astype("<f4").tobytes() if self.keep_logits else b""
        self.channel.send({"t": "done", "version": version, "out": out, "logits": data, "ahead": len(ahead)})
        return True

    def compute(self, version: int, items: list[list[Any]]) -> torch.Tensor:
        """Logits [items, vocab] of each item's last token."""
        if not items:
            return torch.empty((0, 0))
        tokens = [np.frombuffer(item[2], "<i4") for item in items]
        tables = self.replica.batch_rows(version, [item[0] for item in items])
        plan = self.backend.plan(tables, [len(each) for each in tokens])
        positions = np.concatenate([np.arange(item[1], item[1] + len(each)) for item, each in zip(items, tokens, strict=True)])
        progress = LayerProgress(self, version, [item[0] for item in items])
        token_ids = np.concatenate(tokens).astype(np.int64)
        logits = self.model.forward(token_ids, positions, self.backend, plan, progress.on_layer, long_prefill=self.long_prefill)
        progress.wait()
        return logits

    def acknowledge(self) -> None:
        """Tell the manager what is finished, if it owes anything, and renew the lease in time."""
        content = self.replica.ack()
        if content is None and time.monotonic() - self.acked_at > self.renew_s:
            content = self.replica.renewal()
        if content is not None:
            self.send_ack(content)

    def send_ack(self, content: AckContent) -> None:
        self.client.ack(self.worker_id, **content._asdict())
        self.acked_at = time.monotonic()

    def copy(self) -> None:
        """Make the copies that forked, truncated and partly cached sequences need, before anything else is run."""
        while (copies := self.replica.copies()) is not None:
            self.memory.copy_pages(copies.source_pages, copies.target_pages, copies.tokens)
            self.wait_for_device()
            self.replica.copied(copies.version)

    def wait_for_device(self) -> None:
        """Until what was launched has been done. What is acknowledged may be read by another process at once."""
        if self.memory.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    # --- pages ---------------------------------------------------------------------------------------------------------------

    def pull(self) -> None:
        """Have the pages of sequences that are moving here copied, all at once and beside the steps, and say so as they arrive."""
        wanted = {pull.handoff: pull for pull in self.replica.pulls()}
        for pull in wanted.values():
            if pull.handoff not in self.pulling:
                self.begin_pull(pull)
        for handoff, (pull, transfer) in list(self.pulling.items()):
            if handoff not in wanted or self.has_ended(pull.peer.worker):
                transfer.cancel()  # aborted, or soon to be: its pages are held until it has really ended
            transfer.poll()
            if transfer.settled:
                del self.pulling[handoff]
                self.end_pull(pull, transfer)
        for worker in [each for each in self.peers if self.replica.leaving.get(each)]:
            self.peers.pop(worker).gone()  # its process is known dead: nothing to wait for
        for worker in [each for each in self.peers if each not in self.replica.peers]:
            if not any(pull.peer.worker == worker for pull, _ in self.pulling.values()):
                self.peers.pop(worker).close()

    def has_ended(self, peer: int) -> bool:
        """Whether the manager has fenced that worker or knows it dead, even if a step stands before the batch that says so."""
        return peer in self.replica.leaving or peer not in self.replica.peers

    def begin_pull(self, pull: Pull) -> None:
        self.replica.begin_pull(pull.handoff)
        if not pull.tokens:
            self.replica.pulled(pull.handoff)  # nothing of it was written, or the pool has all of it
            return
        try:
            peer = self.peers.get(pull.peer.worker)
            if self.has_ended(pull.peer.worker):
                raise PullFailed("any", f"worker {pull.peer.name} has ended")
            if peer is None:
                peer = self.peers[pull.peer.worker] = self.memory.open_peer(msgpack.unpackb(pull.peer.memory))
                click.echo(f"worker {self.pool}: pages of {pull.peer.name} come by {peer.choice}", err=True)
                self.replica.linked(pull.peer.worker, peer.choice.transport, str(peer.choice).split(": ", 1)[1])
            options: dict[str, Any] = {"layers": pull.layers(self.memory.layout.num_layers)}
            if pull.source_page_size != pull.target_page_size:
                options |= {"tokens": pull.tokens, "source_skip": pull.source_skip}
            transfer = self.memory.begin_pull(peer, pull.source_pages, pull.target_pages, **options)
        except (KVError, OSError, RuntimeError) as error:  # the source may have died this moment: that is its end, not ours
            self.pull_failed(pull, error)
        else:
            self.pulling[pull.handoff] = pull, transfer

    def end_pull(self, pull: Pull, transfer: Transfer) -> None:
        """Nothing of it can land any more."""
        if transfer.state is not PullState.DONE:
            self.pull_failed(pull, transfer.error or f"the pull was {transfer.state.value}")
            return
        self.replica.pulled(pull.handoff)
        self.acknowledge()
        self.channel.send({"t": "pulled", "handoff": pull.handoff, "early": pull.early})

    def pull_failed(self, pull: Pull, error: object) -> None:
        self.replica.pull_failed(pull.handoff, f"pages of {pull.peer.name}: {error}"[:500])
        self.acknowledge()
        self.channel.send({"t": "pulled", "handoff": pull.handoff})

    def dump(self, sequence: int) -> None:
        """Send a sequence's latents as they lie in its pages: float32 [layers, tokens, entry]."""
        table = self.replica.tables
        pages = torch.from_numpy(table.pages_of(sequence).astype(np.int64)).to(self.model.device)
        latents = self.memory.pages[pages].transpose(0, 1).flatten(1, 2)[:, : table.length(sequence)].float().cpu()
        data = latents.numpy().astype("<f4").tobytes()
        self.channel.send({"t": "latents", "sequence": sequence, "data": data, "shape": list(latents.shape)})


def long_prefill_for(model: LatentModel, backend: MLABackend, max_tokens: int) -> LongPrefill | None:
    """Expanded heads for long chunks of prompts (docs/prefill.md), if a step may be long enough to gain by them. None on the CPU, where the
    text is compared with transformers' to the bit and nothing is gained, and its workspace is not made."""
    layout, device = backend.layout, backend.memory.device
    if device.type != "cuda" or not isinstance(model, LatentModel):  # what stands in for a model, in a benchmark, attends by itself
        return None
    arch = torch.cuda.get_device_capability(device)
    nope, v = model.qk_nope_head_dim, model.v_head_dim
    library = choose_library(layout.value_dtype, nope + layout.qk_rope_head_dim, v, arch[0] * 10 + arch[1]).kernel
    longest = np.array([max_tokens])
    dims = (layout.kv_lora_rank, layout.qk_rope_head_dim, nope, v)
    if choose_prefill(backend.kernel, library, backend.num_heads, dims, longest, longest).kernel != "expanded":
        return None
    return LongPrefill(backend, nope, v)


class LayerProgress:
    """How far a step's layers are, told to the manager group by group while the later ones are computed, if somebody pulls them already.

    On a GPU an event is recorded behind each group: what a peer may read is what the device has written, not what was launched."""

    def __init__(self, worker: Worker, version: int, sequences: list[int]) -> None:
        self._worker, self._version = worker, version
        streaming = worker.replica.streaming() if worker.stream_layers else []
        self._sequences = [each for each in sequences if each in streaming]
        self._events: deque[tuple[int, torch.cuda.Event]] = deque()

    def on_layer(self, layers: int) -> None:
        num_layers = self._worker.memory.layout.num_layers
        if not self._sequences or layers == num_layers or layers % self._worker.stream_layers:
            return  # the last group is told with the step
        if self._worker.memory.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._events.append((layers, event))
            self._tell(waiting=False)
        else:
            self._say(layers)

    def wait(self) -> None:
        """Everything is launched: tell the rest as the device gets there."""
        self._tell(waiting=True)

    def _tell(self, waiting: bool) -> None:
        done = 0
        while self._events and (waiting or self._events[0][1].query()):
            done, event = self._events.popleft()
            event.synchronize()
            if waiting:
                self._say(done)
        if done and not waiting:
            self._say(done)

    def _say(self, layers: int) -> None:
        self._worker.replica.layers_written(self._version, self._sequences, layers)
        self._worker.acknowledge()


@click.command(help="A prefill or decode worker of the example engine; started by it.")
@click.option("--model", required=True, type=click.Path(exists=True, file_okay=False), help="checkpoint directory")
@click.option("--pool", required=True, help="the manager's pool whose pages this worker holds")
@click.option("--manager", required=True, help="the manager's request address")
@click.option("--scheduler", required=True, help="the scheduler's address")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16", "float16"]))
@click.option("--max-tokens", default=256, show_default=True, help="tokens of one step")
@click.option("--max-batch", default=256, show_default=True, help="sequences of one step")
@click.option("--lease-ms", default=10_000, show_default=True, help="silence after which the manager fences this worker")
@click.option("--stream-layers", default=0, show_default=True, help="layers after which what is written is told to those who pull already")
@click.option("--decode-early", is_flag=True, help="pull layer by layer, for a first decode step that begins before the last one is here")
@click.option("--keep-logits", is_flag=True, help="send logits along, for comparison")
def main(
    model: str,
    pool: str,
    manager: str,
    scheduler: str,
    device: str,
    dtype: str,
    max_tokens: int,
    max_batch: int,
    lease_ms: int,
    keep_logits: bool,
    stream_layers: int,
    decode_early: bool,
) -> None:
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # kernels are launched on the current device, not on that of their arguments
    torch.set_num_threads(1)  # several workers share the host's cores; OpenMP threads that wait for each other by spinning do not
    channel = WorkerChannel(scheduler, pool)
    try:
        with KVClient(manager, timeout_ms=30_000, resend_ms=200) as client:
            loaded = LatentModel.load(model, device, getattr(torch, dtype))
            worker = Worker(
                loaded,
                client,
                channel,
                pool,
                max_tokens=max_tokens,
                max_batch=max_batch,
                lease_ms=lease_ms,
                keep_logits=keep_logits,
                stream_layers=stream_layers,
                decode_early=decode_early,
            )
            try:
                worker.serve()
            finally:
                worker.follower.close()
                worker.memory.close()
    except (Fenced, StaleEpoch) as error:
        click.echo(f"worker {pool}: {error}", err=True)
        sys.exit(EXIT_FENCED)
    except KVError as error:
        channel.send({"t": "failed", "error": str(error)})
        click.echo(f"worker {pool}: {error}", err=True)
        sys.exit(1)
    finally:
        channel.close()


if __name__ == "__main__":
    main()
