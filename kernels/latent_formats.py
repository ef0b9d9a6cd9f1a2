"""How a page's bytes are seen by kernels: as tensors of one dtype each, over the same memory.

A view costs the host some microseconds, so a backend makes those of its layers once. Kernels take the slot strides as constants: 328, the
bfloat16 values of an fp8_ds_mla slot, is a multiple of 8 and not of 16, and Triton asks of arguments only whether they are multiples of 16.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["E4M3_MAX", "FP8_ARCH", "GROUP", "Stored", "view_pages"]

GROUP = 128  # values that share a scale in fp8_ds_mla
E4M3_MAX = 448.0
FP8_ARCH = 89  # older architectures convert no e4m3 in Triton


class Stored(NamedTuple):
    """One layer's pages [num_pages, page_size, any], page-major, page stride may pass 2**31 elements.

    values        [num_pages, page_size, rank]          bf16 | fp16 | fp32 | float8_e4m3fn
    rope          [num_pages, page_size, rope]          dtype of values, or bf16 beside group_scales
    group_scales  [num_pages, page_size, rank / GROUP]  float32; None: the format has none
    scale         what all values are multiplied by when read, k_pe too
    """

    values: Tensor
    rope: Tensor
    group_scales: Tensor | None
    scale: float


def view_pages(pages: Tensor, rank: int, scale: float = 1.0) -> Stored:
    """pages [num_pages, page_size, storage_width] of one layer: uint8 is fp8_ds_mla, any other dtype holds `rank` values and k_pe."""
    if pages.dtype != torch.uint8:
        return Stored(pages[..., :rank], pages[..., rank:], None, scale)
    scales_end = rank + 4 * (rank // GROUP)
    parts = (pages[..., :rank], pages[..., rank:scales_end], pages[..., scales_end:])
    values, group_scales, rope = (part.view(dtype) for part, dtype in zip(parts, _DS_MLA_DTYPES, strict=True))
    return Stored(values, rope, group_scales, 1.0)


_DS_MLA_DTYPES = (torch.float8_e4m3fn, torch.float32, torch.bfloat16)


_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # Triton's interpreter cuts mantissas off where the device rounds


@triton.jit
def _rounded(value, BITS: tl.constexpr):
    """float32 with BITS bits of mantissa, ties to even; NaN with all of those set."""
    bits = value.to(tl.int32, bitcast=True)
    low: tl.constexpr = 23 - BITS
    even = (bits + ((1 << (low - 1)) - 1) + ((bits >> low) & 1)) & -(1 << low)
    return tl.where(value == value, even, 0x7FF00000).to(tl.float32, bitcast=True)


@triton.jit
def to_e4m3(value):
    """float32 to e4m3, to the nearest, ties to even. What is too large, infinity too, becomes 448 of its sign; NaN stays NaN."""
    value = tl.where(value > 448.0, 448.0, value)
    value = tl.where(value < -448.0, -448.0, value)
    if _INTERPRETED:
        tiny = (tl.abs(value) + 24576.0) - 24576.0  # below 2**-6 numbers are multiples of 2**-9
        signed = tiny.to(tl.int32, bitcast=True) | (value.to(tl.int32, bitcast=True) & (-(2**31)))
        value = tl.where(tl.abs(value) < 0.015625, signed.to(tl.float32, bitcast=True), _rounded(value, 3))
    return value.to(tl.float8e4nv)


@triton.jit
def to_type(value, dtype: tl.constexpr):
    """float32 to bf16, fp16 or float32, to the nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        value = _rounded(value, 7)
    return value.to(dtype)


@triton.jit
def group_scale_bits(top):
    """The bits of the least power of two, 2**-13 or more, that 448 times of is no less than `top`, a finite float32.

    448 is 1.75 * 2**8: a mantissa beyond .75 carries into the exponent. 2**-13 is the floor of FlashMLA's quantiser (1e-4, rounded up)."""
    bits = (top.to(tl.int32, bitcast=True) + 0x1FFFFF) & 0x7F800000
    return tl.maximum(bits, (127 - 13 + 8) << 23) - (8 << 23)
