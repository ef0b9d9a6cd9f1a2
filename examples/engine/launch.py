"""Fleet: the processes of one engine - a manager, workers - and the certainty that one of them has ended.

A process that this one started and reaped is known dead. That, not silence, is what lets the manager give its pages to others.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import kvmanager
from kvmanager import KVClient, PoolConfig
from kvmanager.errors import KVError
from kvmanager.worker.environment import worker_environment

__all__ = ["Fleet"]

MANAGER_STARTS = 10  # one that ends that often will not be helped by another start


class Fleet:
    """Starts processes whose sockets and logs lie in one private folder; `stop()` or leaving the `with` block ends them all."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvmanager-")
        self.folder = Path(self._folder.name)
        self.manager_address = f"ipc://{self.folder}/manager"
        self.scheduler_address = f"ipc://{self.folder}/scheduler"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._reported: set[str] = set()
        self._stopping = threading.Event()
        self._keeper: threading.Thread | None = None
        self._manager_starts = 0
        self._manager_ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start_manager(self, pools: Sequence[PoolConfig], *, lease_ms: int = 10_000, **bounds: int) -> None:
        """`kvmanager serve` for these pools and bounds of ManagerConfig; returns once it answers. Raises RuntimeError with its log if it does not.

        It has a journal: if its process ends, the next one goes on with the same sequences and pages, and nobody else has to end for it.
        """
        arguments = ["-m", "kvmanager.cli", "serve", "--address", self.manager_address, "--publish", f"ipc://{self.folder}/log"]
        fields = ("name", "num_pages", "page_size", "group")
        config = {"lease_ms": lease_ms, **bounds, "pools": [{name: getattr(pool, name) for name in fields} for pool in pools]}
        (self.folder / "manager.json").write_text(json.dumps(config))
        arguments += ["--config", str(self.folder / "manager.json"), "--journal", str(self.folder / "journal")]
        self._keeper = threading.Thread(target=self._keep_manager, args=(arguments,), daemon=True)
        self._keeper.start()
        try:
            with KVClient(self.manager_address, timeout_ms=15_000, resend_ms=100) as client:
                client.hello()
        except KVError as error:
            raise RuntimeError(f"{error}\n{self.log('manager')}") from None

    def _keep_manager(self, arguments: list[str]) -> None:
        """In a thread of its own: the scheduler may be waiting for a reply that the next process will give."""
        while not self._stopping.is_set() and self._manager_starts < MANAGER_STARTS:
            self._start("manager", arguments)
            self._manager_starts += 1
            if self._processes["manager"].wait() == 2:  # it said why it cannot be started
                break
        self._manager_ended = True

    def start_worker(
        self,
        pool: str,
        model: Path,
        *,
        device: str,
        dtype: str,
        max_tokens: int,
        lease_ms: int,
        keep_logits: bool,
        stream_layers: int = 0,
        decode_early: bool = False,
    ) -> None:
        """A worker for `pool`; it reports to the scheduler's channel when it is ready."""
        arguments = ["-m", "kvmanager.examples.engine.worker", "--model", str(model), "--pool", pool, "--manager", self.manager_address]
        arguments += ["--scheduler", self.scheduler_address, "--device", device, "--dtype", dtype, "--max-tokens", str(max_tokens)]
        arguments += ["--lease-ms", str(lease_ms), *(["--keep-logits"] if keep_logits else [])]
        arguments += ["--stream-layers", str(stream_layers)] if stream_layers else []
        arguments += ["--decode-early"] if decode_early else []
        self._start(pool, arguments)

    def _start(self, name: str, arguments: list[str]) -> None:
        # Workers share the host's cores; OpenMP threads that spin while they wait would take them from each other.
        environment = worker_environment(os.environ) | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
        package_root = str(Path(kvmanager.__file__).parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        with open(self.folder / f"{name}.log", "ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, *arguments], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def log(self, name: str, lines: int = 20) -> str:
        """The end of what a process printed."""
        text = (self.folder / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def dead(self) -> list[str]:
        """Workers whose process was found ended, and reaped, since the last call."""
        workers = [(name, process) for name, process in self._processes.items() if name != "manager"]
        ended = [name for name, process in workers if name not in self._reported and process.poll() is not None]
        self._reported.update(ended)
        if self._manager_ended:
            raise RuntimeError(f"the manager's process has ended\n{self.log('manager')}")
        return ended

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a process; it is reaped by `dead`."""
        self._processes[name].send_signal(how)

    def stop(self) -> None:
        """End everything: politely, then not."""
        self._stopping.set()
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + 3
        for process in self._processes.values():
            try:
                process.wait(max(0.05, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        self._folder.cleanup()
