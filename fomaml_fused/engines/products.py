"""Matrix products of the batched engine: torch's own, or what a compiler makes more of.

A product with a side of one number, as a regression begins and ends with, is hardly arithmetic: a library's call costs
more than the numbers do, and left as a sum it becomes a part of what stands beside it. Two or three numbers are enough
for the library to be faster, by a quarter of a step of learnit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """A @ b, [M, N] or [T, M, N]."""
    if _left_as_sums(a, b):
        return _as_sums(a, b)
    return torch.mm(a, b) if a.dim() == 2 else torch.bmm(a, b)


def plus_product(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Beta * c + alpha * a @ b; c broadcasts."""
    if _left_as_sums(a, b) or (torch.compiler.is_compiling() and c.shape[:-1].numel() < a.shape[:-1].numel()):
        # A bias: its sum belongs to the activation behind it, not to the product. The factor is no `alpha` of the sum,
        # which Inductor loses where it makes an addmm of both.
        found = product(a, b)
        return (c if beta == 1.0 else beta * c) + (found if alpha == 1.0 else alpha * found)
    added = torch.addmm if a.dim() == 2 else torch.baddbmm
    return added(c, a, b, beta=beta, alpha=alpha)


def add_product_(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """As `plus_product`, in place."""
    if _left_as_sums(a, b):
        return (c if beta == 1.0 else c.mul_(beta)).add_(_as_sums(a, b), alpha=alpha)
    return c.addmm_(a, b, beta=beta, alpha=alpha) if a.dim() == 2 else c.baddbmm_(a, b, beta=beta, alpha=alpha)


def is_thin(m: int, k: float, n: float) -> bool:
    """Whether a product [m, k] x [k, n] has a side of one number."""
    return 1 in (m, k, n)


def _left_as_sums(a: Tensor, b: Tensor) -> bool:
    return torch.compiler.is_compiling() and is_thin(a.shape[-2], a.shape[-1], b.shape[-1])


def _as_sums(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[-1] == 1:
        return a * b
    return (a * b.mT).sum(-1, keepdim=True) if b.shape[-1] == 1 else (a.mT * b).sum(-2, keepdim=True)
