"""Calls inside of a graph that `torch.compile` makes: each is one op, in which all runs as it does eagerly.

So Dynamo traces neither checks nor planner nor engines, and inside of a graph every rule and kernel is what it is
outside. An op takes tensors, the parameters among them, what may change from call to call, and the number of the module
whose problem it is. Of a loss that is reduced the outer gradient is taken on the way forward, as it is eagerly; the
backward of what is not reduced adapts the tasks again.

Imported where a graph is made: ops that Dynamo does not look into take torch's compiler, seconds to import.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .autograd import NO_SECOND_DERIVATIVE, once_differentiable
from .batch import Query, check_parameters, compute_dtype
from .calls import Call, Given, callable_may_ask, reduced
from .engines import FlatParameters, Gradients
from .inner import PARTS
from .numbered import module_of
from .parts import losses_of_outputs
from .problem import Problem


class Module(Protocol):
    """What a graph reads of `FOMAML`; of these, an op reads its problem alone, which never changes."""

    problem: Problem
    backend: str
    compiled: bool
    graph_number: int
    step_weight_values: Tensor | None

    def graph_precision(self, device: torch.device) -> str | None:
        """One of `PRECISIONS`; None for what torch is set to when the op runs."""

    def listed(self) -> FlatParameters:
        """The parameters and learned rates, as engines list them."""

    def check_layers(self) -> None:
        """Raises where the model is not made of what it was made of."""


def obstacle(module: Module, given: Given) -> str | None:
    """Why a call cannot be one op, by its name in `OUTSIDE`; None where it can."""
    if module.backend == "reference":
        return "reference"
    if callable_may_ask(module.problem, given.query_y is not None):
        # The graph has to see such a loss.
        counts = given.support_counts, given.query_counts, given.step_counts
        if module.problem.multi_step or any(c is not None for c in counts):
            return "callable"
    return None


def loss(module: Module, given: Given, reduction: str) -> tuple[Tensor, Tensor | None]:
    """The loss, and where diverged tasks are skipped, their weight."""
    problem, values = module.problem, Values.of(module, given)
    skips = problem.nonfinite == "skip" and reduction != "none"
    if callable_may_ask(problem, given.query_y is not None):
        assert given.query_x is not None
        assert given.query_y is not None
        # In the engine of torch ops alone a task without a cotangent is left out, whatever it holds.
        outputs = _outputs(module, values, "torch" if skips else module.backend)
        dtype = compute_dtype(given.query_x.dtype)
        weight = None if given.query_weight is None else given.query_weight.to(dtype)
        query = Query(given.query_x, given.query_y, weight)
        losses = losses_of_outputs(problem, query, outputs.to(dtype), skips)
        return reduced(problem, losses, given.task_weight, reduction, given.support_x.dtype)
    how = _how(module, module.backend, given.support_x)
    if reduction == "none":
        value: Tensor = torch.ops.fomaml_fused.task_values(*how, *values, "losses", given.support_x.shape[:1])
        return value, None
    value, skipped, _ = torch.ops.fomaml_fused.meta_loss(*how, *values, reduction, values.needed())
    return value, skipped if skips else None


def predict(module: Module, given: Given) -> Tensor:
    """Outputs [T, Q, out] of the adapted networks."""
    return _outputs(module, Values.of(module, given), module.backend)


def _outputs(module: Module, values: Values, backend: str) -> Tensor:
    assert values.query_x is not None
    shape = (*values.query_x.shape[:2], module.problem.network.out_features)
    how = _how(module, backend, values.support_x)
    outputs: Tensor = torch.ops.fomaml_fused.task_values(*how, *values, "outputs", shape)
    return outputs


def _how(module: Module, backend: str, x: Tensor) -> tuple[int, str, str | None, bool]:
    # What compiles in an op finds functorch, by which it takes the gradient of a callable, switched off.
    compiled = module.compiled and module.problem.loss.name != "callable"
    # Autocast is a matter of the graph: when it runs there is none.
    return module.graph_number, backend, module.graph_precision(x.device), compiled


class Values(NamedTuple):
    """The tensors of an op, in the order of its schema: parameters without gaps, then as `Given`."""

    parameters: list[Tensor]
    support_x: Tensor
    support_y: Tensor
    query_x: Tensor | None
    query_y: Tensor | None
    support_weight: Tensor | None
    query_weight: Tensor | None
    task_weight: Tensor | None
    support_counts: Tensor | None
    query_counts: Tensor | None
    step_counts: Tensor | None
    step_weights: Tensor | None

    @classmethod
    def of(cls, module: Module, given: Given) -> Values:
        """Of a call."""
        counts = given.support_counts, given.query_counts, given.step_counts
        read = [c if c is None or isinstance(c, Tensor) else torch.tensor(list(c)) for c in counts]
        parameters = [p for p in module.listed() if p is not None]
        support_counts, query_counts, step_counts = read
        return cls(parameters, *given[:7], support_counts, query_counts, step_counts, module.step_weight_values)

    @property
    def given(self) -> Given:
        """As an eager call takes them."""
        return Given(*self[1:11])

    def asking(self) -> list[Tensor | None]:
        """Those that may ask for a gradient: parameters, query features, query targets, query and task weights."""
        return [*self.parameters, self.query_x, self.query_y, self.query_weight, self.task_weight]

    def needed(self) -> list[bool]:
        """Which of these do."""
        return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in self.asking()]


@contextmanager
def _eagerly(gradients: bool) -> Iterator[None]:
    """A call of its own: torch runs an op without autograd, which losses may need, and maybe in inference mode."""
    with torch.inference_mode(mode=False), torch.set_grad_enabled(gradients):
        yield


def _call(arguments: Sequence[Any], needed: Sequence[bool] | None = None) -> tuple[Call, Values]:
    """What an op computes with, and its tensors: apart from the graph, and asking for the gradients that are needed."""
    number, backend, precision, compiled = arguments[:4]
    values = Values(*arguments[4:16])
    asking = values.asking()
    asked = [False] * len(asking) if needed is None else needed
    *own, x, y, weight, task_weight = [None if t is None else _leaf(t, a) for t, a in zip(asking, asked, strict=True)]
    parameters = [p for p in own if p is not None]
    values = values._replace(parameters=parameters, query_x=x, query_y=y, query_weight=weight, task_weight=task_weight)
    module = module_of(number)
    module.check_layers()
    problem: Problem = module.problem
    listed = iter(parameters)
    flat = [next(listed) if there else None for there in _listed(problem)]
    check_parameters(flat[: len(PARTS) * problem.network.depth])
    step_weights = None if values.step_weights is None else tuple(values.step_weights.tolist())
    precision = torch.get_float32_matmul_precision() if precision is None else precision
    return Call(problem, flat, backend, precision, step_weights, compiled), values


def _leaf(value: Tensor, need: bool) -> Tensor:
    value = value.detach()
    return (value.clone() if value.is_inference() else value).requires_grad_(need)


def _listed(problem: Problem) -> list[bool]:
    """Which of the tensors that engines list there are."""
    found = [part in layer.parts for layer in problem.network.layers for part in PARTS]
    match problem.inner.learn_lr:
        case None:
            return found
        case "element":
            return found + [part in parts for parts in problem.inner.adapt for part in PARTS]
    return [*found, True]


def _meta_loss(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A reduced loss, the weight of the tasks that were skipped, and the gradients that are needed.

    Gradients of 16-bit tensors are in float32, for cotangents have yet to scale them.
    """
    *_, reduction, needed = arguments
    with _eagerly(any(needed)):
        call, values = _call(arguments, needed)
        batch = call.check(values.given)
        dtype = compute_dtype(values.support_x.dtype)
        # Where more asks for a gradient, a loss of outputs in 16 bits has it, eagerly as well.
        wide_dtype = values.support_x.dtype if any(needed[-3:]) else dtype
        flat = [None if p is None else p.to(wide_dtype) for p in call.flat]
        query = None if batch.query is None else replace(batch.query, x=batch.query.x.to(wide_dtype))
        value, skipped = replace(call, flat=flat).loss(batch._replace(query=query), reduction)
        wide = [*(p for p in flat if p is not None), *(values.asking()[-4:])]
        wide[-4] = None if query is None else query.x
        gradients = _gradients(value, wide, needed, None)
        value = value.detach().to(values.support_x.dtype)
        counted = value.new_zeros((), dtype=dtype) if skipped is None else skipped.detach().to(dtype)
        return value, counted, [g.to(dtype) for g in gradients]


def _task_values(*arguments: Any) -> Tensor:
    """The losses of the tasks [T], or the outputs of the adapted networks [T, Q, out]."""
    *_, what, _ = arguments
    with _eagerly(False):
        return _evaluated(*_call(arguments), what).contiguous()


def _task_values_backward(*arguments: Any) -> list[Tensor]:
    """The gradients that are needed."""
    *_, what, cotangent, needed = arguments
    with _eagerly(True):
        call, values = _call(arguments, needed)
        return _gradients(_evaluated(call, values, what), values.asking(), needed, cotangent)


def _evaluated(call: Call, values: Values, what: str) -> Tensor:
    if what == "losses":
        return call.loss(call.check(values.given), "none")[0]
    if values.query_y is not None:
        call.check(values.given)
    return call.predict(values.given)


def _gradients(
    value: Tensor, of: Sequence[Tensor | None], needed: Sequence[bool], cotangent: Tensor | None
) -> list[Tensor]:
    wanted = [t for t, need in zip(of, needed, strict=True) if t is not None and need]
    if not wanted:
        return []
    found = torch.autograd.grad(value, wanted, cotangent, allow_unused=True, materialize_grads=True)
    return [g.contiguous() for g in found]


def _needed_of(arguments: Sequence[Any], needed: Sequence[bool]) -> list[Tensor]:
    return [t for t, need in zip(Values(*arguments[4:16]).asking(), needed, strict=True) if t is not None and need]


def _meta_loss_fake(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, needed = arguments[5], arguments[-1]
    dtype = compute_dtype(x.dtype)
    gradients = [t.new_empty(t.shape, dtype=dtype) for t in _needed_of(arguments, needed)]
    return x.new_empty(()), x.new_empty((), dtype=dtype), gradients


def _task_values_fake(*arguments: Any) -> Tensor:
    found: Tensor = arguments[5].new_empty(arguments[-1])
    return found


def _task_values_backward_fake(*arguments: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in _needed_of(arguments, arguments[-1])]


def _keep_gradients(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    _, skipped, gradients = output
    asking = Values(*inputs[4:16]).asking()
    ctx.needed, ctx.dtypes, ctx.count = inputs[-1], [None if t is None else t.dtype for t in asking], len(gradients)
    ctx.mark_non_differentiable(skipped, *gradients)
    ctx.save_for_backward(*gradients, *asking)


def _scale_gradients(ctx: Any, cotangent: Tensor, *_: Any) -> tuple[Any, ...]:
    saved, sources = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    gradients = iter(saved)
    with torch.no_grad():
        found = [
            (g := next(gradients)).mul(cotangent.to(g.dtype)).to(dtype) if need else None
            for need, dtype in zip(ctx.needed, ctx.dtypes, strict=True)
        ]
    return _as_inputs(once_differentiable(found, (cotangent, *sources)))


def _keep_inputs(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    parameters, *rest = inputs[4:16]
    ctx.how, ctx.what, ctx.count = inputs[:4], inputs[-2], len(parameters)
    ctx.save_for_backward(*parameters, *rest)


def _adapt_again(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    values = Values(list(saved[: ctx.count]), *saved[ctx.count :])
    asked = Values(*ctx.needs_input_grad[4:16])
    # What outputs are compared with is not in them.
    targets = [asked.query_y, asked.query_weight, asked.task_weight] if ctx.what == "losses" else [False] * 3
    needed = [*asked.parameters, asked.query_x, *targets]
    found = iter(torch.ops.fomaml_fused.task_values_backward(*ctx.how, *values, ctx.what, cotangent, needed))
    return _as_inputs([next(found) if need else None for need in needed])


def _as_inputs(found: Gradients) -> tuple[Any, ...]:
    """Gradients of what may ask for them, as those of an op's inputs."""
    *parameters, x, y, weight, task_weight = found
    return (None,) * 4 + (parameters, None, None, x, y, None, weight, task_weight) + (None,) * 6


def _no_more(ctx: Any, *_: Any) -> tuple[Any, ...]:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


_ARGUMENTS = (
    "int module, str backend, str? precision, bool compiled, Tensor[] parameters, Tensor support_x, Tensor support_y, "
    "Tensor? query_x, Tensor? query_y, Tensor? support_weight, Tensor? query_weight, Tensor? task_weight, "
    "Tensor? support_counts, Tensor? query_counts, Tensor? step_counts, Tensor? step_weights, "
)


def _register(name: str, schema: str, function: Any, fake: Any, backward: Any, setup: Any = None) -> None:
    name = f"fomaml_fused::{name}"
    torch.library.define(name, f"({_ARGUMENTS}{schema}")
    torch.library.impl(
        name, "default", torch.compiler.disable(function)
    )  # what runs beside a graph, Dynamo would trace
    torch.library.register_fake(name, fake)
    torch.library.register_autograd(name, backward, setup_context=setup)


_register(
    "meta_loss",
    "str reduction, bool[] needed) -> (Tensor, Tensor, Tensor[])",
    _meta_loss,
    _meta_loss_fake,
    _scale_gradients,
    _keep_gradients,
)
_register(
    "task_values", "str what, SymInt[] shape) -> Tensor", _task_values, _task_values_fake, _adapt_again, _keep_inputs
)
_register(
    "task_values_backward",
    "str what, Tensor cotangent, bool[] needed) -> Tensor[]",
    _task_values_backward,
    _task_values_backward_fake,
    _no_more,
)
