"""Other people's decode kernels, for a run beside ours, where somebody has put them on PYTHONPATH. Nothing of them is part of this project.

FlashMLA: `vllm/_flashmla_C.abi3.so` and `vllm/third_party/flashmla/` of vLLM's wheel (0.33.0 was tried), beside empty `vllm/__init__.py` and
`vllm/third_party/__init__.py`, in a folder named in PYTHONPATH."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvmanager.attention.compare import Problem

__all__ = ["flashmla"]


def flashmla(problem: Problem, query_len: int) -> Callable[[int], object] | None:
    """A call of FlashMLA's decode on one layer; None where it is missing or does not take these dimensions."""
    layout = problem.memory.layout
    if (layout.kv_lora_rank, layout.qk_rope_head_dim, layout.page_size, layout.dtype) != (512, 64, 64, "bfloat16"):
        return None
    try:
        from vllm.third_party.flashmla.flash_mla_interface import flash_mla_with_kvcache, get_mla_metadata
    except ImportError:
        return None
    tables, device = problem.tables, problem.q.device
    used = [-(-int(length) // layout.page_size) for length in tables.lengths]
    table = torch.zeros((tables.batch, max(used)), dtype=torch.int32)
    for row, count in enumerate(used):
        table[row, :count] = torch.from_numpy(tables.pages_of(row)[:count].copy())
    table, lengths = table.to(device), torch.from_numpy(tables.lengths.copy()).to(device)
    caches = [problem.memory.layer(layer).contiguous().unsqueeze(2) for layer in range(layout.num_layers)]
    plan, _ = get_mla_metadata()  # filled by the first call, outside of the timing

    def call(layer: int) -> object:
        q = problem.q[layer].view(tables.batch, query_len, -1, layout.entry)
        return flash_mla_with_kvcache(q, caches[layer], table, lengths, 512, plan, None, softmax_scale=problem.scale, causal=True)

    return call
