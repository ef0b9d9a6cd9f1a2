"""Other people's decode kernels, for a run beside ours, where somebody has put them on PYTHONPATH. Nothing of them is part of this project.

FlashMLA: `vllm/_flashmla_C.abi3.so` and `vllm/third_party/flashmla/` of vLLM's wheel (0.33.0 was tried), beside empty `vllm/__init__.py` and
`vllm/third_party/__init__.py`, in a folder named in PYTHONPATH.

FlashInfer: its package with its `data` folder (0.3.1's source archive was tried: `include`, `csrc`, `3rdparty/cutlass` and `3rdparty/spdlog` moved into
`flashinfer/data`), and what it imports, in a folder named in PYTHONPATH. It compiles its kernel with nvcc at its first use, a minute or two."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvmanager.attention.compare import Problem

__all__ = ["flashinfer", "flashmla", "flashmla_all_slots", "flashmla_listed"]

FLASHINFER_WORKSPACE_BYTES = 128 << 20  # what its documentation recommends


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


def flashmla_listed(problem: Problem, lists: list[torch.Tensor], queries: torch.Tensor | None = None) -> Callable[[int], object] | None:
    """A call of FlashMLA's sparse decode on one of `lists` [tokens, topk], slots of an fp8_ds_mla cache; None where it is missing or does not take it.

    queries: other ones than the problem's."""
    queries = problem.q if queries is None else queries
    layout, (tokens, heads) = problem.memory.layout, queries.shape[1:3]
    if layout.dtype != "fp8_ds_mla" or layout.page_size != 64 or heads not in (64, 128):
        return None
    try:
        from vllm.third_party.flashmla.flash_mla_interface import flash_mla_with_kvcache, get_mla_metadata
    except ImportError:
        return None
    caches = [problem.memory.layer(layer).contiguous().unsqueeze(2) for layer in range(layout.num_layers)]
    plan, _ = get_mla_metadata()

    def call(index: int) -> object:
        layer = index % layout.num_layers
        q, listed = queries[layer].view(tokens, 1, heads, layout.entry), lists[index].view(tokens, 1, -1)
        return flash_mla_with_kvcache(
            q, caches[layer], None, None, 512, plan, softmax_scale=problem.scale, is_fp8_kvcache=True, indices=listed
        )

    return call


def flashmla_all_slots(problem: Problem, query_len: int) -> Callable[[int], object] | None:
    """FlashMLA's sparse decode, the only one of fp8_ds_mla that it has for Hopper, with a list of all of a sequence's slots for each.

    It takes 64 or 128 heads: fewer are filled up with random ones, whose work it does too."""
    layout, tables, (num_layers, _, heads, entry) = problem.memory.layout, problem.tables, problem.q.shape
    lengths = set(tables.lengths.tolist())
    if query_len > 1 or heads > 128 or len(lengths) > 1 or min(lengths) % 64 or layout.dtype != "fp8_ds_mla":
        return None
    position = torch.arange(min(lengths), dtype=torch.int32)
    page, offset = position // layout.page_size, position % layout.page_size
    lists = [torch.from_numpy(tables.pages_of(row).copy())[page] * layout.page_size + offset for row in range(tables.batch)]
    queries = torch.randn((num_layers, tables.batch, 64 if heads <= 64 else 128, entry), device=problem.q.device).to(problem.q.dtype)
    queries[:, :, :heads] = problem.q
    return flashmla_listed(problem, [torch.stack(lists).to(problem.q.device)] * num_layers, queries)


def flashinfer(problem: Problem, query_len: int) -> Callable[[int], object] | None:
    """A call of FlashInfer's paged MLA attention (its kernel for Hopper) on one layer; None where it is missing or does not take these dimensions."""
    layout = problem.memory.layout
    if (layout.kv_lora_rank, layout.qk_rope_head_dim, layout.dtype) != (512, 64, "bfloat16"):
        return None
    try:
        from flashinfer.mla import BatchMLAPagedAttentionWrapper
    except ImportError:
        return None
    tables, device = problem.tables, problem.q.device
    used = -(-tables.lengths.astype("int64") // layout.page_size)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int32), torch.from_numpy(used).cumsum(0).int()])
    pages = torch.cat([torch.from_numpy(tables.pages_of(row)[: int(count)].copy()) for row, count in enumerate(used)]).int()
    lengths = torch.from_numpy(tables.lengths.copy()).int()
    queries = torch.arange(tables.batch + 1, dtype=torch.int32) * query_len
    heads, rank, rope, size = problem.q.shape[2], layout.kv_lora_rank, layout.qk_rope_head_dim, layout.page_size
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device), backend="fa3")
    on_device = [each.to(device) for each in (queries, indptr, pages, lengths)]
    wrapper.plan(*on_device, heads, rank, rope, size, query_len > 1, problem.scale, torch.bfloat16, torch.bfloat16)
    caches = [problem.memory.layer(layer).contiguous().split([rank, rope], dim=-1) for layer in range(layout.num_layers)]

    def call(layer: int) -> object:
        q_nope, q_pe = problem.q[layer].split([rank, rope], dim=-1)
        return wrapper.run(q_nope, q_pe, *caches[layer], return_lse=True)

    return call
