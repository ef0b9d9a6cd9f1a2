"""A handoff between pools whose pages differ in size, from the manager's plan to the bytes in the target's pages."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from kvmanager import KVManager, ManagerConfig, PoolConfig, Replica
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.memory import PageMemory
from kvmanager.attention.torch_path import encode
from kvmanager.attention.transports.base import PullState
from kvmanager.tables import div_ceil

LAYOUT = LatentLayout(32, 16, 2, 16, "float16")


class Side:
    """A pool with one worker: its memory, and the replica that follows the manager."""

    def __init__(self, manager: KVManager, name: str, page_size: int, layout: LatentLayout = LAYOUT) -> None:
        self.manager, self.memory = manager, PageMemory(dataclasses.replace(layout, page_size=page_size), 64)
        self.memory.pages.view(torch.uint8).fill_(0xFF)  # NaN, in every format
        self.replica = Replica(name)
        self.replica.load(manager.tables_snapshot())
        manager.subscribe(lambda batch, data: self.replica.feed(data))
        self.worker = manager.join(name, name, self.memory.layout.fingerprint)
        self.replica.joined(self.worker)

    def write(self, sequence: int, values: torch.Tensor) -> None:
        """values [tokens, layers, entry] into the sequence's pages, from its first token on."""
        pages = self.replica.tables.pages_of(sequence)
        for token, value in enumerate(values):
            page, slot = divmod(token, self.memory.layout.page_size)
            self.memory.pages[int(pages[page]), :, slot] = value

    def read(self, sequence: int, tokens: int) -> torch.Tensor:
        pages, size = self.replica.tables.pages_of(sequence), self.memory.layout.page_size
        return torch.stack([self.memory.pages[int(pages[token // size]), :, token % size] for token in range(tokens)])

    def ack(self) -> None:
        if (content := self.replica.ack()) is not None:
            self.manager.ack(self.worker, **content._asdict())


@pytest.mark.parametrize(("source_size", "target_size"), list(itertools.permutations([16, 32, 64], 2)))
def test_sequences_keep_their_latents_across_page_sizes(source_size: int, target_size: int) -> None:
    """Two prompts with a common beginning, one after the other: the second moves only what the target lacks, from the middle of a page if need be."""
    pools = (PoolConfig("P", 64, page_size=source_size), PoolConfig("D", 64, page_size=target_size))
    manager = KVManager(ManagerConfig(pools=pools))
    source, target = Side(manager, "P", source_size), Side(manager, "D", target_size)
    peer = target.memory.open_peer(source.memory.export())
    values = torch.randn((150, 2, 48)).half()
    moved = []
    for length in (131, 150):
        opened = manager.open(list(range(1, length + 1)), "P", chunk=length)
        source.write(opened.sequence, values[:length])
        version = source.replica.step
        source.replica.finish(version, [opened.sequence])
        source.ack()
        manager.hand_off(opened.sequence, "D")
        for _ in range(4):
            source.ack()
            target.ack()
        (pull,) = target.replica.pulls()
        target.replica.begin_pull(pull.handoff)
        options = {"tokens": pull.tokens, "source_skip": pull.source_skip}
        copying = target.memory.begin_pull(peer, pull.source_pages, pull.target_pages, **options)
        assert copying.wait(30) is PullState.DONE
        target.replica.pulled(pull.handoff)
        for _ in range(4):
            target.ack()
            source.ack()
        assert torch.equal(target.read(opened.sequence, length), values[:length])
        moved.append((pull.tokens, len(pull.target_pages), pull.shared_pages))
    shared = 131 // target_size
    assert moved == [(131, div_ceil(131, target_size), 0), (150 - shared * target_size, div_ceil(150, target_size) - shared, shared)]
    assert np.isfinite(target.read(opened.sequence, 150).float().numpy()).all()
    source.memory.close()
    target.memory.close()


@pytest.mark.parametrize(("source_size", "target_size"), [(16, 16), (64, 16), (16, 64)])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_latents_arrive_in_eight_bits(source_size: int, target_size: int, streamed: bool) -> None:
    """From a bf16 pool to an fp8_ds_mla one, as the manager plans it: the target's bytes are those of writing the latents there. Piece by piece too."""
    pools = (PoolConfig("P", 64, page_size=source_size), PoolConfig("D", 64, page_size=target_size))
    manager = KVManager(ManagerConfig(pools=pools))
    layout = LatentLayout(512, 64, 2, 16)
    source, target = (
        Side(manager, "P", source_size, layout),
        Side(manager, "D", target_size, dataclasses.replace(layout, dtype="fp8_ds_mla")),
    )
    peer = target.memory.open_peer(source.memory.export())
    values = torch.randn((131, 2, 576), generator=torch.Generator().manual_seed(6)).bfloat16()
    opened = manager.open(list(range(1, 132)), "P", chunk=0).sequence
    if streamed:
        manager.hand_off(opened, "D", reserve=True, stream=True)
    pieces = 0

    def carry_on() -> None:
        nonlocal pieces
        for _ in range(4):
            source.ack()
            target.ack()
            for pull in target.replica.pulls():
                pieces += 1
                target.replica.begin_pull(pull.handoff)
                options = {"tokens": pull.tokens, "source_skip": pull.source_skip} if source_size != target_size else {}
                layers = pull.layers(layout.num_layers)
                ids = [*pull.source_pages.tolist()]
                sums = source.memory.checksums(ids, pull.tokens, layers) if options and not pull.source_skip else None
                copying = target.memory.begin_pull(peer, ids, pull.target_pages, layers=layers, expected=sums, **options)
                assert copying.wait(30) is PullState.DONE
                target.replica.pulled(pull.handoff)

    for count in (70, 61):
        manager.grow(opened, count)
        end = source.replica.tables.length(opened)
        source.write(opened, values[:end])
        source.replica.finish(source.replica.step, [opened])
        carry_on()
    if not streamed:
        manager.hand_off(opened, "D")
        carry_on()
    assert pieces == (2 if streamed else 1)
    assert manager.state.tables.pool_of(opened) == 1
    for layer in range(2):
        want = encode(values[:, layer], torch.uint8)
        assert torch.equal(target.read(opened, 131)[:, layer], want)
    source.memory.close()
    target.memory.close()
