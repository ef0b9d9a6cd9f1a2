"""Run every kernel on a small case under compute-sanitizer's memcheck and racecheck: `make gpu-sanitize`.

    python tests/gpu/sanitize.py [CASE ...] [--tool memcheck] [--jobs 4] [--reports FOLDER]

Each case is a process of its own, checks its answers as well, and says which kernels it launched: together all there are. memcheck must report
nothing, in anybody's kernels; racecheck, in the project's own, nothing beyond FALSE: pairs of accesses whose order racecheck does not
follow. docs/kernels.md says of each what orders them. Ends with status 1 otherwise, and with 0 and a line that says so where there is no
compute-sanitizer or no CUDA device."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

TOOLS = ("memcheck", "racecheck")
SECONDS_MAX = 900  # a case under a tool
LENGTHS, QUERY_LENS = [1, 0, 70, 600, 130], [1, 1, 1, 1, 3]
ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kvmanager" / "kernels"


def step(layout: object, heads: int, kernel: str, **options: object) -> None:
    """Written, decoded and prefilled through a backend, against the float64 reference."""
    import torch

    from kvmanager.attention.backend import MLABackend
    from kvmanager.attention.compare import check_attention, make_problem

    problem = make_problem(layout, LENGTHS, QUERY_LENS, heads, "cuda")  # type: ignore[arg-type]
    sinks = torch.randn(problem.memory.layout.num_layers, heads, device="cuda") if options.pop("sinks", False) else None
    backend = MLABackend(problem.memory, heads, problem.scale, 64, 16, 1024, sinks=sinks, **options)  # type: ignore[arg-type]
    if backend.kernel != kernel and torch.cuda.get_device_capability() == (9, 0):
        raise SystemExit(f"expected the kernel {kernel}, got {backend.kernel}: {backend.why}")
    plan = backend.plan(problem.tables, problem.query_lens)
    backend.write(plan, 1, problem.latent[1])
    out, lse = backend.decode(plan, 1, problem.q[1, : plan.num_decode])
    more_out, more_lse = backend.prefill(plan, 1, problem.q[1, plan.num_decode :])
    sink = None if sinks is None else sinks[1]
    check_attention(problem, 1, torch.cat([out, more_out]), torch.cat([lse, more_lse]), True, backend.options, sink)


def write() -> None:
    """All formats, as they are and from the projection, few tokens and many: the bytes that the CPU writes, or near."""
    import torch

    from kvmanager.attention import reference, torch_path
    from kvmanager.attention.layout import LatentLayout
    from kvmanager.attention.memory import PageMemory
    from kvmanager.kernels.latent_formats import view_pages
    from kvmanager.kernels.latent_write import Projection, write_latent, write_projection, write_quantised

    overlap = torch.cuda.get_device_capability() >= (9, 0)
    for dtype, scales in (("bfloat16", ()), ("float32", ()), ("float8_e4m3fn", (0.02,)), ("fp8_ds_mla", ())):
        layout = LatentLayout(512, 64, 2, 64, dtype, scales=scales)  # type: ignore[arg-type]
        for num_tokens in (5, 3000):
            memory = PageMemory(layout, 50, "cuda")
            memory.pages.view(torch.uint8).zero_()
            stored = view_pages(memory.layer(1), 512, layout.scale_of(1))
            latent = torch.randn(num_tokens, 576).to(getattr(torch, layout.value_dtype))
            slots = torch.randperm(50 * 64)[:num_tokens]
            slots[[0, 3]] = torch.tensor([-1, 50 * 64])
            kept = (slots >= 0) & (slots < 50 * 64)
            if layout.is_fp8:
                write_quantised(latent.cuda(), slots.cuda(), stored, overlap)
            else:
                write_latent(latent.cuda(), slots.cuda(), memory.layer(1), 512, overlap)
            got = memory.layer(1).view(torch.uint8).cpu().flatten(0, 1)[slots[kept]]
            want = torch_path.encode(latent, memory.pages.dtype, layout.scale_of(1)).contiguous().view(torch.uint8)[kept]
            if not torch.equal(got, want):
                raise SystemExit(f"{dtype}: other bytes than the CPU's")
            weight, cos_sin = torch.rand(512), torch.rand(100, 64)
            positions = torch.arange(num_tokens) % 100
            for orders in (("interleaved", "half"), ("half", "interleaved")):
                projection = Projection(weight.cuda(), 1e-6, cos_sin.cuda(), positions.cuda(), *orders)
                write_projection(latent.cuda(), slots.cuda(), stored, projection, overlap)
                near = reference.project(latent, weight, 1e-6, cos_sin, positions, *orders)[kept]
                read = reference.read_latent(memory.layer(1).cpu().flatten(0, 1)[slots[kept]], 512, layout.scale_of(1))
                if ((read - near).abs() > 2**-3 * near.abs() + 0.02).any():
                    raise SystemExit(f"{dtype} from the projection: far from float64")


def decode() -> None:
    from kvmanager.attention.layout import LatentLayout

    step(LatentLayout(512, 64, 2, 64), 20, "triton", logit_soft_cap=30.0, sliding_window=100, sinks=True)
    step(LatentLayout(80, 48, 2, 48, "float16"), 3, "hopper")
    step(LatentLayout(48, 16, 2, 16, "float32"), 17, "triton")
    step(LatentLayout(512, 64, 2, 64, "fp8_ds_mla"), 128, "triton")


def hopper() -> None:
    from kvmanager.attention.layout import LatentLayout

    for page_size, heads in ((64, 20), (16, 128)):
        step(LatentLayout(512, 64, 2, page_size), heads, "hopper", sinks=heads == 20)
    step(LatentLayout(256, 32, 2, 64, "float16"), 16, "hopper")


def hopper_invariant() -> None:
    from kvmanager.attention.layout import LatentLayout

    step(LatentLayout(512, 64, 2, 64), 20, "hopper", batch_invariant=True, invariant_tokens=256)
    step(LatentLayout(256, 32, 2, 16), 40, "hopper", batch_invariant=True, invariant_tokens=256)


def hopper_fp8() -> None:
    from kvmanager.attention.layout import LatentLayout

    step(LatentLayout(512, 64, 2, 64, "fp8_ds_mla"), 16, "hopper_fp8")
    step(LatentLayout(512, 64, 2, 16, "float8_e4m3fn", scales=(0.002,)), 20, "hopper_fp8")


def sparse() -> None:
    """Few tokens, whose lists are cut and merged, and lists of padding alone."""
    import torch

    from kvmanager.attention import reference
    from kvmanager.attention.backend import MLABackend
    from kvmanager.attention.compare import assert_close, make_problem
    from kvmanager.attention.layout import LatentLayout

    for layout, heads in ((LatentLayout(512, 64, 2, 64), 16), (LatentLayout(512, 64, 2, 64, "fp8_ds_mla"), 70)):
        problem = make_problem(layout, [300] * 3, [1] * 3, heads, "cuda", written=True)
        read = (~problem.unread).flatten().nonzero().flatten()
        lists = read[torch.randint(0, len(read), (3, 500))].int()
        lists[torch.rand(lists.shape) < 0.2] = -1
        lists[1] = -1
        backend = MLABackend(problem.memory, heads, problem.scale, 64, 16, 1024)
        out, lse = backend.attend_selected(backend.plan(problem.tables, [1] * 3), 1, problem.q[1], lists.cuda())
        for token in range(3):
            latent = reference.read_latent(reference.select(problem.memory.layer(1), lists[token].cuda()), 512, layout.scale_of(1))
            want = reference.attend(problem.q[1, token : token + 1], latent, 512, problem.scale, causal=False)
            assert_close(out[token : token + 1], lse[token : token + 1], *want)


def cascade() -> None:
    """A prefix that five rows share, and one that two do, read once each."""
    from kvmanager.attention import shared_prefix, staging
    from kvmanager.attention.backend import MLABackend
    from kvmanager.attention.compare import check_attention, make_problem, share_pages
    from kvmanager.attention.layout import LatentLayout

    shared_prefix.gain = lambda shape, rows, tiles: float(rows * tiles)  # whether it pays is another question
    staging.WORTH = float("inf")
    for layout in (LatentLayout(512, 64, 1, 64), LatentLayout(80, 48, 1, 48), LatentLayout(512, 64, 1, 64, "fp8_ds_mla")):
        size = layout.page_size
        problem = make_problem(layout, [1000, 900, 910, 899, 1200, 5, 700, 650], [1] * 8, 16, "cuda", written=True)
        problem = share_pages(problem, [(0, 5, 768 // size), (6, 2, 600 // size)])
        backend = MLABackend(problem.memory, 16, problem.scale, 64, 16, 1024)
        plan = backend.plan(problem.tables, problem.query_lens)
        if plan.device is None or not plan.device.groups:
            raise SystemExit("no group was found")
        check_attention(problem, 0, *backend.decode(plan, 0, problem.q[0]))


def long_prefill(library: str | None = "plain") -> None:
    """Latents gathered from pages, expanded, attended to chunk by chunk; states merged."""
    from kvmanager.attention import LongPrefill
    from kvmanager.attention.backend import MLABackend
    from kvmanager.attention.compare import check_expanded, make_heads, make_problem
    from kvmanager.attention.layout import LatentLayout

    for dtype in ("bfloat16", "fp8_ds_mla"):
        problem = make_problem(LatentLayout(512, 64, 1, 64, dtype), [1, 700, 333], [1, 100, 333], 4, "cuda")  # type: ignore[arg-type]
        heads = make_heads(problem, 128, 128)
        backend = MLABackend(problem.memory, 4, 192**-0.5, 1024, 16, 1024)
        prefill = LongPrefill(backend, 128, 128, workspace_bytes=2**23, library=library)
        plan = backend.plan(problem.tables, problem.query_lens)
        backend.write(plan, 0, problem.latent[0])
        check_expanded(problem, 0, heads, backend.softmax_scale, *prefill.run(plan, 0, *heads.tail(plan.num_decode)), plan.num_decode)


def long_prefill_library() -> None:
    """By the library that is chosen."""
    long_prefill(None)


def states() -> None:
    import torch

    from kvmanager.attention.states import merge_pair, merge_states

    outs, lses = torch.randn(3, 7, 5, 512).bfloat16(), torch.randn(3, 7, 5)
    lses[0, 0], lses[:, 3] = float("-inf"), float("-inf")
    results = []
    for device in ("cuda", "cpu"):
        parts, norms = outs.to(device), lses.to(device)
        out, lse = torch.empty_like(parts[0]), torch.empty_like(norms[0])
        merge_pair(parts[0], norms[0], parts[1], norms[1], out, lse)
        results.append([tensor.cpu().float() for tensor in (out, lse, *merge_states(parts, norms))])
    if any(not torch.allclose(got, want, rtol=0.01, atol=1e-4) for got, want in zip(*results, strict=True)):
        raise SystemExit("states: other results than the CPU's")


def pages() -> None:
    """Copied, pulled into pages of another size, summed."""
    import numpy as np
    import torch

    from kvmanager.attention.checksum import sum_segments
    from kvmanager.attention.layout import LatentLayout
    from kvmanager.attention.memory import PageMemory
    from kvmanager.kernels.page_pull import pull_pages

    layout = LatentLayout(512, 64, 3, 64)
    memory, target = PageMemory(layout, 7, "cuda"), torch.zeros((20, 3, 16, 144), dtype=torch.int64, device="cuda")
    memory.pages.normal_()
    want = memory.pages.clone()
    want[4, :, :63] = want[1, :, :63]
    memory.copy_pages([1, 0, -1], [4, 5, 6], [63, 0, 9])
    words = memory.pages.view(torch.int64)
    for whole, segments, page_size in ((False, [[2, 5, 7, 1, 11], [3, 63, 0, 0, 1]], 16), (True, [[4, 0, 6, 0, 64]], 64)):
        into = target if page_size == 16 else words
        rows = torch.tensor(segments, dtype=torch.int32, device="cuda")
        layers = {"first_layer": 0, "end_layer": 3} if whole else {"first_layer": 1, "end_layer": 3}
        pull_pages(words.data_ptr(), into, rows, source_page_size=64, whole=whole, **layers)
    want[6] = want[4]
    if not torch.equal(memory.pages, want) or not torch.equal(target[7, 1:, 1:12], words[2, 1:, 5:16]) or target[7, 0].any():
        raise SystemExit("pages: other bytes than were copied")
    segments = np.array([[2, 0, 64, 0], [3, 5, 9, 5]], dtype=np.int64)
    sums = [sum_segments(where, layout, segments, (0, 3), 64) for where in (memory.pages, memory.pages.cpu())]
    if not np.array_equal(*sums):
        raise SystemExit("pages: another sum than the CPU's")


def converted() -> None:
    """From the middle of bf16 pages into smaller ones of eight bits, of two of three layers: the CPU's bytes, and no others."""
    import numpy as np
    import torch

    from kvmanager.attention.layout import LatentLayout
    from kvmanager.attention.transports.convert import convert_pages
    from kvmanager.attention.transports.move import plan_move

    source = torch.randn((4, 3, 64, 576), generator=torch.Generator().manual_seed(1)).bfloat16()
    move = plan_move(np.array([2, 0]), np.array([7, 1, 4, 0, 5, 2]), 64, 16, 3, tokens=91, source_skip=5)
    for layout in (
        LatentLayout(512, 64, 3, 16, "fp8_ds_mla"),
        LatentLayout(512, 64, 3, 16, "float8_e4m3fn", scales=(0.5, 0.01, 3.0)),
    ):
        results = []
        for device in ("cuda", "cpu"):
            pages = torch.full((9, 3, 16, layout.storage_width), 7, dtype=torch.uint8, device=device)
            segments = torch.from_numpy(move.segments.astype(np.int32)).to(device)
            convert_pages(source.to(device), 64, pages.view(getattr(torch, layout.storage_dtype)), layout, segments, (1, 3))
            results.append(pages.cpu())
        if not torch.equal(*results) or (results[0][:, 0] != 7).any() or (results[0][[3, 6, 8]] != 7).any():
            raise SystemExit(f"converted {layout.dtype}: other bytes than the CPU's")


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case
    for case in (
        write, decode, hopper, hopper_invariant, hopper_fp8, sparse, cascade, long_prefill, long_prefill_library, states, pages, converted,
    )
}  # fmt: skip
# Under racecheck 2025.3.1 long prefill breaks off ("failed to handle a hardware exception", an illegal access in a kernel that it does not
# name), by cuDNN or by plain products. Its own kernels, the writes and merge_pair, are in `write` and `states`.
TOOLS_OF = {"long_prefill": ("memcheck",), "long_prefill_library": ("memcheck",)}


class Race(NamedTuple):
    """Two accesses of one kernel to shared memory that racecheck reports, by the source that they were compiled from, in order."""

    file: str
    first: str
    second: str


# What orders each: docs/kernels.md, "Checked with compute-sanitizer".
_MOVED = "return gl.max(first.load(_FLAG) | second.load(_FLAG) | third.load(_FLAG) | fourth.load(_FLAG), 0) > 0"
_HOPPER = [
    ("tops.store(new_top)", "top0 = tops0.load(ROW)"),
    ("tops.store(new_top)", "top = tops1.load(ROW)"),
    ("flags.store(any_moves)", _MOVED),
    ("totals0.store(total)", "total += totals0.load(ROW)"),
    ("totals1.store(total)", "total += totals1.load(ROW)"),
]
_HOPPER_FP8 = [
    ("row_scales.store(scale_log2 * ((254 - exponent) << 23).to(gl.float32, bitcast=True))", "row_scale = row_scales.load(ROW)"),
    ("swap_rows.index(0).store(top)", "other_top = swap_rows.index(0).load(ROW)"),
    ("swap_rows.index(1).store(total)", "total = total * mine + swap_rows.index(1).load(ROW) * others"),
    ("swap.index(n % SWAPS).store(acc[n])", "theirs = swap.index(n % SWAPS).load(_SCORE)"),
]
_DISPATCH = ("def _attend_kernel(", "gl.warp_specialize(")
FALSE = frozenset(
    Race(file, *sorted(pair))
    for file, pairs in (("mla_decode_hopper.py", [*_HOPPER, _DISPATCH]), ("mla_decode_hopper_fp8.py", [*_HOPPER_FP8, _DISPATCH]))
    for pair in pairs
)

_FIRST = re.compile(r"=+ \w+: Race reported between \w+ access at (\S+?)\+0x\w+(?: in (\S+):(\d+))?$")
_SECOND = re.compile(r"=+ +and \w+ access at (\S+?)\+0x\w+(?: in (\S+):(\d+))? \[(\d+) hazards?\]$")


def kernel_names() -> set[str]:
    """All kernels there are: what is launched with a grid."""
    return {name for path in KERNELS.glob("*.py") for name in re.findall(r"\b(_\w+_kernel)\[", path.read_text())}


def races(report: str) -> Counter[Race]:
    """The pairs that racecheck reported, and how often each."""
    found: Counter[Race] = Counter()
    first = ("", "")
    for line in report.splitlines():
        if match := _FIRST.match(line):
            first = _source(*match.groups())
        elif match := _SECOND.match(line):
            second = _source(*match.groups()[:3])
            found[Race(first[0], *sorted((first[1], second[1])))] += int(match[4])
    return found


def _source(kernel: str, file: str | None, line: str | None) -> tuple[str, str]:
    """The file of an access, and the text of its line there; of a kernel without lines, its name and nothing."""
    path = KERNELS / Path(file or "").name
    if file is None or line is None or not path.is_file():
        return kernel, ""
    return path.name, path.read_text().splitlines()[int(line) - 1].strip()


def wrong(tool: str, report: str) -> list[str]:
    """What there is to object to in a report."""
    found: list[str] = []
    if not re.search(r"^=+ (ERROR|RACECHECK) SUMMARY: ", report, re.MULTILINE) or "answers are right" not in report:
        return ["it did not come to its end"]
    if tool == "memcheck":
        errors = re.findall(r"ERROR SUMMARY: (\d+) error", report)
        return [] if errors == ["0"] else [f"{', '.join(errors)} errors"]
    reported = len(re.findall(r"Race reported between", report))
    displayed = sum(int(number) for number in re.findall(r"RACECHECK SUMMARY: (\d+) hazard", report))
    if reported != displayed or reported > len(re.findall(_SECOND.pattern, report, re.MULTILINE)):
        found.append(f"{displayed} hazards in a form that is not understood")
    return found + [f"{count} hazards: {race}" for race, count in races(report).items() if race not in FALSE]


def launched(report: str) -> set[str]:
    return {name for line in re.findall(r"^launched: (.*)$", report, re.MULTILINE) for name in line.split()}


def inside(case: str) -> None:
    """Run a case in this process."""
    from triton import knobs

    names: set[str] = set()
    knobs.runtime.launch_enter_hook = lambda metadata: names.add(metadata.get()["name"].split()[0])
    CASES[case]()
    print(f"{case}: answers are right\nlaunched: {' '.join(sorted(names))}")


def run(tool: str, case: str, reports: Path | None) -> str:
    """The report of a case under a tool."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    # Every tensor is an allocation of its own: past its end is not another tensor's memory.
    environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}
    # Libraries' kernels are left out of racecheck: it reports accesses of cuDNN's attention as well, and is slow.
    names = [word for name in sorted(kernel_names()) for word in ("--kernel-name", f"kne={name}")] if tool == "racecheck" else []
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "100000", *names, sys.executable, __file__, "--inside", case]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=SECONDS_MAX, env=environment)
        text = done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        text = f"not done after {SECONDS_MAX} s"
    if reports is not None:
        reports.mkdir(parents=True, exist_ok=True)
        (reports / f"{tool}-{case}.txt").write_text(text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all of them if none is named")
    parser.add_argument("--tool", choices=TOOLS, help="one of the two, instead of both")
    parser.add_argument("--jobs", type=int, default=4, help="cases at a time (%(default)s)")
    parser.add_argument("--reports", type=Path, help="a folder for what the tools print")
    parser.add_argument("--inside", choices=list(CASES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        inside(given.inside)
        return 0
    if unknown := set(given.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    if shutil.which("compute-sanitizer") is None:
        print("gpu-sanitize: skipped: no compute-sanitizer in PATH (it is part of the CUDA toolkit)")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("gpu-sanitize: skipped: no CUDA device")
        return 0
    tools, cases = [given.tool] if given.tool else TOOLS, given.cases or list(CASES)
    pairs = [(tool, case) for case in cases for tool in tools if tool in TOOLS_OF.get(case, TOOLS)]
    print(f"{torch.cuda.get_device_name()}, {', '.join(tools)}, {given.jobs} cases at a time", flush=True)
    failed, names = 0, {tool: set[str]() for tool in tools}
    with ThreadPoolExecutor(given.jobs) as pool:
        for (tool, case), report in zip(pairs, pool.map(lambda pair: run(*pair, given.reports), pairs), strict=True):
            objections, accepted = wrong(tool, report), sum(races(report).values())
            names[tool] |= launched(report)
            failed += bool(objections)
            state = "FAILED" if objections else f"clean but for {accepted} hazards known to be false" if accepted else "clean"
            print(f"{tool:>9} {case:<20} {state}", *objections, sep="\n          ", flush=True)
            if objections:
                print("\n".join(report.splitlines()[-40:]))
    if not given.cases:
        for tool, seen in names.items():
            if missing := kernel_names() - seen:
                failed += 1
                print(f"{tool:>9} never saw {', '.join(sorted(missing))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
