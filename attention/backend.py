"""The MLA backend of one worker: plan a step on the host, then write, decode and prefill layer by layer.

    plan = backend.plan(tables, query_lens)          # host only; checks everything; one asynchronous copy on CUDA
    for layer in range(num_layers):
        backend.write(plan, layer, latent[layer])
        out, lse = backend.decode(plan, layer, q[layer])

Owns the device buffers a plan is sent to; they never move. Never reads a value back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvmanager.attention import torch_path
from kvmanager.attention.layout import ROPE_ORDERS
from kvmanager.attention.memory import PageMemory
from kvmanager.attention.options import Options
from kvmanager.attention.plan import NUM_HEADS_MAX, Limits, Plan, make_plan, make_row_plan
from kvmanager.attention.resident import ResidentTable
from kvmanager.attention.shared_prefix import shares_prefixes
from kvmanager.errors import InvalidValue, WrongState
from kvmanager.tables import BatchRows, BatchTables

if TYPE_CHECKING:
    from kvmanager.attention.cuda_path import CudaPath

__all__ = ["MLABackend"]

TOPK_MAX = 2**16
SEQUENCE_PAGES_MAX = 2**24
RESIDENT_ENTRIES_MAX = 2**30


class MLABackend:
    """Absorbed multi-head latent attention over one worker's page memory.

    Query token t of a sequence with `query_len` n and length L (this step's tokens included) sits at position L - n + t and sees positions
    up to its own. `decode` serves the rows of one query token, `prefill` the rest. LSE is natural log, float32; a row of length 0 is padding
    and gives output 0 and LSE -inf. CPU tensors run in plain torch, CUDA tensors on Triton.

    batch_invariant   a query token's out and lse have the same bits whatever else is in the batch, and whichever step computes them: decode,
                      several tokens, a chunk of a prompt or all of it. invariant_tokens: where sequences are cut then (options.py)
    logit_soft_cap    scores s become logit_soft_cap * tanh(s / logit_soft_cap)
    sliding_window    a query token sees the last so many positions only, its own included
    sinks             float32 [num_layers, heads]: out is scaled by exp(lse) / (exp(lse) + exp(sink)); lse stays without it
    share_prefixes    on CUDA, leading pages that neighbouring decode rows have in common are read once for all of them where that is faster
                      (shared_prefix.py; order_by_prefix makes such rows neighbours). None: yes, but not with batch_invariant or
                      sliding_window, which rule it out. It changes a row's last bits, as the rest of the batch does anyway
    sequence_pages    keep page tables on the device, of so many pages a sequence at most: `plan` of a replica's rows (Replica.batch_rows) then
                      sends what changed alone. resident_rows: sequences in them, 2 * max_batch if None; those not planned for longest make room
    """

    def __init__(
        self,
        memory: PageMemory,
        num_heads: int,
        softmax_scale: float,
        max_tokens: int,
        max_batch: int,
        max_pages: int,
        *,
        batch_invariant: bool = False,
        invariant_tokens: int | None = None,
        logit_soft_cap: float | None = None,
        sliding_window: int | None = None,
        sinks: Tensor | None = None,
        share_prefixes: bool | None = None,
        sequence_pages: int | None = None,
        resident_rows: int | None = None,
    ) -> None:
        if isinstance(num_heads, bool) or not isinstance(num_heads, int) or not 1 <= num_heads <= NUM_HEADS_MAX:
            raise InvalidValue("num_heads", f"an integer from 1 to {NUM_HEADS_MAX}", num_heads)
        if not math.isfinite(softmax_scale) or softmax_scale <= 0:
            raise InvalidValue("softmax_scale", "a positive number", softmax_scale)
        self.memory = memory
        self.layout = memory.layout
        self._value_dtype = getattr(torch, memory.layout.value_dtype)
        self.num_heads = num_heads
        self.softmax_scale = float(softmax_scale)
        self.limits = Limits(max_tokens, max_batch, max_pages)
        self.options = Options(batch_invariant, invariant_tokens, logit_soft_cap, sliding_window, sinks is not None)
        self._sinks = None if sinks is None else _checked_sinks(sinks, memory, num_heads)
        share = shares_prefixes(share_prefixes, self.options)
        self._table = self._resident_table(sequence_pages, resident_rows)
        self._serial = 0
        self._cuda: CudaPath | None = None
        if memory.device.type == "cuda":
            from kvmanager.attention.cuda_path import CudaPath

            self._cuda = CudaPath(memory, num_heads, self.softmax_scale, self.limits, self.options, self._sinks, share, self._table)

    @property
    def kernel(self) -> str:
        """What decode and prefill run on: "hopper" or "hopper_fp8" (mla_decode_hopper*.py), "triton" (mla_decode.py) or "torch"."""
        return "torch" if self._cuda is None else self._cuda.kernel

    @property
    def why(self) -> str:
        """Why that kernel and not another, in a sentence."""
        return "the pages are not on a CUDA device" if self._cuda is None else self._cuda.why

    def _resident_table(self, sequence_pages: int | None, resident_rows: int | None) -> ResidentTable | None:
        if sequence_pages is None:
            if resident_rows is not None:
                raise InvalidValue("resident_rows", "None without sequence_pages", resident_rows)
            return None
        rows = 2 * self.limits.max_batch if resident_rows is None else resident_rows
        low, high = self.limits.max_batch, RESIDENT_ENTRIES_MAX
        for field, value, least, most in (
            ("sequence_pages", sequence_pages, 1, SEQUENCE_PAGES_MAX),
            ("resident_rows", rows, low, high // (sequence_pages if isinstance(sequence_pages, int) and sequence_pages > 0 else 1)),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise InvalidValue(field, f"an integer from {least} to {most}", value)
        return ResidentTable(rows, sequence_pages, self.memory.num_pages, self.memory.device.type != "cuda")

    @property
    def plan_bytes(self) -> int:
        """Bytes that the last plan sent to the device, in its one copy."""
        return 0 if self._cuda is None else self._cuda.plan_bytes

    def plan(
        self,
        tables: BatchTables | BatchRows,
        query_lens: Sequence[int] | np.ndarray | int,
        *,
        graph_batch: int | None = None,
        stores: Sequence[bool] | np.ndarray | None = None,
    ) -> Plan:
        """Plan one step. Rows of one query token come first, then those of several.

        tables       page tables as arrays, or rows of a replica's own: with `sequence_pages` only what changed of those is sent
        query_lens   tokens of this step of each row; a number: of every row
        graph_batch  pads a decode-only step to that many rows and fixes every launch's shape, so that one captured CUDA graph serves every
                     later plan of the same graph_batch, of arrays or of rows. Call it outside the capture, on the stream that runs the step
        stores       of each row, whether its tokens are written here; another rank writes those of the others (context_parallel.py)

        A new plan ends the one before it, for the host: what the device was given to run with that one goes on reading what it was planned
        with, since all that a plan sends is sent in the stream's order. So a step is planned while the one before it runs.
        """
        serial = self._serial + 1
        if isinstance(tables, BatchRows) and self._table is not None:
            plan, update = make_row_plan(self.layout, self.limits, tables, query_lens, graph_batch, serial, stores, self._table)
            if self._cuda is not None:
                plan = self._cuda.send(plan, update)
            self._table.commit(tables, update)
        else:
            arrays = tables.gathered() if isinstance(tables, BatchRows) else tables
            if isinstance(query_lens, int):
                query_lens = np.full(arrays.batch, query_lens)
            plan = make_plan(self.layout, self.memory.num_pages, self.limits, arrays, query_lens, graph_batch, serial, stores)
            if self._cuda is not None:
                plan = self._cuda.send(plan)
        self._serial = serial
        return plan

    def write(self, plan: Plan, layer: int, latent: Tensor) -> None:
        """Write latent [num_tokens, entry] of this step's tokens into their slots of one layer, in the layout's format. Rows may be strided."""
        self._require_current(plan)
        self._require(latent, "latent", (plan.num_tokens, self.layout.entry))
        pages = self.memory.layer(layer)
        if plan.num_tokens == 0:
            return
        if self._cuda is not None:
            self._cuda.write(plan, layer, latent)
        else:
            torch_path.write_latent(latent, torch.from_numpy(plan.slots), pages, self.layout.scale_of(layer))

    def write_raw(
        self,
        plan: Plan,
        layer: int,
        raw: Tensor,
        norm_weight: Tensor,
        norm_eps: float,
        cos_sin: Tensor,
        positions: Tensor,
        source_order: str = "interleaved",
    ) -> None:
        """RMSNorm, rotation, rounding and write of this step's tokens in one launch, from what the model's down-projection gives.

        raw           [num_tokens, entry]         compressed_kv before its norm || k_pe before its rotation; rows may be strided
        norm_weight   [kv_lora_rank]              bf16, fp16 or float32; norm_eps as in the model's config (rms_norm_eps)
        cos_sin       [any, qk_rope_head_dim]     bf16, fp16 or float32: by position, the cosines of all pairs and then their sines
        positions     int64 [num_tokens]          of each token; one outside of cos_sin makes its k_pe NaN
        source_order  how `raw` lists the pairs that rotate together, "interleaved" (DeepSeek's checkpoints) or "half"; they are stored in
                      the layout's rope_order

        The bytes are those of a norm and a rotation in float32, rounded to raw's dtype, and then `write`."""
        self._require_current(plan)
        layout = self.layout
        self._require(raw, "raw", (plan.num_tokens, layout.entry))
        self._require_float(norm_weight, "norm_weight", (layout.kv_lora_rank,))
        self._require_float(cos_sin, "cos_sin", (len(cos_sin) if cos_sin.ndim else 0, layout.qk_rope_head_dim))
        if positions.dtype != torch.int64 or tuple(positions.shape) != (plan.num_tokens,) or positions.device != raw.device:
            expected = f"int64 [{plan.num_tokens}] on {raw.device}"
            raise InvalidValue("positions", expected, f"{positions.dtype} {list(positions.shape)} on {positions.device}")
        if not math.isfinite(norm_eps) or norm_eps < 0:
            raise InvalidValue("norm_eps", "a number of 0 or more", norm_eps)
        if source_order not in ROPE_ORDERS:
            raise InvalidValue("source_order", "one of " + ", ".join(ROPE_ORDERS), source_order)
        pages = self.memory.layer(layer)
        if plan.num_tokens == 0:
            return
        if self._cuda is not None:
            from kvmanager.kernels.latent_write import Projection

            projection = Projection(norm_weight, norm_eps, cos_sin, positions.contiguous(), source_order, layout.rope_order)
            self._cuda.write_raw(plan, layer, raw, projection)
        else:
            latent = torch_path.project(raw, norm_weight, norm_eps, cos_sin, positions, source_order, layout.rope_order)
            torch_path.write_latent(latent, torch.from_numpy(plan.slots), pages, layout.scale_of(layer))

    def decode(self, plan: Plan, layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of the rows of one query token: q [num_decode, heads, entry] to out [num_decode, heads, rank] and lse [num_decode, heads]."""
        return self._attend(plan, layer, q, is_decode=True)

    def prefill(self, plan: Plan, layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """Causal attention of the rows of several query tokens: q [num_prefill, heads, entry], tokens in the step's order."""
        return self._attend(plan, layer, q, is_decode=False)

    def attend_selected(self, plan: Plan, layer: int, q: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of all of this step's tokens, decode and prefill rows, to the slots that each lists (DeepSeek sparse attention).

        q        [num_tokens, heads, entry]
        indices  int32 [num_tokens, topk]  page_id * page_size + offset, FlashMLA's convention; -1, and all that is no slot, is left out

        Gives out [num_tokens, heads, rank] and lse [num_tokens, heads]; a token that lists nothing 0 and -inf. Which slots a token may see is
        the caller's to say: nothing is causal here. Splits depend on the shapes alone."""
        for field, value in asdict(self.options).items():
            if value:
                raise InvalidValue(field, "a backend without it: attention to listed slots takes no option", value)
        self._require_current(plan)
        self._require(q, "q", (plan.num_tokens, self.num_heads, self.layout.entry))
        topk = indices.shape[-1] if indices.ndim else 0
        if indices.dtype != torch.int32 or tuple(indices.shape) != (plan.num_tokens, topk) or indices.device != q.device:
            expected = f"int32 [{plan.num_tokens}, topk] on {q.device}"
            raise InvalidValue("indices", expected, f"{indices.dtype} {list(indices.shape)} on {indices.device}")
        if topk > TOPK_MAX or (indices.numel() and indices.stride(-1) != 1):
            raise InvalidValue("indices", f"at most {TOPK_MAX} slots a token, contiguous in memory", f"{topk}, stride {indices.stride(-1)}")
        pages = self.memory.layer(layer)
        out = torch.empty((plan.num_tokens, self.num_heads, self.layout.kv_lora_rank), dtype=q.dtype, device=q.device)
        lse = torch.empty((plan.num_tokens, self.num_heads), dtype=torch.float32, device=q.device)
        if plan.num_tokens == 0:
            return out, lse
        if self._cuda is not None:
            self._cuda.attend_selected(layer, q, indices, out, lse)
        else:
            torch_path.attend_selected(pages, q, indices, self.softmax_scale, out, lse, self.layout.scale_of(layer))
        return out, lse

    def _attend(self, plan: Plan, layer: int, q: Tensor, is_decode: bool) -> tuple[Tensor, Tensor]:
        self._require_current(plan)
        count = plan.num_decode if is_decode else plan.num_prefill
        self._require(q, "q", (count, self.num_heads, self.layout.entry))
        pages = self.memory.layer(layer)
        out = torch.empty((count, self.num_heads, self.layout.kv_lora_rank), dtype=q.dtype, device=q.device)
        lse = torch.empty((count, self.num_heads), dtype=torch.float32, device=q.device)
        if count == 0:
            return out, lse
        if self._cuda is not None:
            self._cuda.attend(plan, is_decode, layer, q, out, lse)
        else:
            sink = None if self._sinks is None else self._sinks[layer]
            stored_scale = self.layout.scale_of(layer)
            torch_path.attend_rows(plan, is_decode, pages, q, self.softmax_scale, out, lse, stored_scale, self.options, sink)
        return out, lse

    def _require_current(self, plan: Plan) -> None:
        if plan.serial != self._serial:
            raise WrongState("plan", plan.serial, f"the backend's newest, {self._serial}", f"version {plan.version}")

    def _require(self, tensor: Tensor, field: str, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise InvalidValue(field, f"shape {shape}", tuple(tensor.shape))
        pages = self.memory.pages
        if tensor.dtype != self._value_dtype or tensor.device != pages.device:
            raise InvalidValue(field, f"{self._value_dtype} on {pages.device}", f"{tensor.dtype} on {tensor.device}")
        if tensor.stride(-1) != 1 and tensor.numel():
            raise InvalidValue(field, "an entry contiguous in memory", f"stride {tensor.stride(-1)}")

    def _require_float(self, tensor: Tensor, field: str, shape: tuple[int, ...]) -> None:
        device = self.memory.pages.device
        if tuple(tensor.shape) != shape or not tensor.is_floating_point() or tensor.device != device:
            raise InvalidValue(field, f"floats {list(shape)} on {device}", f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}")
        if tensor.element_size() == 1 or (tensor.numel() and tensor.stride(-1) != 1):
            raise InvalidValue(field, "16 or 32 bits a value, rows contiguous in memory", f"{tensor.dtype}, stride {tensor.stride(-1)}")


def _checked_sinks(sinks: Tensor, memory: PageMemory, num_heads: int) -> Tensor:
    shape = (memory.layout.num_layers, num_heads)
    if tuple(sinks.shape) != shape or sinks.dtype != torch.float32 or sinks.device != memory.pages.device:
        expected = f"float32 {shape} on {memory.pages.device}"
        raise InvalidValue("sinks", expected, f"{sinks.dtype} {tuple(sinks.shape)} on {sinks.device}")
    return sinks.contiguous()
