"""Random problems: a model, a batch of tasks and the options of the inner loop, drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fomaml_fused as ff
from fomaml_fused.engines import fold_step
from fomaml_fused.network import read_network

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "elu": lambda: nn.ELU(0.7),
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": lambda: nn.Softplus(2.0),
    "sine": lambda: ff.Sine(3.0),
}


def log_cosh(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss no table holds."""
    return (outputs - targets).cosh().log().sum(-1)


LOSSES: dict[str, Any] = {
    "mse": "mse",
    "l1": "l1",
    "huber": ff.Loss("huber", delta=0.3),
    "cross_entropy": "cross_entropy",
    "smooth_cross_entropy": ff.Loss("cross_entropy", label_smoothing=0.2),
    "bce_with_logits": "bce_with_logits",
    "callable": log_cosh,
}


# Those that a model and its meta-step share by name with a `Case`.
OPTIONS = (
    *("optimizer", "momentum", "nesterov", "weight_decay", "decoupled_weight_decay", "max_grad_norm", "max_grad_value"),
    *("learn_lr", "positive_lr", "adapt", "outer", "step_weights", "nonfinite"),
)
OUTER_OPTIONS = ("outer_loss", "outer", "step_weights", "nonfinite", "learn_lr", "positive_lr")
COUNTS = ("support_counts", "query_counts", "step_counts")


def _norm(norm: nn.LayerNorm | nn.BatchNorm1d) -> nn.Module:
    """Scales and shifts that are not the usual 1 and 0."""
    with torch.no_grad():
        for p in norm.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=torch.float64))
    return norm


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": lambda width: _norm(nn.LayerNorm(width, dtype=torch.float64)),
    "layer without shift": lambda width: _norm(nn.LayerNorm(width, bias=False, dtype=torch.float64)),
    "batch": lambda width: _norm(nn.BatchNorm1d(width, track_running_stats=False, dtype=torch.float64)),
    "plain batch": lambda width: nn.BatchNorm1d(width, affine=False, track_running_stats=False, dtype=torch.float64),
}


@dataclass(frozen=True)
class Case:
    """A meta-learning problem that can be built in any dtype, the same numbers each time."""

    widths: tuple[int, ...] = (3, 17, 5)
    activation: str = "tanh"
    last_activation: str = "identity"
    bias: bool = True
    loss: str = "mse"
    outer_loss: str | None = None
    tasks: int = 3
    shots: int = 5
    queries: int = 4
    steps: int = 2
    lr: Any = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    max_grad_norm: float | None = None
    max_grad_value: float | None = None
    learn_lr: str | None = None
    positive_lr: str | None = None
    adapt: Any = "all"
    outer: str = "fomaml"
    step_weights: tuple[float, ...] | None = None
    nonfinite: str = "propagate"
    weighted: bool = False
    each_step: bool = False
    norm: str | None = None
    support_counts: tuple[int, ...] | None = None
    query_counts: tuple[int, ...] | None = None
    step_counts: tuple[int, ...] | None = None
    reduction: str = "mean"
    seed: int = 0
    forms: tuple[str, ...] | None = field(default=None, compare=False)
    jitter: int = 0
    rounding: float | None = field(default=None, compare=False)

    def __str__(self) -> str:
        name = f"{'x'.join(map(str, self.widths))}-{self.activation}-{self.loss}"
        name += f"-T{self.tasks}S{self.shots}Q{self.queries}K{self.steps}"
        plain = Case()
        others = ("last_activation", "bias", "outer_loss", "weighted", "each_step", "norm", "lr")
        for option in (*OPTIONS, *COUNTS, *others):
            if getattr(self, option) != getattr(plain, option):
                name += f"-{option}={getattr(self, option)}"
        return name

    def model(self, dtype: torch.dtype) -> nn.Sequential:
        torch.manual_seed(self.seed)
        depth = len(self.widths) - 1
        names = [self.activation] * (depth - 1) + [self.last_activation]
        layers: list[nn.Module] = []
        for before, after, name in zip(self.widths[:-1], self.widths[1:], names, strict=True):
            layers.append(nn.Linear(before, after, bias=self.bias, dtype=torch.float64))
            if self.norm is not None and len(layers) < 3 * depth - 2:
                layers.append(NORMS[self.norm](after))
            layers.append(ACTIVATIONS[name]())
        model = nn.Sequential(*layers).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                self._jitter(parameter)
        return model

    def batch(self, dtype: torch.dtype) -> dict[str, Any]:
        """The tensors of a call, as keywords; query features ask for a gradient."""
        generator = torch.Generator().manual_seed(self.seed + 1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def targets(loss: str, *samples: int) -> Tensor:
            shape = (self.tasks, *samples)
            if "cross_entropy" in loss:
                return torch.randint(self.widths[-1], shape, generator=generator)
            values = normal(*shape, self.widths[-1])
            return (values.sigmoid() if loss == "bce_with_logits" else values).to(dtype)

        support = (self.steps, self.shots) if self.each_step else (self.shots,)
        batch: dict[str, Any] = {
            "support_x": normal(self.tasks, *support, self.widths[0]).to(dtype),
            "support_y": targets(self.loss, *support),
            "query_x": normal(self.tasks, self.queries, self.widths[0]).to(dtype),
            "query_y": targets(self.outer_loss or self.loss, self.queries),
        }
        self._jitter(batch["support_x"])
        self._jitter(batch["query_x"]).requires_grad_()
        batch |= {name: counts for name in COUNTS if (counts := getattr(self, name)) is not None}
        if self.weighted:
            for name, shape in (("support", (self.tasks, *support)), ("query", (self.tasks, self.queries))):
                weight = torch.rand(shape, generator=generator, dtype=torch.float64)
                weight[..., 1:] *= (
                    torch.rand(shape, generator=generator, dtype=torch.float64)[..., 1:] > 0.3
                )  # a mask too
                batch[f"{name}_weight"] = weight.to(dtype)
            batch["task_weight"] = torch.rand(self.tasks, generator=generator, dtype=torch.float64).to(dtype)
        if self.outer == "reptile":
            batch = {name: value for name, value in batch.items() if not name.startswith("query")}
        return batch

    def meta(self, model: nn.Module, backend: str, **options: Any) -> ff.FOMAML:
        """The module around one of the case's models; rates that are learned start apart from each other."""
        meta = ff.FOMAML(model, **self.options(), backend=backend, **options)
        with torch.no_grad():
            for i, rates in enumerate(meta.inner_lr.parameters() if self.learn_lr is not None else ()):
                noise = torch.rand(rates.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
                rates.add_(0.05 * noise.to(rates.dtype))
                self._jitter(rates)
        return meta

    def _jitter(self, values: Tensor) -> Tensor:
        """Move values by at most one rounding error, of their dtype or a coarser one, another way for each `jitter`."""
        if self.jitter:
            generator = torch.Generator().manual_seed(self.jitter)
            noise = torch.rand(values.shape, generator=generator, dtype=torch.float64) * 2 - 1
            rounding = self.rounding or torch.finfo(values.dtype).eps
            values.mul_((1 + noise * rounding).to(values.dtype))
        return values

    def inner_options(self) -> dict[str, Any]:
        """The keywords of the oracle's inner loop."""
        return {name: v for name, v in self.options().items() if name not in OUTER_OPTIONS}

    def oracle_options(self) -> dict[str, Any]:
        """The keywords of the oracle's meta-loss; rates that are learned it takes as tensors."""
        return {name: v for name, v in self.options().items() if name not in ("learn_lr", "positive_lr")}

    def options(self) -> dict[str, Any]:
        names = ("lr", "steps", *OPTIONS)
        outer = None if self.outer_loss is None else LOSSES[self.outer_loss]
        return {name: getattr(self, name) for name in names} | {"loss": LOSSES[self.loss], "outer_loss": outer}


def flat(model: nn.Module) -> list[Tensor | None]:
    """A model's parameters as engines list them."""
    return [p for block in read_network(model)[1] for p in block.listed()]


@dataclass(frozen=True)
class Solution:
    """The loss of each task, and every gradient by name: of the reduced loss, and of the losses under cotangents."""

    values: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        loss: Callable[..., Tensor],
        case: Case,
        model: nn.Module,  # whose parameters the gradients are of
        dtype: torch.dtype,
        per_task: bool = True,
    ) -> Solution:
        """loss: takes the keywords of a call, on the model's device, and gives the meta-loss of `model`.

        per_task: solve for the losses of the tasks too, and for their gradients under cotangents.
        """
        device = next(model.parameters()).device
        batch = {n: t.detach().to(device) if isinstance(t, Tensor) else t for n, t in case.batch(dtype).items()}
        inputs: dict[str, Tensor] = dict(model.named_parameters())
        if "query_x" in batch:
            inputs["query_x"] = batch["query_x"].requires_grad_()

        def gradients(value: Tensor, cotangent: Tensor | None, label: str) -> dict[str, Tensor]:
            found = torch.autograd.grad(value, list(inputs.values()), cotangent)
            return {f"{label} d/d {name}": g for name, g in zip(inputs, found, strict=True)}

        reduced = loss(**batch, reduction=case.reduction if case.reduction != "none" else "mean")
        values = {"reduced": reduced.detach()} | gradients(reduced, None, "reduced")
        if not per_task:
            return cls(values)
        losses = loss(**batch, reduction="none")
        cotangent = torch.randn(case.tasks, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        cotangent = cotangent.to(device, dtype)
        return cls(values | {"per task": losses.detach()} | gradients(losses, cotangent, "per task"))

    def vectors(self) -> dict[str, Tensor]:
        """The values, the gradients with respect to all parameters as one vector each."""
        gathered: dict[str, list[Tensor]] = {}
        for name, value in self.values.items():
            label, is_gradient, of = name.partition(" d/d ")
            key = f"{label} d/d parameters" if is_gradient and of != "query_x" else name
            gathered.setdefault(key, []).append(value.flatten())
        return {name: torch.cat(parts) for name, parts in gathered.items()}


def by_oracle(case: Case, dtype: torch.dtype) -> Solution:
    meta = case.meta(case.model(dtype), "reference")
    return Solution.of(meta, case, meta, dtype)


def assert_close(actual: Solution, expected: Solution, tolerance: float) -> None:
    """Every value within `tolerance` of the expected one, relative to the norm of that value."""
    for name, value in expected.values.items():
        error = relative_error(actual.values[name], value)
        assert error <= tolerance, f"{name}: relative error {error:.2e}, taken are {tolerance:.0e}"


def yardsticks(case: Case, dtype: torch.dtype) -> list[Solution]:
    """Torch's own solutions in `dtype`, of the problem and of others that a rounding of its inputs cannot tell from it.

    One solution alone may be right by luck where a problem is ill-conditioned; the worst of a few is torch's error.
    """
    return [by_oracle(replace(case, jitter=jitter), dtype) for jitter in range(4)]


ALLOWANCE = 1e-6  # relative error of an engine, beside twice torch's own


def assert_no_worse_than_twice(
    actual: Solution, own: Sequence[Solution], expected: Solution, allowance: float = ALLOWANCE
) -> None:
    """Every error at most twice torch's own in the same dtype, plus an allowance.

    The gradient of all parameters counts as the one vector it is: a scalar in it, left over where large terms cancel,
    says nothing about either side. That each tensor of it is right, double precision shows.
    """
    for name, found in actual.vectors().items():
        value = expected.vectors()[name]
        error = relative_error(found, value)
        own_error = max(relative_error(solution.vectors()[name], value) for solution in own)
        assert error <= 2.0 * own_error + allowance, (
            f"{name}: relative error {error:.2e}, torch's own is {own_error:.2e}"
        )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of the expected; nan, which no bound admits, where one is nan."""
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    difference = (actual - expected).norm()
    return float(difference / expected.norm().clamp_min(1e-30)) if difference else 0.0


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Random problems with odd sizes, up to four layers."""
    size = st.sampled_from([1, 2, 3, 5, 17])
    depth = draw(st.integers(1, 4))
    loss = draw(st.sampled_from(sorted(LOSSES)))
    steps = draw(st.integers(0, 3))
    rate = st.floats(0.0, 0.2).map(lambda r: round(r, 3))
    case = Case(
        widths=tuple(draw(st.lists(size, min_size=depth + 1, max_size=depth + 1))),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        last_activation=draw(st.sampled_from(["identity", "identity", "tanh", "softplus"])),
        bias=draw(st.booleans()),
        loss=loss,
        outer_loss=draw(st.one_of(st.none(), st.sampled_from(sorted(LOSSES)))),
        tasks=draw(st.integers(1, 4)),
        shots=draw(size),
        queries=draw(size),
        steps=steps,
        lr=draw(
            st.one_of(
                rate,
                st.lists(rate, min_size=depth, max_size=depth),
                st.lists(st.lists(rate, min_size=depth, max_size=depth), min_size=steps, max_size=steps)
                if steps
                else rate,
            )
        ),
        momentum=draw(st.sampled_from([0.0, 0.0, 0.9])),
        weight_decay=draw(st.sampled_from([0.0, 0.0, 0.1])),
        adapt=draw(st.one_of(st.sampled_from(["all", "head", "body"]), st.sets(st.integers(0, depth - 1)).map(sorted))),
        weighted=draw(st.booleans()),
        reduction=draw(st.sampled_from(["mean", "sum"])),
        seed=draw(st.integers(0, 2**20)),
    )
    possible = ["primal", "dual", *(f"dual:{k}" for k in range(1, steps + 1))]
    return replace(case, forms=tuple(draw(st.sampled_from(possible)) for _ in range(depth)))


def forms_within(forms: Sequence[str], steps: int) -> tuple[str, ...]:
    """Forms as they are, but dual where a layer would fold past the last step."""
    return tuple("dual" if (fold_step(form) or 0) > steps else form for form in forms)


def by_engine(
    case: Case,
    dtype: torch.dtype,
    forms: Sequence[str] | None = None,
    chunk: int | None = None,
    rows: int | None = None,
) -> Solution:
    """The batched engine, with the planner's choices or the given ones."""
    meta = case.meta(case.model(dtype), "torch")
    with ff.override(forms=forms, chunk=chunk, rows=rows):
        return Solution.of(meta, case, meta, dtype)
