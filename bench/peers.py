"""One adapter a contender: the same meta-step on the same tensors, written as its users write it.

These need torch alone; those of other libraries are in `library_peers.py` and `jax_peer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

import fomaml_fused as ff
from fomaml_fused.tasks import TaskBatch

from .workloads import Workload

Gradients = dict[str, Tensor]
Result = tuple[Tensor, Gradients]  # the mean loss over tasks, and its gradients
Step = Callable[[], Result]


def ours(workload: Workload, model: nn.Module, batch: TaskBatch, *, engine: str | None = None, **options: Any) -> Step:
    """The package itself, through its module and autograd, as in a training loop.

    engine: in place of the planner's choice.  options: the module's other ones.
    """
    meta = ff.FOMAML(model, lr=workload.lr, steps=workload.steps, loss=workload.loss, **options)
    parameters = dict(model.named_parameters())

    def step() -> Result:
        if engine is None:
            loss = meta(*batch)
        else:
            with ff.override(engine=engine):
                loss = meta(*batch)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        return loss.detach(), dict(zip(parameters, gradients, strict=True))

    return step


def ours_as_function(workload: Workload, model: nn.Module, batch: TaskBatch, **options: Any) -> Step:
    """The same without autograd, as the peers that are functions: `FOMAML.grad_and_value`."""
    meta = ff.FOMAML(model, lr=workload.lr, steps=workload.steps, loss=workload.loss, **options)

    def step() -> Result:
        gradients, loss = meta.grad_and_value(*batch)
        return loss, gradients

    return step


def oracle(workload: Workload, model: nn.Module, batch: TaskBatch) -> Result:
    """The reference, one task at a time."""
    loss = ff.reference.meta_loss(model, *batch, lr=workload.lr, steps=workload.steps, loss=workload.loss)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return loss.detach(), dict(zip(parameters, gradients, strict=True))


def eager_loop(workload: Workload, model: nn.Module, batch: TaskBatch) -> Step:
    """A Python loop over tasks, each adapted with autograd; gradients summed as the loop goes."""
    parameters: Gradients = dict(model.named_parameters())

    def step() -> Result:
        total, losses = {name: torch.zeros_like(p) for name, p in parameters.items()}, []
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            fast = parameters
            for _ in range(workload.steps):
                loss = workload.sample_loss(functional_call(model, fast, (support_x,)), support_y)
                gradients = torch.autograd.grad(loss, list(fast.values()))
                fast = {
                    name: (p - workload.lr * g).detach().requires_grad_()
                    for (name, p), g in zip(fast.items(), gradients, strict=True)
                }
            loss = workload.sample_loss(functional_call(model, fast, (query_x,)), query_y)
            for value, g in zip(total.values(), torch.autograd.grad(loss, list(fast.values())), strict=True):
                value.add_(g, alpha=1 / len(batch.support_x))
            losses.append(loss.detach())
        return torch.stack(losses).mean(), total

    return step


def vmap_grad(workload: Workload, model: nn.Module, batch: TaskBatch) -> Step:
    """`torch.func.vmap` over tasks of the inner loop written with `torch.func.grad`."""
    return _batched(workload, model, batch, lambda function: function)


def compiled_vmap_grad(workload: Workload, model: nn.Module, batch: TaskBatch) -> Step:
    """`torch.compile` of `vmap_grad`, the whole graph at static shapes."""
    torch.compiler.reset()
    return _batched(workload, model, batch, lambda f: torch.compile(f, fullgraph=True, dynamic=False))


def _batched(
    workload: Workload,
    model: nn.Module,
    batch: TaskBatch,
    compile_: Callable[[Callable[..., tuple[Gradients, Tensor]]], Callable[..., tuple[Gradients, Tensor]]],
) -> Step:
    def loss(weights: Gradients, x: Tensor, y: Tensor) -> Tensor:
        return workload.sample_loss(functional_call(model, weights, (x,)), y)

    def task(weights: Gradients, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> tuple[Gradients, Tensor]:
        for _ in range(workload.steps):
            gradients = grad(loss)(weights, sx, sy)
            weights = {name: w - workload.lr * gradients[name] for name, w in weights.items()}
        found: tuple[Gradients, Tensor] = grad_and_value(loss)(weights, qx, qy)
        return found

    def mean_over_tasks(weights: Gradients, *tensors: Tensor) -> tuple[Gradients, Tensor]:
        gradients, losses = vmap(task, in_dims=(None, 0, 0, 0, 0))(weights, *tensors)
        return {name: g.mean(0) for name, g in gradients.items()}, losses.mean()

    function = compile_(mean_over_tasks)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def step() -> Result:
        with torch.no_grad():
            gradients, value = function(parameters, *batch)
        return value, gradients

    return step


PEERS: dict[str, Callable[[Workload, nn.Module, TaskBatch], Step]] = {
    "eager loop": eager_loop,
    "vmap(grad)": vmap_grad,
    "compile(vmap(grad))": compiled_vmap_grad,
}


def disagreement(actual: Result, expected: Result) -> float:
    """The relative error of the loss or of the gradient as one vector, the larger; infinite where one is nan."""
    loss = float((actual[0] - expected[0]).abs() / expected[0].abs())
    a, b = (torch.cat([gradients[name].flatten() for name in expected[1]]) for gradients in (actual[1], expected[1]))
    errors = (loss, float((a - b).norm() / b.norm()))
    return max(errors) if all(map(math.isfinite, errors)) else math.inf
