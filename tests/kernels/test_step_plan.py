"""The launch that finishes a plan, under the interpreter: the host's work list number for number, and page ids where the runs say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvmanager.attention.work import Shape, decode_work
from kvmanager.kernels.step_plan import ListPlaces, Sent, finish

HOPPER = Shape(16, 64, 128, 6, split_tiles_min=1, whole_tiles=3)
SHAPES = [
    HOPPER,
    replace(HOPPER, num_heads=128),
    replace(HOPPER, split_tiles_min=2),
    Shape(40, 16, 64, 10),
    Shape(200, 64, 64, 7),
    Shape(3, 16, 16, 1),
]


def batches() -> list[list[int]]:
    rng = np.random.default_rng(3)
    found = [
        [1],
        [0],
        [0, 0, 0],
        [4096] * 12,
        [4096] * 13,
        [128] * 20,
        [5000, 1, 1, 1],
        [0, 9000, 0],
        [100, 0, 3000, 129, 128, 127],
        [70000],
    ]
    found += [rng.integers(0, most, int(rng.integers(1, 21))).tolist() for most in (300, 9000) for _ in range(2)]
    return found


@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda shape: f"H{shape.num_heads}-R{shape.block_rows}-P{shape.num_programs}-{shape.split_tiles_min}"
)
def test_lists_are_those_of_the_host_and_page_ids_go_where_runs_say(shape: Shape) -> None:
    """Any batch: programs, items, partial slots and merges are decode_work's; merges that are not used have count 0; no other word is touched."""
    rows_max, rng, base = 20, np.random.default_rng(shape.num_heads), 40
    group, lanes = shape.blocks_per_token, shape.lanes
    programs, items, merges = lanes * group + 1, 8 * group * (rows_max + lanes), 8 * group * rows_max
    places = ListPlaces(
        200, 200 + programs, 200 + programs + merges, lanes, group, shape.block_rows, shape.block_tokens,
        shape.split_tiles_min, shape.whole_tiles, rows_max, 64,
    )  # fmt: skip
    for lengths in batches():
        num_rows, ids = len(lengths), rng.integers(0, 1000, 11).astype(np.int32)
        runs = np.array([[3, 0, 1], [900, 1, 9], [20, 10, 1]], np.int32)
        starts, last = (1000 + 1100 * rng.permutation(num_rows)).astype(np.int32), rng.integers(0, 2**26, num_rows).astype(np.int32)
        message = np.concatenate([ids, runs.ravel(), np.array(lengths, np.int32), starts, last])
        words, table = torch.full((200 + programs + merges + items,), -7, dtype=torch.int32), torch.full((24000,), -5, dtype=torch.int32)
        words[200 - len(message) : 200] = torch.from_numpy(message)
        slots = torch.full((rows_max + 1,), -9, dtype=torch.int64)
        finish(words, table, slots, places, Sent(200 - len(message), len(ids), len(runs), num_rows), base, group * num_rows, True)
        want = decode_work(shape, starts, np.array(lengths))
        got = words[200 : 200 + programs].numpy()
        assert got.tolist() == want.programs.tolist(), lengths
        got = words[places.items :].view(-1, 8).numpy()
        assert got[: len(want.items)].tolist() == want.items.tolist(), lengths
        assert (got[len(want.items) :] == -7).all()
        got = words[places.merges : places.items].view(-1, 8).numpy()
        assert got[: len(want.merges)].tolist() == want.merges.tolist(), lengths
        assert not got[len(want.merges) : group * num_rows].any() and (got[group * num_rows :] == -7).all()
        assert words[200 - len(message) : 200].tolist() == message.tolist()
        expected = np.full(24000, -5)
        for at, source, count in runs.tolist():
            expected[base + at : base + at + count] = ids[source : source + count]
        wanted = []
        for length, start, page in zip(lengths, starts.tolist(), last.tolist(), strict=True):
            wanted.append(page * 64 + (length - 1) % 64 if length else -1)
            if length:
                expected[start + (length - 1) // 64] = page
        assert table.tolist() == expected.tolist()
        assert slots.tolist() == wanted + [-9] * (rows_max + 1 - num_rows)


def test_without_lists_only_the_table_and_slots_change() -> None:
    """What a step whose lists the host makes needs: groups, batch invariance, prefill."""
    places = ListPlaces(50, 60, 70, 4, 1, 64, 128, 1, 3, 8, 64)
    words, table = torch.full((90,), -7, dtype=torch.int32), torch.zeros(10, dtype=torch.int32)
    slots = torch.full((8,), -9, dtype=torch.int64)
    words[:7] = torch.tensor([8, 9, 10, 11, 4, 0, 4])
    finish(words, table, slots, places, Sent(0, 4, 1, 0), 1, 5, False)
    assert table.tolist() == [0] * 5 + [8, 9, 10, 11] + [0] and (words[7:] == -7).all() and (slots == -9).all()
    words[:3] = torch.tensor([65, 2, 17])
    finish(words, table, slots, places, Sent(0, 0, 0, 1), 1, 5, False)
    assert table.tolist() == [0] * 3 + [17] + [0] + [8, 9, 10, 11] + [0]
    assert slots.tolist() == [17 * 64] + [-9] * 7
    finish(words, table, slots, places, Sent(0, 0, 0, 0), 1, 5, False)


def test_a_run_longer_than_a_block_is_copied_whole() -> None:
    count = 2500
    places = ListPlaces(0, 0, 0, 4, 1, 64, 128, 1, 3, 8, 64)
    words, table = torch.arange(count + 3, dtype=torch.int32), torch.full((count + 2,), -1, dtype=torch.int32)
    words[count:] = torch.tensor([0, 0, count])
    finish(words, table, torch.zeros(1, dtype=torch.int64), places, Sent(0, count, 1, 0), 1, 0, False)
    assert table[1:-1].tolist() == list(range(count)) and table[0] == table[-1] == -1
