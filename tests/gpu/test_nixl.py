"""NIXL between device memories of two processes. Skipped where it is not installed."""

import importlib.util

import numpy as np
import pytest
import torch

from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.memory import PageMemory
from kvmanager.attention.transports import nixl
from kvmanager.attention.transports.base import PullState
from tests.attention.owner import as_bytes, content, owning

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in nixl.MODULES), reason="nixl is not installed: pip install 'kvmanager[nixl]'"
)
CARDS = [f"cuda:{index}" for index in range(min(2, torch.cuda.device_count()))]


@pytest.mark.parametrize("card", CARDS)
def test_pages_of_device_memory_arrive_byte_for_byte(card: str) -> None:
    """Large pages in several pieces, at random places, many times over: the bytes and the source's sums."""
    layout = LatentLayout(512, 64, 61, 64)
    with owning(layout, 64, device="cuda:0", transports=("nixl",)) as owner:
        memory = PageMemory(layout, 64, card, transports=("nixl",))
        peer = memory.open_peer(owner.export)
        source = content(layout, 64, 7)
        for seed in range(3):
            as_bytes(memory).fill_(0xEE)
            torch.cuda.synchronize(card)
            rng = np.random.default_rng(seed)
            src, dst = rng.permutation(64)[:40], rng.permutation(64)[:40]
            pull = memory.begin_pull(peer, src, dst, expected=owner.sums(src))
            assert pull.wait(60) is PullState.DONE, pull.error
            assert torch.equal(as_bytes(memory)[dst].cpu(), source[src])
            rest = [page for page in range(64) if page not in dst]
            assert (as_bytes(memory)[rest] == 0xEE).all()
        memory.close()
