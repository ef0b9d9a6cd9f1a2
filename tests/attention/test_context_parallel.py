"""Decode with each sequence's pages spread over ranks: two processes over Gloo against one rank that holds everything, and float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kvmanager.attention import merge_states, part_of
from kvmanager.attention.states import merge_pair
from kvmanager.errors import InvalidValue
from kvmanager.tables import BatchTables

WORKER = Path(__file__).with_name("rank_worker.py")
ROOT = WORKER.parents[2]


def run_ranks(tmp_path: Path, ranks: int, device: str) -> list[str]:
    """What each rank prints; all of them must succeed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(WORKER), str(tmp_path / "store"), str(ranks), device]
    processes = [
        subprocess.Popen([*command, str(rank)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)
    return outputs


def test_two_ranks_equal_one_and_each_other(tmp_path: Path) -> None:
    """The worker compares with float64 and with one rank; here: both ranks have the same bits, in 20 runs."""
    digests = [output.split()[-1] for output in run_ranks(tmp_path, 2, "cpu")]
    assert len(set(digests)) == 1


def random_tables(seed: int, page_size: int = 16) -> BatchTables:
    random = np.random.default_rng(seed)
    lengths = np.array([0, 1, 15, 16, 17, 200, 31], np.int32)
    used = -(-lengths // page_size)
    order = random.permutation(64).astype(np.int32)
    rows = [np.append(order[used[:row].sum() : used[: row + 1].sum()], 2147480000).astype(np.int32) for row in range(len(used))]
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return BatchTables(9, page_size, lengths, np.concatenate(rows), indptr)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_parts_hold_every_token_once(ranks: int) -> None:
    """Page p is page p // ranks of rank p % ranks, in the sequence's order; only a sequence's last page may be partly full, on one rank."""
    tables = random_tables(ranks)
    parts = [part_of(tables, ranks, rank) for rank in range(ranks)]
    assert (sum(part.tables.lengths for part in parts) == tables.lengths).all()
    assert (sum(part.stores.astype(int) for part in parts) == (tables.lengths > 0)).all()
    for row, length in enumerate(tables.lengths):
        pages = tables.pages_of(row)[: -(-int(length) // 16)]
        for rank, part in enumerate(parts):
            mine = [int(page) // ranks for page in pages if page % ranks == rank]
            assert part.tables.pages_of(row).tolist() == mine
            last_is_here = len(pages) > 0 and pages[-1] % ranks == rank
            assert part.stores[row] == last_is_here
            assert part.tables.lengths[row] == len(mine) * 16 - (len(pages) * 16 - length if last_is_here else 0)
        assert part.tables.version == 9


def test_wrong_parts_are_named() -> None:
    tables = random_tables(0)
    for field, ranks, rank in (("ranks", 0, 0), ("ranks", True, 0), ("rank", 2, 2), ("rank", 2, -1), ("rank", 2, "1")):
        with pytest.raises(InvalidValue) as caught:
            part_of(tables, ranks, rank)  # type: ignore[arg-type]
        assert caught.value.field == field
    short = BatchTables(1, 16, np.array([40], np.int32), np.array([1, 2], np.int32), np.array([0, 2], np.int64))
    with pytest.raises(InvalidValue, match="lengths"):
        part_of(short, 2, 0)


def states(parts: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outs = torch.randn((parts, 6, 3, 32), generator=generator)
    lses = torch.randn((parts, 6, 3), generator=generator) * 200
    lses[0, 0] = float("-inf")  # an empty part
    lses[:, 1] = float("-inf")  # none has anything
    lses[1:, 2] = float("-inf")  # one alone
    outs[torch.isinf(lses)] = 0
    return outs.to(dtype), lses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_states_are_those_of_the_parts_together(dtype: torch.dtype) -> None:
    outs, lses = states(4, 1, dtype)
    out, lse = merge_states(outs, lses)
    want_lse = torch.logsumexp(lses.double(), 0)
    weight = torch.where(torch.isinf(lses), 0.0, torch.exp(lses.double() - torch.where(torch.isinf(want_lse), 0.0, want_lse)))
    want = (outs.double() * weight[..., None]).sum(0)
    assert out.dtype == dtype and torch.allclose(out.double(), want, atol=1e-6 if dtype == torch.float32 else 1e-2)
    assert torch.allclose(lse.double(), want_lse, rtol=1e-6)
    assert (out[1] == 0).all() and torch.isneginf(lse[1]).all()
    assert torch.equal(out[2], outs[0, 2]) and torch.equal(lse[2], lses[0, 2])


def test_pairs_merge_in_place_and_in_any_layout() -> None:
    outs, lses = states(2, 2)
    want, want_lse = merge_states(outs, lses)
    a, a_lse = outs[0].clone(), lses[0].clone()
    b = torch.empty(6, 3, 48)[..., :32].copy_(outs[1])
    b_lse = lses[1].T.contiguous().T
    merge_pair(a, a_lse, b, b_lse, a, a_lse)
    assert torch.allclose(a, want, atol=1e-6) and torch.allclose(a_lse, want_lse, rtol=1e-6)


def test_wrong_states_are_named() -> None:
    outs, lses = states(2, 3)
    for field, bad in (
        ("outs", (outs.int(), lses)),
        ("outs", (outs[:0], lses[:0])),
        ("lses", (outs, lses.double())),
        ("lses", (outs, lses[0])),
    ):
        with pytest.raises(InvalidValue) as caught:
            merge_states(*bad)
        assert caught.value.field == field
