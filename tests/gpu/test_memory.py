"""Pages pulled from another process's device memory."""

import multiprocessing
from typing import Any

import torch

from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.memory import PageMemory, PeerMemory

LAYOUT = LatentLayout(64, 32, 3, 16)


def owner(pipe: Any) -> None:
    memory = PageMemory(LAYOUT, 50, "cuda")
    memory.pages.copy_(torch.arange(50, device="cuda").view(50, 1, 1, 1).expand(memory.pages.shape))
    pipe.send(memory.export())
    pipe.recv()
    memory.close()


def test_pull_over_cuda_ipc_brings_exactly_the_pages_asked_for() -> None:
    """Plain ints and bytes cross the pipe; the other pages stay as they were."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=owner, args=(there,), daemon=True)
    process.start()
    assert here.poll(60)
    export = here.recv()
    assert all(isinstance(value, (int, str, bytes)) for value in export.values())
    memory = PageMemory(LAYOUT, 30, "cuda")
    memory.pages.fill_(float("nan"))
    peer = PeerMemory.open(export, LAYOUT)
    memory.pull(peer, [49, 0, 7], [3, 29, 11])
    for page, value in ((3, 49), (29, 0), (11, 7)):
        assert (memory.pages[page] == value).all()
    untouched = [page for page in range(30) if page not in (3, 29, 11)]
    assert torch.isnan(memory.pages[untouched]).all()
    peer.close()
    here.send("done")
    process.join(30)
    assert process.exitcode == 0
