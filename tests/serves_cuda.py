"""A pytest plugin for a machine without a GPU: Triton's driver says that it serves CUDA tensors.

    python -m pytest -p tests.serves_cuda --kernels=driver tests/test_resident.py

A test that goes on to move a tensor there is skipped. One that fails hands CPU tensors to a kernel, and would fail on
every GPU.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch


def pytest_sessionstart(session: pytest.Session) -> None:
    import triton

    from bench.compile_only import Driver

    class ServesCuda(Driver):
        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda")

    triton.runtime.driver.set_active(ServesCuda("sm_90"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    try:
        return (yield)
    except (AssertionError, RuntimeError) as error:
        if any(word in str(error) for word in ("not compiled with CUDA", "NVIDIA driver", "No CUDA GPUs")):
            pytest.skip("it moves to the GPU")
        raise
