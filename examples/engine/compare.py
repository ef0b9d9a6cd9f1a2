"""Is what the engine produced right? Compares finished requests with transformers and with one process without a manager."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kvmanager.examples.engine.model import LatentModel
from kvmanager.examples.engine.oracle import Reference, SingleProcess
from kvmanager.examples.engine.request import Request
from kvmanager.tables import div_ceil

__all__ = ["LATENT_TOLERANCE", "Verdict", "against_single_process", "against_transformers"]

# Alone and in the same chunks, layer 0 caches the same bits as transformers (tests/engine). Absorbed attention and other batch shapes
# add the same numbers in another order: measured 1.3e-5 at most. Two swapped slots differ by about 1.
LATENT_TOLERANCE = 5e-5
LOGIT_TOLERANCE = 0.10  # bf16, median over steps: transformers' own bf16 is 3 to 5 % from its float32 (mixture of experts flips)


@dataclass(frozen=True, slots=True)
class Verdict:
    """equal: for each request, whether it passes. lines: what was compared and how far apart it is, for people."""

    equal: list[bool]
    lines: list[str]


def against_transformers(model: Path, requests: Sequence[Request]) -> Verdict:
    """float32 on the CPU: tokens against transformers' `generate`, cached bytes against its cache."""
    reference = Reference(model)
    equal, worst = [], 0.0
    for request in requests:
        expected = reference.generate([request.prompt], request.max_new_tokens)[0]
        good = request.generated == expected
        if request.latents is not None:
            shape, data = request.latents
            ours = torch.from_numpy(np.frombuffer(data, "<f4").reshape(shape).copy())
            theirs = reference.cache(request.tokens[: shape[1]])
            difference = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
            worst = max(worst, difference)
            good = good and difference <= LATENT_TOLERANCE
        equal.append(good)
    lines = [f"equal to transformers generate: {sum(equal)} of {len(equal)}"]
    if compared := sum(request.latents is not None for request in requests):
        lines.append(f"cached latents of {compared} requests: at most {worst:.1e} from transformers' cache (limit {LATENT_TOLERANCE:.0e})")
    return Verdict(equal, lines)


def against_single_process(model: Path, requests: Sequence[Request], device: str, dtype: torch.dtype, page_size: int) -> Verdict:
    """bf16 or fp16: logits of each step against one process with one pool and no manager, and against transformers' in that type.

    A token that differs passes only as a near tie: the two logits must be closer than the two runs are to each other.
    """
    loaded = LatentModel.load(model, device, dtype)
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
    single = SingleProcess(loaded, page_size=page_size, num_pages=div_ceil(longest, page_size))
    reference = Reference(model, dtype, device)
    equal, same, ties, total = [], 0, 0, 0
    from_single: list[float] = []
    from_transformers: list[float] = []
    for request in requests:
        ours = torch.from_numpy(np.frombuffer(b"".join(request.logits), "<f4").reshape(len(request.generated), -1).copy())
        alone = single.generate(request.prompt, len(request.generated), forced=request.generated).logits
        theirs = reference.logits(request.tokens[:-1])[len(request.prompt) - 1 :]
        good = len(request.generated) == request.max_new_tokens
        for token, row, other in zip(request.generated, ours, alone, strict=True):
            total += 1
            if int(other.argmax()) == token:
                same += 1
            elif float(other.max() - other[token]) <= 2 * float((row - other).abs().max()):
                ties += 1
            else:
                good = False
        from_single += ((ours - alone).norm(dim=-1) / alone.norm(dim=-1)).tolist()
        from_transformers += ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).tolist()
        equal.append(good)
    single.close()
    middle = float(np.median(from_transformers))
    if not middle <= LOGIT_TOLERANCE:
        equal = [False] * len(equal)
    tokens = f"{same} of {total} tokens the same, {ties} near ties"
    limit = f"limit {LOGIT_TOLERANCE:.0%}"
    lines = [
        f"equal to the single-process run, token by token: {sum(equal)} of {len(equal)} ({tokens})",
        f"logits, median relative error: {np.median(from_single):.1e} from the single-process run",
        f"logits, median relative error: {middle:.1e} from transformers in the same type ({limit})",
    ]
    return Verdict(equal, lines)
