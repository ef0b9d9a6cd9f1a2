"""Pages pulled from another process's device memory, and sums of pages on the device."""

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch

from kvmanager.attention import torch_path
from kvmanager.attention.checksum import sum_target
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.memory import PageMemory, PeerMemory
from kvmanager.attention.transports import convert, cuda_ipc
from kvmanager.attention.transports.base import Pull, PullState
from kvmanager.attention.transports.move import plan_move
from kvmanager.errors import ChecksumMismatch, InvalidValue
from kvmanager.kernels.latent_formats import view_pages
from kvmanager.kernels.latent_write import write_quantised
from kvmanager.tables import div_ceil
from tests.attention.owner import Owner, as_bytes, content, owning

CARDS = ["cuda:0", "cuda:1"] if torch.cuda.device_count() > 1 else ["cuda:0"]


def moved(source, target, src, dst, tokens, skips, layers):  # type: ignore[no-untyped-def]
    """The model, a token at a time."""
    for token in range(tokens):
        (s, a), (d, b) = divmod(token + skips[0], source.shape[2]), divmod(token + skips[1], target.shape[2])
        target[int(dst[d]), layers[0] : layers[1], b] = source[int(src[s]), layers[0] : layers[1], a]


class Begun(NamedTuple):
    """A pull under way, and what it was asked for."""

    pull: Pull
    src: np.ndarray
    dst: np.ndarray
    tokens: int
    skips: tuple[int, int]
    layers: tuple[int, int]


def begin_four(owner: Owner, memory: PageMemory, peer: PeerMemory, last_tokens: int) -> list[Begun]:
    """Of 40 pages into 60: whole sequences and parts of them, from the middle of pages too, all layers and a group; verified where sums can be."""
    sizes, rng = (peer.layout.page_size, memory.layout.page_size), np.random.default_rng(3)
    free, begun = rng.permutation(60), []
    for tokens, skips, layers in ((150, (0, 0), (0, 3)), (97, (5, 9), (1, 2)), (1, (15, 15), (0, 1)), (last_tokens, (0, 0), (1, 3))):
        counts = [div_ceil(skip + tokens, size) for skip, size in zip(skips, sizes, strict=True)]
        src, dst, free = rng.permutation(40)[: counts[0]], free[: counts[1]], free[counts[1] :]
        sums = owner.sums(src, tokens, layers) if skips[0] == 0 else None
        options = {"tokens": tokens, "source_skip": skips[0], "target_skip": skips[1], "layers": layers, "expected": sums}
        pull = memory.begin_pull(peer, src, dst, **options)  # type: ignore[arg-type]
        begun.append(Begun(pull, src, dst, tokens, skips, layers))
    return begun


def check_wrong_sum_is_refused(memory: PageMemory, peer: PeerMemory) -> None:
    theirs, ours = peer.layout.page_size, memory.layout.page_size
    pages = range(theirs // ours) if ours < theirs else [0]
    wrong = memory.begin_pull(peer, [0], pages, tokens=theirs, expected=np.ones(1, np.uint64))
    assert wrong.wait(30) is PullState.FAILED
    with pytest.raises(ChecksumMismatch):
        wrong.result()


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(("theirs", "ours"), [(64, 64), (64, 16), (16, 64)])
def test_pull_over_cuda_ipc_brings_exactly_the_slots_asked_for(card: str, theirs: int, ours: int) -> None:
    """From this card and from another one: several pulls at once, all layers and a group, verified by the source's sums and by bytes."""
    layouts = LatentLayout(64, 32, 3, theirs), LatentLayout(64, 32, 3, ours)
    with owning(layouts[0], 40, device="cuda:0") as owner:
        memory = PageMemory(layouts[1], 60, card)
        as_bytes(memory).fill_(0xEE)
        peer = memory.open_peer(owner.export)
        assert peer.choice.transport == "cuda_ipc"
        source, want = content(layouts[0], 40, 7), torch.full(as_bytes(memory).shape, 0xEE, dtype=torch.uint8)
        begun = begin_four(owner, memory, peer, 128)
        for each in begun:
            moved(source, want, *each[1:])
        assert [each.pull.wait(30) for each in begun] == [PullState.DONE] * 4
        assert torch.equal(as_bytes(memory).cpu(), want)
        check_wrong_sum_is_refused(memory, peer)
        memory.close()


FP8 = {
    "e4m3": LatentLayout(48, 16, 3, 64, "float8_e4m3fn", scales=(0.07,)),
    "e4m3-by-layer": LatentLayout(512, 64, 3, 64, "float8_e4m3fn", scales=(0.5, 3.0, 0.013)),
    "ds-mla": LatentLayout(512, 64, 3, 64, "fp8_ds_mla"),
}


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(("theirs", "ours"), [(64, 64), (64, 16), (16, 64)])
@pytest.mark.parametrize("name", FP8)
def test_pages_converted_on_their_way_are_those_of_a_direct_write(
    card: str, name: str, theirs: int, ours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 of another process in eight bits here, straight off its card or, where sums are asked for, by way of two staged pages; random bytes, so
    NaN and infinities too. Compared with `write_quantised` of the same latents, and with the CPU's bytes where all are finite."""
    monkeypatch.setattr(convert, "STAGING_BYTES", 1)
    layout = dataclasses.replace(FP8[name], page_size=ours)
    source_layout = dataclasses.replace(layout, page_size=theirs, dtype="bfloat16", scales=())
    with owning(source_layout, 40, device="cuda:0") as owner:
        memory = PageMemory(layout, 60, card)
        as_bytes(memory).fill_(0xEE)
        want = memory.pages.view(torch.uint8).clone().view(memory.pages.dtype)
        peer = memory.open_peer(owner.export)
        assert (peer.choice.transport, peer.layout.format) == ("cuda_ipc", "bfloat16")
        source, finite = content(source_layout, 40, 7).view(torch.bfloat16), 0
        begun = begin_four(owner, memory, peer, 192)
        for _, src, dst, tokens, skips, layers in begun:
            place = np.arange(skips[0], skips[0] + tokens)
            latents = source[torch.from_numpy(src[place // theirs]), :, torch.from_numpy(place % theirs)]
            place = np.arange(skips[1], skips[1] + tokens)
            slots = torch.from_numpy(dst[place // ours] * ours + place % ours)
            for layer in range(*layers):
                rows, scale = latents[:, layer].to(card), layout.scale_of(layer)
                with torch.cuda.device(card):
                    write_quantised(rows, slots.to(card), view_pages(want[:, layer], layout.kv_lora_rank, scale))
                plain = torch_path.encode(latents[:, layer], want.dtype, scale).view(torch.uint8)
                fine = torch.isfinite(latents[:, layer].float()).all(1)
                written = want[:, layer].flatten(0, 1).view(torch.uint8)[slots.to(card)].cpu()
                assert torch.equal(written[fine], plain[fine])
                finite += int(fine.sum())
        assert [each.pull.wait(30) for each in begun] == [PullState.DONE] * 4
        assert torch.equal(as_bytes(memory), want.view(torch.uint8).view(as_bytes(memory).shape))
        assert finite > 0
        check_wrong_sum_is_refused(memory, peer)
        memory.close()


@pytest.mark.parametrize("card", CARDS)
def test_copy_engines_bring_the_same_bytes(card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_ipc, "COPY_ENGINE_RUN_BYTES", 1)
    layout = LatentLayout(64, 32, 3, 16)
    with owning(layout, 40, device="cuda:0") as owner:
        memory = PageMemory(layout, 30, card)
        as_bytes(memory).fill_(0xEE)
        peer = memory.open_peer(owner.export)
        assert memory.begin_pull(peer, [39, 0, 1, 7], [3, 28, 29, 11]).wait(30) is PullState.DONE
        assert torch.equal(as_bytes(memory)[[3, 28, 29, 11]].cpu(), content(layout, 40, 7)[[39, 0, 1, 7]])
        assert (as_bytes(memory)[[page for page in range(30) if page not in (3, 28, 29, 11)]] == 0xEE).all()
        memory.close()


def test_memory_of_the_same_process_needs_no_mapping() -> None:
    layout = LatentLayout(64, 32, 3, 16)
    theirs, ours = PageMemory(layout, 5, "cuda:0"), PageMemory(layout, 5, CARDS[-1])
    as_bytes(theirs).copy_(content(layout, 5, 1))
    torch.cuda.synchronize()
    ours.pull(ours.open_peer(theirs.export()), [4, 2], [0, 1], expected=theirs.checksums([4, 2]))
    assert torch.equal(as_bytes(ours)[:2].cpu(), content(layout, 5, 1)[[4, 2]])
    ours.close()
    theirs.close()


def test_export_that_claims_more_than_the_allocation_is_refused() -> None:
    layout = LatentLayout(64, 32, 3, 16)
    with owning(layout, 40, device="cuda:0") as owner:
        memory = PageMemory(layout, 2, "cuda:0")
        lie = {**owner.export, "num_pages": 1 << 20, "bytes": layout.page_bytes << 20}
        with pytest.raises(InvalidValue, match=r"^bytes: expected at most"):
            memory.open_peer(lie)
        memory.close()


@pytest.mark.parametrize("card", CARDS)
def test_sums_on_the_device_are_those_of_the_cpu(card: str) -> None:
    """V3 pages, beyond 2**31 values; on a card that is not the current one, too."""
    layout = LatentLayout(512, 64, 61, 64)
    memory = PageMemory(layout, 1200, card)
    host = PageMemory(layout, 2)
    host.pages.normal_()
    memory.pages[[1199, 3]] = host.pages.to(card)
    torch.cuda.synchronize(card)
    assert memory.checksums([1199, 3]).tolist() == host.checksums([0, 1]).tolist()
    assert memory.checksums([1199, 3], 100, (5, 40)).tolist() == host.checksums([0, 1], 100, (5, 40)).tolist()
    memory.close()
    host.close()


@pytest.mark.parametrize(("theirs", "ours"), [(64, 64), (64, 16), (16, 64)])
def test_sums_of_what_a_move_brought_are_the_host_s(theirs: int, ours: int) -> None:
    """What a transport without a kernel of its own verifies with: several segments, so that their order in memory matters."""
    layout = LatentLayout(64, 32, 3, ours)
    rng = np.random.default_rng(5)
    src, dst = rng.permutation(40)[: div_ceil(150, theirs)], rng.permutation(60)[: div_ceil(150, ours)]
    move = plan_move(src, dst, theirs, ours, 3, tokens=150)
    pages = content(layout, 60, 9).view(torch.float16)
    want = sum_target(pages, layout, move)
    assert len(set(want.tolist())) == len(src)
    assert (sum_target(pages.cuda(), layout, move) == want).all()
