"""The batched engine's products, as torch's own and as the sums that a compiler is given for thin ones."""

from __future__ import annotations

import pytest
import torch

from fomaml_fused.engines import products


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("tasks", [(), (3,)], ids=["shared", "own"])
@pytest.mark.parametrize(
    "sides", [(1, 6, 7), (6, 1, 7), (6, 7, 1), (5, 3, 2), (6, 4, 9), (2, 7, 8), (5, 6, 7)], ids=str
)
def test_products(
    sides: tuple[int, int, int], tasks: tuple[int, ...], compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    m, k, n = sides
    a, b = torch.randn(*tasks, m, k, dtype=torch.float64), torch.randn(*tasks, k, n, dtype=torch.float64)
    expected = a @ b
    torch.testing.assert_close(products.product(a, b), expected)
    for shape in ((n,), (m, n), (*tasks, m, n)):
        c = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(products.plus_product(c, a, b), c + expected)
        torch.testing.assert_close(products.plus_product(c, a, b, beta=0.5, alpha=-2.0), 0.5 * c - 2.0 * expected)
    whole = c.clone()
    assert products.add_product_(whole, a, b, beta=0.5, alpha=-2.0) is whole
    torch.testing.assert_close(whole, 0.5 * c - 2.0 * expected)


def test_nothing_to_sum_is_nothing() -> None:
    empty = torch.ones(2, 0, 3)
    assert torch.equal(products.product(empty.mT, empty), torch.zeros(2, 3, 3))
