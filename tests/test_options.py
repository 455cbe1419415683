"""What the rules promise beside their gradients: errors, counts, state, training and what a batch costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fomaml_fused as ff
from fomaml_fused.ragged import TaskCounts, plan_groups

from .cases import Case, relative_error

CASE = Case(widths=(3, 17, 5), tasks=4, steps=3)
MLP = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
BATCH = (torch.zeros(2, 3, 3), torch.zeros(2, 3, 2), torch.zeros(2, 4, 3), torch.zeros(2, 4, 2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": "lbfgs"}, ValueError, "optimizer is 'lbfgs'; it takes one of sgd, adam"),
        ({"optimizer": "adam", "momentum": 0.9}, ValueError, "momentum is 0.9; optimizer 'adam' takes betas"),
        ({"nesterov": True}, ValueError, "nesterov is True; it takes a momentum above 0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas is \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, ValueError, "betas is"),
        ({"eps": -1.0}, ValueError, "eps is -1.0"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm is 0; it takes None or a positive number"),
        ({"max_grad_value": float("nan")}, ValueError, "max_grad_value is nan"),
        ({"max_grad_norm": "1"}, TypeError, "max_grad_norm is '1'"),
        ({"learn_lr": "row"}, ValueError, "learn_lr is 'row'; it takes None or one of global, step, layer"),
        ({"learn_lr": "layer", "steps": 0}, ValueError, "learn_lr is 'layer'; without an inner step"),
        ({"learn_lr": "global", "lr": [0.1, 0.2]}, ValueError, "learn_lr='global' takes one rate for all"),
        ({"learn_lr": "layer", "lr": [[0.1], [0.2]], "steps": 2}, ValueError, "learn_lr='layer' takes one rate"),
        ({"learn_lr": "element", "positive_lr": "softplus", "lr": 0.0}, ValueError, "lr is 0; .*takes rates above 0"),
        ({"learn_lr": "layer", "positive_lr": "abs"}, ValueError, "positive_lr is 'abs'"),
        ({"positive_lr": "clamp"}, ValueError, "positive_lr is 'clamp'; it takes learn_lr beside it"),
        ({"outer": "maml"}, ValueError, "outer is 'maml'; it takes one of fomaml, reptile"),
        ({"outer": "reptile", "learn_lr": "layer"}, ValueError, "learn_lr is given; outer 'reptile'"),
        ({"outer": "reptile", "step_weights": [1.0]}, ValueError, "step_weights is given; outer 'reptile'"),
        ({"step_weights": [0.5, 0.5]}, ValueError, "step_weights is .*for each of the 1 steps"),
        ({"step_weights": [0.0]}, ValueError, "step_weights is .*not negative nor all 0"),
        ({"step_weights": [-1.0]}, ValueError, "step_weights is .*not negative nor all 0"),
        ({"nonfinite": "drop"}, ValueError, "nonfinite is 'drop'; it takes one of propagate, skip"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ff.FOMAML(MLP, **options)


@pytest.mark.parametrize(
    ("options", "keywords", "error", "message"),
    [
        ({}, {"query_x": None}, TypeError, "query_x is NoneType; outer 'fomaml' takes query sets"),
        ({"outer": "reptile"}, {}, ValueError, "query_x is given; outer 'reptile' takes no query set"),
        ({}, {"support_counts": [3]}, ValueError, "support_counts has 1 counts; there are 2 tasks"),
        ({}, {"support_counts": [3, 0]}, ValueError, "support_counts holds 0; it takes 1 to 3"),
        ({}, {"support_counts": [3, 4]}, ValueError, "support_counts holds 4; it takes 1 to 3"),
        ({}, {"query_counts": [3, 5]}, ValueError, "query_counts holds 5; it takes 0 to 4"),
        ({}, {"step_counts": [1, 2]}, ValueError, "step_counts holds 2; it takes 0 to 1"),
        ({}, {"step_counts": [1, 0.5]}, TypeError, "step_counts is .*whole number for each task"),
        ({}, {"support_counts": torch.ones(2)}, TypeError, "support_counts is .*whole number"),
        ({"steps": 2}, {"support_x": torch.zeros(2, 3, 3, 3)}, ValueError, "support_x has samples of 3 steps"),
    ],
)
def test_bad_calls(options: dict[str, Any], keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    names = ("support_x", "support_y", "query_x", "query_y")
    batch = dict(zip(names, BATCH, strict=True)) | keywords
    if batch["support_x"].dim() == 4:
        batch["support_y"] = torch.zeros(2, 3, 3, 2)
    with pytest.raises(error, match=message):
        ff.FOMAML(MLP, **options)(**batch)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)), r"model\[0\] is LayerNorm; the first layer"),
        (nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.LayerNorm(2)), "takes its place right behind a Linear"),
        (nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.LayerNorm(2)), "takes its place right behind a Linear"),
        (nn.Sequential(nn.Linear(3, 2), nn.LayerNorm([2, 2])), r"normalizes \[2, 2\]; the layer has 2 features"),
        (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(3)), "normalizes 3 features; the layer has 2"),
        (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), "tracks running statistics"),
    ],
)
def test_norms_out_of_place(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ff.FOMAML(model)


def test_a_batch_norm_takes_more_than_one_sample() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    x, y, query_x, query_y = BATCH
    with pytest.raises(ValueError, match="support_x has one sample a task"):
        ff.FOMAML(model)(x[:, :1], y[:, :1], query_x, query_y)
    with pytest.raises(ValueError, match="query_x has one sample a task"):
        ff.FOMAML(model)(x, y, query_x[:, :1], query_y[:, :1])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_diverged_tasks_are_skipped_and_counted(backend: str, weighted: bool) -> None:
    case = Case(widths=(3, 17, 5), tasks=5, activation="relu", steps=4, lr=1.0, weighted=weighted, nonfinite="skip")
    model, batch = case.model(torch.float64), case.batch(torch.float64)
    batch["support_y"][[1, 3]] = 1e300
    meta = case.meta(model, backend)
    inputs = [*model.parameters(), batch["query_x"]]
    with ff.override(chunk=2):
        loss = meta(**batch)
        found = torch.autograd.grad(loss, inputs)
    rest = {name: value[[0, 2, 4]] for name, value in batch.items()}
    expected = meta(**rest)
    for actual, value in zip(found, torch.autograd.grad(expected, inputs), strict=True):
        assert relative_error(actual, value) < 1e-12
    assert relative_error(loss, expected) < 1e-12
    assert found[-1][[1, 3]].eq(0).all()
    if backend == "torch":
        meta(**batch)
        assert meta.skipped is not None
        count = batch["task_weight"][[1, 3]].sum() if weighted else 2.0
        assert float(meta.skipped) == pytest.approx(float(count))


@pytest.mark.parametrize("learn_lr", ["layer", "layer_step", "element"])
@pytest.mark.parametrize("form", ["primal", "dual"])
def test_a_diverged_task_spoils_no_rate_that_is_learned(learn_lr: str, form: str) -> None:
    case = Case(tasks=3, activation="relu", steps=4, lr=1.0, nonfinite="skip", learn_lr=learn_lr)
    meta, batch = case.meta(case.model(torch.float64), "torch"), case.batch(torch.float64)
    batch["support_y"][1] = 1e300
    forms = ("primal" if learn_lr == "element" else form,) * 2
    with ff.override(forms=forms):
        found = torch.autograd.grad(meta(**batch), list(meta.inner_lr.parameters()))
    rest = {name: value[[0, 2]] for name, value in batch.items()}
    expected = torch.autograd.grad(meta(**rest), list(meta.inner_lr.parameters()))
    for actual, value in zip(found, expected, strict=True):
        assert relative_error(actual, value) < 1e-12


def test_rates_alone_may_be_learned() -> None:
    case = Case(widths=(3, 17, 9, 5), steps=3, learn_lr="layer_step")
    whole, alone = (case.meta(case.model(torch.float64), "torch") for _ in range(2))
    alone.model.requires_grad_(requires_grad=False)
    for meta in (whole, alone):
        meta(**{name: value.detach() for name, value in case.batch(torch.float64).items()}).backward()
    assert relative_error(alone.inner_lr.value.grad, whole.inner_lr.value.grad) < 1e-14  # type: ignore[arg-type]


def test_where_every_task_diverges_the_loss_is_nan_and_the_gradient_0() -> None:
    case = Case(tasks=2, activation="relu", steps=4, lr=1.0, nonfinite="skip")
    meta, batch = case.meta(case.model(torch.float32), "torch"), case.batch(torch.float32)
    batch["support_y"][:] = 1e30
    loss = meta(**batch)
    loss.backward()
    assert loss.isnan()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in meta.parameters())


def test_step_weights_may_be_annealed() -> None:
    case = Case(steps=3, step_weights=(1.0, 1.0, 1.0))
    meta, batch = case.meta(case.model(torch.float64), "torch"), case.batch(torch.float64)
    meta.step_weights = (0.0, 0.0, 1.0)
    last = ff.FOMAML(meta.model, lr=0.1, steps=3)
    torch.testing.assert_close(meta(**batch), last(**batch))
    with pytest.raises(ValueError, match="step_weights is None; whether there are any is decided when"):
        meta.step_weights = None
    with pytest.raises(ValueError, match="for each of the 3 steps"):
        meta.step_weights = (1.0,)


@pytest.mark.parametrize("learn_lr", ["global", "step", "layer", "layer_step", "element"])
@pytest.mark.parametrize("positive", [None, "softplus", "clamp"])
def test_learned_rates_start_where_they_are_told_and_learn(learn_lr: str, positive: str | None) -> None:
    model = CASE.model(torch.float32)
    meta = ff.FOMAML(model, lr=0.02, steps=3, learn_lr=learn_lr, positive_lr=positive)
    own = [p for name, p in meta.named_parameters() if name.startswith("inner_lr")]
    assert {id(p) for p in meta.parameters()} == {id(p) for p in (*model.parameters(), *own)}
    for rates in meta.inner_lr.listed():
        if rates is not None:
            torch.testing.assert_close(rates, torch.full_like(rates, 0.02))
    shapes = {"global": (1, 1), "step": (3, 1), "layer": (1, 2), "layer_step": (3, 2)}
    assert learn_lr == "element" or own[0].shape == shapes[learn_lr]
    assert learn_lr != "element" or [p.shape for p in own] == [p.shape for p in model.parameters()]
    batch = CASE.batch(torch.float32)
    before = meta(**batch).detach()
    optimizer = torch.optim.SGD(own, lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        meta(**batch).backward()
        optimizer.step()
    assert meta(**batch) < before
    assert learn_lr != "element" or all(torch.is_tensor(p.grad) for p in own)


def test_rates_are_in_the_state_dict_beside_the_plain_names() -> None:
    meta = ff.FOMAML(CASE.model(torch.float32), steps=2, learn_lr="layer_step")
    state = meta.state_dict()
    assert set(state) == {"inner_lr.value", *CASE.model(torch.float32).state_dict()}
    other = ff.FOMAML(CASE.model(torch.float32), lr=0.5, steps=2, learn_lr="layer_step")
    other.load_state_dict(state)
    assert torch.equal(other.inner_lr.value, meta.inner_lr.value)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "inner_lr.value"'):
        other.load_state_dict(CASE.model(torch.float32).state_dict())


def test_rates_of_zero_and_below_are_exact() -> None:
    """Where (theta_0 - theta_K) / rate would be 0 / 0."""
    for learn_lr in ("global", "layer_step", "element"):
        gradients = []
        for backend in ("torch", "reference"):
            meta = ff.FOMAML(CASE.model(torch.float64), lr=0.0, steps=3, learn_lr=learn_lr, backend=backend)
            meta(**CASE.batch(torch.float64)).backward()
            gradients.append([p.grad for p in meta.inner_lr.parameters()])
        for actual, expected in zip(*gradients, strict=True):
            assert actual is not None
            assert expected is not None
            assert expected.abs().max() > 0
            assert relative_error(actual, expected) < 1e-12


def test_tasks_run_with_those_of_about_as_many_samples() -> None:
    meta = ff.FOMAML(MLP, steps=2)
    sizes = meta.plan(12, 50, 50).sizes
    counts = TaskCounts((1, 1, 2, 9, 10, 10, 48, 49, 50, 50, 2, 1), (50,) * 12, (2,) * 12)
    for ratio in (1.0, 1.25, 2.0, math.inf):
        groups = counts.groups(ratio)
        assert sorted(t for group in groups for t in group.tasks) == list(range(12))
        for group in groups:
            shots = [counts.shots[t] for t in group.tasks]
            assert group.shots == max(shots) <= ratio * min(shots)
    assert len(counts.groups(math.inf)) == 1
    # Few tasks on a tiny network: launches cost more than padding. Many on a wide one: they do not.
    assert len(plan_groups(meta.problem, sizes, counts, "torch", "highest")) == 1
    wide = ff.FOMAML(nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)), steps=2)
    many = TaskCounts((1, 50) * 500, (5,) * 1000, (2,) * 1000)
    planned = plan_groups(wide.problem, wide.plan(1000, 50, 5).sizes, many, "torch", "highest")
    assert [group.shots for group, _ in planned] == [1, 50]
    padded = wide.plan(1000, 50, 5).estimate.flops
    assert sum(plan.estimate.flops for _, plan in planned) < 0.7 * padded


def test_counts_of_a_batch_norm_are_never_padded() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    meta = ff.FOMAML(model)
    planned = plan_groups(
        meta.problem, meta.plan(3, 10, 4).sizes, TaskCounts((9, 10, 9), (4, 4, 4), (1, 1, 1)), "torch", "highest"
    )
    assert [group.tasks for group, _ in planned] == [(0, 2), (1,)]


@pytest.mark.parametrize(
    "options",
    [{"learn_lr": "layer_step"}, {"step_weights": (0.0, 0.5)}, {"step_weights": (0.5, 0.5)}, {"optimizer": "adam"}],
)
@pytest.mark.compiles
def test_rules_compile_to_one_graph(options: dict[str, Any]) -> None:
    case = Case(widths=(3, 17, 5), tasks=3, **options)
    batch = case.batch(torch.float32)
    meta = case.meta(case.model(torch.float32), "torch", compile=True)
    plain = case.meta(meta.model, "torch")

    def gradients(module: ff.FOMAML) -> list[Tensor]:
        return list(torch.autograd.grad(module(**batch), list(module.parameters())))

    for stance in ("default", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            found = gradients(meta)
        for actual, expected in zip(found, gradients(plain), strict=True):
            assert relative_error(actual, expected) < 1e-5
        with torch.no_grad():  # other rates, the same graph
            for p in {*meta.parameters(), *plain.parameters()}:
                p.mul_(1.1)


@pytest.mark.compiles
def test_every_size_compiles_and_annealed_weights_do_not_compile_anew() -> None:
    case = Case(widths=(3, 5), tasks=2, steps=2, step_weights=(0.5, 0.5))
    meta, batch = case.meta(case.model(torch.float32), "torch", compile=True), case.batch(torch.float32)
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        for tasks in (1, 2):
            some = {name: value[:tasks] for name, value in batch.items()}
            for last in (0.5, 0.75, 1.0):
                meta.step_weights = (1.0 - last + 1e-3, last)
                expected = ff.FOMAML(meta.model, lr=0.1, steps=2, step_weights=meta.step_weights)(**some)
                torch.testing.assert_close(meta(**some), expected)


@pytest.mark.compiles
def test_arguments_that_come_and_go_are_compiled_apart() -> None:
    case = Case(widths=(1, 5, 1), tasks=2, steps=1)
    meta, batch = case.meta(case.model(torch.float32), "torch", compile=True), case.batch(torch.float32)
    plain = ff.FOMAML(meta.model, lr=0.1)
    counts = torch.rand(2, case.shots) + 0.1
    for further in ({}, {"support_weight": counts}, {"task_weight": torch.tensor([1.0, 3.0])}, {}):
        torch.testing.assert_close(meta(**batch, **further), plain(**batch, **further))
    with torch.no_grad():
        for p in meta.parameters():
            p.add_(1.0)
    torch.testing.assert_close(meta(**batch), plain(**batch))


def test_what_lies_behind_the_counted_samples_does_not_matter() -> None:
    case = Case(widths=(3, 17, 5), tasks=4)
    meta, batch = case.meta(case.model(torch.float64), "torch"), case.batch(torch.float64)
    counts: dict[str, Any] = {"support_counts": [3, 4, 3, 5], "query_counts": [0, 4, 3, 4]}
    clean = torch.autograd.grad(meta(**batch, **counts, reduction="none")[1:].sum(), list(meta.parameters()))
    for t, (shots, queries) in enumerate(zip(*counts.values(), strict=True)):
        batch["support_x"][t, shots:] = math.inf
        batch["support_y"][t, shots:] = math.nan
        with torch.no_grad():
            batch["query_x"][t, queries:] = math.nan
        batch["query_y"][t, queries:] = math.nan
    losses = meta(**batch, **counts, reduction="none")
    assert losses.isnan().tolist() == [True, False, False, False]
    found = torch.autograd.grad(losses[1:].sum(), list(meta.parameters()))
    for actual, expected in zip(found, clean, strict=True):
        assert torch.equal(actual, expected)
    assert meta(**{n: v[:0] for n, v in batch.items()}, support_counts=[]).isnan()


def test_a_batch_norm_counts_more_than_one_sample() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    for name in ("support_counts", "query_counts"):
        with pytest.raises(ValueError, match=f"{name} holds 1; it takes 2 to"):
            ff.FOMAML(model)(*BATCH, **{name: [1, 3]})


@pytest.mark.parametrize("kind", ["callable", "weight asks"])
@pytest.mark.parametrize("options", [{}, {"step_weights": (0.5, 0.0, 0.0, 0.5)}, {"learn_lr": "layer"}], ids=str)
def test_diverged_tasks_are_skipped_whatever_asks_for_a_gradient(kind: str, options: dict[str, Any]) -> None:
    case = Case(
        tasks=4,
        activation="relu",
        steps=4,
        lr=1.0,
        nonfinite="skip",
        outer_loss=kind if kind == "callable" else None,
        **options,
    )
    meta, batch = case.meta(case.model(torch.float64), "torch"), case.batch(torch.float64)
    batch["support_y"][[1, 3]] = 1e300
    batch["query_weight"] = torch.rand(4, case.queries, dtype=torch.float64).requires_grad_(kind != "callable")
    asked = [*meta.parameters(), *([batch["query_weight"]] if kind != "callable" else [])]
    loss = meta(**batch)
    found = torch.autograd.grad(loss, asked)
    assert meta.skipped == 2
    rest = {name: value[[0, 2]] for name, value in batch.items()}
    expected = meta(**rest)
    assert relative_error(loss, expected) < 1e-12
    for actual, value in zip(found, torch.autograd.grad(expected, asked), strict=True):
        assert relative_error(actual, value) < 1e-12


def test_adapted_tasks_are_differentiated_as_often_as_one_likes() -> None:
    case = Case(learn_lr="layer", positive_lr="softplus")
    meta, batch = case.meta(case.model(torch.float64), "torch"), case.batch(torch.float64)
    with torch.no_grad():
        fast = meta.adapt(batch["support_x"], batch["support_y"])
    for _ in range(2):
        meta.zero_grad()
        fast(batch["query_x"]).sum().backward()
        assert meta.inner_lr.value.grad is not None


def test_norms_hold_where_samples_are_much_alike() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 1, 64) + 1e-3 * torch.randn(2, 6, 64)
    y = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]).expand(2, 6).unsqueeze(2)
    for form in ("primal", "dual"):
        steps = []
        for dtype in (torch.float32, torch.float64):
            model = nn.Linear(64, 1, dtype=torch.float64)
            with torch.no_grad():
                model.weight.fill_(1e-3)
                model.bias.fill_(0.0)
            meta = ff.FOMAML(model.to(dtype), lr=1.0, max_grad_norm=1e-3)
            with ff.override(forms=(form,)):
                weights = meta.adapt(x.to(dtype), y.to(dtype)).weights()["weight"]
            steps.append(weights.double() - 1e-3)
        assert relative_error(*steps) < 2e-3


def test_a_gap_is_that_of_the_meta_loss_as_it_is() -> None:
    case = Case(steps=3, lr=0.3)
    model, batch = case.model(torch.float64), case.batch(torch.float64)
    first = ff.FOMAML(model, lr=0.3, steps=3, step_weights=(1.0, 0.0, 0.0))
    one = ff.diagnostics.first_order_gap(ff.FOMAML(model, lr=0.3, steps=1), **batch)
    assert ff.diagnostics.first_order_gap(first, **batch).cosine == pytest.approx(one.cosine)
    with pytest.raises(ValueError, match="outer rule 'reptile'"):
        ff.diagnostics.first_order_gap(ff.Reptile(model), **batch)
