"""Matrix products of the batched engine: torch's own, or where a compiler fuses them, sums over a thin side.

A product with a side of one or two numbers, as a network of coordinates begins and a regression ends, is hardly
arithmetic: a library's call costs more than the numbers do. Left as sums it becomes a part of what stands beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

THIN = 4  # numbers along the shortest side of a product that is written as sums


def product(a: Tensor, b: Tensor) -> Tensor:
    """A @ b, [M, N] or [T, M, N]."""
    if _is_thin(a, b):
        return _as_sums(a, b)
    return torch.mm(a, b) if a.dim() == 2 else torch.bmm(a, b)


def plus_product(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Beta * c + alpha * a @ b; c broadcasts."""
    if _is_thin(a, b) or (torch.compiler.is_compiling() and c.shape[:-1].numel() < a.shape[:-1].numel()):
        # A bias: its sum belongs to the activation behind it, not to the product.
        return torch.add(c if beta == 1.0 else beta * c, product(a, b), alpha=alpha)
    added = torch.addmm if a.dim() == 2 else torch.baddbmm
    return added(c, a, b, beta=beta, alpha=alpha)


def add_product_(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """As `plus_product`, in place."""
    if _is_thin(a, b):
        return (c if beta == 1.0 else c.mul_(beta)).add_(_as_sums(a, b), alpha=alpha)
    return c.addmm_(a, b, beta=beta, alpha=alpha) if a.dim() == 2 else c.baddbmm_(a, b, beta=beta, alpha=alpha)


def _is_thin(a: Tensor, b: Tensor) -> bool:
    """Whether a compiler is to have the product as sums; by itself each sum would be a pass over memory."""
    return torch.compiler.is_compiling() and 0 < min(*a.shape[-2:], b.shape[-1]) <= THIN


def _as_sums(a: Tensor, b: Tensor) -> Tensor:
    rows, inner, columns = *a.shape[-2:], b.shape[-1]
    if inner <= THIN:
        found = a[..., :1] * b[..., :1, :]
        for k in range(1, inner):
            found = found + a[..., k : k + 1] * b[..., k : k + 1, :]
        return found
    if columns <= THIN:
        return torch.stack([(a * b[..., None, :, n]).sum(-1) for n in range(columns)], -1)
    return torch.stack([(a[..., m, :, None] * b).sum(-2) for m in range(rows)], -2)
