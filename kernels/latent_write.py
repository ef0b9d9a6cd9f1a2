"""Write new latents into their page slots: as they are, in eight bits, or straight from the projection.

Floor: every latent is read once and written once, num_tokens * (bytes of a row + bytes of a slot) at copy bandwidth. Slots are random, so
what counts is 16-byte vectors over whole entries and enough of them in flight: a program takes several tokens, and their rows are fetched
before it is known which of them are dropped.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from kvmanager.kernels.latent_formats import GROUP, Stored, group_scale_bits, to_e4m3, to_type

__all__ = ["Projection", "write_latent", "write_projection", "write_quantised"]

BLOCK_TOKENS = 2  # tokens a program copies: 2 to 8 time alike on an H100 at 65,536 tokens, 2 is the fastest at 128
BLOCK_TOKENS_RAW = 8  # with a norm; one number for any step, since the order of its sum may not depend on the batch


def write_latent(latent: Tensor, slots: Tensor, pages: Tensor, rank: int, overlap: bool = False) -> None:
    """Write new token slots of one layer into their pages.

    latent  [num_tokens, entry]            any dtype, device; entry contiguous, rows may be strided
    slots   [num_tokens]                   int64, device; page_id * page_size + offset; -1 is padding, out of range is dropped
    pages   [num_pages, page_size, entry]  dtype of latent; one layer's view of page-major memory, page stride may pass 2**31 elements
    rank    kv_lora_rank; the entry is copied as rank + the rest, which are powers of two where the model's dimensions are
    overlap sm_90 and newer: start while the kernel before still runs, and wait for its end inside (programmatic dependent launch)

    One launch, no allocation, no host sync: safe under graph capture. Slots must be distinct: which of two equal ones wins is undefined."""
    num_tokens, entry = latent.shape
    if num_tokens == 0:
        return
    num_pages, page_size = pages.shape[0], pages.shape[1]
    _write_latent_kernel[(triton.cdiv(num_tokens, BLOCK_TOKENS),)](
        latent,
        slots,
        pages,
        num_tokens,
        num_pages * page_size,
        latent.stride(0),
        pages.stride(0),
        pages.stride(1),
        PAGE_SIZE=page_size,
        RANK=rank,
        ROPE=entry - rank,
        BLOCK_RANK=triton.next_power_of_2(rank),
        BLOCK_ROPE=triton.next_power_of_2(entry - rank),
        BLOCK_TOKENS=BLOCK_TOKENS,
        HAS_OVERLAP=overlap,
        num_warps=4,
        **({"launch_pdl": True} if overlap else {}),
    )


class Projection(NamedTuple):
    """What makes latents of the raw projection: RMSNorm of its first `rank` values, rotation of the rest.

    weight        [rank]                   of the norm, any float dtype, contiguous
    eps           of the norm
    cos_sin       [max_positions, rope]    float32 | bf16 | fp16; a row holds rope / 2 cosines, then as many sines
    positions     [num_tokens]             int64, device; one outside of cos_sin makes its token's k_pe NaN
    source_order  "interleaved" | "half"   how the projection lists the pairs that rotate together
    target_order  the same, of what is stored
    """

    weight: Tensor
    eps: float
    cos_sin: Tensor
    positions: Tensor
    source_order: str
    target_order: str


def write_quantised(latent: Tensor, slots: Tensor, stored: Stored, overlap: bool = False) -> None:
    """Write new token slots of one layer in eight bits.

    latent  [num_tokens, entry]  bf16 | fp16 | fp32, device; entry contiguous, rows may be strided
    slots   [num_tokens]         int64, device; as in write_latent
    stored  one layer of float8_e4m3fn or fp8_ds_mla; overlap as in write_latent

    What e4m3 cannot hold, infinities too, becomes the largest number it can; NaN stays NaN. A group's scale is chosen by its finite values, so
    one NaN or infinity costs its neighbours nothing. k_pe in fp8_ds_mla is rounded to bf16 and nothing else.
    One launch, no allocation, no host sync: safe under graph capture."""
    _launch(latent, slots, stored, None, overlap)


def write_projection(raw: Tensor, slots: Tensor, stored: Stored, projection: Projection, overlap: bool = False) -> None:
    """Write new token slots of one layer from `raw`, what the model's down-projection gives: norm, rotation, rounding and write in one launch.

    raw     [num_tokens, entry]  bf16 | fp16 | fp32, device; entry contiguous, rows may be strided (a slice of a wider projection)
    slots   [num_tokens]         int64, device; as in write_latent
    stored  one layer of any format; overlap as in write_latent

    Arithmetic is float32. Results are rounded to the dtype of raw before they are stored, so the bytes are those of a norm, a rotation and a
    write one after the other. Infinity or NaN in a row makes that row's norm NaN or infinite as arithmetic has it, and no other row's.
    One launch, no allocation, no host sync: safe under graph capture."""
    _launch(raw, slots, stored, projection, overlap)


def _launch(latent: Tensor, slots: Tensor, stored: Stored, projection: Projection | None, overlap: bool) -> None:
    num_tokens = latent.shape[0]
    if num_tokens == 0:
        return
    values, rope, group_scales, scale = stored
    num_pages, page_size, rank = values.shape
    width = rope.shape[-1]
    is_raw = projection is not None
    weight, eps, cos_sin, positions, source, target = projection or (latent, 0.0, latent, slots, "half", "half")
    scales = values if group_scales is None else group_scales
    block_tokens = BLOCK_TOKENS_RAW if is_raw else BLOCK_TOKENS
    _write_values_kernel[(triton.cdiv(num_tokens, block_tokens),)](
        latent,
        slots,
        values,
        rope,
        scales,
        weight,
        cos_sin,
        positions,
        num_tokens,
        num_pages * page_size,
        cos_sin.shape[0],
        latent.stride(0),
        cos_sin.stride(0),
        values.stride(0),
        rope.stride(0),
        scales.stride(0),
        1.0 / scale,
        eps,
        PAGE_SIZE=page_size,
        RANK=rank,
        ROPE=width,
        BLOCK_RANK=triton.next_power_of_2(rank),
        BLOCK_HALF=triton.next_power_of_2(width // 2),
        STRIDE_VALUES_SLOT=values.stride(1),
        STRIDE_ROPE_SLOT=rope.stride(1),
        STRIDE_SCALES_SLOT=scales.stride(1),
        GROUP=GROUP if group_scales is not None else 0,
        IS_RAW=is_raw,
        IS_FP8=values.dtype == torch.float8_e4m3fn,
        IS_ROPE_FP8=rope.dtype == torch.float8_e4m3fn,
        IS_SOURCE_INTERLEAVED=source == "interleaved",
        IS_TARGET_INTERLEAVED=target == "interleaved",
        BLOCK_TOKENS=block_tokens,
        HAS_OVERLAP=overlap,
        num_warps=4,
        **({"launch_pdl": True} if overlap else {}),
    )


@triton.jit
def _write_latent_kernel(
    latent_ptr,
    slots_ptr,
    pages_ptr,
    num_tokens,
    num_slots,
    stride_latent_token,
    stride_pages_page,
    stride_pages_slot,
    PAGE_SIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HAS_OVERLAP: tl.constexpr,
):
    if HAS_OVERLAP:
        gdc_wait()
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)  # [BLOCK_TOKENS]
    slot = tl.load(slots_ptr + token, mask=token < num_tokens, other=-1)
    # -1 and out of range are settled before // and %, which truncate toward zero: -1 // 64 would be page 0
    valid = (slot >= 0) & (slot < num_slots)
    slot = tl.where(valid, slot, 0)
    source = latent_ptr + token * stride_latent_token
    target = pages_ptr + (slot // PAGE_SIZE) * stride_pages_page + (slot % PAGE_SIZE) * stride_pages_slot

    column = tl.arange(0, BLOCK_RANK)
    rope = tl.arange(0, BLOCK_ROPE)
    is_column, is_rope = (column < RANK)[None, :], (rope < ROPE)[None, :]
    is_token = (token < num_tokens)[:, None]  # not `valid`: a row need not wait for its slot
    value = tl.load(source[:, None] + column[None, :], mask=is_token & is_column)  # [BLOCK_TOKENS, BLOCK_RANK]
    value_rope = tl.load(source[:, None] + RANK + rope[None, :], mask=is_token & is_rope)
    tl.store(target[:, None] + column[None, :], value, mask=valid[:, None] & is_column)
    tl.store(target[:, None] + RANK + rope[None, :], value_rope, mask=valid[:, None] & is_rope)


@triton.jit(do_not_specialize=["num_tokens"])
def _write_values_kernel(
    latent_ptr,
    slots_ptr,
    values_ptr,
    rope_ptr,
    scales_ptr,
    weight_ptr,
    cos_sin_ptr,
    positions_ptr,
    num_tokens,
    num_slots,
    num_positions,
    stride_latent_token,
    stride_cos_sin_position,
    stride_values_page,
    stride_rope_page,
    stride_scales_page,
    inverse,
    eps,
    PAGE_SIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    STRIDE_VALUES_SLOT: tl.constexpr,
    STRIDE_ROPE_SLOT: tl.constexpr,
    STRIDE_SCALES_SLOT: tl.constexpr,
    GROUP: tl.constexpr,
    IS_RAW: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_ROPE_FP8: tl.constexpr,
    IS_SOURCE_INTERLEAVED: tl.constexpr,
    IS_TARGET_INTERLEAVED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HAS_OVERLAP: tl.constexpr,
):
    if HAS_OVERLAP:
        gdc_wait()
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)  # [BLOCK_TOKENS]
    is_token = token < num_tokens
    slot = tl.load(slots_ptr + token, mask=is_token, other=-1)
    valid = (slot >= 0) & (slot < num_slots)  # before // and %, as above
    slot = tl.where(valid, slot, 0)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
    source = latent_ptr + token * stride_latent_token
    column = tl.arange(0, BLOCK_RANK)
    is_column = (column < RANK)[None, :]
    half, side = tl.arange(0, BLOCK_HALF), tl.arange(0, 2)
    # Value `side` of rotating pair `half`: side by side, or half a k_pe apart. [BLOCK_HALF, 2]
    from_rope = half[:, None] * 2 + side[None, :] if IS_SOURCE_INTERLEAVED else half[:, None] + side[None, :] * (ROPE // 2)
    to_rope = half[:, None] * 2 + side[None, :] if IS_TARGET_INTERLEAVED else half[:, None] + side[None, :] * (ROPE // 2)
    is_half = (half < ROPE // 2)[None, :]

    value = tl.load(source[:, None] + column[None, :], mask=is_token[:, None] & is_column, other=0.0)
    k_pe = tl.load(
        source[:, None, None] + RANK + from_rope[None, :, :], mask=is_token[:, None, None] & is_half[:, :, None], other=0.0
    )  # [BLOCK_TOKENS, BLOCK_HALF, 2]
    stored_type = value.dtype
    value, k_pe = value.to(tl.float32), k_pe.to(tl.float32)
    if IS_RAW:
        position = tl.load(positions_ptr + token, mask=is_token, other=-1)
        is_position = ((position >= 0) & (position < num_positions))[:, None] & is_half
        row = cos_sin_ptr + tl.where((position >= 0) & (position < num_positions), position, 0)[:, None] * stride_cos_sin_position
        cos = tl.load(row + half[None, :], mask=is_position, other=float("nan")).to(tl.float32)  # [BLOCK_TOKENS, BLOCK_HALF]
        sin = tl.load(row + ROPE // 2 + half[None, :], mask=is_position, other=float("nan")).to(tl.float32)
        weight = tl.load(weight_ptr + column, mask=column < RANK, other=0.0).to(tl.float32)
        mean = tl.sum(value * value, 1) / RANK
        value = value * tl.rsqrt(mean + eps)[:, None] * weight[None, :]
        value = to_type(value, stored_type).to(tl.float32)
        x, y = tl.split(k_pe)
        k_pe = to_type(tl.join(x * cos - y * sin, y * cos + x * sin), stored_type).to(tl.float32)

    if GROUP:
        groups = tl.reshape(value, [BLOCK_TOKENS, BLOCK_RANK // GROUP, GROUP])
        size = tl.abs(groups)
        top = tl.max(tl.where(size <= 3.4028234e38, size, 0.0), 2)  # of the finite ones: NaN is not <= anything
        bits = group_scale_bits(top)  # [BLOCK_TOKENS, BLOCK_RANK // GROUP]
        inverse_bits = (254 << 23) - bits  # of a power of two: exact
        groups = groups * inverse_bits.to(tl.float32, bitcast=True)[:, :, None]
        value = tl.reshape(groups, [BLOCK_TOKENS, BLOCK_RANK])
        group = tl.arange(0, BLOCK_RANK // GROUP)
        scales_row = scales_ptr + page * stride_scales_page + offset * STRIDE_SCALES_SLOT
        is_group = valid[:, None] & (group < RANK // GROUP)[None, :]
        tl.store(scales_row[:, None] + group[None, :], bits.to(tl.float32, bitcast=True), mask=is_group)
    elif IS_FP8:
        value = value * inverse
        k_pe = k_pe * inverse
    values_row = values_ptr + page * stride_values_page + offset * STRIDE_VALUES_SLOT
    rope_row = rope_ptr + page * stride_rope_page + offset * STRIDE_ROPE_SLOT
    value = to_e4m3(value) if IS_FP8 else to_type(value, values_ptr.dtype.element_ty)
    k_pe = to_e4m3(k_pe) if IS_ROPE_FP8 else to_type(k_pe, rope_ptr.dtype.element_ty)
    tl.store(values_row[:, None] + column[None, :], value, mask=valid[:, None] & is_column)
    tl.store(rope_row[:, None, None] + to_rope[None, :, :], k_pe, mask=valid[:, None, None] & is_half[:, :, None])
