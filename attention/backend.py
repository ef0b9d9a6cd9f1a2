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
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvmanager.attention import torch_path
from kvmanager.attention.memory import PageMemory
from kvmanager.attention.plan import NUM_HEADS_MAX, Limits, Plan, make_plan
from kvmanager.errors import InvalidValue, WrongState
from kvmanager.tables import BatchTables

if TYPE_CHECKING:
    from kvmanager.attention.cuda_path import CudaPath

__all__ = ["MLABackend"]


class MLABackend:
    """Absorbed multi-head latent attention over one worker's page memory.

    Query token t of a sequence with `query_len` n and length L (this step's tokens included) sits at position L - n + t and sees positions
    up to its own. `decode` serves the rows of one query token, `prefill` the rest. LSE is natural log, float32; a row of length 0 is padding
    and gives output 0 and LSE -inf. CPU tensors run in plain torch, CUDA tensors on Triton.
    """

    def __init__(self, memory: PageMemory, num_heads: int, softmax_scale: float, max_tokens: int, max_batch: int, max_pages: int) -> None:
        if isinstance(num_heads, bool) or not isinstance(num_heads, int) or not 1 <= num_heads <= NUM_HEADS_MAX:
            raise InvalidValue("num_heads", f"an integer from 1 to {NUM_HEADS_MAX}", num_heads)
        if not math.isfinite(softmax_scale) or softmax_scale <= 0:
            raise InvalidValue("softmax_scale", "a positive number", softmax_scale)
        self.memory = memory
        self.layout = memory.layout
        self.num_heads = num_heads
        self.softmax_scale = float(softmax_scale)
        self.limits = Limits(max_tokens, max_batch, max_pages)
        self._serial = 0
        self._cuda: CudaPath | None = None
        if memory.device.type == "cuda":
            from kvmanager.attention.cuda_path import CudaPath

            self._cuda = CudaPath(memory, num_heads, self.softmax_scale, self.limits)

    @property
    def kernel(self) -> str:
        """What decode and prefill run on: "hopper" (mla_decode_hopper.py), "triton" (mla_decode.py) or "torch"."""
        return "torch" if self._cuda is None else self._cuda.kernel

    @property
    def why(self) -> str:
        """Why that kernel and not another, in a sentence."""
        return "the pages are not on a CUDA device" if self._cuda is None else self._cuda.why

    def plan(self, tables: BatchTables, query_lens: Sequence[int] | np.ndarray, *, graph_batch: int | None = None) -> Plan:
        """Plan one step. Rows of one query token come first, then those of several.

        graph_batch pads a decode-only step to that many rows and fixes every launch's shape, so that one captured CUDA graph serves every
        later plan of the same graph_batch. Call it outside the capture, on the stream that runs the step. A new plan ends the one before it.
        """
        plan = make_plan(self.layout, self.memory.num_pages, self.limits, tables, query_lens, graph_batch, self._serial + 1)
        if self._cuda is not None:
            plan = replace(plan, device=self._cuda.send(plan))
        self._serial += 1
        return plan

    def write(self, plan: Plan, layer: int, latent: Tensor) -> None:
        """Write latent [num_tokens, entry] of this step's tokens into their slots of one layer. Rows may be strided."""
        self._require_current(plan)
        self._require(latent, "latent", (plan.num_tokens, self.layout.entry))
        pages = self.memory.layer(layer)
        if plan.num_tokens == 0:
            return
        if self._cuda is not None:
            self._cuda.write(plan, pages, latent)
        else:
            torch_path.write_latent(latent, torch.from_numpy(plan.slots), pages)

    def decode(self, plan: Plan, layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of the rows of one query token: q [num_decode, heads, entry] to out [num_decode, heads, rank] and lse [num_decode, heads]."""
        return self._attend(plan, layer, q, is_decode=True)

    def prefill(self, plan: Plan, layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """Causal attention of the rows of several query tokens: q [num_prefill, heads, entry], tokens in the step's order."""
        return self._attend(plan, layer, q, is_decode=False)

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
            torch_path.attend_rows(plan, is_decode, pages, q, self.softmax_scale, out, lse)
        return out, lse

    def _require_current(self, plan: Plan) -> None:
        if plan.serial != self._serial:
            raise WrongState("plan", plan.serial, f"the backend's newest, {self._serial}", f"version {plan.version}")

    def _require(self, tensor: Tensor, field: str, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise InvalidValue(field, f"shape {shape}", tuple(tensor.shape))
        pages = self.memory.pages
        if tensor.dtype != pages.dtype or tensor.device != pages.device:
            raise InvalidValue(field, f"{pages.dtype} on {pages.device}", f"{tensor.dtype} on {tensor.device}")
        if tensor.stride(-1) != 1 and tensor.numel():
            raise InvalidValue(field, "an entry contiguous in memory", f"stride {tensor.stride(-1)}")
