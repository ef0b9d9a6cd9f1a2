"""The kernels under Triton's interpreter, on the CPU. With a GPU these tests are skipped: tests/gpu runs the compiled kernels there."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated: before the first import of one
    for name in [name for name in sys.modules if name.startswith("kvmanager.kernels.")]:
        del sys.modules[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        for item in items:
            if "/kernels/" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason="compiled kernels are tested by tests/gpu"))
