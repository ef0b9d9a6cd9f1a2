"""The backend on CUDA: fixed device buffers, and launches of the Triton kernels. Never waits for the device and never reads from it."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmanager.attention.choice import choose_kernel
from kvmanager.attention.memory import PageMemory
from kvmanager.attention.options import Options, piece_tokens
from kvmanager.attention.plan import Limits, Plan, with_device
from kvmanager.attention.resident import ResidentTable, Update
from kvmanager.attention.staging import DevicePlan, Staging
from kvmanager.attention.work import Shape
from kvmanager.errors import WrongState
from kvmanager.kernels import latent_write, mla_decode, mla_decode_sparse, mla_merge
from kvmanager.kernels.latent_formats import view_pages
from kvmanager.kernels.latent_write import Projection

__all__ = ["CudaPath", "hopper_shape"]


def hopper_shape(num_heads: int, rank: int, num_programs: int, pieces: int = 0) -> Shape:
    """What a work list for the Hopper kernel is cut for. pieces: latents between two cuts of a batch-invariant one."""
    from kvmanager.kernels import mla_decode_hopper as hopper

    tokens = hopper.block_tokens(rank)
    return Shape(num_heads, hopper.BLOCK_ROWS, tokens, num_programs, split_tiles_min=1, whole_tiles=3, piece_tiles=pieces // tokens)


def hopper_fp8_shape(num_heads: int, num_programs: int) -> Shape:
    """What a work list for the Hopper kernel of eight-bit latents is cut for."""
    from kvmanager.kernels import mla_decode_hopper_fp8 as hopper_fp8

    return Shape(num_heads, hopper_fp8.BLOCK_ROWS, hopper_fp8.BLOCK_TOKENS, num_programs, whole_tiles=3)


class CudaPath:
    """Launches one backend's kernels. The partial buffers are shared by all layers and both kinds of rows: stream order keeps them apart."""

    def __init__(
        self,
        memory: PageMemory,
        num_heads: int,
        scale: float,
        limits: Limits,
        options: Options,
        sinks: Tensor | None = None,
        share_prefixes: bool = False,
        table: ResidentTable | None = None,
    ) -> None:
        layout, device = memory.layout, memory.device
        self._memory, self._rank, self._scale, self._options, self._sinks = memory, layout.kv_lora_rank, scale, options, sinks
        pieces = piece_tokens(options, num_heads)
        properties = torch.cuda.get_device_properties(device)
        arch = properties.major * 10 + properties.minor
        self.kernel, self.why = choose_kernel(layout, arch, mla_decode.TRITON_VERSION, options, num_heads)
        self._stored = [view_pages(memory.layer(index), self._rank, layout.scale_of(index)) for index in range(layout.num_layers)]
        self._is_fp8, self._overlap = layout.is_fp8, arch >= 90
        self._programs = properties.multi_processor_count
        dtype = memory.pages.dtype
        self._sparse_tile = mla_decode_sparse.choose_tile(num_heads, layout.kv_lora_rank, layout.qk_rope_head_dim, dtype, arch)
        if self.kernel == "hopper":
            from kvmanager.kernels import mla_decode_hopper

            # Made here, once: what TMA must know of a layer's pages never changes, and nothing is made on the step path.
            self._pages = [mla_decode_hopper.describe_pages(memory.layer(index), self._rank) for index in range(layout.num_layers)]
            shapes = [hopper_shape(num_heads, self._rank, properties.multi_processor_count, pieces)] * 2
        elif self.kernel == "hopper_fp8":
            from kvmanager.kernels import mla_decode_hopper_fp8

            self._described = [mla_decode_hopper_fp8.describe(stored) for stored in self._stored]
            shapes = [hopper_fp8_shape(num_heads, properties.multi_processor_count)] * 2
        else:
            self._tiles = [
                mla_decode.choose_tile(num_heads, layout.kv_lora_rank, layout.qk_rope_head_dim, dtype, arch, several)
                for several in (False, True)
            ]
            if pieces:  # whatever step computes a token, it is computed by one tile
                self._tiles[1] = self._tiles[0]
            shapes = [
                Shape(
                    num_heads,
                    tile.block_rows,
                    tile.block_tokens,
                    tile.programs_per_sm * properties.multi_processor_count,
                    piece_tiles=pieces // tile.block_tokens,
                    window=options.sliding_window or 0,
                )
                for tile in self._tiles
            ]
        self._shapes = shapes
        self._staging = Staging(limits, shapes[0], shapes[1], layout.page_size, device, share_prefixes, table)
        rows = self._staging.partials_max * max(shape.block_rows for shape in shapes)
        rows = max(rows, self._programs * self._sparse_tile.programs_per_sm * self._sparse_tile.block_rows)
        self._partial_out = torch.empty(rows * layout.kv_lora_rank, dtype=torch.float32, device=device)
        self._partial_lse = torch.empty(rows, dtype=torch.float32, device=device)

    @property
    def plan_bytes(self) -> int:
        return self._staging.sent_bytes

    def send(self, plan: Plan, update: Update | None = None) -> Plan:
        """The plan with its device buffers; the copy is under way. update: of the resident table, if the plan's rows are in it."""
        device = self._staging.send(plan) if update is None else self._staging.send_rows(plan, update)
        return with_device(plan, device)

    def write(self, plan: Plan, layer: int, latent: Tensor) -> None:
        slots = _device_plan(plan).slots
        if self._is_fp8:
            latent_write.write_quantised(latent, slots, self._stored[layer], self._overlap)
        else:
            latent_write.write_latent(latent, slots, self._memory.layer(layer), self._rank, self._overlap)

    def write_raw(self, plan: Plan, layer: int, raw: Tensor, projection: Projection) -> None:
        latent_write.write_projection(raw, _device_plan(plan).slots, self._stored[layer], projection, self._overlap)

    def attend_selected(self, layer: int, q: Tensor, indices: Tensor, out: Tensor, lse: Tensor) -> None:
        tile = self._sparse_tile
        # Where a list is cut depends on how many there are: under batch invariance none is.
        programs = 0 if self._options.batch_invariant else self._programs * tile.programs_per_sm
        cut = mla_decode_sparse.cut_lists(q.shape[0], q.shape[1], indices.shape[1], tile, programs)
        partial_out = self._partial_out[: cut.partials * tile.block_rows * self._rank].view(-1, tile.block_rows, self._rank)
        partial_lse = self._partial_lse[: cut.partials * tile.block_rows].view(-1, tile.block_rows)
        mla_decode_sparse.attend_selected(q, self._stored[layer], indices, out, lse, partial_out, partial_lse, self._scale, tile, cut)

    def attend(self, plan: Plan, is_decode: bool, layer: int, q: Tensor, out: Tensor, lse: Tensor) -> None:
        device = _device_plan(plan)
        kind = 0 if is_decode else 1
        options, sink = self._options, None if self._sinks is None else self._sinks[layer]
        partial_out = self._partial_out.view(-1, self._shapes[kind].block_rows, self._rank)
        partial_lse = self._partial_lse.view(-1, self._shapes[kind].block_rows)
        rows_max = q.shape[1] if is_decode else None
        for work in (device.decode,) if is_decode else device.prefill:
            lists = (device.page_ids, work.programs, work.items, out, lse, partial_out, partial_lse, self._scale)
            if self.kernel == "hopper":
                from kvmanager.kernels import mla_decode_hopper

                mla_decode_hopper.attend(q, self._pages[layer], *lists, placed=options.batch_invariant, sink=sink)
            elif self.kernel == "hopper_fp8":
                from kvmanager.kernels import mla_decode_hopper_fp8

                mla_decode_hopper_fp8.attend(q, self._described[layer], *lists)
            else:
                pages, tile = self._stored[layer], self._tiles[kind]
                mla_decode.attend(q, pages, *lists, tile, soft_cap=options.logit_soft_cap, window=options.sliding_window, sink=sink)
            overlap = self.kernel.startswith("hopper")
            mla_merge.merge(partial_out, partial_lse, work.merges, out, lse, rows_max, overlap, sink, options.batch_invariant)


def _device_plan(plan: Plan) -> DevicePlan:
    if plan.device is None:
        raise WrongState("plan", plan.serial, "a plan of this CUDA backend", "a host plan")
    return plan.device
