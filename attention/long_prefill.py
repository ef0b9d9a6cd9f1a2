"""Prefill over cached latents by expanding them: for steps of so many query tokens that the absorbed kernel's wider dot products cost more.

Absorbed, a (query token, head, latent) costs 2 * (2 * rank + rope) operations; expanded, 2 * (nope + rope + v), and each (head, latent) once
2 * rank * (nope + v) for W_UK and W_UV (DeepSeek-V2, arXiv 2405.04434, section 2.1): 2,176, 640 and 262,144 at DeepSeek-V3's dimensions, so that a
chunk of more than some 171 query tokens gains. Latents are expanded a bounded number at a time, in a workspace that is made once; each chunk's
state (out, LSE) is folded into the one before it (states.py).

    positions  0 ........................ prefix | prefix ............... length       in pieces of chunk_tokens, each expanded once
    queries                                      | 0 .................... count
               every query token sees a piece    | a piece's own query tokens see it causally, those behind it all of it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor

from kvmanager.attention import torch_path
from kvmanager.attention.backend import MLABackend
from kvmanager.attention.choice import Choice, choose_library, choose_prefill
from kvmanager.attention.expanded import attend_cudnn, attend_flash, attend_plain
from kvmanager.attention.plan import Plan
from kvmanager.attention.states import merge_pair
from kvmanager.errors import InvalidValue
from kvmanager.tables import div_ceil

__all__ = ["WORKSPACE_BYTES", "LongPrefill"]

WORKSPACE_BYTES = 512 * 2**20
WORKSPACE_BYTES_MAX = 2**40
HEAD_DIM_MAX = 1024
CHUNK_MULTIPLE = 1024  # large chunks are multiples of it: few shapes, and full tiles
CUDNN_GRAIN = 256  # shapes that cuDNN sees are multiples of it: each costs the host tens of milliseconds once


class Piece(NamedTuple):
    """Latents begin to end, positions in the sequence, that query tokens from `first` on see: the next `own` causally, being its last
    positions, and all behind those wholly."""

    begin: int
    end: int
    first: int
    own: int


def cut_sequence(length: int, count: int, chunk: int, grain: int = 0) -> Iterator[Piece]:
    """Pieces of at most `chunk` latents of a sequence whose last `count` positions are this step's; each position is in one piece.

    The last positions before this step's go with the first of these where that saves a piece. With a grain, of which chunk is a multiple, it is
    those that are left over of it, and a piece before them is a chunk or a power of two times the grain: pieces then have few lengths."""
    prefix = length - count
    lead = prefix % (grain or chunk)
    if not grain and lead + count > chunk:
        lead = 0
    begin = 0
    while begin < prefix - lead:
        left = prefix - lead - begin
        size = min(chunk, left)
        if grain and left < chunk:
            size = grain << ((left // grain).bit_length() - 1)
        yield Piece(begin, begin + size, 0, 0)
        begin += size
    while begin < length:
        end = min(begin + chunk, length)
        first = max(begin - prefix, 0)
        yield Piece(begin, end, first, end - prefix - first)
        begin = end


class LongPrefill:
    """MLA over a backend's pages with expanded heads, beside its absorbed kernels; one object serves all layers.

    qk_nope_head_dim, v_head_dim   of a head's key without rotation, and of its value (128 and 128 in DeepSeek-V3)
    workspace_bytes                most that expanded latents may take on the device; a chunk is as many latents as fit. Beside it: out in
                                   float32 and the library's own out of one chunk, both as large as this step's queries make them

    w_uk [heads, nope, rank] and w_uv [heads, rank, v] are views of kv_b_proj's weight (docs/prefill.md). Results follow the sequence alone: not
    what else is in the batch. They are not those of the absorbed kernels bit for bit: k and v are rounded to the pages' dtype, as in any
    engine that expands them. Raises InvalidValue for a workspace that one page's latents do not fit in, and for a backend with batch_invariant,
    logit_soft_cap, sliding_window or sinks.
    """

    def __init__(
        self,
        backend: MLABackend,
        qk_nope_head_dim: int,
        v_head_dim: int,
        *,
        workspace_bytes: int = WORKSPACE_BYTES,
        library: str | None = None,
    ) -> None:
        for field, value, high in (
            ("qk_nope_head_dim", qk_nope_head_dim, HEAD_DIM_MAX),
            ("v_head_dim", v_head_dim, HEAD_DIM_MAX),
            ("workspace_bytes", workspace_bytes, WORKSPACE_BYTES_MAX),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
                raise InvalidValue(field, f"an integer from 1 to {high}", value)
        for field, value in asdict(backend.options).items():
            if value:
                raise InvalidValue(field, "a backend without it: expanded attention takes no option", value)
        layout, memory = backend.layout, backend.memory
        self.backend, self.qk_nope_head_dim, self.v_head_dim = backend, qk_nope_head_dim, v_head_dim
        self._rank, self._scale = layout.kv_lora_rank, backend.softmax_scale
        self._value_dtype = getattr(torch, layout.value_dtype)
        self._qk_dim = qk_nope_head_dim + layout.qk_rope_head_dim
        is_cuda = memory.device.type == "cuda"
        arch = 0
        if is_cuda:
            properties = torch.cuda.get_device_properties(memory.device)
            arch = properties.major * 10 + properties.minor
        self.library, self.why = choose_library(layout.value_dtype, self._qk_dim, v_head_dim, arch, library)
        # Widths in the workspace: as they are, or for FlashAttention one for all three, a multiple of 8, zeros behind.
        one = div_ceil(max(self._qk_dim, v_head_dim), 8) * 8
        self._k_width, self._v_width = (one, one) if self.library == "flash" else (self._qk_dim, v_head_dim)
        dtype = self._value_dtype if is_cuda else torch.float32
        self._grain = CUDNN_GRAIN if self.library == "cudnn" else 0
        self.chunk_tokens = self._chunk_tokens(workspace_bytes, dtype.itemsize)
        shape = (backend.num_heads, self.chunk_tokens)
        self._k = torch.zeros((*shape, self._k_width), dtype=dtype, device=memory.device)
        self._v = torch.zeros((*shape, self._v_width), dtype=dtype, device=memory.device)
        pages = div_ceil(self.chunk_tokens, layout.page_size) + 1  # a chunk may begin and end inside of pages
        self._stored = torch.empty((pages, *memory.pages.shape[2:]), dtype=_storable(memory.pages.dtype), device=memory.device)
        self._chosen: tuple[int, Choice] | None = None  # of the plan with this serial: layers share it
        self._ends = torch.zeros((2, 2), dtype=torch.int32, device=memory.device)

    def _chunk_tokens(self, workspace_bytes: int, item_bytes: int) -> int:
        layout = self.backend.layout
        wide = layout.entry * (4 + item_bytes) if layout.is_fp8 else 0  # latents in eight bits, as float32 and as values
        a_token = self.backend.num_heads * (self._k_width + self._v_width) * item_bytes + layout.slot_bytes + wide
        spare = 2 * layout.page_size * layout.slot_bytes
        tokens = (workspace_bytes - spare) // a_token
        if tokens < layout.page_size:
            need = layout.page_size * a_token + spare
            raise InvalidValue("workspace_bytes", f"at least {need}, what the latents of one page take expanded", workspace_bytes)
        held = self.backend.limits.max_pages * layout.page_size  # no sequence of a step is longer
        tokens = min(tokens, div_ceil(held, CHUNK_MULTIPLE) * CHUNK_MULTIPLE if self._grain else held)
        if self._grain and tokens < 2 * self._grain:
            self.library, self.why, self._grain = "plain", f"workspace_bytes: room for {tokens} latents, and cuDNN's pieces are longer", 0
        multiple = CHUNK_MULTIPLE if tokens >= 2 * CHUNK_MULTIPLE else max(self._grain, layout.page_size)
        return tokens // multiple * multiple

    @property
    def workspace_bytes(self) -> int:
        """What the workspace takes, float32 copies of latents in eight bits not counted."""
        return sum(tensor.nbytes for tensor in (self._k, self._v, self._stored))

    def warm_up(self, query_tokens: int) -> int:
        """Have cuDNN make its plans for steps of up to so many query tokens a sequence, at any length; gives how many, 0 with another library.

        Some 70 ms each, once in a process (torch keeps them by thread: call it in the one that runs the steps). A step of a shape that is not
        there yet makes it then."""
        if not self._grain:
            return 0
        if isinstance(query_tokens, bool) or not isinstance(query_tokens, int) or query_tokens < 1:
            raise InvalidValue("query_tokens", "an integer of 1 or more", query_tokens)
        grain, chunk = self._grain, self.chunk_tokens
        rows_max = div_ceil(query_tokens, grain) * grain
        lengths = [chunk, *(grain << power for power in range((chunk // grain).bit_length()) if grain << power < chunk)]
        shapes = [(rows, length, False) for rows in range(grain, rows_max + 1, grain) for length in lengths]
        shapes += [(rows, rows, True) for rows in range(grain, min(rows_max + grain, chunk) + 1, grain)]
        q = torch.zeros((rows_max + grain, *self._k.shape[::2]), dtype=self._value_dtype, device=self._k.device)
        for rows, length, causal in shapes:
            out, lse = attend_cudnn(q[:rows], self._k[:, :length], self._v[:, :length], self._scale, causal)
        state = out.float()
        for target in (out, state):  # the merge kernel is compiled at its first launch
            merge_pair(state, lse, out, lse, target, lse)
        return len(shapes)

    def choose(self, plan: Plan) -> Choice:
        """ "expanded" or "absorbed" for this step's rows of several query tokens, and why: by a table of lengths and dimensions (choice.py)."""
        if self._chosen is not None and self._chosen[0] == plan.serial:
            return self._chosen[1]
        rows = slice(plan.num_decode, plan.batch)
        layout = self.backend.layout
        dims = (layout.kv_lora_rank, layout.qk_rope_head_dim, self.qk_nope_head_dim, self.v_head_dim)
        choice = choose_prefill(self.backend.kernel, self.library, self.backend.num_heads, dims, plan.lengths[rows], plan.query_lens[rows])
        self._chosen = (plan.serial, choice)
        return choice

    def attend(self, plan: Plan, layer: int, q_nope: Tensor, q_pe: Tensor, w_uk: Tensor, w_uv: Tensor) -> tuple[Tensor, Tensor]:
        """All of this step's tokens, in its order: decode rows absorbed, the rest as `choose` says.

        q_nope  [num_tokens, heads, nope], q_pe [num_tokens, heads, rope]  the layout's value dtype
        w_uk    [heads, nope, rank], w_uv [heads, rank, v]                 the same

        Gives out [num_tokens, heads, v] in that dtype and lse float32 [num_tokens, heads]. Padding gives 0 and -inf. Latents of this step are
        written before. Launches only: nothing waits for the device."""
        self._check(plan, plan.num_tokens, q_nope, q_pe, w_uk, w_uv)
        out = torch.empty((plan.num_tokens, self.backend.num_heads, self.v_head_dim), dtype=q_nope.dtype, device=q_nope.device)
        lse = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
        head, tail = slice(0, plan.num_decode), slice(plan.num_decode, plan.num_tokens)
        if plan.num_decode:
            self._absorbed(plan, layer, q_nope[head], q_pe[head], w_uk, w_uv, out[head], lse[head], True)
        if plan.num_prefill:
            run = self._expanded if self.choose(plan).kernel == "expanded" else self._absorbed
            run(plan, layer, q_nope[tail], q_pe[tail], w_uk, w_uv, out[tail], lse[tail])
        return out, lse

    def run(self, plan: Plan, layer: int, q_nope: Tensor, q_pe: Tensor, w_uk: Tensor, w_uv: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of several query tokens, expanded whatever the table says: q_nope [num_prefill, heads, nope] and the rest as in `attend`."""
        return self._only(self._expanded, plan, layer, q_nope, q_pe, w_uk, w_uv)

    def run_absorbed(self, plan: Plan, layer: int, q_nope: Tensor, q_pe: Tensor, w_uk: Tensor, w_uv: Tensor) -> tuple[Tensor, Tensor]:
        """The same by the backend's kernel: q_nope W_UK before it, W_UV behind it."""
        return self._only(self._absorbed, plan, layer, q_nope, q_pe, w_uk, w_uv)

    def _only(
        self,
        path: Callable[..., None],
        plan: Plan,
        layer: int,
        q_nope: Tensor,
        q_pe: Tensor,
        w_uk: Tensor,
        w_uv: Tensor,
    ) -> tuple[Tensor, Tensor]:
        self._check(plan, plan.num_prefill, q_nope, q_pe, w_uk, w_uv)
        out = torch.empty((plan.num_prefill, self.backend.num_heads, self.v_head_dim), dtype=q_nope.dtype, device=q_nope.device)
        lse = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
        if plan.num_prefill:
            path(plan, layer, q_nope, q_pe, w_uk, w_uv, out, lse)
        return out, lse

    def _absorbed(
        self,
        plan: Plan,
        layer: int,
        q_nope: Tensor,
        q_pe: Tensor,
        w_uk: Tensor,
        w_uv: Tensor,
        out: Tensor,
        lse: Tensor,
        is_decode: bool = False,
    ) -> None:
        q = torch.empty((*q_nope.shape[:2], self.backend.layout.entry), dtype=q_nope.dtype, device=q_nope.device)
        torch.bmm(q_nope.transpose(0, 1), w_uk, out=q[..., : self._rank].transpose(0, 1))
        q[..., self._rank :] = q_pe
        latent_out, latent_lse = self.backend.decode(plan, layer, q) if is_decode else self.backend.prefill(plan, layer, q)
        torch.bmm(latent_out.transpose(0, 1), w_uv, out=out.transpose(0, 1))
        lse.copy_(latent_lse)

    def _expanded(self, plan: Plan, layer: int, q_nope: Tensor, q_pe: Tensor, w_uk: Tensor, w_uv: Tensor, out: Tensor, lse: Tensor) -> None:
        pages = self.backend.memory.layer(layer)
        w_k, w_v = w_uk.to(self._k.dtype).transpose(1, 2), w_uv.to(self._k.dtype)
        for row in range(plan.num_decode, plan.batch):
            length, count = int(plan.lengths[row]), int(plan.query_lens[row])
            start = int(plan.query_starts[row]) - plan.num_decode
            where = plan.pages_of(row)
            ids = torch.from_numpy(plan.page_ids[where]) if plan.device is None else plan.device.pages_at(where)
            part = slice(start, start + count)
            self._attend_sequence(pages, layer, ids, length, self._joined(q_nope[part], q_pe[part]), w_k, w_v, out[part], lse[part])

    def _attend_sequence(
        self, pages: Tensor, layer: int, ids: Tensor, length: int, q: Tensor, w_k: Tensor, w_v: Tensor, out: Tensor, lse: Tensor
    ) -> None:
        """One sequence, with page ids `ids`: q as `_joined` gives it, out [count, heads, v], lse [count, heads]."""
        count, stored_scale = out.shape[0], self.backend.layout.scale_of(layer)
        pieces = list(cut_sequence(length, count, self.chunk_tokens, self._grain))
        state, state_lse = out, lse  # of the pieces so far, of each query token; not used where there is one piece
        if len(pieces) > 1:
            state, state_lse = torch.empty_like(out, dtype=torch.float32), torch.empty_like(lse)
        for piece in pieces:
            k, v = self._expand(pages, ids, piece.begin, piece.end, w_k, w_v, stored_scale)
            middle = piece.first + piece.own
            # Query tokens that see a piece causally are in no later one: what they get here is their result.
            for part, causal, target in ((slice(piece.first, middle), True, (out, lse)), (slice(middle, count), False, (state, state_lse))):
                if part.start == part.stop:
                    continue
                got, got_lse = self._attend(q, part, k, v, causal)
                if piece.begin == 0:
                    target[0][part], target[1][part] = got, got_lse
                else:
                    merge_pair(state[part], state_lse[part], got, got_lse, target[0][part], target[1][part])

    def _joined(self, q_nope: Tensor, q_pe: Tensor) -> Tensor:
        """q [rows, heads, k_width]: query token t in row t; for cuDNN in row CUDNN_GRAIN + t, with zeros in so many rows before and behind."""
        tokens, heads, nope = q_nope.shape
        q = torch.empty((tokens + 2 * self._grain, heads, self._k_width), dtype=q_nope.dtype, device=q_nope.device)
        own = q[self._grain : self._grain + tokens]
        own[..., :nope] = q_nope
        own[..., nope : self._qk_dim] = q_pe
        own[..., self._qk_dim :] = 0
        q[: self._grain] = 0
        q[self._grain + tokens :] = 0
        return own if not self._grain else q

    def _expand(
        self, pages: Tensor, ids: Tensor, begin: int, end: int, w_k: Tensor, w_v: Tensor, stored_scale: float
    ) -> tuple[Tensor, Tensor]:
        """Latents begin to end of a sequence with page ids `ids`, as k [heads, end - begin, k_width] and v; the workspace behind them is zero."""
        size, tokens = pages.shape[1], end - begin
        first, last = begin // size, div_ceil(end, size)
        torch.index_select(pages.view(self._stored.dtype), 0, ids[first:last], out=self._stored[: last - first])
        # Cut before any arithmetic: the rest of the last page may be NaN.
        latent = self._stored.view(pages.dtype)[: last - first].flatten(0, 1)[begin - first * size : end - first * size]
        if latent.dtype != self._k.dtype:
            latent = torch_path.read_latent(latent, self._rank, stored_scale).to(self._k.dtype)
        heads, nope = self._k.shape[0], self.qk_nope_head_dim
        compressed = latent[:, : self._rank].expand(heads, -1, -1)
        torch.bmm(compressed, w_k, out=self._k[:, :tokens, :nope])
        self._k[:, :tokens, nope : self._qk_dim] = latent[:, self._rank :]
        torch.bmm(compressed, w_v, out=self._v[:, :tokens, : self.v_head_dim])
        return self._k[:, :tokens], self._v[:, :tokens]

    def _attend(self, q: Tensor, part: slice, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Query tokens `part` over one piece: out [tokens, heads, v] and lse [tokens, heads], perhaps strided."""
        if self.library == "cudnn":
            return self._attend_cudnn(q, part, k, v, causal)
        if self.library == "flash":
            out, lse = attend_flash(q[part], k, v, self._scale, causal, self._ends)
            return out[..., : self.v_head_dim], lse
        return attend_plain(q[part], k, v, self._scale, causal)

    def _attend_cudnn(self, q: Tensor, part: slice, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """The same in shapes rounded up: rows of q before and behind `part` are computed and dropped.

        torch asks cuDNN for a causal mask from the first key on, so a piece with more keys than query tokens gets as many rows of q in
        front; keys rounded up stand behind the last that any of `part` sees, and are zeros, because they may be another sequence's NaN."""
        tokens, length = part.stop - part.start, k.shape[1]
        lead = length - tokens if causal else 0
        rows = div_ceil(lead + tokens, CUDNN_GRAIN) * CUDNN_GRAIN
        if causal:
            for whole in (self._k, self._v):
                whole[:, length:rows] = 0
            k, v = self._k[:, :rows], self._v[:, :rows]
        first = CUDNN_GRAIN + part.start - lead
        out, lse = attend_cudnn(q[first : first + rows], k, v, self._scale, causal)
        return out[lead : lead + tokens], lse[lead : lead + tokens]

    def _check(self, plan: Plan, tokens: int, q_nope: Tensor, q_pe: Tensor, w_uk: Tensor, w_uv: Tensor) -> None:
        backend, heads = self.backend, self.backend.num_heads
        backend._require_current(plan)
        backend._require(q_nope, "q_nope", (tokens, heads, self.qk_nope_head_dim))
        backend._require(q_pe, "q_pe", (tokens, heads, backend.layout.qk_rope_head_dim))
        for field, tensor, shape in (
            ("w_uk", w_uk, (heads, self.qk_nope_head_dim, self._rank)),
            ("w_uv", w_uv, (heads, self._rank, self.v_head_dim)),
        ):
            if tuple(tensor.shape) != shape or tensor.dtype != self._value_dtype or tensor.device != backend.memory.device:
                expected = f"{self._value_dtype} {list(shape)} on {backend.memory.device}"
                raise InvalidValue(field, expected, f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}")


def _storable(dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if dtype == torch.float8_e4m3fn else dtype  # torch does not index e4m3
