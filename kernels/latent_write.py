"""Write new latents into their page slots: as they are, in eight bits, or straight from the projection.

Floor: every latent is read once and written once, num_tokens * (bytes of a row + bytes of a slot) at copy bandwidth. Slots are random, so
what counts is 16-byte vectors over whole entries and enough of them in flight: rows are fetched before it is known which of them are dropped.
Few tokens cost what a launch does, and the way from a load to a store: a token a program, and overlapped launches.
"""

# mypy: disable-error-code="assignment, var-annotated"
# (tuples that loops of a kernel put together)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvmanager.kernels.latent_formats import GROUP, Stored, divide_groups, rounded_to, to_e4m3, to_type

__all__ = ["Projection", "write_latent", "write_projection", "write_quantised"]

FEW_TOKENS = 1024  # up to here all programs run at once, a token each


class _Tile(NamedTuple):
    """What a program writes: so many tokens, all of them asked for before one is written."""

    block_tokens: int
    num_warps: int


# Few tokens, and more. The norm's sum is added up by one warp in either, so that a row gets the same bits in any step; nothing else has an order.
_TILES = (_Tile(1, 4), _Tile(2, 4))
_TILES_RAW = (_Tile(1, 1), _Tile(2, 1))


def write_latent(latent: Tensor, slots: Tensor, pages: Tensor, rank: int, overlap: bool = False) -> None:
    """Write new token slots of one layer into their pages.

    latent  [num_tokens, entry]            any dtype, device; entry contiguous, rows may be strided
    slots   [num_tokens]                   int64, device; page_id * page_size + offset; -1 is padding, out of range is dropped
    pages   [num_pages, page_size, entry]  dtype of latent; one layer's view of page-major memory, page stride may pass 2**31 elements
    rank    kv_lora_rank; the entry is copied as rank + the rest, which are powers of two where the model's dimensions are
    overlap sm_90 and newer: start while the kernel before still runs, and wait for its end inside (programmatic dependent launch); of few
            tokens, let the next kernel do so as well

    One launch, no allocation, no host sync: safe under graph capture. Slots must be distinct: which of two equal ones wins is undefined."""
    num_tokens, entry = latent.shape
    if num_tokens == 0:
        return
    num_pages, page_size = pages.shape[0], pages.shape[1]
    is_few = num_tokens <= FEW_TOKENS
    tile = _TILES[not is_few]
    _write_latent_kernel[(triton.cdiv(num_tokens, tile.block_tokens),)](
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
        BLOCK_TOKENS=tile.block_tokens,
        HAS_OVERLAP=overlap,
        IS_FEW=is_few,
        num_warps=tile.num_warps,
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
    is_few = num_tokens <= FEW_TOKENS
    tile = (_TILES_RAW if is_raw else _TILES)[not is_few]
    _write_values_kernel[(triton.cdiv(num_tokens, tile.block_tokens),)](
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
        BLOCK_TOKENS=tile.block_tokens,
        HAS_OVERLAP=overlap,
        IS_FEW=is_few,
        num_warps=tile.num_warps,
        **({"launch_pdl": True} if overlap else {}),
    )


@triton.jit(do_not_specialize=["num_tokens"])
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
    IS_FEW: tl.constexpr,
):
    if HAS_OVERLAP:
        _overlap(IS_FEW)
    column, rope = tl.arange(0, BLOCK_RANK), tl.arange(0, BLOCK_ROPE)
    is_column, is_rope = column < RANK, rope < ROPE
    first = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS
    slots, rows, ropes = (), (), ()
    for n in tl.static_range(BLOCK_TOKENS):  # all rows are asked for before one is written, whether or not there is a slot for it
        token = first + n
        is_token = token < num_tokens
        source = latent_ptr + token * stride_latent_token
        slots += (tl.load(slots_ptr + token, mask=is_token, other=-1),)
        rows += (tl.load(source + column, mask=_where(is_token, is_column)),)  # [BLOCK_RANK]
        ropes += (tl.load(source + RANK + rope, mask=_where(is_token, is_rope)),)  # [BLOCK_ROPE]
    for n in tl.static_range(BLOCK_TOKENS):
        valid, page, offset = _place(slots[n], num_slots, PAGE_SIZE)
        target = pages_ptr + page * stride_pages_page + offset * stride_pages_slot
        tl.store(target + column, rows[n], mask=_where(valid, is_column))
        tl.store(target + RANK + rope, ropes[n], mask=_where(valid, is_rope))


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
    IS_FEW: tl.constexpr,
):
    if HAS_OVERLAP:
        _overlap(IS_FEW)
    column, half, rope = tl.arange(0, BLOCK_RANK), tl.arange(0, BLOCK_HALF), tl.arange(0, 2 * BLOCK_HALF)
    is_column, is_half, is_rope = column < RANK, half < ROPE // 2, rope < ROPE
    stored_type: tl.constexpr = latent_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS
    # Everything is asked for before anything is computed, what the longest chain begins with first: position, cosine, rotation.
    positions, slots, rows, lefts, rights = (), (), (), (), ()
    for n in tl.static_range(BLOCK_TOKENS):
        token = first + n
        is_token = token < num_tokens
        source = latent_ptr + token * stride_latent_token
        if IS_RAW:
            positions += (tl.load(positions_ptr + token, mask=is_token, other=-1),)
        slots += (tl.load(slots_ptr + token, mask=is_token, other=-1),)
        rows += (tl.load(source + column, mask=_where(is_token, is_column), other=0.0),)  # [BLOCK_RANK]
        if IS_RAW and not IS_SOURCE_INTERLEAVED:
            lefts += (tl.load(source + RANK + half, mask=_where(is_token, is_half), other=0.0),)  # [BLOCK_HALF]
            rights += (tl.load(source + RANK + ROPE // 2 + half, mask=_where(is_token, is_half), other=0.0),)
        else:
            lefts += (tl.load(source + RANK + rope, mask=_where(is_token, is_rope), other=0.0),)  # [2 * BLOCK_HALF]
    cosines, sines = (), ()
    if IS_RAW:
        weight = tl.load(weight_ptr + column, mask=is_column, other=0.0)
        for n in tl.static_range(BLOCK_TOKENS):
            is_position = (positions[n] >= 0) & (positions[n] < num_positions)
            row = cos_sin_ptr + tl.where(is_position, positions[n], 0) * stride_cos_sin_position
            cosines += (tl.load(row + half, mask=_where(is_position, is_half), other=float("nan")),)
            sines += (tl.load(row + ROPE // 2 + half, mask=_where(is_position, is_half), other=float("nan")),)

    for n in tl.static_range(BLOCK_TOKENS):
        value = rows[n].to(tl.float32)
        valid, page, offset = _place(slots[n], num_slots, PAGE_SIZE)
        if IS_RAW:
            mean = tl.sum(value * value, 0) / RANK
            value = _rounded_once(value * tl.rsqrt(mean + eps) * weight.to(tl.float32), stored_type, values_ptr.dtype.element_ty)
        if GROUP:
            groups, group_scales = divide_groups(value, BLOCK_RANK // GROUP, GROUP)
            value = tl.reshape(groups, [BLOCK_RANK])
            group = tl.arange(0, BLOCK_RANK // GROUP)
            scales_row = scales_ptr + page * stride_scales_page + offset * STRIDE_SCALES_SLOT
            tl.store(scales_row + group, group_scales, mask=_where(valid, group < RANK // GROUP))
        elif IS_FP8:
            value = value * inverse
        value = to_e4m3(value) if IS_FP8 else to_type(value, values_ptr.dtype.element_ty)
        tl.store(values_ptr + page * stride_values_page + offset * STRIDE_VALUES_SLOT + column, value, mask=_where(valid, is_column))

        rope_row = rope_ptr + page * stride_rope_page + offset * STRIDE_ROPE_SLOT
        factor = inverse if IS_ROPE_FP8 else 1.0
        if IS_RAW:
            if IS_SOURCE_INTERLEAVED:
                x, y = tl.split(tl.reshape(lefts[n], [BLOCK_HALF, 2]))
            else:
                x, y = lefts[n], rights[n]
            x, y, cos, sin = x.to(tl.float32), y.to(tl.float32), cosines[n].to(tl.float32), sines[n].to(tl.float32)
            left = _rounded_once(x * cos - y * sin, stored_type, rope_ptr.dtype.element_ty)
            right = _rounded_once(y * cos + x * sin, stored_type, rope_ptr.dtype.element_ty)
            if IS_TARGET_INTERLEAVED:
                k_pe = tl.reshape(tl.join(left, right), [2 * BLOCK_HALF])
                tl.store(rope_row + rope, _stored_rope(k_pe, factor, rope_ptr, IS_ROPE_FP8), mask=_where(valid, is_rope))
            else:
                tl.store(rope_row + half, _stored_rope(left, factor, rope_ptr, IS_ROPE_FP8), mask=_where(valid, is_half))
                tl.store(rope_row + ROPE // 2 + half, _stored_rope(right, factor, rope_ptr, IS_ROPE_FP8), mask=_where(valid, is_half))
        else:
            k_pe = lefts[n].to(tl.float32)
            tl.store(rope_row + rope, _stored_rope(k_pe, factor, rope_ptr, IS_ROPE_FP8), mask=_where(valid, is_rope))


@triton.jit
def _overlap(IS_FEW: tl.constexpr):
    """Wait for the kernel before; and let the next one be launched at once, which will wait for this one by itself.

    Only if all programs run at the same time: those of the next would take the places of this one's that have not begun."""
    if IS_FEW:
        gdc_launch_dependents()
    gdc_wait()


@triton.jit
def _place(slot, num_slots, PAGE_SIZE: tl.constexpr):
    """Whether there is such a slot; and its page and its offset there, those of slot 0 where there is none.

    -1 and out of range are settled before // and %, which truncate toward zero: -1 // 64 would be page 0. Unsigned, they are shifts."""
    valid = (slot >= 0) & (slot < num_slots)
    index = tl.where(valid, slot, 0).to(tl.uint64)
    return valid, (index // PAGE_SIZE).to(tl.int64), (index % PAGE_SIZE).to(tl.int64)


@triton.jit
def _where(flag, mask):
    """mask [any] if the scalar flag is set, or else nothing. (The interpreter takes no flag & mask.)"""
    return mask & (tl.full(mask.shape, flag.to(tl.int32), tl.int32) != 0)


@triton.jit
def _rounded_once(value, dtype: tl.constexpr, target: tl.constexpr):
    """float32 rounded to dtype, unless storing it as `target` does that."""
    if dtype == target:
        return value
    else:
        return rounded_to(value, dtype)


@triton.jit
def _stored_rope(value, factor, rope_ptr, IS_ROPE_FP8: tl.constexpr):
    return to_e4m3(value * factor) if IS_ROPE_FP8 else to_type(value, rope_ptr.dtype.element_ty)
