"""What every test may use. Imports nothing heavy: the GPU tests run with whatever a GPU machine has, and torch is asked only for them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import zmq

try:
    from hypothesis import settings
except ModuleNotFoundError:  # only the control plane's tests need it
    pass
else:
    settings.register_profile("local", deadline=None)
    settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("ci" if os.environ.get("CI") else "local")

TERM_SECONDS_MAX = 5.0
DATA_PLANE = {"attention", "engine", "gpu", "kernels"}  # folders of tests that use torch

# Read when torch loads its OpenMP, here and in the processes that tests start. Threads that spin while they wait make two busy torch
# processes on two cores more than five times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_pycollect_makemodule(module_path: Path) -> None:
    """Without a CUDA device, kernels run under Triton's interpreter, in every test or in none.

    Triton reads the variable when it is imported and again when a kernel is decorated, so it has to be set before the first test module
    that may import either; setting it between two modules leaves half of Triton's own functions compiled.
    """
    folders = module_path.resolve().relative_to(Path(__file__).resolve().parent).parts[:-1]
    if "TRITON_INTERPRET" not in os.environ and not DATA_PLANE.isdisjoint(folders):
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(trylast=True)  # after -m and -k have thrown out what is not asked for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """run_python(code, *args, cwd, pythonpath=None): standard output of a fresh interpreter, which must succeed."""

    def run(code: str, *args: str, cwd: Path, pythonpath: Path | None = None) -> str:
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if pythonpath is not None:
            env["PYTHONPATH"] = str(pythonpath)
        command = [sys.executable, "-c", code, *args]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240, cwd=cwd, env=env)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    return run


@pytest.fixture
def zmq_context() -> Iterator[zmq.Context[Any]]:
    """A context of the test's own. The test fails if one of its sockets is still open at the end, or still has messages to send.

    `term` waits for ever for such a socket, so it runs in a thread that is left behind: closing a socket that another thread may be
    using would be worse (libzmq's sockets belong to one thread, and it aborts the process when that is broken).
    """
    import zmq

    class RecordingContext(zmq.Context[Any]):
        """Knows its sockets, for the message."""

        def socket(self, *args: Any, **kwargs: Any) -> Any:
            socket = super().socket(*args, **kwargs)
            made.append((zmq.SocketType(socket.type).name, weakref.ref(socket)))  # weak: dropping a socket closes it
            return socket

    made: list[tuple[str, weakref.ref[Any]]] = []
    context: zmq.Context[Any] = RecordingContext()
    yield context
    closer = threading.Thread(target=context.term, name="zmq-term", daemon=True)
    closer.start()
    closer.join(TERM_SECONDS_MAX)
    if closer.is_alive():
        left = [kind for kind, ref in made if (socket := ref()) is not None and not socket.closed]
        what = f"sockets left open: {', '.join(left)}" if left else "a closed socket still has messages to send: set LINGER to 0"
        pytest.fail(f"the test's zmq.Context did not end within {TERM_SECONDS_MAX:g} s; {what}", pytrace=False)
