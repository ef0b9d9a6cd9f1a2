"""How a page's bytes are seen by kernels: as tensors of one dtype each, over the same memory.

A view costs the host some microseconds, so a backend makes those of its layers once. Kernels take the slot strides as constants: 328, the
bfloat16 values of an fp8_ds_mla slot, is a multiple of 8 and not of 16, and Triton asks of arguments only whether they are multiples of 16.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["FP8_ARCH", "GROUP", "Stored", "divide_groups", "load_latents", "view_pages"]

GROUP = 128  # values that share a scale in fp8_ds_mla
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
    """pages [num_pages, page_size, storage_width] of one layer, or [num_pages, num_layers, ...] of all: uint8 is fp8_ds_mla, any other dtype
    holds `rank` values and k_pe."""
    if pages.dtype != torch.uint8:
        return Stored(pages[..., :rank], pages[..., rank:], None, scale)
    scales_end = rank + 4 * (rank // GROUP)
    parts = (pages[..., :rank], pages[..., rank:scales_end], pages[..., scales_end:])
    values, group_scales, rope = (part.view(dtype) for part, dtype in zip(parts, _DS_MLA_DTYPES, strict=True))
    return Stored(values, rope, group_scales, 1.0)


_DS_MLA_DTYPES = (torch.float8_e4m3fn, torch.float32, torch.bfloat16)


@triton.jit
def load_latents(
    values_ptr,
    rope_ptr,
    scales_ptr,
    page,
    offset,
    keep,
    stride_values_page,
    stride_rope_page,
    stride_scales_page,
    STRIDE_VALUES_SLOT: tl.constexpr,
    STRIDE_ROPE_SLOT: tl.constexpr,
    STRIDE_SCALES_SLOT: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    dtype: tl.constexpr,
):
    """Latents at page, offset (int64 [BLOCK_TOKENS]) as values [BLOCK_TOKENS, BLOCK_RANK] and k_pe [BLOCK_TOKENS, BLOCK_ROPE] of `dtype`; 0
    beyond the dimensions and, if HAS_KEEP, where not `keep`. Group scales are multiplied in; the one scale of all values is the caller's."""
    column, rope = tl.arange(0, BLOCK_RANK), tl.arange(0, BLOCK_ROPE)
    values_slot = values_ptr + page * stride_values_page + offset * STRIDE_VALUES_SLOT
    rope_slot = rope_ptr + page * stride_rope_page + offset * STRIDE_ROPE_SLOT
    if HAS_KEEP:
        values = tl.load(values_slot[:, None] + column[None, :], mask=keep[:, None] & (column < RANK)[None, :], other=0.0)
        k_rope = tl.load(rope_slot[:, None] + rope[None, :], mask=keep[:, None] & (rope < ROPE)[None, :], other=0.0)
    else:
        if BLOCK_RANK == RANK:
            values = tl.load(values_slot[:, None] + column[None, :])
        else:
            values = tl.load(values_slot[:, None] + column[None, :], mask=(column < RANK)[None, :], other=0.0)
        if BLOCK_ROPE == ROPE:
            k_rope = tl.load(rope_slot[:, None] + rope[None, :])
        else:
            k_rope = tl.load(rope_slot[:, None] + rope[None, :], mask=(rope < ROPE)[None, :], other=0.0)
    if GROUP:
        group = tl.arange(0, BLOCK_RANK // GROUP)
        scales_slot = scales_ptr + page * stride_scales_page + offset * STRIDE_SCALES_SLOT
        if HAS_KEEP:
            scales = tl.load(scales_slot[:, None] + group[None, :], mask=keep[:, None] & (group >= 0)[None, :], other=0.0)
        else:
            scales = tl.load(scales_slot[:, None] + group[None, :])  # [BLOCK_TOKENS, BLOCK_RANK // GROUP]
        wide = tl.reshape(values, [values.shape[0], BLOCK_RANK // GROUP, GROUP]).to(tl.float32) * scales[:, :, None]
        return tl.reshape(wide, [values.shape[0], BLOCK_RANK]).to(dtype), k_rope.to(dtype)
    return values.to(dtype), k_rope.to(dtype)


_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # Triton's interpreter cuts mantissas off where the device rounds

_IS_CUDA = tl.constexpr(not _INTERPRETED.value and torch.version.hip is None)


@triton.jit
def _rounded(value, BITS: tl.constexpr):
    """float32 with BITS bits of mantissa, ties to even; NaN with all of those set."""
    bits = value.to(tl.int32, bitcast=True)
    low: tl.constexpr = 23 - BITS
    even = (bits + ((1 << (low - 1)) - 1) + ((bits >> low) & 1)) & -(1 << low)
    return tl.where((bits & 0x7FFFFFFF) <= 0x7F800000, even, 0x7FF00000).to(tl.float32, bitcast=True)


@triton.jit
def to_e4m3(value):
    """float32 to e4m3, to the nearest, ties to even. What is too large, infinity too, becomes 448 of its sign; NaN stays NaN."""
    if not _IS_CUDA:  # there one instruction converts two values so (cvt.rn.satfinite)
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
def rounded_to(value, dtype: tl.constexpr):
    """float32 rounded to what bf16, fp16 or float32 can hold, still as float32."""
    if _IS_CUDA and dtype == tl.bfloat16:  # two by one instruction; ptxas would take them one by one, at an eighth of the rate
        bits = tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
            "=r,=r,f,f",
            [value],
            dtype=tl.int32,
            is_pure=True,
            pack=2,
        )
        return bits.to(tl.float32, bitcast=True)
    else:
        return to_type(value, dtype).to(tl.float32)


@triton.jit
def group_scale_bits(top):
    """The bits of the least power of two, 2**-13 or more, that 448 times of is no less than `top`, a finite float32.

    448 is 1.75 * 2**8: a mantissa beyond .75 carries into the exponent. 2**-13 is the floor of FlashMLA's quantiser (1e-4, rounded up)."""
    bits = (top.to(tl.int32, bitcast=True) + 0x1FFFFF) & 0x7F800000
    return tl.maximum(bits, (127 - 13 + 8) << 23) - (8 << 23)


@triton.jit
def divide_groups(value, NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """float32, NUM_GROUPS * GROUP of any shape, as [NUM_GROUPS, GROUP] and divided by their groups' scales; and those, [NUM_GROUPS]."""
    groups = tl.reshape(value, [NUM_GROUPS, GROUP])
    size = tl.abs(groups)
    top = tl.max(tl.where(size <= 3.4028234e38, size, 0.0), 1)  # of the finite ones: NaN is not <= anything
    bits = group_scale_bits(top)
    inverse_bits = (254 << 23) - bits  # of a power of two: exact
    return groups * inverse_bits.to(tl.float32, bitcast=True)[:, None], bits.to(tl.float32, bitcast=True)
