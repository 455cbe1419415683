"""Losses of a batch of tasks: the value of each task, and the gradient with respect to its outputs in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import Loss


@dataclass(frozen=True)
class TaskLoss:
    """A loss against fixed targets, ready to be evaluated at every inner step.

    Attributes:
        gradient: (outputs [T, N, out], cotangents, a number or [T, 1, 1]) -> the gradient of each task's loss times its
            cotangent, [T, N, out]; outputs stay as they are.
        values: outputs [T, N, out] -> the loss of each task, [T]; differentiable by autograd.
    """

    gradient: Callable[[Tensor, float | Tensor], Tensor]
    values: Callable[[Tensor], Tensor]


def task_loss(loss: Loss, targets: Tensor, weight: Tensor | None, out_features: int, dtype: torch.dtype) -> TaskLoss:
    """The loss of each task: the weighted mean over its samples.

    Args:
        targets: [T, N] class indices or [T, N, out].
        weight: [T, N] or None.
        out_features: the width of the outputs.
        dtype: of the outputs.
    """
    shares = None if weight is None else weight / weight.sum(1, keepdim=True)
    return _loss_of(loss, targets, shares, targets.shape[1], out_features, dtype)


def block_losses(
    loss: Loss,
    targets: Tensor,
    weight: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
    blocks: Sequence[slice],
) -> list[TaskLoss]:
    """As `task_loss`, of each block of samples: what it adds to the loss of its task."""
    if len(blocks) == 1:
        return [task_loss(loss, targets, weight, out_features, dtype)]
    shares = None if weight is None else weight / weight.sum(1, keepdim=True)
    return [
        _loss_of(
            loss, targets[:, own], None if shares is None else shares[:, own], targets.shape[1], out_features, dtype
        )
        for own in blocks
    ]


def _loss_of(
    loss: Loss, targets: Tensor, shares: Tensor | None, samples: int, out_features: int, dtype: torch.dtype
) -> TaskLoss:
    """What some samples of each task add to its loss.

    shares: what each of them counts, [T, N], or None for one of `samples`.
    """
    values = partial(_values, loss, targets, shares, samples)
    if loss.name == "callable":
        if _inferring():
            with torch.inference_mode(mode=False):  # copies that autograd takes
                targets, shares = targets.clone(), None if shares is None else shares.clone()
            values = partial(_values, loss, targets, shares, samples)
        return TaskLoss(partial(_autograd_gradient, values), values)
    averaged = samples if loss.takes_classes else samples * out_features
    # dL/dz = scale * residual(z): a number when all samples count alike, else a factor per sample [T, N, 1].
    scale: float | Tensor = (2.0 if loss.name == "mse" else 1.0) / max(averaged, 1)
    if shares is not None:
        scale = shares.unsqueeze(-1) * (samples * scale)
    residual = _residual(loss, targets, out_features, dtype)
    return TaskLoss(lambda outputs, cotangents: residual(outputs).mul_(scale * cotangents), values)


def sample_losses(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each sample [N] for outputs [N, out].

    Raises:
        ValueError: a callable loss gave another shape.
    """
    match loss.name:
        case "mse":
            return (outputs - targets).square().mean(-1)
        case "l1":
            return (outputs - targets).abs().mean(-1)
        case "huber":
            return F.huber_loss(outputs, targets, reduction="none", delta=loss.delta).mean(-1)
        case "bce_with_logits":
            return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(-1)
        case "cross_entropy":
            if _by_class(outputs):
                likelihoods = torch.log_softmax(outputs.t(), 0)  # [out, N]
                found = F.nll_loss(likelihoods.t(), targets, reduction="none")
                smooth = loss.label_smoothing
                return found if not smooth else (1.0 - smooth) * found - smooth * likelihoods.mean(0)
            return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=loss.label_smoothing)
    assert loss.function is not None
    samples = loss.function(outputs, targets)
    if samples.shape != outputs.shape[:1]:
        raise ValueError(
            f"loss gave a tensor of shape {list(samples.shape)}; a callable takes (outputs [N, out], targets [N, ...]) "
            f"and gives a loss per sample, here {list(outputs.shape[:1])}"
        )
    return samples


def _values(loss: Loss, targets: Tensor, shares: Tensor | None, samples: int, outputs: Tensor) -> Tensor:
    found = sample_losses(loss, outputs.flatten(0, 1), targets.flatten(0, 1)).view(targets.shape[:2])
    return found.sum(1) / samples if shares is None else (found * shares).sum(1)


def _residual(loss: Loss, targets: Tensor, out_features: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Outputs -> d(sample loss)/d(outputs), but for the constant factor that `task_loss` puts into its scale."""
    match loss.name:
        case "mse":
            return lambda z: torch.sub(z, targets)
        case "l1":
            return lambda z: torch.sub(z, targets).sign_()
        case "huber":
            delta = loss.delta
            return lambda z: torch.sub(z, targets).clamp_(-delta, delta)
        case "bce_with_logits":
            return lambda z: torch.sigmoid(z).sub_(targets)
        case "cross_entropy":
            smooth = loss.label_smoothing
            expected = torch.zeros(out_features, targets.numel(), dtype=dtype, device=targets.device)
            expected.scatter_(0, targets.reshape(1, -1), 1.0)
            if smooth:
                expected.mul_(1.0 - smooth).add_(smooth / out_features)
            if _by_class(expected.t()):
                return lambda z: torch.softmax(z.flatten(0, 1).t(), 0).sub_(expected).t().unflatten(0, z.shape[:2])
            expected = expected.t().contiguous().unflatten(0, targets.shape)
            return lambda z: torch.softmax(z, -1).sub_(expected)
    raise AssertionError(f"no gradient for loss {loss}")


def _by_class(outputs: Tensor) -> bool:
    """Whether the softmax of outputs [N, out] goes class by class, over all samples at once.

    Sample by sample, torch on a CPU takes vectors of 16 numbers: for fewer classes that is several times as long.
    """
    return outputs.device.type == "cpu" and outputs.shape[1] < 16


def _autograd_gradient(values: Callable[[Tensor], Tensor], outputs: Tensor, cotangents: float | Tensor) -> Tensor:
    if _inferring():
        with torch.inference_mode(mode=False):
            return _autograd_gradient(values, outputs.clone(), cotangents)
    if torch.compiler.is_compiling():  # which takes this and not that
        found: Tensor = torch.func.grad(lambda z: values(z).sum())(outputs)
        return found * cotangents
    with torch.enable_grad():
        point = outputs.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(values(point).sum(), point)
    return gradient * cotangents


def _inferring() -> bool:
    """Whether this is inference mode, where torch has no autograd; of which a graph in the making knows nothing."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
