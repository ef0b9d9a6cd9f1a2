"""Other people's bookkeeping, for a run beside ours, where somebody has put it at hand. Nothing of it is part of this project.

SGLang: the folder `sglang/srt/mem_cache/rust_tree_core` of its unpacked wheel, named in SGLANG_TREE (0.5.23 was tried; needs torch): the radix
tree in Rust, called as its own adapter does, through the extension alone.

vLLM: an unpacked source distribution, named in VLLM_SOURCE (0.33.0 was tried; needs torch, cbor2, uvloop and psutil): KVCacheManager, its
coordinator, block pool, managers and hashing, and Request, are vLLM's files as they are; every other module that they import is an
empty stand-in, since nothing in it is called in what is timed.

Each row checks what it got and is the median of a loop of its own, the caches as warm as they can be.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import statistics
import sys
import time
import types
from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

__all__ = ["measure_peers"]

PAGE = 64
PROMPT = 32_768


def loop(call: Callable[[], Any], repeats: int) -> float:
    """Median microseconds of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return statistics.median(times)


def expect(condition: object, text: str) -> None:
    if not condition:
        raise SystemExit(f"peers_control: wrong answer, not timed: {text}")


def measure_peers(quick: bool) -> dict[str, dict[str, float]]:
    """Median us by row of bench_control and by peer; empty where none is at hand."""
    rows: dict[str, dict[str, float]] = {}
    for name, folder, measure in (("SGLang Rust", "SGLANG_TREE", sglang), ("vLLM", "VLLM_SOURCE", vllm)):
        if os.environ.get(folder):
            for row, median in measure(os.environ[folder], 40 if quick else 400).items():
                rows.setdefault(row, {})[name] = median
    return rows


def edges_of(prompt: np.ndarray, edges: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Prompts that leave `prompt` one after the other, so that it lies in `edges` runs of pages with two children each; itself last."""
    return [*(np.concatenate([prompt[: PROMPT * edge // edges], rng.integers(0, 150_000, PAGE)]) for edge in range(1, edges)), prompt]


# --- SGLang ----------------------------------------------------------------------------------------------------------------------


def sglang(folder: str, repeats: int) -> dict[str, float]:
    import torch  # first: the extension needs its libraries

    torch.set_num_threads(1)
    sys.path.insert(0, folder)
    import mem_cache as tree_core  # type: ignore[import-not-found]

    def new_tree() -> Any:
        off = {
            "tlru_float_config": None,
            "swa_sliding_window_size": None,
            "mamba_cache_chunk_size": None,
            "mamba_max_states_per_path": None,
        }
        params = tree_core.TreeCoreInitParamsBinding(
            eviction_policy="lru",
            slru_protected_threshold=2,
            tlru_tail_budget=0,
            page_size=PAGE,
            is_write_back=False,
            enable_hicache=False,
            write_through_threshold=256,
            device="cpu",
            swa_req_ring=False,
            enable_kv_cache_events=False,
            dynamo_kv_event_format=False,
            **off,
        )
        return tree_core.RustUnifiedTreeCoreBinding(params, [0])

    def insert(tree: Any, tokens: np.ndarray) -> None:
        params = tree_core.InsertParamsBinding(
            key=array("q", tokens.tolist()),
            value=torch.arange(len(tokens)),
            extra_key=None,
            cache_salt=None,
            session_id=None,
            mamba_value=None,
            prev_prefix_len=0,
            swa_evicted_seqlen=0,
            swa_branching_seqlen=None,
            inserted_len=0,
            priority=0,
            track_adopted_ranges=False,
            rotation_base=None,
        )
        tree.begin_insert(params)
        while tree.has_ongoing_insert():
            tree.resume_insert()
        tree.end_insert()

    rows, rng = {}, np.random.default_rng(1)
    for edges in (1, 64):
        tree, prompt = new_tree(), rng.integers(0, 150_000, PROMPT)
        for each in edges_of(prompt, edges, rng):
            insert(tree, each)
        key = array("q", prompt.tolist())

        def match(tree: Any = tree, key: Any = key) -> Any:
            return tree.match_prefix(tree_core.MatchParamsBinding(key=key, extra_key=None, cache_salt=None))

        def pages(tree: Any = tree, match: Any = match) -> Any:
            return tree.collect_full_device_indices(match().last_device_node_id, tree.root_node_handle())

        expect(match().device_prefix_len == PROMPT and len(pages()) == PROMPT, "SGLang: all of the prompt is cached")
        rows[f"hit_{edges}_match"] = loop(match, repeats)
        rows[f"hit_{edges}_lookup"] = loop(pages, repeats)
    return rows


# --- vLLM ------------------------------------------------------------------------------------------------------------------------

_REAL = ("core.", "kv_cache_interface", "kv_cache_spec_registry", "request", "utils", "hisparse.block_pool")


class _Anything(type):
    """A class of which every attribute can be called, and does nothing."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


class _StandIn(types.ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made: Any = _Anything(name, (), {"__init__": lambda self, *_, **__: None, "__class_getitem__": classmethod(lambda cls, _: cls)})
        if name == "init_logger":
            made = logging.getLogger
        if name == "length_from_prompt_token_ids_or_embeds":
            made = lambda ids, embeds: len(ids)
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """vLLM's own files for what is measured, stand-ins for the rest."""

    def __init__(self, root: str) -> None:
        self.root = root

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "vllm" and not name.startswith("vllm."):
            return None
        file = os.path.join(self.root, *name.split(".")) + ".py"
        real = name in ("vllm.utils.math_utils", "vllm.utils.hashing") or any(name.startswith(f"vllm.v1.{each}") for each in _REAL)
        if real and os.path.exists(file):
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> Any:
        return _StandIn(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def vllm(root: str, repeats: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    sys.meta_path.insert(0, _Finder(root))
    import vllm.v1.core.kv_cache_manager as managing  # type: ignore[import-not-found]
    import vllm.v1.core.kv_cache_utils as kv_utils  # type: ignore[import-not-found]
    import vllm.v1.kv_cache_interface as interface  # type: ignore[import-not-found]
    from vllm.utils import hashing  # type: ignore[import-not-found]
    from vllm.v1.request import Request  # type: ignore[import-not-found]

    kv_utils.init_none_hash(hashing.sha256)
    hasher = kv_utils.get_request_block_hasher(PAGE, hashing.sha256)  # vLLM's default
    names = iter(range(1 << 60))
    rng = np.random.default_rng(1)

    def new_manager(num_pages: int = 100_000) -> Any:
        spec = interface.FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
        group = interface.KVCacheGroupSpec(["layer"], spec)
        config = interface.KVCacheConfig(num_blocks=num_pages, kv_cache_tensors=[], kv_cache_groups=[group])
        return managing.KVCacheManager(config, max_model_len=1 << 20, scheduler_block_size=PAGE, hash_block_size=PAGE)

    def request(tokens: list[int]) -> Any:
        params = SimpleNamespace(max_tokens=1 << 20, extra_args=None, skip_reading_prefix_cache=False)
        return Request(str(next(names)), tokens, params, None, block_hasher=hasher)

    def start(manager: Any, made: Any) -> Any:
        blocks, cached, _ = manager.get_computed_blocks(made)
        expect(manager.allocate_slots(made, made.num_tokens - cached, cached, blocks) is not None, "vLLM: slots for a prompt")
        made.num_computed_tokens = made.num_tokens
        return cached

    rows: dict[str, float] = {}
    for name, staggered, wanted in (("decode_4", True, 4), ("decode_256", False, 256)):
        manager = new_manager()
        running = [request(rng.integers(0, 150_000, PAGE * 2 + (index % PAGE if staggered else 0)).tolist()) for index in range(256)]
        for each in running:
            start(manager, each)
        hashing_us, allocating_us = [], []
        for _ in range(64 * 3 if staggered else 64 * 8):
            began = time.perf_counter_ns()
            for each in running:
                each.append_output_token_ids(7)  # and the hash of a page that it fills
            hashed = time.perf_counter_ns()
            free = manager.block_pool.get_num_free_blocks()
            for each in running:
                manager.allocate_slots(each, 1)
            ended = time.perf_counter_ns()
            for each in running:
                each.num_computed_tokens += 1
            if free - manager.block_pool.get_num_free_blocks() == wanted:
                allocating_us.append((ended - hashed) / 1e3)
            hashing_us.append((hashed - began) / 1e3)
        expect(allocating_us, f"vLLM: steps in which {wanted} requests take a page")
        rows[name] = statistics.median(allocating_us)
        if staggered:
            rows[f"{name}_hashes"] = statistics.median(hashing_us)

    manager, prompt = new_manager(), rng.integers(0, 150_000, PROMPT).tolist()
    start(manager, request(prompt))
    hits, lookups = [], []
    for _ in range(max(repeats // 8, 5)):
        began = time.perf_counter_ns()
        made = request(prompt)
        hashed = time.perf_counter_ns()
        blocks, cached, _ = manager.get_computed_blocks(made)
        found = time.perf_counter_ns()
        manager.allocate_slots(made, made.num_tokens - cached, cached, blocks)
        hits.append((time.perf_counter_ns() - began) / 1e3)
        lookups.append((found - began) / 1e3)
        expect(cached == PROMPT - PAGE and hashed, "vLLM: all but the last page is cached")
        manager.free(made)
    rows["hit_1_lookup"], rows["hit_1"] = statistics.median(lookups), statistics.median(hits)

    misses, frees = [], []
    for _ in range(max(repeats // 8, 5)):
        tokens = rng.integers(0, 150_000, 8192).tolist()
        began = time.perf_counter_ns()
        made = request(tokens)
        expect(start(manager, made) == 0, "vLLM: a prompt that nobody has seen")
        misses.append((time.perf_counter_ns() - began) / 1e3)
        long = request(rng.integers(0, 150_000, 512 * PAGE).tolist())
        start(manager, long)
        began = time.perf_counter_ns()
        manager.free(long)
        frees.append((time.perf_counter_ns() - began) / 1e3)
        manager.free(made)
    rows["miss"], rows["free_512"] = statistics.median(misses), statistics.median(frees)
    return rows


if __name__ == "__main__":
    for row, peers in measure_peers("--quick" in sys.argv).items():
        print(f"{row:<20}" + "  ".join(f"{peer} {median:.1f} us" for peer, median in peers.items()))
