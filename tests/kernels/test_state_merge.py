"""Merging of states under the interpreter against float64, poisoned where nothing may be read or written."""

import pytest
import torch

from kvmanager.kernels.state_merge import merge_pair, merge_states


def states(parts: int, tokens: int, heads: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(parts + tokens + width)
    outs = torch.randn((parts, tokens, heads, width), generator=generator).to(dtype)
    lses = torch.randn((parts, tokens, heads), generator=generator) * 30
    lses[torch.rand(lses.shape, generator=generator) < 0.3] = float("-inf")
    lses[:, 0] = float("-inf")
    outs[torch.isinf(lses)] = 0
    return outs, lses


def golden(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.logsumexp(lses.double(), 0)
    weight = torch.exp(lses.double() - torch.where(torch.isinf(lse), 0.0, lse))
    return (outs.double() * weight[..., None]).sum(0), lse


def check(out: torch.Tensor, lse: torch.Tensor, outs: torch.Tensor, lses: torch.Tensor) -> None:
    want, want_lse = golden(outs, lses)
    assert torch.allclose(out.double(), want, atol=1e-5 if out.dtype == torch.float32 else 4e-3)
    assert torch.allclose(lse.double(), want_lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("rows,width", [(1, 16), (7, 80), (9, 512), (5, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_states_of_ranks_merge_in_one_launch(parts: int, rows: int, width: int, dtype: torch.dtype) -> None:
    """Parts apart by more than their rows; rows that no part has anything for give 0 and -inf."""
    outs, lses = states(parts, rows, 1, width, dtype)
    apart = torch.full((parts, rows * width + 24), float("nan"), dtype=dtype)
    apart[:, : rows * width] = outs.flatten(1)
    out, lse = torch.full((rows + 1, width), float("nan"), dtype=dtype), torch.full((rows + 1,), float("nan"))
    merge_states(apart[:, : rows * width].unflatten(1, (rows, width)), lses[..., 0], out[:rows], lse[:rows])
    check(out[:rows], lse[:rows], outs[:, :, 0], lses[..., 0])
    assert torch.isnan(out[rows]).all() and torch.isnan(lse[rows])


@pytest.mark.parametrize("tokens,heads,width", [(1, 1, 16), (5, 3, 80), (3, 4, 128)])
def test_two_states_merge_in_any_layout_and_in_place(tokens: int, heads: int, width: int) -> None:
    """A float32 state and a library's: wider rows, lse of heads first."""
    outs, lses = states(2, tokens, heads, width, torch.float32)
    a, a_lse = outs[0].clone(), lses[0].clone()
    b = torch.full((heads, tokens, width + 64), float("nan"), dtype=torch.float16)[..., :width].transpose(0, 1)
    b.copy_(outs[1])
    b_lse = lses[1].T.contiguous().T
    other, other_lse = torch.full_like(a, float("nan")).half(), torch.full_like(a_lse, float("nan"))
    merge_pair(a, a_lse, b, b_lse, other, other_lse)
    parts = torch.stack([outs[0], b.float()])
    check(other, other_lse, parts, lses)
    merge_pair(a, a_lse, b, b_lse, a, a_lse)
    check(a, a_lse, parts, lses)


def test_no_rows_launch_nothing() -> None:
    merge_states(torch.empty(2, 0, 16), torch.empty(2, 0), torch.empty(0, 16), torch.empty(0))
    merge_pair(*[torch.empty(0, 2, 16), torch.empty(0, 2)] * 3)
