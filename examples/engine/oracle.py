"""What the engine's answers are compared with: transformers' own model, and our model in one process without a manager.

Owns nothing of the engine: no page here was handed out by a manager, no byte moved between processes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvmanager.attention import MLABackend, PageMemory
from kvmanager.errors import OutOfPages
from kvmanager.examples.engine.checkpoint import quiet_transformers
from kvmanager.examples.engine.model import LatentModel
from kvmanager.tables import BatchTables, div_ceil

__all__ = ["Generation", "PagedSequence", "Reference", "SingleProcess", "generate_reference", "reference_cache"]

Directory = str | os.PathLike[str]


class Reference:
    """transformers' own model of a checkpoint directory, loaded once. One prompt at a time: no padding that would need an argument."""

    def __init__(self, directory: Directory, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig

        with quiet_transformers():
            self.model: Any = AutoModelForCausalLM.from_pretrained(os.fspath(directory), local_files_only=True, dtype=dtype)
        self.model.eval().to(device)
        self._config_class: Any = GenerationConfig

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """The greedy continuation of each prompt: exactly `max_new_tokens` ids, an end token of the checkpoint's notwithstanding."""
        # In place of the checkpoint's: what is None in an argument would be filled from there (end tokens, sampling, penalties).
        self.model.generation_config = self._config_class(do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0)
        found = []
        for prompt in prompts:
            ids = self._ids(prompt)
            with torch.inference_mode():
                out = self.model.generate(ids, attention_mask=torch.ones_like(ids))
            found.append(out[0, len(prompt) :].tolist())
        return found

    def cache(self, token_ids: Sequence[int]) -> Tensor:
        """Latents that transformers caches for `token_ids` in one forward: [layers, tokens, entry], compressed_kv || k_pe, on the CPU."""
        with torch.inference_mode():
            out = self.model(self._ids(token_ids), use_cache=True)
        cache = out["cache"] if "cache" in out else out["past_key_values"]  # renamed between 5.17 and 5.24
        return torch.stack([torch.cat([layer.keys[0, 0], layer.values[0, 0]], dim=-1) for layer in cache.layers]).cpu()

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits after each of `token_ids`, computed in one forward: float32 [tokens, vocab], on the CPU."""
        with torch.inference_mode():
            return self.model(self._ids(token_ids), use_cache=False).logits[0].float().cpu()

    def _ids(self, token_ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(token_ids)], dtype=torch.int64, device=self.model.device)


def generate_reference(
    directory: Directory,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> list[list[int]]:
    """Greedy continuations by transformers' `generate`, one list of `max_new_tokens` ids a prompt."""
    return Reference(directory, dtype, device).generate(prompts, max_new_tokens)


def reference_cache(
    directory: Directory, token_ids: Sequence[int], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Tensor:
    """Latents [layers, tokens, entry] that transformers caches for `token_ids` in one forward, on the CPU."""
    return Reference(directory, dtype, device).cache(token_ids)


@dataclass
class PagedSequence:
    """One sequence of `SingleProcess`: its pages in order and how many tokens they hold."""

    page_ids: list[int] = field(default_factory=list)
    length: int = 0


@dataclass(frozen=True)
class Generation:
    """tokens: the continuation. logits: float32 [len(tokens), vocab] on the CPU, row i being what tokens[i] was chosen from."""

    tokens: list[int]
    logits: Tensor


class SingleProcess:
    """LatentModel on one pool in this process: pages from a free list, prefill, greedy decode. What a distributed run must reproduce."""

    def __init__(
        self, model: LatentModel, page_size: int = 64, num_pages: int = 64, chunk: int | None = None, scatter_seed: int | None = None
    ) -> None:
        """chunk: prefill at most this many tokens a step (None: all). scatter_seed: hand pages out in a random order (None: rising)."""
        self.model = model
        self.page_size = page_size
        self.chunk = chunk
        self.memory = PageMemory(model.layout(page_size), num_pages, model.device)
        slots = num_pages * page_size
        self.backend = MLABackend(self.memory, model.num_heads, model.softmax_scale, max_tokens=slots, max_batch=slots, max_pages=num_pages)
        order = np.arange(num_pages) if scatter_seed is None else np.random.default_rng(scatter_seed).permutation(num_pages)
        self._free: list[int] = order[::-1].tolist()
        self._version = 0

    def release(self, sequence: PagedSequence) -> None:
        """Take a sequence's pages back."""
        self._free.extend(reversed(sequence.page_ids))
        sequence.page_ids, sequence.length = [], 0

    def close(self) -> None:
        """Give the page memory back."""
        self.memory.close()

    def step(self, work: Sequence[tuple[PagedSequence, Sequence[int]]]) -> Tensor:
        """Append tokens to each sequence in one forward; gives logits [len(work), vocab] in the order of `work`."""
        for sequence, tokens in work:
            sequence.length += len(tokens)
            needed = div_ceil(sequence.length, self.page_size) - len(sequence.page_ids)
            if needed > len(self._free):
                raise OutOfPages("single process", needed, len(self._free), 0)
            sequence.page_ids += [self._free.pop() for _ in range(needed)]
        order = sorted(range(len(work)), key=lambda row: len(work[row][1]) != 1)  # stable: rows of one token first, as a plan asks
        rows = [work[row] for row in order]
        self._version += 1
        tables = BatchTables(
            version=self._version,
            page_size=self.page_size,
            lengths=np.array([sequence.length for sequence, _ in rows], np.int32),
            page_ids=np.array([page for sequence, _ in rows for page in sequence.page_ids], np.int32),
            page_indptr=np.cumsum([0] + [len(sequence.page_ids) for sequence, _ in rows], dtype=np.int64),
        )
        plan = self.backend.plan(tables, [len(tokens) for _, tokens in rows])
        token_ids = [token for _, tokens in rows for token in tokens]
        positions = [position for sequence, tokens in rows for position in range(sequence.length - len(tokens), sequence.length)]
        logits = self.model.forward(token_ids, positions, self.backend, plan)
        return logits[np.argsort(order)]

    def prefill(self, sequence: PagedSequence, tokens: Sequence[int]) -> Tensor:
        """Append a prompt in chunks; logits [vocab] after its last token."""
        chunk = self.chunk or len(tokens)
        for start in range(0, len(tokens), chunk):
            logits = self.step([(sequence, tokens[start : start + chunk])])
        return logits[0]

    def generate(self, prompt: Sequence[int], max_new_tokens: int, forced: Sequence[int] | None = None) -> Generation:
        """Greedy continuation of one prompt.

        forced: follow these tokens instead of the greedy ones, so that another run's logits can be compared step by step even where
        bfloat16 rounding lets two equally good tokens change places.
        """
        sequence = PagedSequence()
        try:
            rows = [self.prefill(sequence, prompt)]
            tokens = [int(rows[0].argmax()) if forced is None else forced[0]]
            while len(tokens) < max_new_tokens:
                rows.append(self.step([(sequence, tokens[-1:])])[0])
                tokens.append(int(rows[-1].argmax()) if forced is None else forced[len(tokens)])
        finally:
            self.release(sequence)
        return Generation(tokens, torch.stack(rows).cpu())

    def cached(self, sequence: PagedSequence) -> Tensor:
        """The sequence's latents as they lie in its pages: [layers, length, entry], on the CPU."""
        pages = self.memory.pages[sequence.page_ids]  # [pages, layers, page_size, entry]
        return pages.transpose(0, 1).flatten(1, 2)[:, : sequence.length].cpu()
