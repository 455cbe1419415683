"""The batched engine against the oracle: every loss, activation, form and option, in value and in every gradient."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fomaml_fused as ff

from .cases import (
    ACTIVATIONS,
    LOSSES,
    Case,
    Solution,
    assert_close,
    assert_no_worse_than_twice,
    by_engine,
    by_oracle,
    cases,
    forms_within,
    relative_error,
    yardsticks,
)

FORMS = {
    "primal": ("primal",) * 3,
    "dual": ("dual",) * 3,
    "mixed": ("dual", "primal", "dual"),
    "mixed again": ("primal", "dual", "primal"),
    "fold": ("dual:1", "dual:2", "dual:1"),
    "fold for queries": ("dual:3", "dual:3", "dual:3"),
    "mixed folds": ("dual:2", "primal", "dual:3"),
}


def check(case: Case, forms: tuple[str, ...] | None) -> None:
    if forms is not None:
        forms = forms_within(forms, case.steps)
    exact = by_oracle(case, torch.float64)
    assert_close(by_engine(case, torch.float64, forms), exact, 1e-10)
    assert_no_worse_than_twice(by_engine(case, torch.float32, forms), yardsticks(case, torch.float32), exact)


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.sampled(8)
def test_every_activation_and_loss(activation: str, loss: str, forms: str) -> None:
    check(Case(widths=(3, 17, 5, 3), activation=activation, loss=loss, steps=3), FORMS[forms])


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1, "steps": 1},
        {"lr": [0.1, 0.2, 0.05]},
        {"lr": [[0.1], [0.05], [0.2], [0.0]], "steps": 4},
        {"lr": [[0.1, 0.2, 0.3], [0.05, 0.0, 0.1]], "steps": 2, "momentum": 0.5},
        {"bias": False},
        {"bias": False, "momentum": 0.9, "weight_decay": 0.1},
        {"weighted": True},
        {"weighted": True, "reduction": "sum", "loss": "cross_entropy"},
        {"weighted": True, "loss": "callable"},
        {"outer_loss": "cross_entropy"},
        {"loss": "cross_entropy", "outer_loss": "huber"},
        {"steps": 0},
        {"adapt": []},
        {"adapt": "head", "momentum": 0.9},
        {"adapt": "body", "weight_decay": 0.1},
        {"adapt": [1]},
        {"adapt": [0, 2]},
        {"adapt": [0]},
        {"tasks": 1, "shots": 1, "queries": 1},
        {"shots": 17, "queries": 40, "steps": 5},
        {"last_activation": "sigmoid"},
    ],
    ids=str,
)
@pytest.mark.sampled(5)
def test_every_option(options: dict[str, object], forms: str) -> None:
    check(replace(Case(widths=(3, 17, 5, 3), steps=3), **options), FORMS[forms])  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 3, 17, 40, 63, 65])
@pytest.mark.parametrize("form", ["primal", "dual", "dual:1", "dual:2"])
@pytest.mark.sampled(5)
def test_odd_sizes_and_depths(size: int, form: str) -> None:
    for widths in [(size, 3), (3, size, 2), (2, size, size, 3), (1, size, 2, size, 1)]:
        case = Case(widths=widths, tasks=2, shots=size % 19 + 1, queries=size % 7 + 1, activation="gelu")
        check(case, (form,) * (len(widths) - 1))


@given(case=cases())
def test_random_problems(case: Case) -> None:
    check(case, case.forms)


@given(case=cases())
def test_the_planners_own_choice(case: Case) -> None:
    assert_close(by_engine(case, torch.float64), by_oracle(case, torch.float64), 1e-10)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("form", ["primal", "dual", "dual:2"])
def test_the_chunk_changes_nothing_but_rounding(form: str, chunk: int) -> None:
    case = Case(widths=(3, 17, 5, 3), tasks=7, weighted=True, steps=3, momentum=0.9)
    forms = (form,) * 3
    assert_close(by_engine(case, torch.float64, forms, chunk), by_engine(case, torch.float64, forms, 7), 1e-13)


@pytest.mark.parametrize("rows", [1, 4, 5, 16])
@pytest.mark.parametrize(
    "options",
    [
        *({"loss": loss, "weighted": weighted} for loss in LOSSES for weighted in (False, True)),
        {"momentum": 0.9, "weight_decay": 0.1},
        {"optimizer": "adam", "lr": 0.01, "bias": False},
        {"max_grad_norm": 0.1},
        {"max_grad_value": 0.01, "max_grad_norm": 0.05},
        {"lr": [0.1, 0.2, 0.05], "adapt": [0, 2]},
        {"norm": "layer", "adapt": "body"},
        {"learn_lr": "layer_step", "momentum": 0.9},
        {"learn_lr": "element"},
        {"step_weights": (0.2, 0.0, 0.5)},
        {"outer": "reptile"},
        {"each_step": True, "weighted": True},
        {"support_counts": (17, 9, 16), "query_counts": (3, 11, 11)},
        {"steps": 0},
        {"adapt": []},
    ],
    ids=str,
)
@pytest.mark.sampled(5)
def test_samples_in_blocks(options: dict[str, object], rows: int) -> None:
    """17 and 11 samples in blocks of which the last is smaller, and in none."""
    case = replace(Case(widths=(3, 17, 5, 3), activation="sine", shots=17, queries=11, steps=3), **options)  # type: ignore[arg-type]
    exact = by_oracle(case, torch.float64)
    assert_close(by_engine(case, torch.float64, chunk=2, rows=rows), exact, 1e-10)
    assert_no_worse_than_twice(by_engine(case, torch.float32, rows=rows), yardsticks(case, torch.float32), exact)


@pytest.mark.compiles
def test_blocks_compile_to_one_graph() -> None:
    # With a sine, whose frequency rides on its product.
    widths = (3, 6, 5)
    case = Case(widths=widths, activation="sine", loss="cross_entropy", steps=1, shots=5, queries=3, weighted=True)
    reference, meta = (
        case.meta(case.model(torch.float64), "reference"),
        case.meta(case.model(torch.float64), "torch", compile=True),
    )
    reduced = Solution.of(reference, case, reference, torch.float64, per_task=False)
    with ff.override(rows=3):
        assert_close(Solution.of(meta, case, meta, torch.float64, per_task=False), reduced, 1e-10)


@given(case=cases(), rows=st.integers(1, 20))
def test_random_problems_in_blocks(case: Case, rows: int) -> None:
    assert_close(by_engine(case, torch.float64, rows=rows), by_oracle(case, torch.float64), 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["primal", "dual", "dual:2"])
def test_sixteen_bit_parameters_are_computed_in_float32(form: str, dtype: torch.dtype) -> None:
    case = Case(widths=(3, 17, 5, 3), loss="cross_entropy", steps=3)
    # The numbers that 16 bits hold are the problem; the double-precision solution starts from the same ones.
    rounded = case.model(dtype)
    meta = ff.FOMAML(rounded, **case.options())
    batch = case.batch(dtype)
    with ff.override(forms=(form,) * 3):
        loss = meta(**batch)
    gradients = torch.autograd.grad(loss, [*rounded.parameters(), batch["query_x"]])

    def oracle(working: torch.dtype) -> list[torch.Tensor]:
        model = case.model(dtype).to(working)
        exact = {n: t.detach().to(working) if t.is_floating_point() else t for n, t in batch.items()}
        exact["query_x"].requires_grad_()
        value = ff.reference.meta_loss(model, **exact, **case.oracle_options())
        return [value.detach(), *torch.autograd.grad(value, [*model.parameters(), exact["query_x"]])]

    for actual, own, expected in zip([loss, *gradients], oracle(dtype), oracle(torch.float64), strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, expected) <= 2 * relative_error(own, expected) + 1e-6


@pytest.mark.parametrize("form", ["primal", "dual", "dual:2"])
def test_a_diverged_task_spoils_its_own_loss_and_nothing_else(form: str) -> None:
    case = Case(tasks=4, activation="relu", steps=5, lr=1.0)
    model, batch = case.model(torch.float32), case.batch(torch.float32)
    batch["support_y"][2] = 1e30
    with ff.override(forms=(form, form)):
        losses = ff.FOMAML(model, **case.options())(**batch, reduction="none")
    assert losses.isfinite().tolist() == [True, True, False, True]


@pytest.mark.parametrize("form", ["primal", "dual", "dual:2"])
def test_results_repeat_bit_by_bit(form: str) -> None:
    case = Case(widths=(9, 33, 17, 5), loss="cross_entropy", tasks=9, steps=4)
    rows = 3 if form == "primal" else None
    first, second = (by_engine(case, torch.float32, (form,) * 3, chunk=4, rows=rows).values for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inputs_and_parameters_are_left_as_they_were() -> None:
    case = Case(widths=(3, 17, 3), weighted=True, momentum=0.9, weight_decay=0.1, steps=3)
    model, batch = case.model(torch.float32), case.batch(torch.float32)
    before = [t.clone() for t in [*model.parameters(), *batch.values()]]
    for form in ("primal", "dual", "dual:1", "dual:3"):
        with ff.override(forms=(form, form)):
            ff.FOMAML(model, **case.options())(**batch).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, [*model.parameters(), *batch.values()], strict=True))


def test_strided_inputs_give_what_contiguous_ones_give() -> None:
    case = Case(widths=(3, 17, 3), shots=4, queries=4, steps=3)
    model, batch = case.model(torch.float64), case.batch(torch.float64)
    meta = ff.FOMAML(model, **case.options())
    strided = {name: t.detach().transpose(0, 1).contiguous().transpose(0, 1) for name, t in batch.items()}
    strided["support_x"] = strided["support_x"][:, :1].expand(-1, 4, -1)  # zero stride
    dense = {name: t.contiguous() for name, t in strided.items()}
    gradients = [torch.autograd.grad(meta(**b), list(model.parameters())) for b in (strided, dense)]
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected) < 1e-14


def test_fresh_memory_is_poisoned_here() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.ones(2).new_empty(2, 2).isnan().all()
