"""The meta-step in JAX, `jit(vmap(grad))`, on NumPy arrays. It imports no torch: JAX may live where there is none.

    python -m bench.jax_step FOLDER

serves the step to another process: it reads FOLDER/settings.json and FOLDER/inputs.npz, writes what one step finds to
FOLDER/result.npz and says the version of JAX. From then on each line that it reads is how many seconds to warm up for;
it does so, times one step, and answers with its seconds. In between it sleeps.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

# What XLA makes of a float32 product on a GPU: "highest" is float32, everything else may be tf32.
PRECISIONS = {"highest": "highest", "high": "high", "medium": "default"}


@dataclass(frozen=True)
class Settings:
    """What a step needs to know beside its arrays; w0: of sines.  precision: of float32 products, in torch's names."""

    activation: str
    w0: float
    loss: str
    lr: float
    steps: int
    precision: str


def load_jax() -> Any:
    """JAX itself."""
    # Else it takes three quarters of a GPU's memory, which torch may share.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return import_module("jax")


def meta_step(settings: Settings, parameters: Sequence[Any], batch: Sequence[Any]) -> Callable[[], Any]:
    """A function that takes the step and waits for it: the mean loss over tasks, and its gradients as layers' pairs.

    Args:
        parameters: weight [out, in] and bias [out] of each Linear in turn, NumPy arrays of float32.
        batch: support x and y, query x and y; class indices of any integers.
    """
    jax = load_jax()
    jnp = jax.numpy
    activation = {
        "relu": jax.nn.relu,
        "tanh": jnp.tanh,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "sine": lambda x: jnp.sin(settings.w0 * x),
    }[settings.activation]

    def forward(layers: list[Any], x: Any) -> Any:
        for i, (weight, bias) in enumerate(layers):
            x = jnp.matmul(x, weight.T, precision=PRECISIONS[settings.precision]) + bias
            x = x if i + 1 == len(layers) else activation(x)
        return x

    def loss(layers: list[Any], x: Any, y: Any) -> Any:
        outputs = forward(layers, x)
        if settings.loss == "cross_entropy":
            return -jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], axis=1).mean()
        return jnp.square(outputs - y).mean()

    def task(layers: list[Any], sx: Any, sy: Any, qx: Any, qy: Any) -> Any:
        for _ in range(settings.steps):
            gradients = jax.grad(loss)(layers, sx, sy)
            layers = jax.tree.map(lambda p, g: p - settings.lr * g, layers, gradients)
        return jax.value_and_grad(loss)(layers, qx, qy)

    def mean_over_tasks(layers: list[Any], *tensors: Any) -> Any:
        found = jax.vmap(task, in_axes=(None, 0, 0, 0, 0))(layers, *tensors)
        return jax.tree.map(lambda x: x.mean(0), found)

    def on_device(array: Any) -> Any:
        # JAX has no int64 unless told so.
        return jax.device_put(array.astype("int32") if np.issubdtype(array.dtype, np.integer) else array)

    arrays = [on_device(array) for array in parameters]
    layers = list(zip(arrays[::2], arrays[1::2], strict=True))
    tensors = [on_device(array) for array in batch]
    function = jax.jit(mean_over_tasks)
    return lambda: jax.block_until_ready(function(layers, *tensors))


def as_numpy(result: Any) -> list[Any]:
    """What a step found: the loss, then the gradients in the order of its parameters."""
    jax = load_jax()
    return [np.asarray(jax.device_get(x)) for x in jax.tree.leaves(result)]


def numbered(arrays: Mapping[str, Any], kind: str) -> list[Any]:
    """Those named kind0, kind1, ..."""
    return [arrays[f"{kind}{i}"] for i in range(sum(name.startswith(kind) for name in arrays))]


def serve(folder: Path) -> None:
    """Take part in another process's rounds, until it closes our input."""
    given = json.loads((folder / "settings.json").read_text())
    threads = given.pop("threads")
    if hasattr(os, "sched_setaffinity"):  # JAX makes a thread for each core that it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    inputs = np.load(folder / "inputs.npz")
    step = meta_step(Settings(**given), numbered(inputs, "parameter"), numbered(inputs, "batch"))
    np.savez(folder / "result.npz", **{f"found{i}": x for i, x in enumerate(as_numpy(step()))})
    print(load_jax().__version__, flush=True)
    for line in sys.stdin:
        end = time.perf_counter() + float(line)
        while time.perf_counter() < end:
            step()
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
