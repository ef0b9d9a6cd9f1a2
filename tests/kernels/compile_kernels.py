"""Compile every kernel for sm_90a as its launcher launches it, on any machine, and say what the machine code holds; run by test_compiled.py.

    python tests/kernels/compile_kernels.py [--all] [--share 0/2] [--cache FOLDER]      one JSON line a kernel

Launchers are called on small CPU tensors with a driver that knows the card's architecture and launches nothing, so what is compiled is what the
backend would launch, specialised alike. --all: all combinations of the Hopper kernels' parameters, instead of all pairs of them. Lines in
--cache are of the same source, parameters and Triton, and are printed again. Needs Triton and the ptxas it brings, no GPU and no CUDA driver."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does up to 3.9; says nothing about it then

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.memory import PageMemory
from kvmanager.kernels import latent_write, mla_decode, mla_decode_hopper, mla_decode_hopper_fp8, mla_decode_sparse, mla_merge, step_plan
from kvmanager.kernels.latent_formats import Stored, view_pages
from kvmanager.kernels.page_checksum import sum_pages
from kvmanager.kernels.page_copy import copy_pages
from kvmanager.kernels.page_pull import convert_pages, pull_pages
from kvmanager.kernels.state_merge import merge_pair, merge_states

ARCH = 90
NUM_PAGES, TOKENS = 4, 6
Launches = Iterator[tuple[str, Callable[[], object]]]

HOPPER = {  # what the kernel is compiled for; the dimensions are those of the models served and of the tests
    "dims": ((512, 64), (256, 32), (448, 64), (128, 32), (512, 32), (256, 64)),
    "page_size": (64, 16, 32),  # boxes of TMA: pages of 128 are two of 64
    "dtype": ("bfloat16", "float16"),
    "causal": (True, False),
    "placed": (False, True),
    "sink": (False, True),
}
HOPPER_FP8 = {
    "dtype": ("fp8_ds_mla", "float8_e4m3fn"),
    "page_size": (64, 16, 48),
    "causal": (True, False),
}


class _Card:
    """As much of a driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)


def chosen(axes: dict[str, tuple[Any, ...]], everything: bool, allowed: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """All allowed combinations, or so many of them that each allowed pair of values of two axes is in one: most wanting pairs first."""
    rows = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    rows = [row for row in rows if allowed(row)]
    if everything:
        return rows
    pairs = [set(itertools.combinations(row.items(), 2)) for row in rows]
    wanted, kept = set().union(*pairs), []
    while wanted:
        best = max(range(len(rows)), key=lambda index: len(pairs[index] & wanted))
        kept.append(rows[best])
        wanted -= pairs[best]
    return kept


def _stored(layout: LatentLayout) -> tuple[Tensor, Stored]:
    memory = PageMemory(layout, NUM_PAGES, "cpu")
    return memory.layer(1), view_pages(memory.layer(1), layout.kv_lora_rank, layout.scale_of(1))


def _layout(dims: tuple[int, int], page_size: int, dtype: str) -> LatentLayout:
    return LatentLayout(*dims, 2, page_size, dtype, scales=(0.5,) if dtype == "float8_e4m3fn" else ())  # type: ignore[arg-type]


def _attention(layout: LatentLayout, heads: int, block_rows: int) -> tuple[Tensor, list[Tensor], float]:
    """q, then a launcher's other tensors: page_ids, programs, items, out, lse, partial_out, partial_lse; and a scale."""
    dtype, rank = getattr(torch, layout.value_dtype), layout.kv_lora_rank
    q = torch.empty((TOKENS, heads, layout.entry), dtype=dtype)
    lists = [torch.zeros(16, dtype=torch.int32), torch.zeros(9, dtype=torch.int32), torch.zeros((16, 8), dtype=torch.int32)]
    results = [torch.empty((TOKENS, heads, rank), dtype=dtype), torch.empty((TOKENS, heads))]
    return q, [*lists, *results, torch.empty((8, block_rows, rank)), torch.empty((8, block_rows))], 0.1


def hopper(everything: bool) -> Launches:
    def launch(dims: tuple[int, int], page_size: int, dtype: str, causal: bool, placed: bool, sink: bool) -> None:
        layout = _layout(dims, page_size, dtype)
        q, tensors, scale = _attention(layout, 16, mla_decode_hopper.BLOCK_ROWS)
        pages = mla_decode_hopper.describe_pages(_stored(layout)[0], layout.kv_lora_rank)
        sinks = torch.zeros(16) if sink else None
        mla_decode_hopper.attend(q, pages, *tensors, scale, causal, placed=placed, sink=sinks)  # type: ignore[arg-type]

    for row in chosen(HOPPER, everything, lambda row: row["causal"] or not row["placed"]):
        (rank, rope), flags = row["dims"], [name for name in ("causal", "placed", "sink") if row[name]]
        yield f"hopper {rank}+{rope} page {row['page_size']} {' '.join([row['dtype'], *flags])}", lambda row=row: launch(**row)  # type: ignore[misc]


def hopper_fp8(everything: bool) -> Launches:
    def launch(dtype: str, page_size: int, causal: bool) -> None:
        layout = _layout((512, 64), page_size, dtype)
        q, tensors, scale = _attention(layout, 16, mla_decode_hopper_fp8.BLOCK_ROWS)
        pages = mla_decode_hopper_fp8.describe(_stored(layout)[1])
        mla_decode_hopper_fp8.attend(q, pages, *tensors, scale, causal)  # type: ignore[arg-type]

    for row in chosen(HOPPER_FP8, everything, lambda row: True):
        name = f"hopper_fp8 {row['dtype']} page {row['page_size']}{' causal' if row['causal'] else ''}"
        yield name, lambda row=row: launch(**row)  # type: ignore[misc]


def decode(everything: bool) -> Launches:
    """The plain kernel, where the Hopper ones are not chosen: other dimensions, options, many heads in eight bits; and beside them."""

    def launch(layout: LatentLayout, heads: int, several: bool, options: dict[str, Any]) -> None:
        stored = _stored(layout)[1]
        tile = mla_decode.choose_tile(heads, layout.kv_lora_rank, layout.qk_rope_head_dim, stored.values.dtype, ARCH, several)
        q, tensors, scale = _attention(layout, heads, tile.block_rows)
        mla_decode.attend(q, stored, *tensors, scale, tile, **options)  # type: ignore[arg-type]

    for dims, dtype, heads, several, options in (
        ((512, 64), "bfloat16", 128, False, {}),
        ((512, 64), "bfloat16", 16, False, {"soft_cap": 30.0, "window": 4096, "sink": torch.zeros(16)}),
        ((1024, 64), "float16", 16, True, {}),
        ((64, 32), "bfloat16", 16, True, {"causal": False}),
        ((256, 32), "float32", 16, False, {}),
        ((512, 64), "fp8_ds_mla", 128, True, {}),
        ((512, 64), "float8_e4m3fn", 16, False, {"window": 100}),
    ):
        name = f"decode {dims[0]}+{dims[1]} {dtype} {heads} heads{' several' if several else ''} {' '.join(options)}".rstrip()
        layout = _layout(dims, 64, dtype)  # type: ignore[arg-type]
        yield name, lambda a=(layout, heads, several, options): launch(*a)  # type: ignore[misc]


def sparse(everything: bool) -> Launches:
    def launch(layout: LatentLayout, heads: int, programs: int) -> None:
        stored = _stored(layout)[1]
        tile = mla_decode_sparse.choose_tile(heads, layout.kv_lora_rank, layout.qk_rope_head_dim, stored.values.dtype, ARCH)
        cut = mla_decode_sparse.cut_lists(TOKENS, heads, 2048, tile, programs)
        q, (_, _, _, out, lse, *_), scale = _attention(layout, heads, tile.block_rows)
        partial_out = torch.empty((cut.partials, tile.block_rows, layout.kv_lora_rank))
        indices = torch.zeros((TOKENS, 2048), dtype=torch.int32)
        mla_decode_sparse.attend_selected(q, stored, indices, out, lse, partial_out, partial_out[..., 0], scale, tile, cut)

    for dtype, heads, programs in (("bfloat16", 128, 0), ("fp8_ds_mla", 16, 264), ("fp8_ds_mla", 128, 0), ("float8_e4m3fn", 64, 132)):
        layout = _layout((512, 64), 64, dtype)
        yield f"sparse {dtype} {heads} heads {programs} programs", lambda a=(layout, heads, programs): launch(*a)  # type: ignore[misc]


def write(everything: bool) -> Launches:
    def launch(layout: LatentLayout, raw: bool, overlap: bool, orders: tuple[str, str], tokens: int) -> None:
        pages, stored = _stored(layout)
        latent, slots = (
            torch.empty((tokens, layout.entry), dtype=getattr(torch, layout.value_dtype)),
            torch.zeros(tokens, dtype=torch.int64),
        )
        if raw:
            weight, cos_sin = latent[0, : layout.kv_lora_rank].contiguous(), torch.empty((64, layout.qk_rope_head_dim))
            latent_write.write_projection(latent, slots, stored, latent_write.Projection(weight, 1e-6, cos_sin, slots, *orders), overlap)
        elif layout.is_fp8:
            latent_write.write_quantised(latent, slots, stored, overlap)
        else:
            latent_write.write_latent(latent, slots, pages, layout.kv_lora_rank, overlap)

    orders = itertools.cycle((("interleaved", "half"), ("half", "half"), ("interleaved", "interleaved"), ("half", "interleaved")))
    for dims, dtype, raw in (
        ((512, 64), "bfloat16", False),
        ((448, 64), "float32", False),
        ((512, 64), "fp8_ds_mla", False),
        ((256, 32), "float8_e4m3fn", False),
        ((512, 64), "bfloat16", True),
        ((448, 64), "float16", True),
        ((512, 64), "fp8_ds_mla", True),
        ((512, 64), "float8_e4m3fn", True),
    ):
        for tokens in (TOKENS, latent_write.FEW_TOKENS + 1):
            arguments = (_layout(dims, 64, dtype), raw, True, next(orders), tokens)
            yield f"write {dims[0]}+{dims[1]} {dtype}{' raw' if raw else ''} {tokens} tokens", lambda a=arguments: launch(*a)  # type: ignore[misc]


def merge(everything: bool) -> Launches:
    def launch(num_lists: int, rank: int, ordered: bool, sink: bool) -> None:
        layout = _layout((rank, 64), 64, "bfloat16")
        _, (_, _, _, out, lse, partial_out, partial_lse), _ = _attention(layout, 16, 64)
        merges = torch.zeros((num_lists, mla_merge.MERGE_FIELDS), dtype=torch.int32)
        sinks = torch.zeros(16) if sink else None
        mla_merge.merge(partial_out, partial_lse, merges, out, lse, overlap=True, sink=sinks, ordered=ordered)

    for num_lists, rank in ((1, 512), (3, 448), (100, 512)):
        for ordered in (False, True):
            name = f"merge {num_lists} lists rank {rank}{' ordered' if ordered else ''}"
            yield name, lambda a=(num_lists, rank, ordered, rank == 448): launch(*a)  # type: ignore[misc]


def state(everything: bool) -> Launches:
    outs, lses = torch.empty((2, TOKENS, 16, 512), dtype=torch.bfloat16), torch.empty((2, TOKENS, 16))
    yield "state pair", lambda: merge_pair(outs[0], lses[0], outs[1], lses[1], outs[0], lses[0])
    flat, norms = outs.flatten(1, 2), lses.flatten(1)
    yield "state all", lambda: merge_states(flat, norms, flat[0], norms[0])


def move(everything: bool) -> Launches:
    words = torch.zeros((NUM_PAGES, 2, 64, 144), dtype=torch.int64)
    segments = torch.zeros((3, 5), dtype=torch.int32)
    yield "copy", lambda: copy_pages(words.view(torch.bfloat16), segments[:, :3].contiguous())
    by_slot, by_word = torch.zeros((2, 64), dtype=torch.int64), torch.zeros(144, dtype=torch.int64)
    yield "checksum", lambda: sum_pages(words, segments[:, :4].contiguous(), 0, 2, by_slot, by_word)
    for whole in (True, False):
        arguments = {"source_page_size": 64, "whole": whole, "first_layer": 0, "end_layer": 2}
        yield f"pull{' whole' if whole else ''}", lambda a=arguments: pull_pages(words.data_ptr(), words, segments, **a)  # type: ignore[misc]
    inverse, sizes = torch.ones(2), {"source_page_size": 64, "first_layer": 0, "end_layer": 2}
    for width, dtype in ((656, torch.uint8), (576, torch.float8_e4m3fn)):
        stored = view_pages(torch.zeros((NUM_PAGES, 2, 64, width), dtype=torch.uint8).view(dtype), 512)
        yield f"convert to {width} bytes", lambda a=stored: convert_pages(words.data_ptr(), a, inverse, segments, **sizes)  # type: ignore[misc]


def plan(everything: bool) -> Launches:
    words, slots, sent = torch.zeros(64, dtype=torch.int32), torch.zeros(8, dtype=torch.int64), step_plan.Sent(0, 8, 2, 8)
    for lanes, group, split_min, whole, rows_max in ((132, 1, 1, 3, 256), (66, 2, 2, 0, 4096)):
        places = step_plan.ListPlaces(0, 0, 0, lanes, group, 64, 128, split_min, whole, rows_max, 64)
        yield f"plan {rows_max} rows {lanes} lanes", lambda a=places: step_plan.finish(words, words, slots, a, sent, 0, 8, True)  # type: ignore[misc]


FAMILIES = (hopper, hopper_fp8, decode, sparse, write, merge, state, move, plan)


def loose_arrivals(code: str) -> int:
    """How often one thread arrives at an mbarrier for its warpgroups without a barrier of theirs right before, behind all that they access.

    What racecheck does not follow, and the list of what it may report rests on (tests/gpu/sanitize.py)."""
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", code, re.MULTILINE)
    loose = 0
    for index, instruction in enumerate(instructions):
        if "SYNCS.ARRIVE.TRANS64.A1T0" not in instruction:
            continue
        before = next(
            (
                found
                for found in reversed(instructions[:index])
                if re.search(r"\b(BAR|STS|STSM|LDS|LDSM|HGMMA|WARPGROUP|BRA|SYNCS)\b", found)
            ),
            "",
        )
        loose += re.search(r"^BAR\.SYNC\S* 0x\w+, 0x(80|100)", before.strip()) is None
    return loose


def measure(kernel: triton.compiler.CompiledKernel, log: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        command = [str(Path(get_ptxas(ARCH).path).with_name("cuobjdump")), "-sass", str(cubin)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "warnings": re.findall(r"\(C75\d\d\)[^\n]*|[^\n]*serializ[^\n]*", log),
        "spilled": max(int(number) for number in re.findall(r"(\d+) bytes spill", log)),
        "registers": max(int(number) for number in re.findall(r"Used (\d+) registers", log)),
        "shared": kernel.metadata.shared,
        "loose": loose_arrivals(code),
        "arrivals": code.count("SYNCS.ARRIVE.TRANS64.A1T0"),
        **{name: len(re.findall(rf"\b{name}\b", code)) for name in ("HGMMA", "UTMALDG", "LDL", "STL")},
    }


def run(launches: list[tuple[str, Callable[[], object]]], cache: Path | None) -> None:
    """Print a line for each kernel that each launch compiles; one that an earlier launch compiled is not printed twice."""
    compile_really = triton.compiler.compile
    found: list[dict[str, Any]] = []

    def compile_and_measure(source: Any, target: Any = None, options: Any = None) -> object:
        text = f"{triton.__version__} {Path(__file__).read_text()} {source.hash()} {sorted(options.items())}"
        kept = cache / f"{hashlib.sha256(text.encode()).hexdigest()}.json" if cache else None
        if kept is not None and kept.exists():
            found.append(json.loads(kept.read_text()))
            return None
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = compile_really(source, target=target, options=options)
        found.append({"kernel": source.name, **measure(kernel, log.getvalue())})
        if kept is not None:
            partial = kept.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(found[-1]))
            partial.replace(kept)
        return kernel

    run_really = JITFunction.run
    JITFunction.run = lambda self, *args, warmup, **kwargs: run_really(self, *args, warmup=True, **kwargs)
    triton.compiler.compile = compile_and_measure  # taken from there when a kernel is first launched
    triton.runtime.driver.set_active(_Card())
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    for name, launch in launches:
        launch()
        for line in found:
            print(json.dumps({"triton": triton.__version__, "launch": name, **line}), flush=True)
        found.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="every N-th launch from the I-th on")
    parser.add_argument("--cache", type=Path)
    given = parser.parse_args()
    index, count = map(int, given.share.split("/"))
    if given.cache is not None:
        given.cache.mkdir(parents=True, exist_ok=True)
    launches = [launch for family in FAMILIES for launch in family(given.all)][index::count]
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        run(launches, given.cache)


if __name__ == "__main__":
    main()
