"""Pulling pages and summing them, under the interpreter: exact bytes and exact sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvmanager.attention import torch_path
from kvmanager.attention.checksum import slot_factors, sum_segments, word_factors
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.transports.move import plan_move
from kvmanager.kernels.latent_formats import view_pages
from kvmanager.kernels.page_checksum import sum_pages
from kvmanager.kernels.page_pull import convert_pages, pull_pages


def random_words(pages: int, layers: int, page_size: int, words: int, seed: int) -> torch.Tensor:
    raw = np.random.default_rng(seed).integers(-(2**63), 2**63, (pages, layers, page_size, words), dtype=np.int64)
    return torch.from_numpy(raw)


@pytest.mark.parametrize("words", [12, 144])
@pytest.mark.parametrize(
    ("sizes", "tokens", "skips", "layers"),
    [((16, 16), None, (0, 0), (0, 3)), ((16, 16), None, (0, 0), (1, 2)), ((64, 16), 150, (5, 9), (0, 3)), ((16, 64), 77, (0, 60), (1, 3))],
)
def test_pulled_slots_are_exact_and_nothing_else_changes(
    words: int, sizes: tuple[int, int], tokens: int | None, skips: tuple[int, int], layers: tuple[int, int]
) -> None:
    """Whole pages and slots of pages of another size; the target is poisoned; compared with runs of bytes, which have a model of their own."""
    source, target = random_words(9, 3, sizes[0], words, 1), random_words(12, 3, sizes[1], words, 2)
    want = target.clone()
    count = 5 if tokens is None else tokens
    pages = [-(-(count + skip) // size) if tokens else count for skip, size in zip(skips, sizes, strict=True)]
    rng = np.random.default_rng(0)
    src, dst = rng.permutation(9)[: pages[0]], rng.permutation(12)[: pages[1]]
    move = plan_move(src, dst, *sizes, 3, tokens=tokens, source_skip=skips[0], target_skip=skips[1], layers=layers)
    runs = move.runs(3, words)
    for s, d, length in zip(runs.source.tolist(), runs.target.tolist(), runs.length.tolist(), strict=True):
        want.view(-1)[d : d + length] = source.view(-1)[s : s + length]
    pull_pages(
        source.data_ptr(),
        target,
        torch.from_numpy(move.segments.astype(np.int32)),
        source_page_size=sizes[0],
        whole=move.whole,
        first_layer=layers[0],
        end_layer=layers[1],
    )
    assert torch.equal(target, want)


@pytest.mark.parametrize(
    ("layout", "source_size"),
    [
        (LatentLayout(48, 16, 3, 16, "float8_e4m3fn", scales=(0.5, 0.01, 3.0)), 48),
        (LatentLayout(80, 32, 3, 48, "float8_e4m3fn", scales=(0.3,)), 16),
        (LatentLayout(512, 64, 3, 16, "fp8_ds_mla"), 16),
        (LatentLayout(512, 64, 3, 32, "fp8_ds_mla"), 48),
    ],
    ids=lambda value: value.format.split("-")[0] if isinstance(value, LatentLayout) else str(value),
)
def test_converted_slots_are_those_of_a_write_and_nothing_else_changes(layout: LatentLayout, source_size: int) -> None:
    """From the middle of a page to the middle of another, of two of three layers; NaN and infinities among the latents."""
    source = (torch.randn((6, 3, source_size, layout.entry), generator=torch.Generator().manual_seed(4)) * 5).to(torch.bfloat16)
    source[2, 1, 3, 5], source[2, 1, 4, 7], source[4, 2, 0, 0] = float("nan"), float("inf"), float("-inf")
    target = torch.full((8, 3, layout.page_size, layout.storage_width), 7, dtype=torch.uint8).view(getattr(torch, layout.storage_dtype))
    want, tokens, skips = target.clone(), 61, (5, 9)
    counts = [-(-(tokens + skip) // size) for skip, size in zip(skips, (source_size, layout.page_size), strict=True)]
    src, dst = np.array([2, 4, 0, 1, 5])[: counts[0]], np.array([7, 3, 0, 6, 1])[: counts[1]]
    options = {"source_skip": skips[0], "target_skip": skips[1], "layers": (1, 3)}
    move = plan_move(src, dst, source_size, layout.page_size, 3, tokens=tokens, **options)  # type: ignore[arg-type]
    for token in range(tokens):
        (s, a), (d, b) = divmod(token + skips[0], source_size), divmod(token + skips[1], layout.page_size)
        for layer in (1, 2):
            slot = torch.tensor([dst[d] * layout.page_size + b])
            torch_path.write_latent(source[src[s], layer, a][None], slot, want[:, layer], layout.scale_of(layer))
    inverse = torch.tensor([1.0 / layout.scale_of(layer) for layer in range(3)], dtype=torch.float32)
    segments = torch.from_numpy(move.segments.astype(np.int32))
    views = view_pages(target, layout.kv_lora_rank)
    convert_pages(source.data_ptr(), views, inverse, segments, source_page_size=source_size, first_layer=1, end_layer=3)
    assert torch.equal(target.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("layout", [LatentLayout(32, 16, 3, 64, "float16"), LatentLayout(512, 64, 2, 16)], ids=["48x64", "576x16"])
def test_sums_are_those_of_the_cpu(layout: LatentLayout) -> None:
    """Whole pages, parts of pages counted from elsewhere, no slot at all; a group of layers."""
    size, words = layout.page_size, layout.slot_bytes // 8
    pages = random_words(4, layout.num_layers, size, words, 3)
    segments = np.array([[2, 0, size, 0], [0, 0, size, 0], [3, 5, 7, 50], [1, size - 1, 1, 0], [1, 3, 0, 0]])
    values = pages.view(torch.float16 if layout.dtype == "float16" else torch.bfloat16)
    for layers in ((0, layout.num_layers), (1, 2)):
        want = sum_segments(values, layout, segments, layers, 64)
        got = sum_pages(
            pages, torch.from_numpy(segments.astype(np.int32)), *layers, slot_factors(layout.num_layers, 64), word_factors(words)
        )
        assert got.numpy().view(np.uint64).tolist() == want.tolist()
        assert want[4] == 0 and len(set(want.tolist())) == 5
