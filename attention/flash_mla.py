"""FlashMLA's decode interface (deepseek-ai/FlashMLA: flash_mla/flash_mla_interface.py) on this project's kernels; `kvmanager.compat.flash_mla`.

    tile_scheduler_metadata, num_splits = get_mla_metadata()
    for layer in range(num_layers):
        out, lse = flash_mla_with_kvcache(q, cache[layer], block_table, cache_seqlens, 512, tile_scheduler_metadata, num_splits, causal=True)

Signatures (its release of 2026-09-30, the newest), shapes and the +inf LSE of rows that see nothing are FlashMLA's. Beyond it: any entry and
page size, fp16 and fp32, every CUDA architecture that Triton serves, attn_sink for dense attention, CPU tensors; indices over caches of q's
dtype; enable_batch_invariant on Hopper and for dense attention; out for several KV heads. Refused by name: an fp8 cache without indices, the
extra cache beside indices, and entries without a part of their own for RoPE (head_dim equal to head_dim_v: DeepSeek-V4's eight-bit formats).
Lengths are never read back: the schedule is made on the device by the first call of a metadata object, so calls can be captured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kvmanager.attention import torch_path
from kvmanager.attention.layout import (
    DIM_MULTIPLE,
    DS_MLA_BYTES,
    DS_MLA_DIMS,
    KV_LORA_RANK_MAX,
    QK_ROPE_HEAD_DIM_MAX,
    LatentLayout,
    check_page_size,
)
from kvmanager.errors import InvalidValue

if TYPE_CHECKING:
    from kvmanager.attention.work import Shape
    from kvmanager.kernels.mla_decode import Tile

__all__ = ["FlashMLASchedMeta", "flash_mla_with_kvcache", "get_mla_metadata"]

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}

_BYTES = (torch.uint8, torch.int8, torch.float8_e4m3fn)


class _Config(NamedTuple):
    """What every call of one metadata object must share."""

    batch: int
    query_len: int
    num_heads: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device: torch.device
    causal: bool
    table_stride: int
    is_fp8_kvcache: bool
    topk: int | None
    enable_batch_invariant: bool


@dataclass(slots=True)
class FlashMLASchedMeta:
    """The schedule of one batch: empty until the first call that is given it. To be used again only while the shapes and the lengths stay."""

    have_initialized: bool = False
    config: _Config | None = None
    schedule: _Schedule | None = None


class _Schedule(NamedTuple):
    """Lists on the device and what they were made for; tile is the plain kernel's, None the Hopper kernel's."""

    shape: Shape
    tile: Tile | None
    programs: Tensor
    items: Tensor
    merges: Tensor


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """An empty schedule, and None for what used to be the second result. Arguments are those of older versions, and are not looked at."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    out: Tensor | None = None,
    enable_batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of a few query tokens a sequence over paged latents: all of a sequence's, or those that `indices` lists.

    q              [batch, query_len, heads, head_dim]          bf16 | fp16 | fp32; head_dim contiguous
    k_cache        [num_pages, page_size, kv_heads, head_dim]   dtype of q; kv_heads divides heads; may be strided
    block_table    [batch, pages of the longest sequence]       int32; entries behind a sequence's length are never read
    cache_seqlens  [batch]                                      int32; 0 gives out 0 and lse +inf
    head_dim_v     values are the first so many of an entry
    softmax_scale  None: head_dim ** -0.5
    causal         query token t sees length - query_len + t + 1 latents; else all
    attn_sink      [heads] float32; out is scaled by exp(lse) / (exp(lse) + exp(attn_sink)), lse is not
    indices        [batch, query_len, topk] int32; page * page_size + offset of each latent to attend to; all that is no slot is left out. Then
                   kv_heads is 1, causal False, any page size; block_table and cache_seqlens are not looked at and may be None
    topk_length    [batch] int32; only so many of each list count, from the left; with indices
    is_fp8_kvcache k_cache holds bytes (uint8, int8 or float8_e4m3fn) [num_pages, page_size, 1, 656], fp8_ds_mla of LatentLayout; with
                   indices, for head_dim 576 and head_dim_v 512
    out            [batch, query_len, heads, head_dim_v] of q's dtype, contiguous: the result is written there, and no other is allocated
    enable_batch_invariant
                   no sequence and no list is cut: the bits of a sequence's rows are the same alone and in any batch. One value for all calls of
                   a metadata object. Few long sequences then leave most of a card idle

    Gives out [batch, query_len, heads, head_dim_v] of q's dtype and lse [batch, heads, query_len], float32, natural log.
    InvalidValue names the argument that is out of place. On a CUDA device lengths and table entries cannot be checked."""
    unsupported = {
        "extra_k_cache": extra_k_cache,
        "extra_indices_in_kvcache": extra_indices_in_kvcache,
        "extra_topk_length": extra_topk_length,
        "num_splits": num_splits,
    }
    for field, value in unsupported.items():
        if value is not None:
            raise InvalidValue(field, "None", type(value).__name__)
    if not isinstance(is_fp8_kvcache, bool) or (is_fp8_kvcache and indices is None):
        raise InvalidValue("is_fp8_kvcache", "False, or True with indices", is_fp8_kvcache)
    if topk_length is not None and indices is None:
        raise InvalidValue("topk_length", "None without indices", type(topk_length).__name__)
    if not isinstance(enable_batch_invariant, bool):
        raise InvalidValue("enable_batch_invariant", "True or False", enable_batch_invariant)
    if not isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        got = type(tile_scheduler_metadata).__name__
        raise InvalidValue("tile_scheduler_metadata", "what kvmanager's get_mla_metadata() gave", got)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if not math.isfinite(scale) or scale <= 0:
        raise InvalidValue("softmax_scale", "a positive number", softmax_scale)
    _check_query(q, k_cache, head_dim_v, causal, attn_sink, is_fp8_kvcache)
    if indices is None:
        config, table, lengths = _checked(q, k_cache, block_table, cache_seqlens, head_dim_v, causal, enable_batch_invariant)
    else:
        config = _checked_lists(q, k_cache, head_dim_v, causal, is_fp8_kvcache, indices, topk_length, enable_batch_invariant)
    shape = (config.batch, config.query_len, config.num_heads, head_dim_v)
    if out is None:
        out = q.new_empty(shape)
    elif tuple(out.shape) != shape or out.dtype != q.dtype or out.device != q.device or not out.is_contiguous():
        raise InvalidValue("out", f"{q.dtype} {shape} on {q.device}, contiguous", f"{_words(out)} on {out.device}")
    meta = tile_scheduler_metadata
    if meta.config is None:
        meta.config, meta.have_initialized = config, True
    elif meta.config != config:
        field = next(name for name in _Config._fields if getattr(meta.config, name) != getattr(config, name))
        raise InvalidValue(field, f"{getattr(meta.config, field)}, as in the first call of this metadata", getattr(config, field))
    if indices is not None:
        lse = _attend_listed(q, k_cache, indices, topk_length, scale, attn_sink, config, out)
    elif q.device.type == "cuda":
        lse = _on_device(q, k_cache, table, lengths, scale, attn_sink, meta, config, out)
    else:
        lse = _on_cpu(q, k_cache, table, lengths, scale, attn_sink, config, out)
    lse = torch.where(torch.isneginf(lse), float("inf"), lse)
    return out, lse.view(shape[:3]).transpose(1, 2).contiguous()


def _check_query(q: Tensor, k_cache: Tensor, head_dim_v: int, causal: bool, attn_sink: Tensor | None, is_fp8: bool) -> None:
    """What both kinds of attention ask of q and of the dimensions."""
    if q.dim() != 4 or q.dtype not in _DTYPES or q.stride(-1) != 1 or not q.numel():
        raise InvalidValue("q", "bf16, fp16 or fp32 [batch, query_len, heads, head_dim], head_dim contiguous", _words(q))
    num_heads, head_dim = q.shape[2:]
    if (
        isinstance(head_dim_v, bool)
        or not isinstance(head_dim_v, int)
        or head_dim_v % DIM_MULTIPLE
        or not 0 < head_dim_v <= KV_LORA_RANK_MAX
    ):
        raise InvalidValue("head_dim_v", f"a multiple of {DIM_MULTIPLE} up to {KV_LORA_RANK_MAX}", head_dim_v)
    rope = head_dim - head_dim_v
    if rope % DIM_MULTIPLE or not 0 < rope <= QK_ROPE_HEAD_DIM_MAX:
        more = f"a multiple of {DIM_MULTIPLE} up to {QK_ROPE_HEAD_DIM_MAX} more than head_dim_v {head_dim_v}"
        raise InvalidValue("q", f"a head_dim of {more}", head_dim)
    width, dtypes = (DS_MLA_BYTES, _BYTES) if is_fp8 else (head_dim, (q.dtype,))
    if k_cache.dim() != 4 or k_cache.shape[3] != width or k_cache.dtype not in dtypes or k_cache.stride(3) != 1:
        kinds = " or ".join(map(str, dtypes))
        raise InvalidValue("k_cache", f"{kinds} [num_pages, page_size, kv_heads, {width}], contiguous in the last", _words(k_cache))
    for field, tensor in (("k_cache", k_cache), ("attn_sink", attn_sink)):
        if tensor is not None and tensor.device != q.device:
            raise InvalidValue(field, f"a tensor on {q.device}", f"one on {tensor.device}")
    if attn_sink is not None and (attn_sink.dtype != torch.float32 or tuple(attn_sink.shape) != (num_heads,)):
        raise InvalidValue("attn_sink", f"float32 [{num_heads}]", _words(attn_sink))
    if not isinstance(causal, bool):
        raise InvalidValue("causal", "True or False", causal)


def _checked(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    causal: bool,
    batch_invariant: bool,
) -> tuple[_Config, Tensor, Tensor]:
    batch, query_len, num_heads, head_dim = q.shape
    _, page_size, num_kv_heads, _ = k_cache.shape
    check_page_size(page_size)
    if num_heads % num_kv_heads:
        raise InvalidValue("k_cache", f"a number of heads that divides q's {num_heads}", num_kv_heads)
    for field, value, shape in (("block_table", block_table, (batch, None)), ("cache_seqlens", cache_seqlens, (batch,))):
        if value is None or value.dtype != torch.int32 or value.dim() != len(shape) or value.shape[0] != batch or value.stride(-1) != 1:
            raise InvalidValue(field, f"int32 of {batch} rows, contiguous", "None" if value is None else _words(value))
        if value.device != q.device:
            raise InvalidValue(field, f"a tensor on {q.device}", f"one on {value.device}")
    assert block_table is not None and cache_seqlens is not None
    table_stride = block_table.stride(0) if batch > 1 else block_table.shape[1]
    config = _Config(
        batch,
        query_len,
        num_heads,
        page_size,
        num_kv_heads,
        head_dim,
        head_dim_v,
        q.dtype,
        q.device,
        causal and query_len > 1,
        table_stride,
        False,
        None,
        batch_invariant,
    )
    return config, block_table, cache_seqlens


def _checked_lists(
    q: Tensor,
    k_cache: Tensor,
    head_dim_v: int,
    causal: bool,
    is_fp8: bool,
    indices: Tensor,
    topk_length: Tensor | None,
    batch_invariant: bool,
) -> _Config:
    batch, query_len, num_heads, head_dim = q.shape
    _, page_size, num_kv_heads, _ = k_cache.shape
    if causal:
        raise InvalidValue("causal", "False with indices", causal)
    if num_kv_heads != 1:
        raise InvalidValue("k_cache", "one KV head with indices", num_kv_heads)
    if is_fp8 and (head_dim, head_dim_v) != (sum(DS_MLA_DIMS), DS_MLA_DIMS[0]):
        raise InvalidValue("head_dim_v", "512 of 576 for an fp8 cache", f"{head_dim_v} of {head_dim}")
    if is_fp8 and q.dtype == torch.float32:
        raise InvalidValue("q", "bf16 or fp16 for an fp8 cache", _words(q))
    if is_fp8 and (k_cache.stride(0) % 4 or k_cache.stride(1) % 4 or k_cache.data_ptr() % 4):
        raise InvalidValue("k_cache", "slots at multiples of 4 bytes", _words(k_cache))
    if (
        indices.dtype != torch.int32
        or indices.dim() != 3
        or indices.shape[:2] != q.shape[:2]
        or (indices.numel() and indices.stride(2) != 1)
    ):
        raise InvalidValue("indices", f"int32 [{batch}, {query_len}, topk], topk contiguous", _words(indices))
    if topk_length is not None and (topk_length.dtype != torch.int32 or tuple(topk_length.shape) != (batch,)):
        raise InvalidValue("topk_length", f"int32 [{batch}]", _words(topk_length))
    for field, tensor in (("indices", indices), ("topk_length", topk_length)):
        if tensor is not None and tensor.device != q.device:
            raise InvalidValue(field, f"a tensor on {q.device}", f"one on {tensor.device}")
    topk = indices.shape[2]
    return _Config(
        batch, query_len, num_heads, page_size, 1, head_dim, head_dim_v, q.dtype, q.device, False, 0, is_fp8, topk, batch_invariant
    )


def _words(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} of strides {tensor.stride()}"


def _attend_listed(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor,
    topk_length: Tensor | None,
    scale: float,
    sink: Tensor | None,
    config: _Config,
    result: Tensor,
) -> Tensor:
    """Fills result; gives lse [tokens, heads], -inf where a token lists nothing. Lists are cut by the shapes alone."""
    if topk_length is not None:
        place = torch.arange(indices.shape[2], device=indices.device)
        indices = torch.where(place < topk_length[:, None, None], indices, -1)
    tokens, heads, rank = config.batch * config.query_len, config.num_heads, config.head_dim_v
    lists, rows = indices.reshape(tokens, -1), q.reshape(tokens, heads, config.head_dim)
    pages = (k_cache.view(torch.uint8) if config.is_fp8_kvcache else k_cache)[:, :, 0]
    out = result.view(tokens, heads, rank)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    if q.device.type != "cuda":
        torch_path.attend_selected(pages, rows, lists, scale, out, lse, sink=sink)
        return lse
    from kvmanager.attention.choice import FP8_ARCH_MIN
    from kvmanager.kernels import mla_decode_sparse
    from kvmanager.kernels.latent_formats import view_pages

    properties = torch.cuda.get_device_properties(q.device)
    arch = properties.major * 10 + properties.minor
    if config.is_fp8_kvcache and arch < FP8_ARCH_MIN:
        raise InvalidValue("is_fp8_kvcache", f"False on sm_{arch}: eight bits need sm_{FP8_ARCH_MIN}", True)
    tile = mla_decode_sparse.choose_tile(heads, rank, config.head_dim - rank, pages.dtype, arch)
    programs = 0 if config.enable_batch_invariant else properties.multi_processor_count * tile.programs_per_sm  # 0: no list is cut
    cut = mla_decode_sparse.cut_lists(tokens, heads, lists.shape[1], tile, programs)
    partial_out = torch.empty((cut.partials, tile.block_rows, rank), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty((cut.partials, tile.block_rows), dtype=torch.float32, device=q.device)
    stored = view_pages(pages, rank)
    mla_decode_sparse.attend_selected(rows, stored, lists, out, lse, partial_out, partial_lse, scale, tile, cut, sink)
    return lse


def _on_cpu(
    q: Tensor, k_cache: Tensor, table: Tensor, lengths: Tensor, scale: float, sink: Tensor | None, config: _Config, out: Tensor
) -> Tensor:
    """Fills out; gives lse [batch, query_len, heads], -inf where nothing is seen. Sequences are computed one by one: no bits of the batch."""
    heads = config.num_heads // config.num_kv_heads
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    for row, length in enumerate(lengths.tolist()):
        count = -(-length // config.page_size)
        if length < 0 or count > table.shape[1]:
            raise InvalidValue("cache_seqlens", f"0 to {table.shape[1]} pages of {config.page_size}", f"{length} in row {row}")
        ids = table[row, :count].long()
        if count and not 0 <= int(ids.min()) <= int(ids.max()) < k_cache.shape[0]:
            raise InvalidValue("block_table", f"0 to {k_cache.shape[0] - 1} in row {row}", f"{int(ids.min())} to {int(ids.max())}")
        latents = k_cache.index_select(0, ids).flatten(0, 1)[:length]
        for index in range(config.num_kv_heads):
            part = slice(index * heads, (index + 1) * heads)
            own = None if sink is None else sink[part]
            latent = latents[:, index].float()
            torch_path.attend_sequence(q[row][:, part], latent, scale, out[row][:, part], lse[row][:, part], config.causal, sink=own)
    return lse


def _schedule(lengths: Tensor, config: _Config) -> _Schedule:
    from kvmanager.attention.choice import choose_kernel
    from kvmanager.attention.cuda_path import hopper_shape
    from kvmanager.attention.device_work import device_work
    from kvmanager.attention.work import Shape
    from kvmanager.kernels import mla_decode

    heads, rank = config.num_heads // config.num_kv_heads, config.head_dim_v
    rope = config.head_dim - rank
    properties = torch.cuda.get_device_properties(config.device)
    arch = properties.major * 10 + properties.minor
    layout = LatentLayout(rank, rope, 1, config.page_size, _DTYPES[config.dtype])  # type: ignore[arg-type]
    tile = None
    if choose_kernel(layout, arch, mla_decode.TRITON_VERSION).kernel == "hopper":
        shape = hopper_shape(heads, rank, properties.multi_processor_count)
    else:
        tile = mla_decode.choose_tile(heads, rank, rope, config.dtype, arch, config.query_len > 1)
        shape = Shape(heads, tile.block_rows, tile.block_tokens, tile.programs_per_sm * properties.multi_processor_count)
    whole = config.enable_batch_invariant
    return _Schedule(shape, tile, *device_work(shape, config.table_stride, lengths, config.query_len, config.causal, whole))


def _on_device(
    q: Tensor,
    k_cache: Tensor,
    table: Tensor,
    lengths: Tensor,
    scale: float,
    sink: Tensor | None,
    meta: FlashMLASchedMeta,
    config: _Config,
    result: Tensor,
) -> Tensor:
    """Fills result; gives lse [batch, query_len, heads], -inf where nothing is seen."""
    from kvmanager.kernels import mla_decode, mla_merge

    if meta.schedule is None:
        meta.schedule = _schedule(lengths, config)
    shape, tile, programs, items, merges = meta.schedule
    heads, rank, tokens = config.num_heads // config.num_kv_heads, config.head_dim_v, config.batch * config.query_len
    page_ids = table.as_strided(((config.batch - 1) * config.table_stride + table.shape[1],), (1,))
    rows = q.reshape(tokens, config.num_heads, config.head_dim)
    out = result.view(1, tokens, heads, rank) if config.num_kv_heads == 1 else q.new_empty((config.num_kv_heads, tokens, heads, rank))
    lse = torch.empty((config.num_kv_heads, tokens, heads), dtype=torch.float32, device=q.device)
    partials_max = 1 if config.enable_batch_invariant else shape.partials_max
    partial_out = torch.empty((partials_max, shape.block_rows, rank), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty((partials_max, shape.block_rows), dtype=torch.float32, device=q.device)
    rows_max = heads if config.query_len == 1 else None
    for index in range(config.num_kv_heads):
        part = slice(index * heads, (index + 1) * heads)
        own = None if sink is None else sink[part].contiguous()
        pages = k_cache[:, :, index]
        lists = (page_ids, programs, items, out[index], lse[index], partial_out, partial_lse, scale)
        if tile is None:
            from kvmanager.kernels import mla_decode_hopper

            described = mla_decode_hopper.describe_pages(pages, rank)
            mla_decode_hopper.attend(rows[:, part], described, *lists, config.causal, sink=own)
        else:
            mla_decode.attend(rows[:, part], pages, *lists, tile, config.causal, sink=own)
        mla_merge.merge(partial_out, partial_lse, merges, out[index], lse[index], rows_max, overlap=tile is None, sink=own)
    if config.num_kv_heads == 1:
        return lse[0]
    result.view(tokens, config.num_kv_heads, heads, rank).copy_(out.transpose(0, 1))
    return lse.transpose(0, 1).contiguous()
