"""The backend on CUDA: fixed device buffers, and launches of the Triton kernels. Never waits for the device and never reads from it."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmanager.attention.memory import PageMemory
from kvmanager.attention.plan import Limits, Plan
from kvmanager.attention.staging import DevicePlan, Staging
from kvmanager.attention.work import Shape
from kvmanager.errors import WrongState
from kvmanager.kernels import latent_write, mla_decode, mla_merge

__all__ = ["CudaPath"]


class CudaPath:
    """Launches one backend's kernels. The partial buffers are shared by all layers and both kinds of rows: stream order keeps them apart."""

    def __init__(self, memory: PageMemory, num_heads: int, scale: float, limits: Limits) -> None:
        layout, device = memory.layout, memory.device
        self._rank, self._scale = layout.kv_lora_rank, scale
        properties = torch.cuda.get_device_properties(device)
        arch = properties.major * 10 + properties.minor
        dtype = memory.pages.dtype
        tiles = [
            mla_decode.choose_tile(num_heads, layout.kv_lora_rank, layout.qk_rope_head_dim, dtype, arch, several)
            for several in (False, True)
        ]
        self._decode_tile, self._prefill_tile = tiles
        shapes = [
            Shape(num_heads, tile.block_rows, tile.block_tokens, tile.programs_per_sm * properties.multi_processor_count) for tile in tiles
        ]
        self._staging = Staging(limits, shapes[0], shapes[1], device)
        rows = max(shape.partials_max * shape.block_rows for shape in shapes)
        self._partial_out = torch.empty(rows * layout.kv_lora_rank, dtype=torch.float32, device=device)
        self._partial_lse = torch.empty(rows, dtype=torch.float32, device=device)

    def send(self, plan: Plan) -> DevicePlan:
        return self._staging.send(plan)

    def write(self, plan: Plan, pages: Tensor, latent: Tensor) -> None:
        latent_write.write_latent(latent, _device_plan(plan).slots, pages, self._rank)

    def attend(self, plan: Plan, is_decode: bool, pages: Tensor, q: Tensor, out: Tensor, lse: Tensor) -> None:
        device = _device_plan(plan)
        work, tile = (device.decode, self._decode_tile) if is_decode else (device.prefill, self._prefill_tile)
        partial_out = self._partial_out.view(-1, tile.block_rows, self._rank)
        partial_lse = self._partial_lse.view(-1, tile.block_rows)
        mla_decode.attend(q, pages, device.page_ids, work.programs, work.items, out, lse, partial_out, partial_lse, self._scale, tile)
        mla_merge.merge(partial_out, partial_lse, work.merges, out, lse)


def _device_plan(plan: Plan) -> DevicePlan:
    if plan.device is None:
        raise WrongState("plan", plan.serial, "a plan of this CUDA backend", "a host plan")
    return plan.device
