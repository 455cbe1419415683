"""What the first-order approximation costs, measured on a user's own batch."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .batch import check_query, check_support
from .module import FOMAML


@dataclass(frozen=True)
class FirstOrderGap:
    """How the FOMAML gradient lies to the exact MAML gradient.

    Attributes:
        cosine: of the angle between them; 1 where they point the same way.
        norm_ratio: the length of the FOMAML gradient over that of the MAML gradient.
        cosines: the cosine for each parameter by name.
    """

    cosine: float
    norm_ratio: float
    cosines: dict[str, float]

    def __str__(self) -> str:
        return f"first-order gradient: cosine {self.cosine:.4f}, norm ratio {self.norm_ratio:.4f} to the exact one"


@torch.enable_grad()
def first_order_gap(
    meta: FOMAML,
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    *,
    support_weight: Tensor | None = None,
    query_weight: Tensor | None = None,
    task_weight: Tensor | None = None,
) -> FirstOrderGap:
    """Compare the first-order with the second-order meta-gradient on a batch of tasks.

    Both come from the oracle, one task at a time: for a look at a few batches, not for a training loop. The arguments
    are those of `FOMAML.forward`; gradients accumulated on the model stay as they are.
    """
    problem = meta.problem
    if problem.outer == "reptile":
        raise ValueError("meta has the outer rule 'reptile', whose gradient is no approximation of an exact one")
    model = copy.deepcopy(meta.model).requires_grad_()
    parameters = dict(model.named_parameters())
    like = next(iter(parameters.values()))
    support = check_support(problem, like, support_x, support_y, support_weight)
    query = check_query(problem, like, support.x.shape[0], query_x, query_y, query_weight, task_weight)
    gradients = []
    for first_order in (True, False):
        loss = reference.meta_loss(
            model,
            support.x,
            support.y,
            query.x.detach(),
            query.y,
            **meta.reference_options(),
            outer_loss=problem.outer_loss,
            step_weights=meta.step_weights,
            nonfinite=problem.nonfinite,
            support_weight=support.weight,
            query_weight=query.weight,
            task_weight=query.task_weight,
            first_order=first_order,
        )
        gradients.append(torch.autograd.grad(loss, list(parameters.values())))
    first, second = (torch.cat([g.flatten() for g in gs]) for gs in gradients)
    return FirstOrderGap(
        cosine=_cosine(first, second),
        norm_ratio=float(first.norm() / second.norm()),
        cosines={name: _cosine(a.flatten(), b.flatten()) for name, a, b in zip(parameters, *gradients, strict=True)},
    )


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))
