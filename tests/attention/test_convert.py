"""Pages converted on their way, between real processes: byte for byte what a write of the same latents into the target's pages would have put there."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from kvmanager.attention import torch_path
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.memory import PageMemory
from kvmanager.attention.transports import convert
from kvmanager.attention.transports.base import PullState
from kvmanager.errors import ChecksumMismatch, LayoutMismatch, NoConversion
from kvmanager.tables import div_ceil
from tests.attention.owner import as_bytes, content, owning
from tests.attention.test_transports import TRANSPORTS, loopback  # noqa: F401 - a fixture

LAYERS = 3
SMALL = LatentLayout(48, 16, LAYERS, 64)
LARGE = LatentLayout(512, 64, LAYERS, 64)
TARGETS = {
    "e4m3": dataclasses.replace(SMALL, dtype="float8_e4m3fn", scales=(0.07,)),
    "e4m3-by-layer": dataclasses.replace(SMALL, dtype="float8_e4m3fn", scales=(0.5, 3.0, 0.013)),
    "ds-mla": dataclasses.replace(LARGE, dtype="fp8_ds_mla"),
}


def source_of(target: LatentLayout, page_size: int) -> LatentLayout:
    return dataclasses.replace(target, dtype="bfloat16", scales=(), page_size=page_size)


def written_directly(want: torch.Tensor, layout: LatentLayout, latents: torch.Tensor, dst: Any, skip: int, layers: tuple[int, int]) -> None:
    """latents [tokens, layers, entry] written by the backend's own path, layer by layer, into `want`, bytes of page memory."""
    pages = want.view(getattr(torch, layout.storage_dtype)).view(len(want), layout.num_layers, layout.page_size, layout.storage_width)
    place = np.arange(skip, skip + len(latents))
    slots = torch.from_numpy(np.asarray(dst)[place // layout.page_size] * layout.page_size + place % layout.page_size)
    for layer in range(*layers):
        torch_path.write_latent(latents[:, layer], slots, pages[:, layer], layout.scale_of(layer))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("theirs", "ours"), [(64, 64), (64, 16), (16, 64)])
@pytest.mark.parametrize("name", TARGETS)
def test_bytes_are_those_of_writing_the_same_latents(
    transport: str, name: str, theirs: int, ours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random bytes as latents, NaN and infinities among them; whole pages and parts, all layers and a group, with the source's sums and without:
    all at once, by way of a staging buffer that holds two pages."""
    monkeypatch.setattr(convert, "STAGING_BYTES", 1)
    layout = dataclasses.replace(TARGETS[name], page_size=ours)
    source_layout = source_of(layout, theirs)
    with owning(source_layout, 40, transports=(transport,)) as owner:
        memory = PageMemory(layout, 60, transports=(transport,), copy_threads=2)
        as_bytes(memory).fill_(0xEE)
        want = as_bytes(memory).clone()
        peer = memory.open_peer(owner.export)
        assert (peer.layout.format, peer.choice.transport) == ("bfloat16", transport)
        source = content(source_layout, 40, 7).view(torch.bfloat16)
        assert not torch.isfinite(source.float()).all()
        rng = np.random.default_rng(3)
        free, pulls = rng.permutation(60), []
        for tokens, skips, layers in ((150, (0, 0), (0, 3)), (97, (5, 9), (1, 2)), (1, (15, 15), (0, 1)), (192, (0, 0), (1, 3))):
            counts = [div_ceil(skip + tokens, size) for skip, size in zip(skips, (theirs, ours), strict=True)]
            src, dst, free = rng.permutation(40)[: counts[0]], free[: counts[1]], free[counts[1] :]
            sums = owner.sums(src, tokens, layers) if skips[0] == 0 else None
            options: dict[str, Any] = {"source_skip": skips[0], "target_skip": skips[1], "layers": layers, "expected": sums}
            pulls.append(memory.begin_pull(peer, src, dst, tokens=tokens, **options))
            place = np.arange(skips[0], skips[0] + tokens)
            latents = source[torch.from_numpy(src[place // theirs]), :, torch.from_numpy(place % theirs)]
            written_directly(want, layout, latents, dst, skips[1], layers)
        assert [pull.wait(30) for pull in pulls] == [PullState.DONE] * 4
        assert torch.equal(as_bytes(memory), want)
        memory.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_sums_are_those_of_the_bytes_that_arrived(transport: str) -> None:
    """Not of the converted ones: what the source says of its own pages is what is compared, and a wrong sum names its page."""
    layout = dataclasses.replace(TARGETS["ds-mla"], page_size=16)
    with owning(source_of(layout, 64), 12, transports=(transport,)) as owner:
        memory = PageMemory(layout, 10, transports=(transport,))
        peer = memory.open_peer(owner.export)
        sums = owner.sums([4, 9], 101)
        dst = [3, 1, 4, 0, 5, 2, 7]
        memory.pull(peer, [4, 9], dst, tokens=101, expected=sums)
        with pytest.raises(ChecksumMismatch, match=f"page 9: expected checksum {int(sums[1]) ^ 1:016x}, got {int(sums[1]):016x}"):
            memory.pull(peer, [4, 9], dst, tokens=101, expected=sums ^ np.array([0, 1], np.uint64))
        memory.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_many_converted_pulls_at_once_share_one_small_buffer(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "STAGING_BYTES", 1)
    layout = TARGETS["e4m3"]
    with owning(source_of(layout, 64), 12, transports=(transport,)) as owner:
        memory = PageMemory(layout, 100, transports=(transport,), copy_threads=2)
        peer = memory.open_peer(owner.export)
        pulls = [memory.begin_pull(peer, [index % 12, (index + 5) % 12], [2 * index, 2 * index + 1]) for index in range(50)]
        pulls[7].cancel()
        assert {pull.wait(60) for pull in pulls if pull is not pulls[7]} == {PullState.DONE}
        assert pulls[7].wait(30) in (PullState.DONE, PullState.CANCELLED)
        source = content(source_of(layout, 64), 12, 7).view(torch.bfloat16)
        want = torch_path.encode(source.flatten(0, 2), torch.float8_e4m3fn, 0.07).view(torch.uint8).view(12, LAYERS, 64, -1)
        for index in range(50):
            if pulls[index].state is PullState.DONE:
                assert torch.equal(as_bytes(memory)[2 * index : 2 * index + 2], want[[index % 12, (index + 5) % 12]])
        if transport == "nixl":
            assert len(peer._source._into) == 2  # type: ignore[attr-defined]
        memory.close()


def test_pairs_that_nobody_converts_are_refused_by_name() -> None:
    """Eight bits do not go back to sixteen, nor from one scale to another; other dimensions are another layout, whatever the format."""
    bf16, e4m3 = source_of(SMALL, 64), TARGETS["e4m3"]
    pairs = (
        (e4m3, bf16),
        (e4m3, TARGETS["e4m3-by-layer"]),
        (dataclasses.replace(bf16, dtype="float16"), e4m3),
        (bf16, dataclasses.replace(bf16, dtype="float16")),
    )
    for source, target in pairs:
        theirs, ours = PageMemory(source, 1), PageMemory(target, 1)
        with pytest.raises(NoConversion, match=f"stores or converts {source.format}, got one of {target.format}") as caught:
            ours.open_peer(theirs.export())
        assert (caught.value.details["expected"], caught.value.details["got"]) == (source.format, target.format)
    ours = PageMemory(e4m3, 1)
    with pytest.raises(LayoutMismatch) as caught:
        ours.open_peer(PageMemory(dataclasses.replace(bf16, num_layers=2), 1).export())
    assert not isinstance(caught.value, NoConversion)
