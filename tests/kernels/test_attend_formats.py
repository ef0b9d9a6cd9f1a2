"""Attention over latents in eight bits, under the interpreter, against the float64 reference of what their bytes mean."""

import pytest
import torch

from kvmanager.attention.compare import check_attention, make_problem, run_kernels
from kvmanager.attention.layout import LatentLayout
from kvmanager.kernels.mla_decode import Tile

LAYOUTS = [
    LatentLayout(512, 64, 2, 16, "fp8_ds_mla"),
    LatentLayout(512, 64, 2, 64, "fp8_ds_mla"),
    LatentLayout(80, 48, 2, 48, "float8_e4m3fn", scales=(0.002, 0.0013)),
    LatentLayout(256, 32, 2, 32, "float8_e4m3fn", scales=(0.003,)),
]


@pytest.mark.parametrize("value_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.dtype}-D{layout.kv_lora_rank}-P{layout.page_size}")
def test_decode_equals_the_reference_of_what_the_bytes_mean(layout: LatentLayout, value_dtype: torch.dtype) -> None:
    """Ragged lengths around a page's edges, one empty; cut and not; NaN in every byte that no sequence reads, scales included."""
    edge = layout.page_size
    problem = make_problem(layout, [1, 0, edge - 1, edge, edge + 1, 150], [1] * 6, 5, seed=edge, written=True, value_dtype=value_dtype)
    for num_programs in (1, 7):
        check_attention(problem, 1, *run_kernels(problem, 1, Tile(16, 16, 4, 1, 1), num_programs))


@pytest.mark.parametrize("layout", LAYOUTS[1:3], ids=lambda layout: layout.dtype)
def test_prefill_equals_the_reference_of_what_the_bytes_mean(layout: LatentLayout) -> None:
    problem = make_problem(layout, [33, 40, 20], [33, 5, 2], 3, seed=9, written=True, value_dtype=torch.float16)
    for tile in (Tile(16, 32, 4, 1, 1), Tile(64, 16, 4, 1, 1)):
        check_attention(problem, 0, *run_kernels(problem, 0, tile, 5))


def test_any_group_scale_is_read() -> None:
    """Others write scales that are no powers of two; a slot's four scales are its own."""
    layout = LAYOUTS[0]
    problem = make_problem(layout, [40], [1], 3, seed=4, written=True, value_dtype=torch.float32)
    pages = problem.memory.layer(0)
    scales = pages.view(torch.uint8)[..., 512:528].clone().view(torch.float32)
    scales *= 0.5 + torch.rand(scales.shape, generator=torch.Generator().manual_seed(1))
    pages[..., 512:528] = scales.view(torch.uint8)
    pages[problem.unread] = 255
    check_attention(problem, 0, *run_kernels(problem, 0, Tile(16, 16, 4, 1, 1), 3))
