"""What the bytes of a page mean. Owns the dimensions and their limits; knows nothing of devices and imports no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from kvmanager.errors import InvalidValue

__all__ = ["LatentLayout", "check_page_size"]

DIM_MULTIPLE = 16  # what a tensor core consumes, and 32 bytes of bf16: rows stay aligned to 16-byte vectors
KV_LORA_RANK_MAX = 1024
QK_ROPE_HEAD_DIM_MAX = 256
PAGE_SIZE_MAX = 128
NUM_LAYERS_MAX = 1024
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1}
FORMATS = (*ITEM_BYTES, "fp8_ds_mla")
DS_MLA_DIMS, DS_MLA_GROUP, DS_MLA_BYTES = (512, 64), 128, 656  # 512 e4m3, 512 / 128 float32 scales, 64 bfloat16
SCALE_MIN, SCALE_MAX = 2.0**-60, 2.0**60  # far from where a float32 scale or its inverse is no longer normal
ROPE_ORDERS = ("interleaved", "half")


def _check_int(field: str, value: object, low: int, high: int, multiple: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high or value % multiple:
        what = f"a multiple of {multiple}" if multiple > 1 else "an integer"
        raise InvalidValue(field, f"{what} from {low} to {high}", value)


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidValue(field, "one of " + ", ".join(choices), value)


def check_page_size(value: object, field: str = "page_size") -> None:
    """Raises InvalidValue unless kernels take pages of so many token slots; the manager's own limit is wider."""
    _check_int(field, value, DIM_MULTIPLE, PAGE_SIZE_MAX, DIM_MULTIPLE)


@dataclass(frozen=True, slots=True)
class LatentLayout:
    """Layout of one model's latents. A token slot of one layer holds `compressed_kv || k_pe`, `entry` values, `slot_bytes` bytes.

    dtype says how they are stored:
      bfloat16, float16, float32   as they are
      float8_e4m3fn                each divided by its layer's scale and rounded to e4m3; `scales` has one number a layer, or one for all
      fp8_ds_mla                   656 bytes, for 512 + 64 only: 512 e4m3 | 4 float32 scales, one for each 128 of them | 64 bfloat16, k_pe as
                                   it is. The format of FlashMLA's sparse decode and of vLLM's `kv_cache_dtype="fp8_ds_mla"` for DeepSeek-V3.2
                                   (deepseek-ai/FlashMLA README, "FP8 KV Cache", and tests/quant.py, V32_FP8Sparse; vLLM csrc/cache_kernels.cu,
                                   concat_and_cache_ds_mla_kernel). We write scales rounded up to a power of two, as FlashMLA's quantiser does,
                                   so that each value is exact in bfloat16 again; any positive scale is read.

    rope_order says how k_pe lists its rotating pairs: "interleaved" keeps the two values of a pair adjacent (Hugging Face's DeepSeek-V2),
    "half" puts the partner of value i at i + qk_rope_head_dim / 2 (its DeepSeek-V3 writes them so). Both rotate alike and store
    different bytes, so the order is part of the layout.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int
    num_layers: int
    page_size: int = 64
    dtype: Literal["bfloat16", "float16", "float32", "float8_e4m3fn", "fp8_ds_mla"] = "bfloat16"
    rope_order: Literal["interleaved", "half"] = "interleaved"
    scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_int("kv_lora_rank", self.kv_lora_rank, DIM_MULTIPLE, KV_LORA_RANK_MAX, DIM_MULTIPLE)
        _check_int("qk_rope_head_dim", self.qk_rope_head_dim, DIM_MULTIPLE, QK_ROPE_HEAD_DIM_MAX, DIM_MULTIPLE)
        _check_int("num_layers", self.num_layers, 1, NUM_LAYERS_MAX)
        check_page_size(self.page_size)
        _check_choice("dtype", self.dtype, FORMATS)
        _check_choice("rope_order", self.rope_order, ROPE_ORDERS)
        dims = (self.kv_lora_rank, self.qk_rope_head_dim)
        if self.dtype == "fp8_ds_mla" and dims != DS_MLA_DIMS:
            raise InvalidValue("dtype", "another than fp8_ds_mla, which is made for 512 + 64,", f"fp8_ds_mla for {dims[0]} + {dims[1]}")
        self._check_scales()

    def _check_scales(self) -> None:
        counts = sorted({1, self.num_layers}) if self.dtype == "float8_e4m3fn" else [0]
        if not isinstance(self.scales, tuple) or len(self.scales) not in counts:
            got = len(self.scales) if isinstance(self.scales, tuple) else type(self.scales).__name__
            raise InvalidValue("scales", f"a tuple of {' or '.join(map(str, counts))} numbers for {self.dtype}", got)
        for scale in self.scales:
            if isinstance(scale, bool) or not isinstance(scale, int | float) or not SCALE_MIN <= scale <= SCALE_MAX:
                raise InvalidValue("scales", f"positive numbers from {SCALE_MIN:.1e} to {SCALE_MAX:.1e}", scale)

    @property
    def entry(self) -> int:
        """Values in one token slot of one layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return DS_MLA_BYTES if self.dtype == "fp8_ds_mla" else self.entry * ITEM_BYTES[self.dtype]

    @property
    def storage_dtype(self) -> str:
        """Torch's name for the elements of page memory: `dtype`, or bytes where a slot mixes several."""
        return "uint8" if self.dtype == "fp8_ds_mla" else self.dtype

    @property
    def storage_width(self) -> int:
        """Elements of page memory in one token slot of one layer: `entry` where nothing is mixed."""
        return DS_MLA_BYTES if self.dtype == "fp8_ds_mla" else self.entry

    @property
    def value_dtype(self) -> str:
        """Torch's name for what goes into a write and for q and the output of attention: `dtype`, or bfloat16 where latents are stored in fp8."""
        return "bfloat16" if self.is_fp8 else self.dtype

    @property
    def is_fp8(self) -> bool:
        """Whether latents are stored in eight bits."""
        return self.dtype in ("float8_e4m3fn", "fp8_ds_mla")

    def scale_of(self, layer: int) -> float:
        """What one layer's stored values are multiplied by when read; 1 where the format has none, or has its own in each slot."""
        return float(self.scales[layer % len(self.scales)]) if self.scales else 1.0

    @property
    def format(self) -> str:
        """How values are stored, scales included, in one word: two memories whose words differ hold other bytes for the same latents."""
        if not self.scales:
            return self.dtype
        return f"{self.dtype}-{hashlib.sha256(' '.join(float(scale).hex() for scale in self.scales).encode()).hexdigest()[:16]}"

    @property
    def converts(self) -> tuple[str, ...]:
        """Formats of a source whose pages become pages of this layout as they are pulled, byte for byte those of a write of its latents here.

        Eight bits from bfloat16, what is written into such pages anyway. Not back: the rounded values would stand in a pool among others that
        were never rounded, and be shared as the same prefix."""
        return (self.value_dtype,) if self.is_fp8 else ()

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers: one contiguous run of memory."""
        return self.num_layers * self.page_size * self.slot_bytes

    @property
    def content_fingerprint(self) -> str:
        """16 hex digits that two memories must share before a byte moves between them: all but the page size, since slots are regathered, and
        the format, since some are converted."""
        text = (
            f"kvmanager-content-2 kv_lora_rank={self.kv_lora_rank} qk_rope_head_dim={self.qk_rope_head_dim} num_layers={self.num_layers}"
            f" rope_order={self.rope_order}"
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def fingerprint(self) -> str:
        """What a worker joins with, as the manager reads it (kvmanager/pages/layouts.py): content, format, page size, and the formats that its
        pages are made from on their way."""
        converts = f"<{','.join(self.converts)}" if self.converts else ""
        return f"{self.content_fingerprint}:{self.format}/p{self.page_size}{converts}"
