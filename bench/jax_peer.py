"""The peer in JAX: `jit(vmap(grad))` of the same meta-step, on the numbers of a torch model and batch.

JAX is no dependency: `obstacle` says why it cannot take part.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fomaml_fused.tasks import TaskBatch

from .peers import Gradients
from .workloads import Workload

# What XLA makes of a float32 product on a GPU: "highest" is float32, everything else may be tf32.
PRECISIONS = {"highest": "highest", "high": "high", "medium": "default"}


def obstacle() -> str | None:
    """Why JAX cannot run on a GPU here; None where it can."""
    try:
        backend = _jax().default_backend()
    except ImportError as error:
        return f"jax cannot be imported ({error})"
    except Exception as error:  # a plugin that does not match its driver fails in ways of its own
        return f"jax does not start ({type(error).__name__}: {error})"
    return None if backend in ("gpu", "cuda", "rocm") else f"jax has no GPU here, its backend is {backend!r}"


def jit_vmap_grad(
    workload: Workload, model: nn.Module, batch: TaskBatch, *, precision: str
) -> tuple[Callable[[], Any], Callable[[Any], tuple[Tensor, Gradients]]]:
    """The meta-step in JAX, and how to read its result as torch tensors on the model's device.

    Args:
        precision: of float32 products, one of torch's names.
    """
    jax = _jax()
    jnp = jax.numpy
    activation = {"relu": jax.nn.relu, "tanh": jnp.tanh, "gelu": _exact_gelu, "sine": _sine(model)}[workload.activation]

    def forward(layers: list[Any], x: Any) -> Any:
        for i, (weight, bias) in enumerate(layers):
            x = jnp.matmul(x, weight.T, precision=PRECISIONS[precision]) + bias
            x = x if i + 1 == len(layers) else activation(x)
        return x

    def loss(layers: list[Any], x: Any, y: Any) -> Any:
        outputs = forward(layers, x)
        if workload.loss == "cross_entropy":
            return -jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], axis=1).mean()
        return jnp.square(outputs - y).mean()

    def task(layers: list[Any], sx: Any, sy: Any, qx: Any, qy: Any) -> Any:
        for _ in range(workload.steps):
            gradients = jax.grad(loss)(layers, sx, sy)
            layers = jax.tree.map(lambda p, g: p - workload.lr * g, layers, gradients)
        return jax.value_and_grad(loss)(layers, qx, qy)

    def mean_over_tasks(layers: list[Any], *tensors: Any) -> Any:
        found = jax.vmap(task, in_axes=(None, 0, 0, 0, 0))(layers, *tensors)
        return jax.tree.map(lambda x: x.mean(0), found)

    linears = [module for module in model if isinstance(module, nn.Linear)]  # type: ignore[attr-defined]
    layers = [(_array(linear.weight), _array(linear.bias)) for linear in linears]
    arrays = [_array(tensor) for tensor in batch]
    function = jax.jit(mean_over_tasks)
    device = next(model.parameters()).device
    names = [name for name, _ in model.named_parameters()]

    def step() -> Any:
        return jax.block_until_ready(function(layers, *arrays))

    def as_torch(result: Any) -> tuple[Tensor, Gradients]:
        value, *gradients = (torch.tensor(jax.device_get(x), device=device) for x in jax.tree.leaves(result))
        return value, dict(zip(names, gradients, strict=True))

    return step, as_torch


def _jax() -> Any:
    # Else it takes three quarters of the device's memory, which torch shares here.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return import_module("jax")


def _array(tensor: Tensor) -> Any:
    """A copy on JAX's default device; class indices as int32, for JAX has no int64 unless told so."""
    tensor = tensor.detach().cpu()
    return _jax().device_put((tensor if tensor.is_floating_point() else tensor.int()).numpy())


def _exact_gelu(x: Any) -> Any:
    return _jax().nn.gelu(x, approximate=False)


def _sine(model: nn.Module) -> Callable[[Any], Any]:
    w0 = next((module.w0 for module in model.modules() if hasattr(module, "w0")), 1.0)
    return lambda x: _jax().numpy.sin(w0 * x)
