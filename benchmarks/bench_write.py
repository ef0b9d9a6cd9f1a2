"""Writing new latents to random slots on one GPU: checks the bytes, then times each format beside torch's index_copy_ in the same run.

    python3 benchmarks/bench_write.py [TOKENS ...]

Floor: each row read once and each slot written once at copy bandwidth, measured in the same run; or, where that is less, an empty kernel's
launch by the same graph replay: of one program, one after the other. Beside it: as many programs, overlapped launches, and the least that a
write can be, a kernel that loads a slot and stores there. raw: RMSNorm, rotation, rounding and write from the projection, in one launch.
"overlapped" is what a backend does on sm_90 and newer: programmatic dependent launch, each write waiting for the one before.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from measure import COLD_BYTES, graph_ms, graph_of, median, print_header, replay_ms
from result_files import write_results
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvmanager.attention import torch_path
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.memory import PageMemory
from kvmanager.kernels.latent_formats import view_pages
from kvmanager.kernels.latent_write import Projection, write_latent, write_projection, write_quantised

WARM_SECONDS = 0.1  # a card that waited for the check of the bytes is slower at first: 56 us for 50

LAYOUTS = {
    "bf16": LatentLayout(512, 64, 4),
    "e4m3": LatentLayout(512, 64, 4, dtype="float8_e4m3fn", scales=(0.02,)),
    "fp8_ds_mla": LatentLayout(512, 64, 4, dtype="fp8_ds_mla"),
}


@triton.jit
def _empty_kernel(pointer, HAS_OVERLAP: tl.constexpr):
    if HAS_OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _least_kernel(slots_ptr, target_ptr, HAS_OVERLAP: tl.constexpr):
    if HAS_OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(slots_ptr + tl.program_id(0))
    tl.store(target_ptr + slot, 1.0)


def can_overlap() -> bool:
    return torch.cuda.get_device_capability() >= (9, 0)


def print_launches(num_programs: int) -> float:
    """What launches cost by the replay that times everything here; gives the empty one of one program, in ms."""
    target, slots = torch.zeros(997 * num_programs, device="cuda"), torch.arange(num_programs, device="cuda") * 997
    found = {}
    for overlap in (False, True) if can_overlap() else (False,):
        more = {"launch_pdl": True} if overlap else {}
        for programs in (1, num_programs):
            empty = lambda programs=programs, overlap=overlap, more=more: _empty_kernel[(programs,)](target, overlap, **more)
            found[f"{'overlapped ' if overlap else ''}empty, {programs} programs"] = graph_ms([empty] * 64)  # type: ignore[list-item]
        least = lambda overlap=overlap, more=more: _least_kernel[(num_programs,)](slots, target, overlap, num_warps=1, **more)
        found[f"{'overlapped ' if overlap else ''}load and store, {num_programs} programs"] = graph_ms([least] * 64)  # type: ignore[list-item]
    empty_ms = next(iter(found.values()))
    print("launches: " + "; ".join(f"{what} {ms * 1e3:.2f} us ({ms / empty_ms:.2f} x)" for what, ms in found.items()))
    return empty_ms


def bench(num_tokens: int, name: str, copy: float, empty_ms: float) -> list[dict[str, Any]]:
    layout = LAYOUTS[name]
    memory = PageMemory(layout, 4096, "cuda")
    memory.pages.view(torch.uint8).zero_()
    sets = max(4, min(64, COLD_BYTES // (num_tokens * layout.slot_bytes * 2)))
    num_slots, rank = memory.num_pages * layout.page_size, layout.kv_lora_rank
    latent = [torch.randn((num_tokens, layout.entry), device="cuda").bfloat16() for _ in range(sets)]
    slots = [torch.randperm(num_slots, device="cuda")[:num_tokens] for _ in range(sets)]
    weight, angle = torch.ones(rank, device="cuda").bfloat16(), torch.rand((65536, 32), device="cuda") * 6
    cos_sin, positions = torch.cat([angle.cos(), angle.sin()], 1).bfloat16(), torch.arange(num_tokens, device="cuda")
    stored = [view_pages(memory.layer(layer), rank, layout.scale_of(layer)) for layer in range(4)]

    projection = Projection(weight, 1e-6, cos_sin, positions, "interleaved", "half")

    def write(index: int, overlap: bool = False) -> None:
        if layout.is_fp8:
            write_quantised(latent[index], slots[index], stored[index % 4], overlap)
        else:
            write_latent(latent[index], slots[index], memory.layer(index % 4), rank, overlap)

    def raw(index: int, overlap: bool = False) -> None:
        write_projection(latent[index], slots[index], stored[index % 4], projection, overlap)

    write(1)
    where = (slots[1] // layout.page_size, slots[1] % layout.page_size)
    got = memory.layer(1).view(torch.uint8)[where]
    want = torch_path.encode(latent[1].cpu(), memory.pages.dtype, layout.scale_of(1)).view(torch.uint8)
    if not torch.equal(got.cpu(), want) or int(memory.pages.view(torch.uint8).count_nonzero(dim=(1, 2, 3)).ne(0).sum()) > num_tokens:
        raise SystemExit(f"{name}: wrong bytes")

    def timed(call: Callable[[int], object]) -> float:
        graph, until = graph_of([lambda index=index: call(index) for index in range(sets)]), time.perf_counter() + WARM_SECONDS  # type: ignore[misc]
        while time.perf_counter() < until:
            replay_ms(graph, sets, 1)
        return median(replay_ms(graph, sets, 25))

    flat = torch.empty((num_slots, layout.entry), dtype=torch.bfloat16, device="cuda")
    times = {"write": timed(write), "raw": timed(raw)}
    if can_overlap():
        times |= {"overlapped write": timed(lambda index: write(index, True)), "overlapped raw": timed(lambda index: raw(index, True))}
    if name == "bf16":
        times["torch index_copy_ (one contiguous layer)"] = timed(lambda index: flat.index_copy_(0, slots[index], latent[index]))
    floor = num_tokens * (layout.entry * 2 + layout.slot_bytes) / copy / 1e6
    line = f"{num_tokens:>8} tokens  {name:>10}  floor {floor * 1e3:6.1f} us"
    for what, ms in times.items():
        line += f"  {what} {ms * 1e3:6.2f} us {floor / ms:6.1%} {ms / empty_ms:5.2f} x empty"
    print(line, flush=True)
    shared = {"floor_ms": max(floor, empty_ms), "empty_ms": empty_ms}
    rows = [
        {"shape": f"{num_tokens} tokens, {name}{kind}", **shared, "ours_ms": times.get(f"overlapped {what}", times[what]), "alone_ms": times[what]}
        for what, kind in (("write", ""), ("raw", ", raw"))
    ]  # fmt: skip
    if name == "bf16":
        rows[0]["index_copy_ms"] = times["torch index_copy_ (one contiguous layer)"]
    return rows


def main() -> None:
    copy, _, _ = print_header()
    empty_ms = print_launches(128)
    print("512 + 64, page 64, 4 layers page-major, random slots; bytes checked first; empty: of one program, not overlapped")
    rows: list[dict[str, Any]] = []
    for num_tokens in map(int, sys.argv[1:] or ("128", "4096", "65536")):
        for name in LAYOUTS:
            rows += bench(num_tokens, name, copy, empty_ms)
            torch.cuda.empty_cache()
    write_results("write", rows, copy_gb_s=copy)


if __name__ == "__main__":
    main()
