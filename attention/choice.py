"""Which attention kernel a CUDA device gets. A table: by architecture, dimensions, dtype and Triton's version, never by timing or batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.options import Options
from kvmanager.errors import InvalidValue

__all__ = ["Choice", "choose_kernel", "choose_library", "choose_prefill"]

HOPPER_ARCH = 90  # wgmma exists there and nowhere else
FP8_ARCH_MIN = 89  # e4m3 is converted from there on
HOPPER_RANKS = (65, 512)  # two warpgroups' registers hold 64 rows of 512; a narrower half than 64 columns is no swizzled tile
HOPPER_FP8_DIMS = (512, 64)
HOPPER_FP8_HEADS_MAX = 64  # its blocks of rows are 16; at 128 heads the plain kernel's 64 rows cost the same, and less on a warm card
HOPPER_ROPE_MAX = 64  # probabilities take the place of a tile's rotary keys in shared memory
TRITON_VERSIONS = ((3, 6), (3, 10))  # from, and before: Gluon is experimental, and these are the versions the kernel is compiled under


class Choice(NamedTuple):
    """kernel: what is chosen ("hopper", "triton", ...); why: the reason, for people."""

    kernel: str
    why: str


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())


def _is_known(triton_version: str) -> bool:
    first, before = TRITON_VERSIONS
    return first <= _version(triton_version) < before


def choose_kernel(layout: LatentLayout, arch: int, triton_version: str, options: Options | None = None, num_heads: int = 128) -> Choice:
    """arch: compute capability times ten (90 is Hopper). Raises InvalidValue where no kernel takes the layout."""
    options = options or Options()
    low, high = HOPPER_RANKS
    if layout.is_fp8 and arch < FP8_ARCH_MIN:
        raise InvalidValue("dtype", f"bfloat16, float16 or float32 on sm_{arch}: eight bits need sm_{FP8_ARCH_MIN}", layout.dtype)
    if arch != HOPPER_ARCH:
        return Choice("triton", f"architecture sm_{arch}: the Hopper kernel needs sm_{HOPPER_ARCH}")
    if layout.is_fp8:
        return _choose_fp8(layout, triton_version, options, num_heads)
    if layout.dtype not in ("bfloat16", "float16"):
        return Choice("triton", f"dtype {layout.dtype}: the Hopper kernel takes bfloat16 and float16")
    if not low <= layout.kv_lora_rank <= high:
        return Choice("triton", f"kv_lora_rank {layout.kv_lora_rank}: the Hopper kernel takes {low} to {high}")
    if layout.qk_rope_head_dim > HOPPER_ROPE_MAX:
        return Choice("triton", f"qk_rope_head_dim {layout.qk_rope_head_dim}: the Hopper kernel takes at most {HOPPER_ROPE_MAX}")
    for field in ("logit_soft_cap", "sliding_window"):
        if getattr(options, field) is not None:
            return Choice("triton", f"{field}: the Hopper kernel has none")
    if not _is_known(triton_version):
        return Choice("triton", f"Triton {triton_version}: the Hopper kernel is compiled under 3.6 to 3.9")
    return Choice("hopper", f"sm_{arch}, {layout.kv_lora_rank} + {layout.qk_rope_head_dim}, {layout.dtype}, Triton {triton_version}")


def _choose_fp8(layout: LatentLayout, triton_version: str, options: Options, num_heads: int) -> Choice:
    """Latents in eight bits on sm_90."""
    if (layout.kv_lora_rank, layout.qk_rope_head_dim) != HOPPER_FP8_DIMS:
        return Choice("triton", f"{layout.dtype} of {layout.kv_lora_rank} + {layout.qk_rope_head_dim}: the Hopper kernel takes 512 + 64")
    for field in ("batch_invariant", "logit_soft_cap", "sliding_window", "has_sink"):
        if getattr(options, field) != getattr(Options(), field):
            return Choice("triton", f"{field}: the Hopper kernel of {layout.dtype} has none")
    if num_heads > HOPPER_FP8_HEADS_MAX:
        return Choice("triton", f"{layout.dtype} with {num_heads} heads: the Hopper kernel is the faster one to {HOPPER_FP8_HEADS_MAX}")
    if not _is_known(triton_version):
        return Choice("triton", f"Triton {triton_version}: the Hopper kernel of {layout.dtype} is compiled under 3.6 to 3.9")
    return Choice("hopper_fp8", f"sm_{HOPPER_ARCH}, 512 + 64, {layout.dtype}, {num_heads} heads, Triton {triton_version}")


LIBRARIES = ("cudnn", "flash", "plain")
FLASH_ARCH_MIN, FLASH_DIM_MAX = 80, 256
CUDNN_ARCH, CUDNN_DIMS = 90, (192, 128)  # where it was measured: more than twice as fast as FlashAttention 2 is there
# From how many query tokens expanding pays, in multiples of the count at which both paths have as many operations, by absorbed kernel and library.
# Measured on one H100 at 128 heads of 512 + 64 (benchmarks/RESULTS.md). What was not measured is taken to be equal: expanding then saves work at least.
EXPANDED_FROM = {("hopper", "cudnn"): 2.4, ("hopper", "flash"): 6.0, ("triton", "cudnn"): 1.0, ("triton", "flash"): 1.2}
# A library has a program for each 128 (query token, head) rows of a sequence and cuts no sequence: fewer leave a card idle. 16 heads measured.
EXPANDED_ROWS_MIN = 12288


def choose_library(value_dtype: str, qk_dim: int, v_dim: int, arch: int, asked: str | None = None) -> Choice:
    """What expanded attention runs on. arch: 0 is the CPU. Raises InvalidValue if the library asked for does not take it."""
    fits_flash = arch >= FLASH_ARCH_MIN and value_dtype in ("bfloat16", "float16") and max(qk_dim, v_dim) <= FLASH_DIM_MAX
    fits_cudnn = fits_flash and arch == CUDNN_ARCH and qk_dim <= CUDNN_DIMS[0] and v_dim <= CUDNN_DIMS[1] and qk_dim % 8 == v_dim % 8 == 0
    fits = {"cudnn": fits_cudnn, "flash": fits_flash, "plain": True}
    what = f"{value_dtype}, heads of {qk_dim} and {v_dim}, {f'sm_{arch}' if arch else 'CPU'}"
    if asked is not None:
        if not fits.get(asked, False):
            raise InvalidValue("library", "one of " + ", ".join(name for name in LIBRARIES if fits[name]) + f" for {what}", asked)
        return Choice(asked, "asked for")
    if fits_cudnn:
        return Choice("cudnn", f"{what}: cuDNN takes it, and is the faster one on sm_{CUDNN_ARCH}")
    if fits_flash:
        return Choice(
            "flash",
            f"{what}: FlashAttention takes it; cuDNN is for heads to {CUDNN_DIMS[0]} and {CUDNN_DIMS[1]}, multiples of 8, on sm_{CUDNN_ARCH}",
        )
    return Choice("plain", f"{what}: FlashAttention takes bfloat16 and float16, heads to {FLASH_DIM_MAX}, from sm_{FLASH_ARCH_MIN}")


def choose_prefill(
    kernel: str, library: str, num_heads: int, dims: tuple[int, int, int, int], lengths: np.ndarray, query_lens: np.ndarray
) -> Choice:
    """Whether rows of lengths and query_lens are "expanded" or "absorbed"; dims: kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim.

    kernel and library are what the two paths run on.
    One answer for all rows of a step: expanded if at least half of what its query tokens see is seen by rows long enough to gain."""
    rank, rope, nope, v = dims
    saved = 2 * rank + rope - (nope + rope + v)  # products a query token and latent
    if saved <= 0:
        return Choice("absorbed", f"{rank} + {rope}: absorbed heads are no wider than expanded ones")
    equal = rank * (nope + v) / saved
    filling = 0 if kernel == "torch" else -(-EXPANDED_ROWS_MIN // num_heads)
    factor = EXPANDED_FROM.get((kernel.removesuffix("_fp8"), library), 1.0)
    needed = max(int(factor * equal), filling)
    seen = query_lens * (lengths - (query_lens - 1) / 2)
    longest, share = int(query_lens.max(initial=0)), float(seen[query_lens >= needed].sum() / max(seen.sum(), 1))
    rule = f"{needed} query tokens of a row are enough ({factor:g} x {equal:.0f}, {num_heads} heads from {filling})"
    why = f"{kernel} or {library}: {rule}; {share:.0%} of this step's work is in such rows, the longest has {longest}"
    return Choice("expanded" if share >= 0.5 else "absorbed", why)
