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
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
ROPE_ORDERS = ("interleaved", "half")


def _check_int(field: str, value: object, low: int, high: int, multiple: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high or value % multiple:
        what = f"a multiple of {multiple}" if multiple > 1 else "an integer"
        raise InvalidValue(field, f"{what} from {low} to {high}", value)


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidValue(field, "one of " + ", ".join(choices), value)


def check_page_size(value: object) -> None:
    """Raises InvalidValue unless kernels take pages of so many token slots; the manager's own limit is wider."""
    _check_int("page_size", value, DIM_MULTIPLE, PAGE_SIZE_MAX, DIM_MULTIPLE)


@dataclass(frozen=True, slots=True)
class LatentLayout:
    """Layout of one model's latents. A token slot of one layer holds `compressed_kv || k_pe`, `entry` values of `dtype`.

    rope_order says how k_pe lists its rotating pairs: "interleaved" keeps the two values of a pair adjacent (Hugging Face's DeepSeek-V2),
    "half" puts the partner of value i at i + qk_rope_head_dim / 2 (its DeepSeek-V3 writes them so). Both rotate alike and store
    different bytes, so the order is part of the layout.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int
    num_layers: int
    page_size: int = 64
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    rope_order: Literal["interleaved", "half"] = "interleaved"

    def __post_init__(self) -> None:
        _check_int("kv_lora_rank", self.kv_lora_rank, DIM_MULTIPLE, KV_LORA_RANK_MAX, DIM_MULTIPLE)
        _check_int("qk_rope_head_dim", self.qk_rope_head_dim, DIM_MULTIPLE, QK_ROPE_HEAD_DIM_MAX, DIM_MULTIPLE)
        _check_int("num_layers", self.num_layers, 1, NUM_LAYERS_MAX)
        check_page_size(self.page_size)
        _check_choice("dtype", self.dtype, tuple(ITEM_BYTES))
        _check_choice("rope_order", self.rope_order, ROPE_ORDERS)

    @property
    def entry(self) -> int:
        """Values in one token slot of one layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return self.entry * ITEM_BYTES[self.dtype]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers: one contiguous run of memory."""
        return self.num_layers * self.page_size * self.slot_bytes

    @property
    def fingerprint(self) -> str:
        """16 hex digits that two memories must share before a byte moves between them."""
        text = (
            f"kvmanager-latent-1 kv_lora_rank={self.kv_lora_rank} qk_rope_head_dim={self.qk_rope_head_dim} num_layers={self.num_layers}"
            f" page_size={self.page_size} dtype={self.dtype} rope_order={self.rope_order}"
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]
