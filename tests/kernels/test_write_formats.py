"""Writes in eight bits and from the raw projection, under the interpreter: the nearest bytes, in their slots alone, as the torch path has them."""

import pytest
import torch
from torch import Tensor

from kvmanager.attention import reference, torch_path
from kvmanager.kernels.latent_formats import view_pages
from kvmanager.kernels.latent_write import Projection, write_latent, write_projection, write_quantised

FP8 = torch.float8_e4m3fn
SHAPES = [(FP8, 512, 64, 64), (FP8, 48, 32, 48), (FP8, 80, 16, 16), (torch.uint8, 512, 64, 16)]
SCALE = 0.03


def make_pool(dtype: torch.dtype, rank: int, rope: int, page_size: int, num_pages: int = 5) -> tuple[Tensor, Tensor]:
    """All of a page-major pool with a canary page before and behind it, and one layer's view of the pages between them."""
    width = 656 if dtype == torch.uint8 else rank + rope
    whole = torch.full(
        (num_pages + 2, 3, page_size, width), 7.0 if dtype.itemsize > 1 else 7, dtype=torch.uint8 if dtype.itemsize == 1 else dtype
    )
    whole = whole.view(dtype)
    return whole, whole[1:-1, 1]


def make_slots(num_pages: int, page_size: int, num_tokens: int) -> Tensor:
    """Distinct slots, and among them all that must be dropped."""
    slots = torch.randperm(num_pages * page_size, generator=torch.Generator().manual_seed(1))[:num_tokens]
    slots[[0, 5, 9, 12, 18]] = torch.tensor([-1, num_pages * page_size, 2**31, -page_size, 2**62])
    return slots


def as_bytes(pages: Tensor) -> Tensor:
    return pages.contiguous().view(torch.uint8)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype,rank,rope,page_size", SHAPES)
def test_quantised_write_puts_the_nearest_bytes_into_its_slots_and_touches_nothing_else(
    dtype: torch.dtype, rank: int, rope: int, page_size: int, source: torch.dtype
) -> None:
    """Strided rows in. What is read back is as near as e4m3 comes; scales are the least power of two that holds their group."""
    whole, pages = make_pool(dtype, rank, rope, page_size)
    slots = make_slots(5, page_size, 19)
    latent = (torch.randn((19, 2, rank + rope), generator=torch.Generator().manual_seed(rank)) * 3).to(source)[:, 0]
    latent[1, 3], latent[2, 4] = 300.0, 1e-6
    before = whole.clone()
    write_quantised(latent, slots, view_pages(pages, rank, SCALE))
    grid = reference.e4m3_values()
    grid = grid[torch.isfinite(grid)].sort().values
    for token, slot in enumerate(slots.tolist()):
        if not 0 <= slot < 5 * page_size:
            continue
        row = pages[slot // page_size, slot % page_size]
        got, want = reference.read_latent(row, rank, SCALE), latent[token].double()
        scale = torch.full((rank + rope,), SCALE, dtype=torch.float64)
        if dtype == torch.uint8:
            group_scales = row[512:528].clone().view(torch.float32).double()
            top = want[:512].view(4, 128).abs().amax(1)
            assert torch.equal(torch.frexp(group_scales).mantissa, torch.full((4,), 0.5, dtype=torch.float64))
            assert (group_scales * 448 >= top).all() and ((group_scales * 224 < top) | (group_scales == 2.0**-13)).all()
            assert torch.equal(got[512:], want[512:].bfloat16().double())
            scale, got, want = group_scales.repeat_interleave(128), got[:512], want[:512]
        nearest = (grid[None, :] * scale[:, None] - want[:, None]).abs().amin(1)
        assert ((got - want).abs() <= nearest * (1 + 1e-6) + 1e-12).all()
    expected = before.clone()
    torch_path.write_latent(latent, slots, expected[1:-1, 1], SCALE if dtype == FP8 else 1.0)
    assert torch.equal(as_bytes(whole), as_bytes(expected))  # every byte, those of canaries and other layers too


def test_every_number_of_e4m3_and_every_middle_between_two_is_rounded_to_even() -> None:
    """Subnormals, both zeros' neighbourhood, the largest; ties go to the even mantissa, on both paths."""
    grid = reference.e4m3_values()[:127]
    middle = (grid[1:] + grid[:-1]) / 2
    numbers = torch.cat([grid, middle, middle * (1 - 2**-12), middle * (1 + 2**-12), torch.tensor([449.0, 1e30, 2.0**-11, 1e-30])])
    numbers = torch.cat([numbers, -numbers]).float()
    numbers = torch.nn.functional.pad(numbers, (0, -len(numbers) % 64)).view(-1, 64)
    latent = torch.cat([numbers, torch.zeros(len(numbers), 16)], 1)
    _, pages = make_pool(FP8, 64, 16, 16)
    slots = torch.arange(len(latent))
    write_quantised(latent, slots, view_pages(pages, 64, 1.0))
    assert torch.equal(as_bytes(pages.flatten(0, 1)[: len(latent)]), as_bytes(torch_path.encode(latent, FP8)))
    got = reference.read_latent(pages.flatten(0, 1)[: len(latent)], 64)[:, :64].flatten()
    distance = (grid[None, :] - numbers.flatten().double().abs()[:, None]).abs()
    best = distance.amin(1, keepdim=True)
    ties = distance == best
    even = torch.where(ties & (torch.arange(127) % 2 == 0)[None, :], grid[None, :], -1.0).amax(1)
    want = torch.where(ties.sum(1) > 1, even, grid[distance.argmin(1)])
    assert torch.equal(got.abs(), want)


@pytest.mark.parametrize("dtype", [FP8, torch.uint8])
def test_nan_and_infinity_are_defined_and_cost_their_neighbours_nothing(dtype: torch.dtype) -> None:
    """NaN stays NaN, infinity becomes the largest number of its sign, and a group's scale comes of its finite values; all NaN, all zero."""
    nan, inf = float("nan"), float("inf")
    latent = torch.randn((4, 576), generator=torch.Generator().manual_seed(3))
    latent[0, [0, 200, 530]], latent[1, [1, 300, 540]], latent[1, [2, 575]] = nan, inf, -inf
    latent[2], latent[3] = 0.0, nan
    _, pages = make_pool(dtype, 512, 64, 16)
    write_quantised(latent, torch.arange(4), view_pages(pages, 512, SCALE))
    got = reference.read_latent(pages[0, :4], 512, SCALE)
    clean = torch.where(torch.isfinite(latent), latent, 0.0)
    same = reference.read_latent(torch_path.encode(clean, dtype, SCALE), 512, SCALE)
    finite = torch.isfinite(latent)
    assert torch.equal(got[finite], same[finite])
    assert torch.equal(torch.isnan(got), torch.isnan(latent))
    if dtype == torch.uint8:
        assert torch.isinf(got[1, [540, 575]]).all()  # bf16 has infinities
        group_scale = pages[0, 1, 512:528].clone().view(torch.float32).double()
        assert got[1, 1] == 448 * group_scale[0] and got[1, 2] == -448 * group_scale[0] and got[1, 300] == 448 * group_scale[2]
        assert torch.equal(pages[0, 2:4, 512:528].clone().view(torch.float32), torch.full((2, 4), 2.0**-13))
    else:
        assert (got[1, [1, 300, 540]] == 448 * SCALE).all() and (got[1, [2, 575]] == -448 * SCALE).all()


@pytest.mark.parametrize("source_order", ["interleaved", "half"])
@pytest.mark.parametrize("target_order", ["interleaved", "half"])
@pytest.mark.parametrize(
    "dtype,source,rank,rope",
    [
        (torch.float32, torch.float32, 512, 64), (torch.float16, torch.float16, 80, 48), (torch.bfloat16, torch.bfloat16, 48, 16),
        (FP8, torch.float32, 80, 48), (FP8, torch.bfloat16, 512, 64), (torch.uint8, torch.bfloat16, 512, 64),
    ],
)  # fmt: skip
def test_projection_is_normalised_rotated_and_stored_in_one_launch(
    dtype: torch.dtype, source: torch.dtype, rank: int, rope: int, source_order: str, target_order: str
) -> None:
    """Against float64, in every format and both orders of pairs on either side; dropped slots and canaries as everywhere."""
    generator = torch.Generator().manual_seed(rank)
    raw = (torch.randn((19, rank + rope + 32), generator=generator) * 2).to(source)[:, 16:-16]  # a slice of a wider projection
    weight = 1 + 0.1 * torch.randn(rank, generator=generator)
    angle = torch.rand((40, rope // 2), generator=generator) * 6
    cos_sin = torch.cat([angle.cos(), angle.sin()], 1)
    positions = torch.randint(0, 40, (19,), generator=generator)
    whole, pages = make_pool(dtype, rank, rope, 16)
    before = whole.clone()
    slots = make_slots(5, 16, 19)
    write_projection(raw, slots, view_pages(pages, rank, SCALE), Projection(weight, 1e-6, cos_sin, positions, source_order, target_order))
    want = reference.project(raw, weight, 1e-6, cos_sin, positions, source_order, target_order)
    scale = SCALE if dtype == FP8 else 1.0
    kept = (slots >= 0) & (slots < 5 * 16)
    got = reference.read_latent(reference.select(pages, slots[kept]), rank, scale)
    step = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8, FP8: 2**-4 + 2**-8, torch.uint8: 2**-4 + 2**-8}[dtype]
    least = {FP8: SCALE * 2**-9, torch.uint8: 2**-4 * 2.0**-9}.get(dtype, 1e-5)
    error = (got - want[kept]).abs()
    assert (error <= step * want[kept].abs() + least).all()
    if dtype == torch.uint8:
        assert (error[:, rank:] <= 2**-8 * want[kept, rank:].abs() + 1e-5).all()
    # One rounding before the store: the bytes are those of the steps one after the other, but for values on an edge between two.
    latent = torch_path.project(raw, weight, 1e-6, cos_sin, positions, source_order, target_order)
    expected = before.clone()
    torch_path.write_latent(latent, slots, expected[1:-1, 1], scale)
    differ = as_bytes(whole) != as_bytes(expected)
    assert differ.float().sum() <= 0.02 * kept.sum() * pages.shape[-1] * max(dtype.itemsize, 1) or dtype == torch.float32
    untouched = torch.ones_like(whole[..., 0], dtype=torch.bool)
    untouched[1 + slots[kept] // 16, 1, slots[kept] % 16] = False
    assert torch.equal(as_bytes(whole)[untouched], as_bytes(before)[untouched])


def test_projection_of_bad_positions_and_bad_rows_stays_in_its_row() -> None:
    """A position outside of the table gives k_pe NaN, and nothing is read from there; NaN in one row leaves the others as they were."""
    raw = torch.randn((4, 80), generator=torch.Generator().manual_seed(5))
    cos_sin = torch.cat([torch.ones(10, 8), torch.zeros(10, 8)], 1)
    raw[3, 2] = float("nan")
    _, pages = make_pool(torch.float32, 64, 16, 16)
    for positions in (torch.tensor([0, 10, -1, 3]), torch.tensor([0, 2**40, -(2**62), 3])):
        write_projection(raw, torch.arange(4), view_pages(pages, 64), Projection(torch.ones(64), 1e-6, cos_sin, positions, "half", "half"))
        assert torch.isfinite(pages[0, 0]).all() and torch.isfinite(pages[0, 1:3, :64]).all()
        assert torch.isnan(pages[0, 1:3, 64:]).all()
        assert torch.isnan(pages[0, 3, :64]).all() and torch.equal(pages[0, 3, 64:], raw[3, 64:])


def test_writes_of_no_tokens_launch_nothing() -> None:
    _, pages = make_pool(torch.uint8, 512, 64, 16)
    write_quantised(torch.empty(0, 576), torch.empty(0, dtype=torch.int64), view_pages(pages, 512))


def test_plain_write_of_dropped_slots_reads_their_rows_and_writes_nothing() -> None:
    """Rows are fetched before it is known where they go: those of no slot are dropped all the same."""
    whole, pages = make_pool(torch.float16, 48, 16, 16)
    before = whole.clone()
    write_latent(torch.randn(9, 64).half(), torch.full((9,), -1), pages, 48)
    assert torch.equal(whole, before)
