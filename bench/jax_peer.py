"""The peer in JAX on the numbers of a torch model and batch: in this process, or in one of its own.

JAX is no dependency: `obstacle` and `process_obstacle` say why it cannot take part.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fomaml_fused.tasks import TaskBatch

from .cores import own_cores
from .jax_step import Settings, as_numpy, load_jax, meta_step, numbered
from .peers import Gradients, Result
from .workloads import Workload

ROOT = Path(__file__).parent.parent
REST = 0.2  # seconds after a step in which its process, whose threads go on for a while, disturbs nobody's turn


def obstacle() -> str | None:
    """Why JAX cannot run on a GPU here; None where it can."""
    try:
        backend = load_jax().default_backend()
    except ImportError as error:
        return f"jax cannot be imported ({error})"
    except Exception as error:  # a plugin that does not match its driver fails in ways of its own
        return f"jax does not start ({type(error).__name__}: {error})"
    return None if backend in ("gpu", "cuda", "rocm") else f"jax has no GPU here, its backend is {backend!r}"


def jit_vmap_grad(
    workload: Workload, model: nn.Module, batch: TaskBatch, *, precision: str
) -> tuple[Callable[[], Any], Callable[[Any], tuple[Tensor, Gradients]]]:
    """The meta-step in this process, and how to read its result as torch tensors on the model's device.

    Args:
        precision: of float32 products, one of torch's names.
    """
    step = meta_step(_settings(workload, model, precision), _arrays(model.parameters()), _arrays(batch))
    return step, lambda result: _as_torch(model, as_numpy(result))


def interpreter() -> str | None:
    """The Python that has JAX: that of the environment `jax` inside ours, as `make peers` makes it, or our own."""
    own = Path(sys.prefix) / "jax" / "bin" / "python"
    if own.exists():
        return str(own)
    return None if find_spec("jax") is None else sys.executable


def process_obstacle() -> str | None:
    """Why JAX cannot run in a process of its own; None where it can."""
    return "jax is not installed" if interpreter() is None else None


class JaxProcess:
    """The meta-step on a CPU in a process of its own, which sleeps except in its turns.

    Attributes:
        version: of JAX, once it has started.

    Raises:
        RuntimeError: it ended before it was told to; the message holds what it last said.
    """

    def __init__(self, workload: Workload, model: nn.Module, batch: TaskBatch) -> None:
        python = interpreter()
        assert python is not None, process_obstacle()
        self._model, self._folder = model, tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        settings = asdict(_settings(workload, model, "highest")) | {"threads": torch.get_num_threads()}
        (folder / "settings.json").write_text(json.dumps(settings))
        inputs = {f"parameter{i}": array for i, array in enumerate(_arrays(model.parameters()))}
        inputs |= {f"batch{i}": array for i, array in enumerate(_arrays(batch))}
        np.savez(folder / "inputs.npz", **inputs)
        # Its environment has packages of its own, which ours must not hide.
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with (folder / "said").open("w") as said, own_cores():
            self._process = subprocess.Popen(
                [python, "-m", "bench.jax_step", str(folder)],
                cwd=ROOT,
                env=variables | {"JAX_PLATFORMS": "cpu"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
        self.version: str | None = None

    def result(self) -> Result:
        """What the first step, which compiles, found."""
        if self.version is None:
            self.version = self._answer()
        return _as_torch(self._model, numbered(np.load(Path(self._folder.name) / "result.npz"), "found"))

    def timed(self, warm_up: float) -> float:
        """Seconds of one step after steps for `warm_up` seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{warm_up}\n")
        self._process.stdin.flush()
        took = float(self._answer())
        time.sleep(REST)
        return took

    def close(self) -> None:
        """End the process and forget its files."""
        self._process.communicate()
        self._folder.cleanup()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            self._process.wait()
            said = (Path(self._folder.name) / "said").read_text().strip().splitlines()
            raise RuntimeError(f"jax ended with status {self._process.returncode}: {said[-1] if said else 'no word'}")
        return line


def _settings(workload: Workload, model: nn.Module, precision: str) -> Settings:
    w0 = next((float(module.w0) for module in model.modules() if hasattr(module, "w0")), 1.0)  # type: ignore[arg-type]
    return Settings(workload.activation, w0, workload.loss, workload.lr, workload.steps, precision)


def _arrays(tensors: Any) -> list[Any]:
    return [tensor.detach().cpu().numpy() for tensor in tensors]


def _as_torch(model: nn.Module, found: list[Any]) -> Result:
    device = next(model.parameters()).device
    value, *gradients = (torch.tensor(x, device=device) for x in found)
    return value, dict(zip([name for name, _ in model.named_parameters()], gradients, strict=True))
