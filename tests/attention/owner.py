"""A process that owns page memory and answers a few orders over a pipe: the other side of every transfer test."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.memory import PageMemory


def content(layout: LatentLayout, num_pages: int, seed: int) -> torch.Tensor:
    """Random bytes as uint8 [num_pages, num_layers, page_size, slot_bytes], the same in every process; no byte is 0xEE."""
    raw = np.random.default_rng(seed).integers(0, 0xEE, (num_pages, layout.num_layers, layout.page_size, layout.slot_bytes), dtype=np.uint8)
    return torch.from_numpy(raw)


def as_bytes(memory: PageMemory) -> torch.Tensor:
    layout = memory.layout
    return memory.pages.view(torch.uint8).view(memory.num_pages, layout.num_layers, layout.page_size, layout.slot_bytes)


def _enter(namespace: str) -> None:
    """Join a network namespace of `ip netns` as `ip netns exec` does: no socket reaches outside it any more, and /sys shows its devices."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_network, new_mounts, recursive_slave = 0x40000000, 0x20000, 0x84000

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments):
            raise OSError(ctypes.get_errno(), f"{name} {arguments}")

    with open(f"/run/netns/{namespace}") as file:
        call("setns", file.fileno(), new_network)
    call("unshare", new_mounts)
    call("mount", b"none", b"/", None, recursive_slave, None)
    call("mount", namespace.encode(), b"/sys", b"sysfs", 0, None)


def _own(
    pipe: Connection, layout: LatentLayout, num_pages: int, seed: int, transports: tuple[str, ...] | None, device: str, namespace: str
) -> None:
    if namespace:
        _enter(namespace)
    memory = PageMemory(layout, num_pages, device, transports=transports)
    if seed >= 0:
        as_bytes(memory).copy_(content(layout, num_pages, seed))
    else:
        as_bytes(memory).fill_(-seed)  # large memories: one byte everywhere, fast
    if memory.device.type == "cuda":
        torch.cuda.synchronize()
    pipe.send((os.getpid(), memory.export()))
    while True:
        order, *rest = pipe.recv()
        if order == "sums":
            pipe.send(memory.checksums(*rest))
        else:
            memory.close()
            pipe.send("closed")
            return


class Owner:
    def __init__(self, process: Any, pipe: Connection, pid: int, export: dict[str, Any]) -> None:
        self.process, self.pipe, self.pid, self.export = process, pipe, pid, export

    def sums(self, *arguments: Any) -> np.ndarray:
        self.pipe.send(("sums", *arguments))
        return self.pipe.recv()

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def wake(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@contextmanager
def owning(
    layout: LatentLayout,
    num_pages: int,
    *,
    seed: int = 7,
    transports: tuple[str, ...] | None = None,
    device: str = "cpu",
    namespace: str = "",
) -> Iterator[Owner]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_own, args=(there, layout, num_pages, seed, transports, device, namespace), daemon=True)
    process.start()
    try:
        there.close()
        assert here.poll(120), "the owner did not start"
        yield Owner(process, here, *here.recv())
    finally:
        process.kill()
        process.join()
        here.close()
