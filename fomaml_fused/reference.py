"""The oracle: meta-learning one task at a time with autograd, written to be read as the definition.

It runs the user's own module through `torch.func.functional_call` and torch's own losses, batches nothing and shares no
code with any engine. `docs/math.md` derives what it computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .inner import Adapt, adapted_parts, inner_rates
from .problem import Loss, SampleLoss

Weights = dict[str, Tensor]
Rates = Mapping[str, Sequence[float | Tensor]]  # by name of a parameter that moves: the rate of each step


def adapt_task(model: nn.Module, x: Tensor, y: Tensor, **inner: Any) -> Weights:
    """One task's fast weights after all steps on its support set; arguments as of `trajectory`."""
    return trajectory(model, x, y, **inner)[-1]


def trajectory(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    lr: Any,
    steps: int,
    loss: str | Loss | SampleLoss,
    optimizer: str = "sgd",
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    max_grad_norm: float | None = None,
    max_grad_value: float | None = None,
    adapt: Adapt = "all",
    weight: Tensor | None = None,
    first_order: bool = True,
) -> list[Weights]:
    """One task's fast weights before the first and after every step of gradient descent on its support set.

    Args:
        x: [S, in], or [K, S, in] for samples of their own at every step.
        y, weight: alike, [S] or [S, out], and [S].
        lr: as `FOMAML` takes it; or what may ask for a gradient: a tensor that broadcasts to [K, layers], or tensors by
            name of a parameter.
        first_order: take the Jacobian of a step to be the identity; else keep the graph through the gradients.

    Returns:
        The parameters by name, K + 1 times. With `first_order` their derivative with respect to the model's is the
        identity, and that with respect to a rate is minus what the rate multiplied.
    """
    rates = rates_by_name(model, lr, steps, adapt)
    fast: Weights = dict(model.named_parameters())
    points = [fast]
    moments: list[Weights] = [{name: torch.zeros_like(fast[name]) for name in rates} for _ in range(2)]
    each_step = x.dim() == 3
    for k in range(steps):
        samples, targets = (x[k], y[k]) if each_step else (x, y)
        weights = weight[k] if each_step and weight is not None else weight
        with torch.enable_grad():
            point = {name: p.detach().requires_grad_() if first_order else p for name, p in fast.items()}
            value = mean_loss(loss, functional_call(model, point, (samples,)), targets, weights)
            moving = [point[name] for name in rates]
            found = torch.autograd.grad(value, moving, create_graph=not first_order) if moving else ()
        gradients = dict(zip(rates, _clipped(found, max_grad_norm, max_grad_value), strict=True))
        fast = dict(fast)
        for name, gradient in gradients.items():
            if not decoupled_weight_decay:
                gradient = gradient + weight_decay * point[name]
            if optimizer == "adam":
                direction = _adam(moments, name, gradient, betas, eps, k + 1)
            else:
                moments[0][name] = momentum * moments[0][name] + gradient
                direction = gradient + momentum * moments[0][name] if nesterov else moments[0][name]
            if decoupled_weight_decay:
                direction = direction + weight_decay * point[name]
            # The first-order step: what is subtracted loses its history, what it is subtracted from keeps it.
            fast[name] = fast[name] - rates[name][k] * (direction.detach() if first_order else direction)
        points.append(fast)
    return points


def _clipped(gradients: Sequence[Tensor], max_norm: float | None, max_value: float | None) -> list[Tensor]:
    """As `torch.nn.utils.clip_grad_value_`, and then `clip_grad_norm_`, over all gradients of a task."""
    clipped = list(gradients)
    if max_value is not None:
        clipped = [g.clamp(-max_value, max_value) for g in clipped]
    if max_norm is not None and clipped:
        norm = torch.stack([g.square().sum() for g in clipped]).sum().sqrt()
        clipped = [g * (max_norm / (norm + 1e-6)).clamp(max=1.0) for g in clipped]
    return clipped


def _adam(
    moments: list[Weights], name: str, gradient: Tensor, betas: tuple[float, float], eps: float, step: int
) -> Tensor:
    """The direction of `torch.optim.Adam` (Kingma and Ba 2015, algorithm 1)."""
    powers = (gradient, gradient.square())
    for moment, beta, power in zip(moments, betas, powers, strict=True):
        moment[name] = beta * moment[name] + (1.0 - beta) * power
    first, second = (moment[name] / (1.0 - beta**step) for moment, beta in zip(moments, betas, strict=True))
    return first / (second.sqrt() + eps)


def mean_loss(loss: str | Loss | SampleLoss, outputs: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
    """The weighted mean of the loss over one task's samples.

    Args:
        outputs: [N, out].
        targets: [N] or [N, out].
        weight: [N] or None.
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
    query_x: Tensor | None = None,
    query_y: Tensor | None = None,
    *,
    lr: Any = 0.01,
    steps: int = 1,
    loss: str | Loss | SampleLoss = "mse",
    outer_loss: str | Loss | SampleLoss | None = None,
    outer: str = "fomaml",
    step_weights: Sequence[float] | None = None,
    nonfinite: str = "propagate",
    support_weight: Tensor | None = None,
    query_weight: Tensor | None = None,
    task_weight: Tensor | None = None,
    support_counts: Sequence[int] | None = None,
    query_counts: Sequence[int] | None = None,
    step_counts: Sequence[int] | None = None,
    reduction: str = "mean",
    first_order: bool = True,
    **inner: Any,
) -> Tensor:
    """The query loss of the adapted network; its autograd gradient is the FOMAML (or MAML) gradient.

    Arguments as those of `fomaml_fused.FOMAML` and its call; `inner` as the other keywords of `trajectory`. With
    `first_order=False` the exact MAML gradient of Finn et al. 2017 (eq. 1) flows through the inner steps.

    Returns:
        A scalar, or the loss per task [T] with `reduction="none"`.
    """
    losses = []
    for t in range(support_x.shape[0]):
        shots, queries, taken = (None if c is None else c[t] for c in (support_counts, query_counts, step_counts))
        taken = steps if taken is None else taken
        each_step = support_x.dim() == 4
        points = trajectory(
            model,
            _first_samples(support_x[t].detach(), shots, each_step),
            _first_samples(support_y[t], shots, each_step),
            lr=lr if taken == steps else _first_rates(model, lr, steps, taken),
            steps=taken,
            loss=loss,
            weight=None if support_weight is None else _first_samples(support_weight[t], shots, each_step),
            first_order=first_order,
            **inner,
        )
        if outer == "reptile":
            losses.append(half_squared_distance(points))
            continue
        assert query_x is not None
        assert query_y is not None
        # A task that stops early stays where it is for the steps that remain.
        points += [points[-1]] * (steps - taken)
        weights = [0.0] * (steps - 1) + [1.0] if step_weights is None else list(step_weights)
        value = query_x.new_zeros(())
        for weight, fast in zip(weights, points[1:], strict=True) if steps else [(1.0, points[0])]:
            if weight:
                outputs = functional_call(model, fast, (query_x[t][:queries],))
                counts = None if query_weight is None else query_weight[t][:queries]
                rule = loss if outer_loss is None else outer_loss
                value = value + weight * mean_loss(rule, outputs, query_y[t][:queries], counts)
        losses.append(value)
    per_task = torch.stack(losses) if losses else support_x.new_empty(0)
    if nonfinite == "skip" and reduction != "none":
        kept = [t for t, value in enumerate(losses) if value.isfinite()]
        # Stacked anew: a cotangent of 0 would still be nan times a diverged task's derivatives.
        # Of no task there is a gradient too, and it is 0.
        nothing = sum((0.0 * p).sum() for p in model.parameters()) + support_x.new_empty(0)
        per_task = torch.stack([losses[t] for t in kept]) if kept else nothing
        task_weight = None if task_weight is None else task_weight[kept]
    return reduce_tasks(per_task, task_weight, reduction)


def half_squared_distance(points: Sequence[Weights]) -> Tensor:
    """Half the squared distance from the first point to the last, whose gradient at the first is `theta_0 - theta_K`.

    That is Reptile's meta-gradient (Nichol et al. 2018, algorithm 2); the last point counts as a constant.
    """
    start, end = points[0], points[-1]
    return torch.stack([(start[name] - end[name].detach()).square().sum() for name in start]).sum() / 2


def predict(model: nn.Module, support_x: Tensor, support_y: Tensor, query_x: Tensor, **inner: Any) -> Tensor:
    """Adapted outputs on the query features, [T, Q, out]; `inner` as the keywords of `trajectory`."""
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


def rates_by_name(model: nn.Module, lr: Any, steps: int, adapt: Adapt) -> Rates:
    """The rate of each step for every parameter that moves; a layer is a Linear and the normalisation behind it."""
    parameters, layers = dict(model.named_parameters()), _layers(model)
    moving = adapted_parts(adapt, layers, parameters)
    if isinstance(lr, Mapping):
        moved = [names[part] for names, parts in zip(layers, moving, strict=True) for part in parts]
        return {name: [lr[name]] * steps for name in moved}
    rows = lr.broadcast_to(steps, len(layers)) if isinstance(lr, Tensor) else inner_rates(lr, steps, len(layers))
    return {
        names[part]: [row[i] for row in rows]
        for i, (names, parts) in enumerate(zip(layers, moving, strict=True))
        for part in parts
    }


def _first_rates(model: nn.Module, lr: Any, steps: int, taken: int) -> Any:
    """The rates of the first steps alone."""
    if isinstance(lr, Mapping):
        return lr
    depth = len(_layers(model))
    if not isinstance(lr, Tensor):
        lr = torch.tensor(inner_rates(lr, steps, depth), dtype=torch.float64)
    return lr.broadcast_to(steps, depth)[:taken]


def _first_samples(values: Tensor, count: int | None, each_step: bool) -> Tensor:
    return values[:, :count] if each_step else values[:count]


def _layers(model: nn.Module) -> list[dict[str, str]]:
    """Of each layer, the names of its parameters by `inner.PARTS`."""
    layers: list[dict[str, str]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            layers.append({})
        elif not isinstance(module, nn.LayerNorm | nn.BatchNorm1d):
            continue
        prefix = "" if isinstance(module, nn.Linear) else "norm_"
        own = {prefix + part: f"{name}.{part}" if name else part for part, _ in module.named_parameters()}
        layers[-1] |= own
    return layers
