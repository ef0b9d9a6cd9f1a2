"""FlashMLA's interface on the CPU: a part of its list of tests, its conventions, and what is refused. tests/gpu has the whole list."""

import inspect
from typing import Any

import pytest
import torch

from kvmanager.compat import flash_mla
from kvmanager.errors import InvalidValue
from tests.attention.flash_mla_grid import Case, grid, listed, run, run_listed

LISTED = [case for batch in (1, 2, 6) for tokens in (1, 2, 4) for case in grid(batch, tokens) if case.length < 4096 and case.heads < 10]


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_part_of_flashmlas_list(batch: int) -> None:
    """KV 20 and 140, 1 to 9 heads, 1, 2, 3, 8 KV heads, ragged, causal."""
    cases = [case for case in LISTED if case.batch == batch]
    assert len(cases) > 100
    for seed, case in enumerate(cases):
        run(case, "cpu", (torch.bfloat16, torch.float16)[seed % 2], seed)


def test_long_sequences_many_heads_and_none_at_all() -> None:
    for seed, case in enumerate(
        [Case(2, 4, 4096, 128, 1, True, True), Case(5, 2, 100, 126, 3, True, True, True), Case(9, 4, 3, 64, 8, False, True, True)]
    ):
        run(case, "cpu", seed=seed)


def test_part_of_flashmlas_list_of_listed_slots() -> None:
    """fp8 and q's dtype; pages of 2 to 576 slots, lists shorter than topk, sinks (infinite ones too), rows that list nothing."""
    cases = [case for case in listed(4) if case.topk == 64]
    assert len(cases) == 52
    for seed, case in enumerate(cases):
        run_listed(case._replace(heads=(1, 5, 16)[seed % 3]), "cpu", seed % 3 > 0, (torch.bfloat16, torch.float16)[seed % 2], seed)


def call(**changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    arguments: dict[str, Any] = {
        "q": torch.randn(2, 1, 4, 48),
        "k_cache": torch.randn(6, 16, 2, 48),
        "block_table": torch.tensor([[0, 3], [5, 1]], dtype=torch.int32),
        "cache_seqlens": torch.tensor([17, 0], dtype=torch.int32),
        "head_dim_v": 32,
        "tile_scheduler_metadata": flash_mla.get_mla_metadata()[0],
    }
    return flash_mla.flash_mla_with_kvcache(**{**arguments, **changes})


def test_empty_sequences_give_zero_and_plus_infinity() -> None:
    """Not -inf, which the backend gives."""
    out, lse = call()
    assert torch.isfinite(out).all() and (out[1] == 0).all() and torch.isposinf(lse[1]).all() and torch.isfinite(lse[0]).all()


def test_parameters_are_flashmlas() -> None:
    """Of the newest public version, in its order; older versions had the first nine or eleven, and gave get_mla_metadata three."""
    names = list(inspect.signature(flash_mla.flash_mla_with_kvcache).parameters)
    assert names == [
        "q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata", "num_splits", "softmax_scale", "causal",
        "is_fp8_kvcache", "indices", "attn_sink", "extra_k_cache", "extra_indices_in_kvcache", "topk_length", "extra_topk_length",
        "out", "enable_batch_invariant",
    ]  # fmt: skip
    meta, splits = flash_mla.get_mla_metadata(torch.tensor([17, 0], dtype=torch.int32), 4, 2)
    call(tile_scheduler_metadata=meta, num_splits=splits)


def test_sink_scales_the_output_and_leaves_lse() -> None:
    q = torch.randn(2, 1, 4, 48)
    cache = torch.randn(6, 16, 2, 48)
    sink = torch.tensor([0.0, float("-inf"), float("inf"), 2.0])
    (out, lse), (plain, plain_lse) = call(q=q, k_cache=cache, attn_sink=sink), call(q=q, k_cache=cache)
    assert torch.equal(lse, plain_lse)
    torch.testing.assert_close(out[0, 0], plain[0, 0] * torch.sigmoid(lse[0, :, 0] - sink)[:, None])


@pytest.mark.parametrize("more", [{}, {"indices": torch.tensor([[[0, 17, -1, 5]], [[-1, -1, -1, -1]]], dtype=torch.int32)}])
def test_result_is_written_where_the_caller_says(more: dict[str, Any]) -> None:
    """With or without indices; rows that see nothing too."""
    q, cache = torch.randn(2, 1, 4, 48), torch.randn(6, 16, 1, 48)
    place = torch.full((3, 1, 4, 32), 7.0)
    want, want_lse = call(q=q, k_cache=cache, **more)
    out, lse = call(q=q, k_cache=cache, out=place[1:], **more)
    assert out.data_ptr() == place[1:].data_ptr() and torch.equal(place[1:], want) and torch.equal(lse, want_lse) and (place[0] == 7).all()


def test_batch_invariance_is_one_of_what_calls_of_a_metadata_object_share() -> None:
    meta, _ = flash_mla.get_mla_metadata()
    call(tile_scheduler_metadata=meta, enable_batch_invariant=True)
    call(tile_scheduler_metadata=meta, enable_batch_invariant=True)
    with pytest.raises(InvalidValue, match="enable_batch_invariant"):
        call(tile_scheduler_metadata=meta)


LISTED_CALL = {"indices": torch.zeros(2, 1, 4, dtype=torch.int32), "k_cache": torch.randn(6, 16, 1, 48)}
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("k_cache", {"indices": torch.zeros(2, 1, 4, dtype=torch.int32)}),
    ("indices", {**LISTED_CALL, "indices": torch.zeros(2, 4, dtype=torch.int32)}),
    ("indices", {**LISTED_CALL, "indices": torch.zeros(2, 1, 4, dtype=torch.int64)}),
    ("causal", {**LISTED_CALL, "causal": True}),
    ("topk_length", {**LISTED_CALL, "topk_length": torch.zeros(2)}),
    ("k_cache", {**LISTED_CALL, "is_fp8_kvcache": True}),
    ("head_dim_v", {**LISTED_CALL, "is_fp8_kvcache": True, "k_cache": torch.zeros(6, 16, 1, 656, dtype=torch.uint8)}),
    ("is_fp8_kvcache", {"is_fp8_kvcache": True}),
    ("extra_k_cache", {"extra_k_cache": torch.zeros(1)}),
    ("extra_indices_in_kvcache", {"extra_indices_in_kvcache": torch.zeros(1)}),
    ("topk_length", {"topk_length": torch.zeros(1)}),
    ("extra_topk_length", {"extra_topk_length": torch.zeros(1)}),
    ("num_splits", {"num_splits": torch.zeros(3)}),
    ("tile_scheduler_metadata", {"tile_scheduler_metadata": torch.zeros(3)}),
    ("softmax_scale", {"softmax_scale": -1.0}),
    ("causal", {"causal": 1}),
    ("q", {"q": torch.randn(2, 4, 48)}),
    ("q", {"q": torch.randn(2, 1, 4, 48).long()}),
    ("q", {"q": torch.randn(2, 1, 4, 32), "k_cache": torch.randn(6, 16, 2, 32)}),
    ("k_cache", {"k_cache": torch.randn(6, 16, 3, 48)}),
    ("k_cache", {"k_cache": torch.randn(6, 16, 2, 64)}),
    ("k_cache", {"k_cache": torch.randn(6, 16, 2, 48).half()}),
    ("page_size", {"k_cache": torch.randn(6, 20, 2, 48)}),
    ("head_dim_v", {"head_dim_v": 33}),
    ("block_table", {"block_table": None}),
    ("block_table", {"block_table": torch.zeros(2, 2)}),
    ("block_table", {"block_table": torch.tensor([[0, 6], [5, 1]], dtype=torch.int32)}),
    ("cache_seqlens", {"cache_seqlens": None}),
    ("cache_seqlens", {"cache_seqlens": torch.tensor([17, 33], dtype=torch.int32)}),
    ("cache_seqlens", {"cache_seqlens": torch.tensor([17, -1], dtype=torch.int32)}),
    ("attn_sink", {"attn_sink": torch.zeros(3)}),
    ("enable_batch_invariant", {"enable_batch_invariant": 1}),
    ("out", {"out": torch.zeros(2, 1, 4, 48)}),
    ("out", {"out": torch.zeros(2, 1, 4, 32).half()}),
    ("out", {"out": torch.zeros(2, 1, 4, 64)[..., :32]}),
]


@pytest.mark.parametrize("field,changes", REFUSED, ids=[f"{index}-{field}" for index, (field, _) in enumerate(REFUSED)])
def test_what_is_refused_is_named(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue) as caught:
        call(**changes)
    assert caught.value.field == field


def test_metadata_of_another_shape_is_refused() -> None:
    """As in FlashMLA: a schedule serves calls of the same shapes and lengths."""
    meta, _ = flash_mla.get_mla_metadata()
    call(tile_scheduler_metadata=meta)
    call(tile_scheduler_metadata=meta)
    with pytest.raises(InvalidValue) as caught:
        call(tile_scheduler_metadata=meta, q=torch.randn(2, 2, 4, 48))
    assert caught.value.field == "query_len"
