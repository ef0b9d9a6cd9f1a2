"""One captured CUDA graph serves every later step."""

import numpy as np
import torch

from kvmanager.attention.backend import MLABackend
from kvmanager.attention.compare import assert_close
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.memory import PageMemory
from kvmanager.attention.reference import decode
from kvmanager.tables import BatchTables


def test_captured_step_replays_growing_lengths_and_changing_tables_bitwise_like_eager() -> None:
    """A padded batch of 12, all layers' write and decode, captured once on an empty plan; 100 steps of other lengths, pages and batch sizes."""
    layout, graph_batch, heads, scale = LatentLayout(512, 64, 3, 64), 12, 128, 0.05
    generator = torch.Generator(device="cuda").manual_seed(1)
    rng = np.random.default_rng(1)
    memory = PageMemory(layout, 1200, "cuda")
    memory.pages.normal_(std=0.1, generator=generator)
    backend = MLABackend(memory, heads, scale, max_tokens=64, max_batch=16, max_pages=2048)
    latent = torch.empty((layout.num_layers, graph_batch, layout.entry), dtype=torch.bfloat16, device="cuda")
    q = torch.empty((layout.num_layers, graph_batch, heads, layout.entry), dtype=torch.bfloat16, device="cuda")

    def step(plan):
        results = []
        for layer in range(layout.num_layers):
            backend.write(plan, layer, latent[layer])
            results.append(backend.decode(plan, layer, q[layer]))
        return results

    def tables_at(version: int, lengths: np.ndarray) -> BatchTables:
        counts = -(-lengths // layout.page_size)
        ids = rng.permutation(memory.num_pages)[: counts.sum()].astype(np.int32)
        return BatchTables(version, layout.page_size, lengths.astype(np.int32), ids, np.concatenate([[0], np.cumsum(counts)]))

    empty = tables_at(0, np.zeros(0, np.int64))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        latent.zero_()
        q.zero_()
        step(backend.plan(empty, [], graph_batch=graph_batch))  # compiles
        plan = backend.plan(empty, [], graph_batch=graph_batch)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step(plan)
        lengths = np.array([1, 63, 64, 65, 500, 3000, 7, 900, 2, 128, 4000, 129])
        for version in range(1, 101):
            batch = int(rng.integers(1, graph_batch + 1))
            tables = tables_at(version, lengths[:batch] + version * rng.integers(0, 40, batch))
            latent.normal_(std=0.1, generator=generator)
            q.normal_(generator=generator)
            plan = backend.plan(tables, [1] * batch, graph_batch=graph_batch)
            for out, lse in captured:
                out.fill_(float("nan"))
                lse.fill_(float("nan"))
            graph.replay()
            replayed = [(out.clone(), lse.clone()) for out, lse in captured]
            eager = step(plan)
            for (out, lse), (want_out, want_lse) in zip(replayed, eager, strict=True):
                assert torch.equal(out, want_out) and torch.equal(lse, want_lse)
                assert (out[batch:] == 0).all() and torch.isneginf(lse[batch:]).all()
            if version % 20 == 1:
                for layer, (out, lse) in enumerate(replayed):
                    want = decode(q[layer, :batch], memory.layer(layer), tables, layout.kv_lora_rank, scale)
                    assert_close(out[:batch], lse[:batch], *want)
