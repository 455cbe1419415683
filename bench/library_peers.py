"""The loops of other libraries: the same meta-step, written as the users of each write it to first order.

None of the libraries is a dependency: `make peers` installs them, and `LIBRARIES` says what each is imported as.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module, metadata

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from fomaml_fused.tasks import TaskBatch

from .peers import Gradients, Result, Step
from .workloads import Workload


def learn2learn_maml(workload: Workload, model: nn.Module, batch: TaskBatch) -> Step:
    """`MAML(first_order=True)`: a clone a task, adapted step by step; `backward` sums on the model's parameters."""
    l2l = import_module("learn2learn")
    maml = l2l.algorithms.MAML(model, lr=workload.lr, first_order=True)

    def step() -> Result:
        model.zero_grad()
        losses = []
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            learner = maml.clone()
            for _ in range(workload.steps):
                learner.adapt(workload.sample_loss(learner(support_x), support_y))
            loss = workload.sample_loss(learner(query_x), query_y)
            (loss / len(batch.support_x)).backward()
            losses.append(loss.detach())
        return torch.stack(losses).mean(), _accumulated(model)

    return step


def higher_innerloop(workload: Workload, model: nn.Module, batch: TaskBatch) -> Step:
    """`innerloop_ctx` without higher gradients: the fast weights' gradients are the model's to first order."""
    higher = import_module("higher")
    inner = torch.optim.SGD(model.parameters(), lr=workload.lr)

    def step() -> Result:
        model.zero_grad()
        losses = []
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            context = higher.innerloop_ctx(model, inner, copy_initial_weights=False, track_higher_grads=False)
            with context as (fast_model, optimizer):
                for _ in range(workload.steps):
                    optimizer.step(workload.sample_loss(fast_model(support_x), support_y))
                loss = workload.sample_loss(fast_model(query_x), query_y)
                found = torch.autograd.grad(loss / len(batch.support_x), list(fast_model.parameters()))
            for parameter, gradient in zip(model.parameters(), found, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            losses.append(loss.detach())
        return torch.stack(losses).mean(), _accumulated(model)

    return step


def torchopt_vmap(workload: Workload, model: nn.Module, batch: TaskBatch) -> Step:
    """TorchOpt's functional optimizer in the inner loop, all tasks at once by `torch.func.vmap`."""
    torchopt = import_module("torchopt")
    inner = torchopt.sgd(lr=workload.lr)

    def loss(weights: Gradients, x: Tensor, y: Tensor) -> Tensor:
        return workload.sample_loss(functional_call(model, weights, (x,)), y)

    def task(weights: Gradients, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> tuple[Gradients, Tensor]:
        state = inner.init(weights)
        for _ in range(workload.steps):
            updates, state = inner.update(grad(loss)(weights, sx, sy), state, params=weights, inplace=False)
            weights = torchopt.apply_updates(weights, updates, inplace=False)
        found: tuple[Gradients, Tensor] = grad_and_value(loss)(weights, qx, qy)
        return found

    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def step() -> Result:
        with torch.no_grad():
            gradients, losses = vmap(task, in_dims=(None, 0, 0, 0, 0))(parameters, *batch)
            return losses.mean(), {name: g.mean(0) for name, g in gradients.items()}

    return step


# By the name it is shown under: what it is imported as, and its adapter.
LIBRARIES: dict[str, tuple[str, Callable[[Workload, nn.Module, TaskBatch], Step]]] = {
    "learn2learn": ("learn2learn", learn2learn_maml),
    "higher": ("higher", higher_innerloop),
    "TorchOpt": ("torchopt", torchopt_vmap),
}


def version_of(module: str) -> str:
    """The version of an installed library."""
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:  # modules that were unpacked
        return str(import_module(module).__version__)


def _accumulated(model: nn.Module) -> Gradients:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
