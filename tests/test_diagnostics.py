"""The first-order gap against gradients taken by hand."""

import pytest
import torch

import fomaml_fused as ff

from .cases import Case


def test_the_gap_is_between_the_oracles_gradients() -> None:
    case = Case(widths=(3, 17, 3), steps=3, lr=0.3)
    model, batch = case.model(torch.float64), case.batch(torch.float64)
    gap = ff.diagnostics.first_order_gap(ff.FOMAML(model, **case.options()), **batch)
    first, second = (
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(
                    ff.reference.meta_loss(model, **batch, **case.oracle_options(), first_order=first_order),
                    list(model.parameters()),
                )
            ]
        )
        for first_order in (True, False)
    )
    assert gap.cosine == pytest.approx(float(first @ second / first.norm() / second.norm()))
    assert gap.norm_ratio == pytest.approx(float(first.norm() / second.norm()))
    assert 0.5 < gap.cosine < 0.9999
    assert set(gap.cosines) == {name for name, _ in model.named_parameters()}
    assert "cosine" in str(gap)
    assert all(p.grad is None for p in model.parameters())


def test_frozen_layers_and_no_grad_are_no_hindrance_and_bad_batches_are_named() -> None:
    case = Case(widths=(3, 17, 3), steps=2)
    meta, batch = ff.FOMAML(case.model(torch.float64), **case.options()), case.batch(torch.float64)
    expected = ff.diagnostics.first_order_gap(meta, **batch)
    meta.model[0].requires_grad_(False)  # type: ignore[index]
    with torch.no_grad():
        assert ff.diagnostics.first_order_gap(meta, **batch) == expected
    with pytest.raises(ValueError, match="query_x has 1 tasks"):
        ff.diagnostics.first_order_gap(meta, **(batch | {"query_x": batch["query_x"][:1]}))


def test_without_a_step_there_is_no_gap() -> None:
    case = Case(steps=0)
    gap = ff.diagnostics.first_order_gap(
        ff.FOMAML(case.model(torch.float64), **case.options()), **case.batch(torch.float64)
    )
    assert gap.cosine == pytest.approx(1.0)
    assert gap.norm_ratio == pytest.approx(1.0)
