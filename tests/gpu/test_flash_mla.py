"""kvmanager.compat.flash_mla on CUDA: FlashMLA's whole list of dense decode tests with its tolerances, capture, and no wait for the device."""

import pytest
import torch

from kvmanager.attention.choice import Choice
from kvmanager.compat.flash_mla import flash_mla_with_kvcache, get_mla_metadata
from tests.attention.flash_mla_grid import Case, corners, grid, listed, run, run_listed


@pytest.mark.parametrize("batch", [1, 2, 6, 64])
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_list_of_flashmla(batch: int, tokens: int) -> None:
    """KV 20, 140, 4,096; 1 to 128 heads; 1, 2, 3, 8 KV heads; ragged; causal."""
    for seed, case in enumerate(grid(batch, tokens)):
        run(case, "cuda", seed=seed)


def test_corners_of_flashmlas_list() -> None:
    """128 sequences, half of them empty."""
    for seed, case in enumerate(corners()):
        run(case, "cuda", (torch.bfloat16, torch.float16)[seed % 2], seed)


@pytest.mark.parametrize("batch", [4, 74])
def test_list_of_flashmla_of_listed_slots(batch: int) -> None:
    """head_dim 576, fp8: pages of 2 to 576 slots, lists of 64 to 2,048; few heads and a cache of q's dtype beside them."""
    for seed, case in enumerate(listed(batch) if batch == 4 else listed(batch)[::9]):
        run_listed(case, "cuda", seed=seed)
        if seed % 5 == 0:
            run_listed(case._replace(heads=(1, 16, 40)[seed % 3]), "cuda", seed % 2 == 0, (torch.bfloat16, torch.float16)[seed % 2], seed)


def test_plain_kernel_serves_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other cards get."""
    monkeypatch.setattr("kvmanager.attention.choice.choose_kernel", lambda *_: Choice("triton", "a test"))
    for seed, case in enumerate([*grid(2, 1)[::5], *grid(6, 4)[::5]]):
        run(case, "cuda", seed=seed)


def test_schedule_is_made_on_the_device_and_serves_a_captured_graph() -> None:
    """Lengths change between replays: the schedule is part of the graph. No call waits for the device."""
    batch, heads = 5, 16
    q = torch.randn(batch, 1, heads, 576, device="cuda").bfloat16()
    caches = torch.randn(2, 200, 64, 1, 576, device="cuda").bfloat16() / 10
    table = torch.randperm(200, device="cuda").int().view(batch, 40)
    lengths = torch.tensor([1, 100, 2000, 0, 64], dtype=torch.int32, device="cuda")

    def step() -> list[tuple[torch.Tensor, torch.Tensor]]:
        meta, splits = get_mla_metadata()
        return [flash_mla_with_kvcache(q, cache, table, lengths, 512, meta, splits, causal=True) for cache in caches]

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        step()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
    for values in ([1, 100, 2000, 0, 64], [2560, 0, 1, 2559, 700], [0, 0, 0, 0, 0]):
        lengths.copy_(torch.tensor(values, dtype=torch.int32))
        graph.replay()
        for (out, lse), (want_out, want_lse) in zip(captured, step(), strict=True):
            assert torch.equal(out, want_out) and torch.equal(lse, want_lse)
            assert torch.isposinf(lse[lengths == 0]).all() and not out[lengths == 0].any()


@pytest.mark.parametrize("kernel", ["chosen", "triton"])
@pytest.mark.parametrize("tokens,heads,kv_heads,causal", [(1, 16, 1, True), (1, 128, 1, True), (4, 40, 1, True), (2, 16, 2, False)])
def test_batch_invariance_and_out(
    tokens: int, heads: int, kv_heads: int, causal: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence alone and in two batches: the same bits, right ones, where the caller wants them. Without it, the long ones are cut."""
    if kernel == "triton":
        monkeypatch.setattr("kvmanager.attention.choice.choose_kernel", lambda *_: Choice("triton", "a test"))
    lengths = [5000, 64, 0, 9000, 130, 5000]
    q = torch.randn(6, tokens, heads, 576, device="cuda").bfloat16()
    cache = torch.randn(600, 64, kv_heads, 576, device="cuda").bfloat16() / 10
    table = torch.randperm(600, device="cuda")[:600].int().view(6, 100)[:, :100]
    table = torch.cat([table, table.flip(1)], 1).contiguous()

    def run(rows: list[int], out: torch.Tensor | None = None, invariant: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        meta, splits = get_mla_metadata()
        given = torch.tensor([lengths[row] for row in rows], dtype=torch.int32, device="cuda")
        return flash_mla_with_kvcache(
            q[rows], cache, table[rows], given, 512, meta, splits, causal=causal, out=out, enable_batch_invariant=invariant
        )

    place = torch.full((6, tokens, heads, 512), float("nan"), device="cuda", dtype=torch.bfloat16)
    out, lse = run(list(range(6)), place)
    assert out.data_ptr() == place.data_ptr()
    for rows in ([0], [3], [5, 2, 1], [3] * 5 + [4], [0, 3]):
        part, part_lse = run(rows)
        assert torch.equal(part, out[rows]) and torch.equal(part_lse, lse[rows])
    free, free_lse = run(list(range(6)), invariant=False)
    assert (free.float() - out.float()).abs().max() < 1e-2 and (free_lse - lse).nan_to_num(nan=0.0).abs().max() < 1e-3
    assert not torch.equal(run([0], invariant=False)[1], run([0])[1])


def test_listed_slots_are_batch_invariant_and_written_where_the_caller_says() -> None:
    q = torch.randn(70, 1, 64, 576, device="cuda").bfloat16()
    cache = torch.randn(100, 64, 1, 576, device="cuda").bfloat16() / 10
    indices = torch.randint(-1, 6400, (70, 1, 2048), device="cuda", dtype=torch.int32)

    def run(rows: slice, invariant: bool, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        meta = get_mla_metadata()[0]
        return flash_mla_with_kvcache(
            q[rows], cache, None, None, 512, meta, indices=indices[rows], out=out, enable_batch_invariant=invariant
        )

    place = torch.full((70, 1, 64, 512), float("nan"), device="cuda", dtype=torch.bfloat16)
    out, lse = run(slice(0, 70), True, place)
    assert out.data_ptr() == place.data_ptr() and not torch.isnan(place).any()
    for rows in (slice(0, 1), slice(3, 8), slice(20, 70)):
        part, part_lse = run(rows, True)
        assert torch.equal(part, out[rows]) and torch.equal(part_lse, lse[rows])
    assert not torch.equal(run(slice(0, 1), False)[1], lse[:1])


def test_one_case_of_each_layout() -> None:
    """Tables that are a part of wider ones, a layer of page-major memory, one query that is strided."""
    wide = torch.full((3, 9), 2147480000, dtype=torch.int32, device="cuda")
    table = wide[:, 2:6]
    table.copy_(torch.randperm(12).int().view(3, 4))
    memory = torch.randn(12, 5, 64, 1, 576, device="cuda").bfloat16() / 10
    q = torch.randn(3, 2, 8, 600, device="cuda").bfloat16()[..., :576]
    lengths = torch.tensor([200, 0, 65], dtype=torch.int32, device="cuda")
    got = flash_mla_with_kvcache(q, memory[:, 3], table, lengths, 512, get_mla_metadata()[0], causal=True)
    want = flash_mla_with_kvcache(
        q.cpu(), memory[:, 3].cpu(), table.cpu().contiguous(), lengths.cpu(), 512, get_mla_metadata()[0], causal=True
    )
    assert (got[0].cpu().float() - want[0].float()).abs().max() < 1e-2 and (got[1].cpu() - want[1]).nan_to_num(nan=0.0).abs().max() < 1e-3


def test_case_is_what_pytest_says() -> None:
    assert len([case for batch in (1, 2, 6, 64) for tokens in (1, 2, 4) for case in grid(batch, tokens)]) == 2304 and isinstance(
        corners()[0], Case
    )
