"""Compile the Hopper kernel's variants for sm_90a on any machine and say what the machine code holds; a program, run by test_hopper.py.

    python tests/kernels/compile_hopper.py [--all]      one JSON line a variant

Needs Triton and the ptxas it brings, no GPU and no CUDA driver."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does up to 3.9; says nothing about it then

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon._runtime import GluonASTSource

from kvmanager.kernels import mla_decode_hopper as hopper

TYPICAL = [
    (512, 64, 64, "bf16", True),
    (512, 64, 16, "bf16", True),
    (256, 32, 32, "fp16", True),
    (128, 64, 128, "bf16", False),
    (512, 64, 64, "bf16", True, True),
    (256, 32, 32, "bf16", True, True),
    (512, 64, 64, "bf16", True, False, True),
]  # rank, rope, page size, dtype, causal, placed, sink
ALL = list(
    itertools.product((512, 448, 256, 128), (64, 32, 16), (16, 32, 64, 128), ("bf16", "fp16"), (True, False), (False, True), (False, True))
)


def compiled(
    rank: int, rope: int, page_size: int, dtype: str, causal: bool, placed: bool = False, has_sink: bool = False
) -> triton.compiler.CompiledKernel:
    kernel = hopper._attend_kernel
    constants = hopper.constants(rank, rope, page_size, causal, placed, has_sink)
    flat, boxes = repr(hopper._SHARED.value), repr(hopper._SHARED_BOX.value)
    box, group = constants["BOX"], hopper._group(rank)
    signature = {
        "q_desc": f"tensordesc<{dtype}[64, {group}],{flat}>",
        "q_rope_desc": f"tensordesc<{dtype}[64, 64],{flat}>",
        "kv_desc": f"tensordesc<{dtype}[1, {box}, {group if box == constants['TILE'] else 64}],{boxes}>",
        "k_rope_desc": f"tensordesc<{dtype}[1, {box}, 64],{boxes}>",
        **{name: "*i32" for name in ("page_ids_ptr", "programs_ptr", "items_ptr")},
        **{name: "*fp32" for name in ("lse_ptr", "partial_out_ptr", "partial_lse_ptr", "sink_ptr")},
        "out_ptr": f"*{dtype}",
        "scale_log2": "fp32",
        "num_heads": "i32",
        **dict.fromkeys(constants, "constexpr"),
    }
    signature = {name: signature[name] for name in kernel.arg_names}
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(kernel.arg_names) if name.endswith("_ptr")}
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": hopper.NUM_WARPS})


def report(*variant: object) -> dict[str, object]:
    kernel = compiled(*variant)  # type: ignore[arg-type]
    ptxas = Path(get_ptxas(90).path)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(kernel.asm["ptx"])
        cubin.write_bytes(kernel.asm["cubin"])
        command = [str(ptxas), "-v", "--gpu-name=sm_90a", str(ptx), "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [str(ptxas.with_name("cuobjdump")), "-sass", str(cubin)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counted = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("HGMMA", "UTMALDG", "LDL", "STL")}
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill", log)]
    return {
        "variant": variant,
        "warnings": re.findall(r"\(C75\d\d\)[^\n]*|[^\n]*serializ[^\n]*", log),
        "spilled": max(spilled),
        "shared": kernel.metadata.shared,
        **counted,
    }


if __name__ == "__main__":
    for variant in ALL if "--all" in sys.argv else TYPICAL:
        print(json.dumps({"triton": triton.__version__, **report(*variant)}), flush=True)
