"""Work lists made by torch are those made by numpy."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmanager.attention.device_work import device_work
from kvmanager.attention.work import Shape, decode_work, prefill_work

shapes = st.builds(
    Shape,
    st.sampled_from([1, 3, 16, 63, 65, 128, 200]),
    st.sampled_from([16, 64]),
    st.sampled_from([16, 64, 128]),
    st.integers(1, 40),
    st.sampled_from([1, 2]),
)
lengths_of = st.lists(st.one_of(st.just(0), st.integers(0, 70), st.integers(0, 5000)), min_size=1, max_size=20)


@settings(max_examples=200, deadline=None)
@given(shapes, lengths_of, st.sampled_from([1, 1, 2, 4, 7]), st.booleans(), st.integers(1, 99))
def test_lists_equal_those_of_the_host(shape: Shape, lengths: list[int], query_len: int, causal: bool, stride: int) -> None:
    """Every item and merge, in the same order; what is left over belongs to no program, and its merges have count 0."""
    shape = replace(shape, whole_tiles=0)
    counts = np.full(len(lengths), query_len)
    starts, tokens = np.arange(len(lengths)) * stride, np.arange(len(lengths)) * query_len
    if query_len == 1:
        want = decode_work(shape, starts, np.array(lengths))
    else:
        want = prefill_work(shape, starts, np.array(lengths), counts, tokens, causal)
    programs, items, merges = device_work(shape, stride, torch.tensor(lengths, dtype=torch.int32), query_len, causal)
    assert programs.tolist() == want.programs.tolist()
    assert items[: len(want.items)].tolist() == want.items.tolist()
    assert merges[: len(want.merges)].tolist() == want.merges.tolist()
    assert not merges[len(want.merges) :, 4].any()
    assert programs.dtype == items.dtype == merges.dtype == torch.int32


@settings(max_examples=200, deadline=None)
@given(shapes, lengths_of, st.sampled_from([1, 1, 2, 4, 7]), st.booleans(), st.integers(1, 99))
def test_whole_lists_hold_each_block_of_rows_once_and_uncut(
    shape: Shape, lengths: list[int], query_len: int, causal: bool, stride: int
) -> None:
    """What an item is depends on its own sequence alone: those of a batch are those of its sequences one by one, whatever runs them."""

    def items_of(part: list[int]) -> list[list[int]]:
        programs, items, merges = device_work(shape, stride, torch.tensor(part, dtype=torch.int32), query_len, causal, whole=True)
        assert len(merges) == 0
        counts = programs.tolist()
        assert counts[0] == 0 and counts == sorted(counts) and len(programs) - 1 <= max(shape.num_programs, shape.blocks_per_token)
        return items[: counts[-1]].tolist()

    items = items_of(lengths)
    rows = -(-query_len * shape.num_heads // shape.block_rows)
    assert len(items) == rows * len(lengths)
    alone = []
    for row, length in enumerate(lengths):
        alone += [[row * stride, row * query_len, *item[2:]] for item in items_of([length])]
    assert sorted(items) == sorted(alone)
    assert all(item[5] == 0 and item[7] == -1 for item in items)
    if query_len == 1:
        assert all(item[6] == item[3] for item in items)
