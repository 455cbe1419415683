"""The dual kernels against the oracle, in two launches and layer by layer; as `test_resident.py` runs its own."""

from __future__ import annotations

import pytest

from .kernel_contract import KernelContract, watched

pytest.importorskip("triton")

__all__ = ["watched"]


@pytest.mark.parametrize("engine", ["dual", "layered"])
class TestDual(KernelContract):
    pass
