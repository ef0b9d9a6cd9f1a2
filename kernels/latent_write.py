"""Write new latents into their page slots.

Floor: every latent is read once and written once, 2 * num_tokens * entry * itemsize bytes at copy bandwidth; no arithmetic. Slots are
random, so what counts is 16-byte vectors over whole entries and enough of them in flight: a program copies several tokens.
"""

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["write_latent"]

BLOCK_TOKENS = 4  # tokens a program copies: 2 to 16 time alike on an H100 at any size, 1 is slower


def write_latent(latent: Tensor, slots: Tensor, pages: Tensor, rank: int) -> None:
    """Write new token slots of one layer into their pages.

    latent  [num_tokens, entry]            any dtype, device; entry contiguous, rows may be strided
    slots   [num_tokens]                   int64, device; page_id * page_size + offset; -1 is padding, out of range is dropped
    pages   [num_pages, page_size, entry]  dtype of latent; one layer's view of page-major memory, page stride may pass 2**31 elements
    rank    kv_lora_rank; the entry is copied as rank + the rest, which are powers of two where the model's dimensions are

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
        num_warps=4,
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
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)  # [BLOCK_TOKENS]
    slot = tl.load(slots_ptr + token, mask=token < num_tokens, other=-1)
    # -1 and out of range are settled before // and %, which truncate toward zero: -1 // 64 would be page 0
    valid = (slot >= 0) & (slot < num_slots)
    slot = tl.where(valid, slot, 0)
    source = latent_ptr + token * stride_latent_token
    target = pages_ptr + (slot // PAGE_SIZE) * stride_pages_page + (slot % PAGE_SIZE) * stride_pages_slot

    column = tl.arange(0, BLOCK_RANK)
    keep = valid[:, None] & (column < RANK)[None, :]
    rope = tl.arange(0, BLOCK_ROPE)
    keep_rope = valid[:, None] & (rope < ROPE)[None, :]
    value = tl.load(source[:, None] + column[None, :], mask=keep)  # [BLOCK_TOKENS, BLOCK_RANK]
    value_rope = tl.load(source[:, None] + RANK + rope[None, :], mask=keep_rope)
    tl.store(target[:, None] + column[None, :], value, mask=keep)
    tl.store(target[:, None] + RANK + rope[None, :], value_rope, mask=keep_rope)
