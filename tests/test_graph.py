"""In a graph of `torch.compile` a call is one op: no break, and bit by bit what an eager call gives."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fomaml_fused as ff
from fomaml_fused import graph
from fomaml_fused.calls import Given

from .cases import Case, log_cosh, relative_error

CASE = Case(widths=(3, 17, 5), weighted=True)
# Torch looks at the gradients of what it traces, which results of a graph have not.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def _graphs_of_its_own() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    """In one graph; by default without the compiler of that graph, which is no matter of ours and takes seconds."""
    found: Callable[..., Any] = torch.compile(function, fullgraph=True, backend=backend, **options)
    return found


def with_gradients(
    loss: Callable[..., Tensor], meta: ff.FOMAML, batch: dict[str, Any], ask: Sequence[str], reduction: str
) -> list[Tensor]:
    """The loss, its gradients under some cotangent, and how much was skipped."""
    batch = {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
    asked = [batch[name].requires_grad_() for name in ask if name in batch]
    value = loss(**batch, reduction=reduction)
    cotangent = torch.linspace(0.5, 2.0, max(value.numel(), 1)).to(value)[: value.numel()].view(value.shape)
    skipped = [] if meta.skipped is None else [meta.skipped]
    return [value.detach(), *torch.autograd.grad(value, [*meta.parameters(), *asked], cotangent), *skipped]


def assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), f"they differ by {relative_error(a, b):.1e}"


@pytest.mark.parametrize(
    ("case", "reduction", "dtype"),
    [
        (replace(CASE, loss="cross_entropy", steps=3), "mean", torch.float64),
        (replace(CASE, bias=False, momentum=0.9), "sum", torch.float32),
        (replace(CASE, learn_lr="layer_step", positive_lr="softplus"), "none", torch.float64),
        (
            Case(widths=(3, 9, 7, 5), norm="layer without shift", learn_lr="element", adapt=[0, 2]),
            "mean",
            torch.float64,
        ),
        (replace(CASE, step_weights=(0.3, 0.7), nonfinite="skip"), "mean", torch.float64),
        (Case(outer="reptile", each_step=True), "none", torch.float64),
        (replace(CASE, support_counts=(1, 5, 4), query_counts=(2, 3, 4), step_counts=(0, 1, 2)), "mean", torch.float64),
        (Case(loss="callable", outer_loss="callable", nonfinite="skip"), "mean", torch.float64),
        (Case(outer_loss="callable", weighted=True), "none", torch.float64),
        (Case(tasks=0), "sum", torch.float64),
        (Case(), "mean", torch.float16),
    ],
    ids=str,
)
def test_a_call_in_a_graph_is_the_eager_one(case: Case, reduction: str, dtype: torch.dtype) -> None:
    meta, batch = case.meta(case.model(dtype), "torch"), case.batch(dtype)
    if case.nonfinite == "skip":
        batch["support_y"][1] = 1e300
    for ask in (["query_x"], ["query_x", "query_y", "query_weight", "task_weight"])[: 1 + (reduction == "mean")]:
        if case.loss == "cross_entropy":
            ask = [name for name in ask if name != "query_y"]
        expected = with_gradients(meta, meta, batch, ask, reduction)
        found = with_gradients(compiled(meta), meta, batch, ask, reduction)
        assert_equal(found, expected)
        assert (meta.skipped is not None) == (case.nonfinite == "skip")
        assert meta.skipped is None or not meta.skipped.requires_grad


def test_gradients_in_16_bits_are_scaled_before_they_are_rounded() -> None:
    meta, batch = Case().meta(Case().model(torch.float16), "torch"), Case().batch(torch.float16)
    batch = {name: value.detach() for name, value in batch.items()} | {"query_x": batch["query_x"].detach() * 1e-5}
    gradients = [
        torch.autograd.grad(function(**batch) * 2.0**14, meta.model[0].weight)[0]  # type: ignore[index]
        for function in (meta, compiled(meta))
    ]
    assert_equal(*([gradient] for gradient in gradients))
    assert (gradients[0] / 2.0**14).eq(0).any()
    assert gradients[0].ne(0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_kernels_run_in_a_graph(reduction: str) -> None:
    pytest.importorskip("triton")
    from .on_kernels import kernel_device, on_device

    case = Case(widths=(3, 5), tasks=2)
    meta, batch = case.meta(case.model(torch.float32).to(kernel_device()), "triton"), on_device(case)
    assert meta.plan(2, 5, 4).engine != "batched"
    with torch.autocast(kernel_device().type, dtype=torch.bfloat16):  # how kernels multiply is a matter of the graph
        rounded = with_gradients(meta, meta, batch, ["query_x"], reduction)
        found = with_gradients(compiled(meta), meta, batch, ["query_x"], reduction)
    assert_equal(found, rounded)
    found = with_gradients(compiled(meta), meta, batch, ["query_x"], reduction)
    assert_equal(found, with_gradients(meta, meta, batch, ["query_x"], reduction))
    assert not torch.equal(found[0], rounded[0])


def test_outputs_under_a_loss_of_ones_own() -> None:
    meta, batch = CASE.meta(CASE.model(torch.float64), "torch"), CASE.batch(torch.float64)

    def loss(query_x: Tensor) -> Tensor:
        outputs = meta.predict(batch["support_x"], batch["support_y"], query_x, support_weight=batch["support_weight"])
        found: Tensor = (outputs - batch["query_y"]).abs().sqrt().logsumexp((0, 1, 2))
        return found

    inputs = [*meta.parameters(), batch["query_x"]]
    found, expected = compiled(loss)(batch["query_x"]), loss(batch["query_x"])
    assert_equal([found], [expected])
    assert_equal(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))


@pytest.mark.compiles
def test_a_training_loop_through_the_compiler() -> None:
    """Backbone, module, loss and optimiser in graphs of Inductor, as `torch.compile` is by default."""
    torch.use_deterministic_algorithms(False)  # poisoned memory costs the compiler minutes
    case = replace(CASE, widths=(7, 5), adapt="head", weighted=False)
    losses: list[list[float]] = []
    for through in (lambda f: f, torch.compile):
        torch.manual_seed(0)
        backbone, meta = nn.Linear(3, 7, dtype=torch.float64), case.meta(case.model(torch.float64), "torch")
        batch = replace(case, widths=(3, 5)).batch(torch.float64)
        optimizer = torch.optim.SGD([*backbone.parameters(), *meta.parameters()], lr=0.1)

        def loss(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor, backbone: Any = backbone, meta: Any = meta) -> Tensor:
            value: Tensor = meta(backbone(sx).tanh(), sy, backbone(qx).tanh(), qy) * 2.0
            return value

        step = through(loss) if through is not torch.compile else torch.compile(loss, fullgraph=True)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            value = step(*(batch[name] for name in ("support_x", "support_y", "query_x", "query_y")))
            value.backward()
            optimizer.step()
            losses[-1].append(float(value.detach()))
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def breaks(step: Callable[[], Any]) -> int:
    """How often torch breaks the graph of a step."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.compile(step, backend="eager")()
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def test_a_whole_step_breaks_where_that_of_any_model_does() -> None:
    meta, batch = CASE.meta(CASE.model(torch.float64), "torch"), CASE.batch(torch.float64)
    expected = CASE.meta(CASE.model(torch.float64), "torch")

    def step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value

    plain = CASE.model(torch.float64)
    of_any = breaks(
        lambda: step(lambda: F.mse_loss(plain(batch["query_x"]), batch["query_y"]), torch.optim.SGD(plain.parameters()))
    )
    ours = torch.optim.SGD(meta.parameters())
    assert breaks(lambda: step(lambda: meta(**batch), ours)) == of_any
    step(lambda: expected(**batch), torch.optim.SGD(expected.parameters()))
    assert_equal(list(meta.parameters()), list(expected.parameters()))


def test_what_changes_between_calls_compiles_nothing_anew() -> None:
    case = replace(CASE, step_weights=(0.5, 0.5), learn_lr="layer")
    meta, batch = case.meta(case.model(torch.float64), "torch"), case.batch(torch.float64)
    step = compiled(meta)
    with_gradients(step, meta, batch, ["query_x"], "mean")
    with torch.compiler.set_stance("fail_on_recompile"):
        for last in (0.75, 1.0):
            meta.step_weights = (1.0 - last, last)
            with torch.no_grad():
                for p in meta.parameters():
                    p.mul_(1.1)
            found = with_gradients(step, meta, batch, ["query_x"], "mean")
            assert_equal(found, with_gradients(meta, meta, batch, ["query_x"], "mean"))


def test_step_weights_that_a_graph_sets_count_in_it() -> None:
    case = replace(CASE, step_weights=(0.5, 0.5))
    meta, batch = case.meta(case.model(torch.float64), "torch"), case.batch(torch.float64)

    @compiled
    def annealed() -> Any:
        meta.step_weights = (0.0, 1.0)
        return meta(**batch)

    found = annealed()
    assert meta.step_weights == (0.0, 1.0)
    assert torch.equal(found, meta(**batch))


def test_graphs_of_any_number_of_tasks_and_samples() -> None:
    step = None
    for tasks, shots, queries in ((4, 6, 7), (8, 9, 10), (6, 7, 11)):
        case = replace(CASE, tasks=tasks, shots=shots, queries=queries)
        batch = case.batch(torch.float64)
        if step is None:
            meta = case.meta(case.model(torch.float64), "torch")
            step = compiled(meta, dynamic=True)
            for reduction in ("mean", "none"):
                with_gradients(step, meta, batch, ["query_x"], reduction)
        with torch.compiler.set_stance("fail_on_recompile"):
            for reduction in ("mean", "none"):
                found = with_gradients(step, meta, batch, ["query_x"], reduction)
                assert_equal(found, with_gradients(meta, meta, batch, ["query_x"], reduction))


def test_copies_are_themselves_in_graphs() -> None:
    """Also where the module that they are of is no more."""
    meta, batch = CASE.meta(CASE.model(torch.float64), "torch"), CASE.batch(torch.float64)
    expected = meta(**batch)
    twins = [copy.deepcopy(meta), pickle.loads(pickle.dumps(meta)), copy.copy(meta)]
    del meta
    gc.collect()
    for twin in twins:
        torch._dynamo.reset()
        assert torch.equal(compiled(twin)(**batch), expected)


def test_a_graph_takes_parameters_from_wherever_they_come() -> None:
    meta, batch = CASE.meta(CASE.model(torch.float64), "torch"), CASE.batch(torch.float64)
    others = {name: p.detach() + 0.1 for name, p in meta.named_parameters()}

    def loss(scale: Tensor) -> Any:
        scaled = {name: scale * p for name, p in others.items()}
        return torch.func.functional_call(meta, scaled, kwargs=batch)

    found = []
    for function in (loss, compiled(loss)):
        scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        value = function(scale)
        found.append([value, *torch.autograd.grad(value, scale)])
    assert_equal(*found)
    assert found[0][1] != 0


def test_an_optimiser_in_the_graph_moves_what_the_next_call_reads() -> None:
    meta, batch = CASE.meta(CASE.model(torch.float64), "torch"), CASE.batch(torch.float64)

    @compiled
    def two_steps() -> Any:
        with torch.no_grad():
            first = meta(**batch)
            for p in meta.parameters():
                p.mul_(0.5)
            return torch.stack([first, meta(**batch)])

    first = meta(**batch)
    found = two_steps()
    assert_equal(found.unbind(), [first, meta(**batch)])
    assert found[0] != found[1]


@pytest.mark.parametrize("what", ["mean", "none", "predict"])
def test_a_second_derivative_is_an_error(what: str) -> None:
    meta, batch = CASE.meta(CASE.model(torch.float64), "torch"), CASE.batch(torch.float64)

    def loss() -> Any:
        if what == "predict":
            return meta.predict(batch["support_x"], batch["support_y"], batch["query_x"]).sum()
        return meta(**batch, reduction=what).sum()

    value = compiled(loss, "eager")()
    gradient, *_ = torch.autograd.grad(value, list(meta.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(gradient.square().sum(), list(meta.parameters()))


@pytest.mark.parametrize(
    ("case", "backend", "reason"),
    [
        (Case(), "reference", "backend 'reference'.* run outside of graphs"),
        (Case(outer_loss="callable", step_weights=(0.5, 0.5)), "torch", "an outer_loss that is a callable, with"),
        (Case(outer_loss="callable", query_counts=(1, 2, 3)), "torch", "an outer_loss that is a callable, with"),
    ],
    ids=str,
)
def test_what_no_graph_takes_says_so_and_runs_outside(case: Case, backend: str, reason: str) -> None:
    meta, batch = case.meta(case.model(torch.float64), backend), case.batch(torch.float64)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=reason):
        compiled(meta)(**batch)
    outside = torch.compile(meta, backend="eager")
    expected = with_gradients(meta, meta, batch, ["query_x"], "mean")
    assert_equal(with_gradients(outside, meta, batch, ["query_x"], "mean"), expected)
    with torch.no_grad():  # when nothing a callable closes over can ask for a gradient, it is an op as well
        if backend != "reference":
            assert torch.equal(compiled(meta)(**batch), meta(**batch))


def test_objects_are_made_outside_of_graphs() -> None:
    meta, batch = CASE.meta(CASE.model(torch.float64), "torch"), CASE.batch(torch.float64)

    def outputs() -> Tensor:
        adapted = meta.adapt(batch["support_x"], batch["support_y"], support_weight=batch["support_weight"])
        _, loss = meta.grad_and_value(**batch)
        return (
            loss * adapted(batch["query_x"]) + meta.losses(batch["support_x"], batch["support_y"]).support[:, :1, None]
        )

    with pytest.raises(
        torch._dynamo.exc.Unsupported,
        match=r"adapt\(\), what it returns, losses\(\) and grad_and_value\(\) run outside",
    ):
        compiled(outputs)()
    assert torch.equal(torch.compile(outputs, backend="eager")(), outputs())


def test_bad_batches_are_the_same_errors_in_a_graph() -> None:
    case = replace(CASE, loss="cross_entropy")
    meta, batch = case.meta(case.model(torch.float64), "torch"), case.batch(torch.float64)
    for change, message in (
        ({"support_y": batch["support_y"] + 5}, "support_y holds classes . to 9; the network has 5 outputs"),
        ({"query_x": batch["query_x"][..., :2]}, "query_x has 2 features; the network takes 3"),
        ({"query_x": batch["query_x"][0, 0]}, r"query_x has shape \[3\]; it takes"),
        ({"support_counts": [1, 2, 6]}, "support_counts holds 6; it takes 1 to 5"),
    ):
        with pytest.raises(ValueError, match=message):
            compiled(meta)(**(batch | change))
    with pytest.raises(TypeError, match="query_y is NoneType; outer 'fomaml' takes query sets"):
        compiled(meta)(batch["support_x"], batch["support_y"], batch["query_x"])
    with pytest.raises(ValueError, match=r"query_x has shape \[3\]; it takes"):
        compiled(meta.predict)(batch["support_x"], batch["support_y"], batch["query_x"][0, 0])


def test_a_model_changed_behind_the_back_of_a_graph_is_an_error() -> None:
    meta, batch = CASE.meta(CASE.model(torch.float64), "torch"), CASE.batch(torch.float64)
    step = compiled(meta)
    step(**batch)
    meta.model[2] = nn.Linear(17, 5).double()  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="make a new FOMAML"):
        step(**batch)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_graph_without_gradients(mode: Any) -> None:
    case = replace(CASE, loss="callable", outer_loss="callable")
    meta, batch = case.meta(case.model(torch.float64), "torch"), case.batch(torch.float64)
    expected = meta(**batch)
    with mode():
        found = compiled(meta)(**batch)
    assert not found.requires_grad
    assert relative_error(found, expected) < 1e-12


def arguments(case: Case, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[ff.FOMAML, list[Any]]:
    """What an op takes first."""
    meta = case.meta(case.model(dtype), "torch", **options)
    batch = case.batch(dtype)
    values = graph.Values.of(meta, Given(*(batch.get(name) for name in Given._fields)))  # type: ignore[arg-type]
    parameters = [p.detach().requires_grad_() for p in values.parameters]
    return meta, [meta.graph_number, "torch", None, False, parameters, *values[1:]]


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        Case(learn_lr="layer_step", step_weights=(0.3, 0.7), nonfinite="skip"),
        Case(outer="reptile", support_counts=(2, 5, 4)),
    ],
    ids=str,
)
def test_the_ops_are_what_they_are_registered_as(case: Case) -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares what torch.empty gives
    ops = torch.ops.fomaml_fused
    meta, first = arguments(case)  # the module lives as long as its number is to be known
    values = graph.Values(*first[4:])
    torch.library.opcheck(ops.meta_loss.default, (*first, "mean", values.needed()))
    torch.library.opcheck(ops.task_values.default, (*first, "losses", [case.tasks]))
    cotangent = torch.rand(case.tasks, dtype=torch.float64)
    plain = [[t.detach() for t in a] if isinstance(a, list) else a.detach() if torch.is_tensor(a) else a for a in first]
    torch.library.opcheck(ops.task_values_backward.default, (*plain, "losses", cotangent, values.needed()))
    if case.outer != "reptile":
        shape = [case.tasks, case.queries, case.widths[-1]]
        torch.library.opcheck(ops.task_values.default, (*first, "outputs", shape))
    assert len(meta.model) == 4  # type: ignore[arg-type]


def test_parameters_of_a_callable_outer_loss_get_their_gradient_through_a_graph() -> None:
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return log_cosh(scale * outputs, targets)

    meta = ff.FOMAML(CASE.model(torch.float64), outer_loss=loss)
    batch = CASE.batch(torch.float64)
    found, expected = (torch.autograd.grad(f(**batch), scale)[0] for f in (compiled(meta), meta))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("loss", ["mse", "callable"])
@pytest.mark.compiles
def test_a_compiled_step_runs_in_a_graph_too(loss: str) -> None:
    torch.use_deterministic_algorithms(False)
    case = Case(widths=(3, 2), steps=1, loss=loss, outer_loss="mse")
    batch = case.batch(torch.float64)
    metas = [case.meta(case.model(torch.float64), "torch", compile=compile) for compile in (False, True)]
    plain, own = (with_gradients(meta, meta, batch, ["query_x"], "mean") for meta in metas)
    for found in (own, with_gradients(compiled(metas[1]), metas[1], batch, ["query_x"], "mean")):
        for a, b in zip(found, plain, strict=True):
            assert relative_error(a, b) < 1e-12
