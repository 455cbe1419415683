"""The oracle: meta-learning one task at a time with autograd, written to be read as the definition.

It runs the user's own module through `torch.func.functional_call` and torch's own losses, batches nothing and shares no
code with any engine. `docs/math.md` derives what it computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .problem import Loss, SampleLoss, adapted_layers, inner_rates

Weights = dict[str, Tensor]


def adapt_task(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    lr: Any,
    steps: int,
    loss: str | Loss | SampleLoss,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    adapt: str | Iterable[int] = "all",
    weight: Tensor | None = None,
    first_order: bool = True,
) -> Weights:
    """One task's fast weights after `steps` steps of SGD on its support set.

    Args:
        x: [S, in].  y: [S] or [S, out].  weight: [S] or None.
        first_order: take the Jacobian of a step to be the identity; else keep the graph through the gradients.

    Returns:
        The parameters by name. With `first_order` their derivative with respect to the model's is the identity.
    """
    rates = _rates_by_name(model, lr, steps, adapt)
    fast: Weights = dict(model.named_parameters())
    velocity: Weights = {name: torch.zeros_like(fast[name]) for name in rates}
    for k in range(steps if rates else 0):
        with torch.enable_grad():
            point = {name: p.detach().requires_grad_() if first_order else p for name, p in fast.items()}
            value = mean_loss(loss, functional_call(model, point, (x,)), y, weight)
            gradients = torch.autograd.grad(value, [point[name] for name in rates], create_graph=not first_order)
        for name, gradient in zip(rates, gradients, strict=True):
            velocity[name] = momentum * velocity[name] + gradient + weight_decay * point[name]
            step = rates[name][k] * velocity[name]
            # The first-order step: what is subtracted loses its history, what it is subtracted from keeps it.
            fast[name] = fast[name] - (step.detach() if first_order else step)
    return fast


def mean_loss(loss: str | Loss | SampleLoss, outputs: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
    """The weighted mean of the loss over one task's samples.

    Args:
        outputs: [N, out].  targets: [N] or [N, out].  weight: [N] or None.
    """
    loss = Loss.of(loss)
    match loss.name:
        case "mse":
            samples = F.mse_loss(outputs, targets, reduction="none").mean(-1)
        case "l1":
            samples = F.l1_loss(outputs, targets, reduction="none").mean(-1)
        case "huber":
            samples = F.huber_loss(outputs, targets, reduction="none", delta=loss.delta).mean(-1)
        case "bce_with_logits":
            samples = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(-1)
        case "cross_entropy":
            samples = F.cross_entropy(outputs, targets, reduction="none", label_smoothing=loss.label_smoothing)
        case _:
            assert loss.function is not None
            samples = loss.function(outputs, targets)
            if samples.shape != outputs.shape[:1]:
                raise ValueError(f"loss gave a tensor of shape {list(samples.shape)}; it gives a loss per sample")
    return samples.mean() if weight is None else (weight * samples).sum() / weight.sum()


def meta_loss(
    model: nn.Module,
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    *,
    lr: Any = 0.01,
    steps: int = 1,
    loss: str | Loss | SampleLoss = "mse",
    outer_loss: str | Loss | SampleLoss | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    adapt: str | Iterable[int] = "all",
    support_weight: Tensor | None = None,
    query_weight: Tensor | None = None,
    task_weight: Tensor | None = None,
    reduction: str = "mean",
    first_order: bool = True,
) -> Tensor:
    """The query loss of the adapted network; its autograd gradient is the FOMAML (or MAML) gradient.

    Arguments as those of `fomaml_fused.FOMAML` and its call. With `first_order=False` the exact MAML gradient of Finn
    et al. 2017 (eq. 1) flows through the inner steps.

    Returns:
        A scalar, or the loss per task [T] with `reduction="none"`.
    """
    losses = []
    for t in range(support_x.shape[0]):
        fast = adapt_task(
            model,
            support_x[t].detach(),
            support_y[t],
            lr=lr,
            steps=steps,
            loss=loss,
            momentum=momentum,
            weight_decay=weight_decay,
            adapt=adapt,
            weight=None if support_weight is None else support_weight[t],
            first_order=first_order,
        )
        outputs = functional_call(model, fast, (query_x[t],))
        weight = None if query_weight is None else query_weight[t]
        losses.append(mean_loss(loss if outer_loss is None else outer_loss, outputs, query_y[t], weight))
    per_task = torch.stack(losses) if losses else query_x.new_empty(0)
    return reduce_tasks(per_task, task_weight, reduction)


def predict(model: nn.Module, support_x: Tensor, support_y: Tensor, query_x: Tensor, **inner: Any) -> Tensor:
    """Adapted outputs on the query features, [T, Q, out]; `inner` as the keywords of `adapt_task`."""
    weights = inner.pop("support_weight", None)
    fast = [
        adapt_task(model, x.detach(), y, weight=None if weights is None else weights[t], **inner)
        for t, (x, y) in enumerate(zip(support_x, support_y, strict=True))
    ]
    return run_tasks(model, fast, query_x)


def run_tasks(model: nn.Module, fast: Sequence[Weights], x: Tensor) -> Tensor:
    """Outputs [T, N, out] of each task's fast weights on its own features x [T, N, in]."""
    if not fast:
        outputs: Tensor = model(x)
        return outputs
    return torch.stack([functional_call(model, weights, (x[t],)) for t, weights in enumerate(fast)])


def reduce_tasks(per_task: Tensor, task_weight: Tensor | None, reduction: str) -> Tensor:
    """Weighted mean, weighted sum or weighted losses of tasks [T], as `torch.nn.functional.cross_entropy` does it."""
    weighted = per_task if task_weight is None else task_weight * per_task
    if reduction == "none":
        return weighted
    if reduction == "sum" or task_weight is None:
        return weighted.sum() if reduction == "sum" else weighted.mean()
    return weighted.sum() / task_weight.sum()


def _rates_by_name(model: nn.Module, lr: Any, steps: int, adapt: str | Iterable[int]) -> dict[str, list[float]]:
    """The rate of each step for every parameter that moves; a layer is a module with a weight, in order."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    rates = inner_rates(lr, steps, len(layers))
    moves = adapted_layers(adapt, len(layers))
    return {
        name: [row[layers.index(name.rpartition(".")[0])] for row in rates]
        for name, _ in model.named_parameters()
        if moves[layers.index(name.rpartition(".")[0])]
    }
