"""Compile the Hopper kernel of eight-bit latents for sm_90a on any machine and say what the machine code holds; a program, run by test_hopper_fp8.py.

    python tests/kernels/compile_hopper_fp8.py      one JSON line a variant

Needs Triton and the ptxas it brings, no GPU and no CUDA driver."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon._runtime import GluonASTSource

from kvmanager.kernels import mla_decode_hopper_fp8 as hopper
from kvmanager.kernels.latent_formats import view_pages

VARIANTS = [
    *itertools.product(("fp8_ds_mla", "float8_e4m3fn"), (64,), (16, 32), (True,)),
    ("fp8_ds_mla", 16, 16, True),
    ("float8_e4m3fn", 48, 16, False),
]  # format, page size, rows, causal


def report(stored_as: str, page_size: int, rows: int, causal: bool) -> dict[str, object]:
    pages = torch.empty((2, 3, page_size, 656 if stored_as == "fp8_ds_mla" else 576), dtype=torch.uint8)
    stored = view_pages((pages if stored_as == "fp8_ds_mla" else pages.view(torch.float8_e4m3fn))[:, 1], 512)
    kernel, constants = hopper._attend_kernel, hopper.constants(stored, rows, causal)
    types = {"q_ptr": "*bf16", "out_ptr": "*bf16", "scale_log2": "fp32", "stored_scale": "fp32"}
    types |= dict.fromkeys(("scales_ptr", "lse_ptr", "partial_out_ptr", "partial_lse_ptr"), "*fp32")
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "*i32" if name.endswith("_ptr") else "i32") for name in names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name.endswith("_ptr") or name.startswith("stride_")}
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": hopper.NUM_WARPS})
    ptxas = Path(get_ptxas(90).path)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        command = [str(ptxas), "-v", "--gpu-name=sm_90a", str(ptx), "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [str(ptxas.with_name("cuobjdump")), "-sass", str(cubin)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "variant": (stored_as, page_size, rows, causal),
        "warnings": re.findall(r"\(C75\d\d\)[^\n]*|[^\n]*serializ[^\n]*", log),
        "spilled": max(int(number) for number in re.findall(r"(\d+) bytes spill", log)),
        "shared": compiled.metadata.shared,
        "HGMMA": len(re.findall(r"\bHGMMA\b", code)),
    }


if __name__ == "__main__":
    for variant in VARIANTS:
        print(json.dumps({"triton": triton.__version__, **report(*variant)}), flush=True)
