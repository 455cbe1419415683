"""The boundary between autograd and the engines: two functions with closed-form first-order gradients.

`meta_loss` knows each task's share of the loss, so it takes the outer gradient on the way, chunk by chunk, and keeps
nothing per task. `predict` does not: whatever loss comes behind it, its backward runs the query pass in reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import Query, Support, compute_dtype
from .engines import FlatParameters, Gradients, Outcome, batched
from .engines import compiled as compiled_engine
from .plans import Plan

NO_SECOND_DERIVATIVE = (
    "the first-order meta-gradient has no second derivative; "
    "fomaml_fused.reference.meta_loss(..., first_order=False) gives losses that can be differentiated twice"
)


def meta_loss(
    plan: Plan,
    support: Support,
    query: Query | None,
    share: float | Tensor,
    parameters: FlatParameters,
    *,
    compiled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The sum over tasks of the adapted networks' losses times their shares, differentiable to first order.

    Args:
        query: None where the outer rule asks for none.
        share: the cotangent of each task's loss, a number or [T].
        compiled: run each chunk of tasks through `torch.compile`; it compiles once for every plan.

    Returns:
        The sum; and where diverged tasks are skipped, the shares of the others, summed.
    """
    job = _Job(plan, support, query, share, parameters, compiled, torch.is_grad_enabled())
    present = [p for p in parameters if p is not None]
    found: tuple[Tensor, Tensor | None] = _MetaLoss.apply(job, None if query is None else query.x, *present)
    return found


def meta_step(
    plan: Plan,
    support: Support,
    query: Query | None,
    share: float | Tensor,
    parameters: FlatParameters,
    needed: tuple[bool, ...],
    *,
    compiled: bool = False,
) -> Outcome:
    """What `meta_loss` is made of, without autograd: the loss of all tasks, chunk by chunk, and its gradients.

    Args:
        needed: which gradients are asked for: of the query features, then of each parameter.
    """
    compiled = compiled and plan.engine == "batched"  # kernels are compiled already
    step = partial(compiled_engine.step if compiled else _engine(plan).step, plan, needed)
    if plan.engine in ("batched", "native") and support.x.device.type == "cpu":
        batched.keep_freed_memory()
    # Dynamo asks for the gradients of what it is given, which those computed from others have not.
    parameters = [p if p is None or p.is_leaf else p.detach() for p in parameters]
    if compiled and query is not None:
        query = compiled_engine.annealed(query)
    with without_autocast(support.x):
        if plan.chunk == plan.sizes.tasks:
            found = step(parameters, support, query, share)
        else:
            found = _chunk_by_chunk(step, plan, support, query, share, parameters)
    return found._replace(gradients=_zeros_for_none(found.gradients, parameters, needed[1:]))


def _chunk_by_chunk(
    step: Callable[..., Outcome],
    plan: Plan,
    support: Support,
    query: Query | None,
    share: float | Tensor,
    parameters: FlatParameters,
) -> Outcome:
    values, features, counts = [], [], []
    outer: Gradients = [None] * len(parameters)
    for tasks in slices(plan):
        part = share if isinstance(share, float) else share[tasks]
        queries = None if query is None else query.tasks(tasks)
        value, dx, gradients, kept = step(parameters, support.tasks(tasks), queries, part)
        values.append(value)
        _add(outer, gradients)
        features += [] if dx is None else [dx]
        counts += [] if kept is None else [kept]
    value = _total(values) if values else support.x.new_zeros((), dtype=compute_dtype(support.x.dtype))
    return Outcome(value, _joined(features) if features else None, outer, _total(counts) if counts else None)


def predict(tasks: AdaptedTasks, query_x: Tensor, parameters: FlatParameters) -> Tensor:
    """Outputs of the adapted networks [T, Q, out], differentiable to first order."""
    return _Predict.apply(tasks, query_x, tasks.support.x, tasks.support.y, tasks.support.weight, *parameters)


def predict_steps(
    plan: Plan, support: Support, query_x: Tensor, steps: Sequence[int], parameters: FlatParameters
) -> Tensor:
    """Outputs after each of some inner steps, [steps, T, Q, out], differentiable to first order; a batched plan's."""
    return _PredictSteps.apply(plan, support, tuple(steps), query_x, support.x, support.y, support.weight, *parameters)


def half_squared_distances(plan: Plan, support: Support, parameters: FlatParameters) -> Tensor:
    """Half the squared distance that each task moves, [T], with Reptile's gradient; a batched plan's."""
    return _Distances.apply(AdaptedTasks(plan, support, parameters, keep=plan.keeps_state), *parameters)


class AdaptedTasks:
    """A batch of adapted tasks, chunk by chunk: kept, or adapted anew every time one is asked for.

    Args:
        parameters: what the tasks are adapted from; read again whenever they are adapted.
        keep: hold every task's adapted layers.
    """

    def __init__(self, plan: Plan, support: Support, parameters: FlatParameters, *, keep: bool) -> None:
        self.plan, self.support, self.parameters = plan, support, tuple(parameters)
        self.slices = list(slices(plan))
        self.kept: list[Any] | None = None
        if keep:
            self.kept = [self._adapt(tasks) for tasks in self.slices]

    @property
    def engine(self) -> ModuleType:
        return _engine(self.plan)

    def adapted(self, chunk: int) -> Any:
        """The tasks `slices[chunk]`, adapted, as the engine holds them."""
        return self._adapt(self.slices[chunk]) if self.kept is None else self.kept[chunk]

    def query(self, chunk: int, x: Tensor) -> tuple[Any, Any]:
        """A chunk of adapted tasks, and its query pass on its part of the features x [T, Q, in]."""
        adapted = self.adapted(chunk)
        return adapted, self.engine.query_pass(adapted, x[self.slices[chunk]])

    @torch.no_grad()
    def fast_weights(self, chunk: int, tasks: slice) -> FlatParameters:
        """The adapted parameters [t, *shape], as engines list them, for some tasks of a chunk."""
        with without_autocast(self.support.x):
            found: FlatParameters = self.engine.fast_weights(self.adapted(chunk), tasks)
        return found

    @torch.no_grad()
    def _adapt(self, tasks: slice) -> Any:
        with without_autocast(self.support.x):
            return self.engine.adapt(self.plan, self.parameters, self.support.tasks(tasks))


class _Job(NamedTuple):
    """The arguments of `meta_loss`, in one that autograd does not look into."""

    plan: Plan
    support: Support
    query: Query | None
    share: float | Tensor
    parameters: FlatParameters
    compiled: bool
    wanted: bool  # whether gradients are, where the loss is asked for


class _MetaLoss(torch.autograd.Function):
    """Of the query features and the parameters that there are, for which a job says the rest."""

    @staticmethod
    def forward(ctx: Any, job: _Job, query_x: Tensor | None, *present: Tensor) -> tuple[Tensor, Tensor | None]:
        plan, support, query, share, parameters, compiled, wanted = job
        _, features_needed, *rest = ctx.needs_input_grad
        needs = iter(rest)
        # Of the query features, then of every parameter as it is listed.
        needed = tuple(
            wanted and need for need in (features_needed, *(p is not None and next(needs) for p in parameters))
        )
        value, dx, gradients, kept = meta_step(plan, support, query, share, parameters, needed, compiled=compiled)
        dx = None if query_x is None else _whole([dx], query_x, needed[0])
        ctx.inputs, ctx.compute_dtype = (query_x, *present), compute_dtype(support.x.dtype)
        ctx.native = plan.engine == "native"
        ctx.save_for_backward(dx, *(g for g, p in zip(gradients, parameters, strict=True) if p is not None))
        if kept is not None:
            ctx.mark_non_differentiable(kept)
        return value, kept

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: Any) -> tuple[Any, ...]:
        return (None, *_differentiable_once(_MetaLoss._gradients, ctx, cotangent))

    @staticmethod
    def _gradients(ctx: Any, cotangent: Tensor) -> Gradients:
        found = ctx.saved_tensors
        # What the native engine found is on a CPU, where to look at a cotangent costs nothing, and nobody else's.
        if not (ctx.native and not _keeps_graph() and _is_one(cotangent)):
            cotangent = cotangent.to(ctx.compute_dtype)
            # One launch for all of them, where there are launches.
            scaled = iter(torch._foreach_mul([g for g in found if g is not None], cotangent))
            found = [None if g is None else next(scaled) for g in found]
        return as_dtypes(found, ctx.inputs)


class _Predict(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tasks: AdaptedTasks, query_x: Tensor, *tensors: Tensor | None) -> Tensor:
        with without_autocast(query_x):
            passes = [_outputs(tasks, i, query_x) for i in _chunks(tasks)]
        outputs = [chunk for chunk, _ in passes]
        ctx.tasks, ctx.traces = tasks, [trace for _, trace in passes]
        ctx.inputs = (query_x, *tensors[3:])
        # Saved, support set and all, so that autograd notices what changed in place between forward and backward.
        ctx.save_for_backward(query_x, *tensors)
        if not outputs:
            return query_x.new_empty(*query_x.shape[:2], tasks.plan.problem.network.out_features)
        return torch.cat(outputs).to(query_x.dtype)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        dx, *gradients = _differentiable_once(_Predict._gradients, ctx, cotangent)
        return (None, dx, None, None, None, *gradients)

    @staticmethod
    def _gradients(ctx: Any, cotangent: Tensor) -> Gradients:
        query_x, _, _, _, *parameters = ctx.saved_tensors
        tasks, needed = ctx.tasks, (ctx.needs_input_grad[1], *ctx.needs_input_grad[5:])
        features = []
        outer: Gradients = [None] * len(parameters)
        with without_autocast(query_x):
            for i in _chunks(tasks):
                dx, gradients = _reverse(tasks, i, ctx.traces[i], query_x, cotangent, needed)
                features.append(dx)
                _add(outer, gradients)
        gradients = [_whole(features, query_x, needed[0]), *_zeros_for_none(outer, parameters, needed[1:])]
        return as_dtypes(gradients, (query_x, *parameters))


class _PredictSteps(torch.autograd.Function):
    """Keeps nothing of the inner loop: its backward runs it again, and the query passes in reverse on the way."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, support: Support, steps: tuple[int, ...], query_x: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        ctx.plan, ctx.support, ctx.steps, ctx.inputs = plan, support, steps, (query_x, *tensors[3:])
        ctx.save_for_backward(query_x, *tensors)  # support set and all, as in `_Predict`
        chunks = []
        for tasks in slices(plan):
            outputs: list[Tensor] = []

            def visit(adapted: Any, k: int, x: Tensor = query_x[tasks], outputs: list[Tensor] = outputs) -> None:
                if k in steps:
                    outputs.append(batched.query_pass(adapted, x).outputs)

            with without_autocast(query_x):
                batched.trajectory(plan, tensors[3:], support.tasks(tasks), visit)
            chunks.append(torch.stack(outputs))
        if not chunks:
            return query_x.new_empty(len(steps), *query_x.shape[:2], plan.problem.network.out_features)
        return torch.cat(chunks, 1).to(query_x.dtype)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        dx, *gradients = _differentiable_once(_PredictSteps._gradients, ctx, cotangent)
        return (None, None, None, dx, None, None, None, *gradients)

    @staticmethod
    def _gradients(ctx: Any, cotangent: Tensor) -> Gradients:
        query_x, _, _, _, *parameters = ctx.saved_tensors
        needed = (ctx.needs_input_grad[3], *ctx.needs_input_grad[7:])
        features: list[Tensor | None] = []
        outer: Gradients = [None] * len(parameters)
        for tasks in slices(ctx.plan):
            own: Gradients = [None]

            def visit(
                adapted: Any,
                k: int,
                x: Tensor = query_x[tasks],
                d: Tensor = cotangent[:, tasks],
                own: Gradients = own,
            ) -> None:
                if k in ctx.steps:
                    trace = batched.query_pass(adapted, x)
                    d = torch.empty_like(trace.outputs).copy_(d[ctx.steps.index(k)])
                    keep = _with_cotangent(ctx.plan, d)
                    dx, gradients = batched.query_backward(adapted, trace, d, needed[1:], needed[0], *keep)
                    _add(own, [dx])
                    _add(outer, gradients)

            with without_autocast(query_x):
                batched.trajectory(ctx.plan, parameters, ctx.support.tasks(tasks), visit)
            features += own
        gradients = [_whole(features, query_x, needed[0]), *_zeros_for_none(outer, parameters, needed[1:])]
        return as_dtypes(gradients, (query_x, *parameters))


class _Distances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tasks: AdaptedTasks, *parameters: Tensor | None) -> Tensor:
        ctx.tasks, ctx.inputs = tasks, parameters
        ctx.save_for_backward(tasks.support.x, tasks.support.y, *parameters)
        support_x = tasks.support.x
        with without_autocast(support_x):
            found = [batched.half_squared_distances(tasks.adapted(i)) for i in _chunks(tasks)]
        return torch.cat(found).to(support_x.dtype) if found else support_x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        return (None, *_differentiable_once(_Distances._gradients, ctx, cotangent))

    @staticmethod
    def _gradients(ctx: Any, cotangent: Tensor) -> Gradients:
        _, _, *parameters = ctx.saved_tensors
        tasks, needed = ctx.tasks, ctx.needs_input_grad[1:]
        outer: Gradients = [None] * len(parameters)
        with without_autocast(tasks.support.x):
            for i in _chunks(tasks):
                shares = cotangent[tasks.slices[i]].to(compute_dtype(cotangent.dtype))
                _add(outer, batched.displacements(tasks.adapted(i), shares, needed))
        return as_dtypes(_zeros_for_none(outer, parameters, needed), parameters)


class _NoSecondDerivative(torch.autograd.Function):
    """The identity on a gradient that came from `sources`; its derivative is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(NO_SECOND_DERIVATIVE)


def _differentiable_once(backward: Callable[[Any, Tensor], Gradients], ctx: Any, cotangent: Tensor) -> Gradients:
    """Run a backward; where its results are to be differentiated again, make that an error.

    `torch.autograd.function.once_differentiable` does so only if the cotangent asks for a gradient. Parameters ask for
    one too, and without an error a gradient penalty would silently count as a constant.
    """
    # To turn off what is off would take as long as the backward of a small step.
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        gradients = backward(ctx, cotangent)
    return once_differentiable(gradients, (cotangent, *ctx.inputs))


def once_differentiable(gradients: Gradients, sources: Sequence[Tensor | None]) -> Gradients:
    """What a backward returns, computed from `sources`; to differentiate it again is an error."""
    if not torch.is_grad_enabled():  # autograd enables gradients in a backward exactly under create_graph
        return gradients
    return [None if g is None else _NoSecondDerivative.apply(g, *sources) for g in gradients]


def _is_one(cotangent: Tensor) -> bool:
    try:
        return cotangent.item() == 1.0
    except RuntimeError:  # it is a batch of them
        return False


def _keeps_graph() -> bool:
    """Whether the backward under way may be run again; where torch does not tell, it may."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())


def _engine(plan: Plan) -> ModuleType:
    """The module that does what a plan says."""
    if plan.engine == "resident":
        from .engines import resident  # imports Triton, as do the next

        return resident
    if plan.engine in ("dual", "layered"):
        from .engines import dual

        return dual
    if plan.engine in ("chained", "primal"):
        from .engines import primal

        return primal
    if plan.engine == "native":
        from .engines import native

        return native
    return batched


def _outputs(tasks: AdaptedTasks, chunk: int, x: Tensor) -> tuple[Tensor, Any]:
    """The outputs of a chunk, and what its query pass left where adapted tasks are kept as well."""
    _, trace = tasks.query(chunk, x)
    return trace.outputs, trace if tasks.kept else None


def _reverse(
    tasks: AdaptedTasks, chunk: int, trace: Any, x: Tensor, cotangent: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Gradients]:
    """The query pass of a chunk in reverse, after running it again where its trace was not kept."""
    adapted, trace = tasks.query(chunk, x) if trace is None else (tasks.adapted(chunk), trace)
    d = torch.empty_like(trace.outputs).copy_(cotangent[tasks.slices[chunk]])
    keep = _with_cotangent(tasks.plan, d)
    found: tuple[Tensor | None, Gradients] = tasks.engine.query_backward(
        adapted, trace, d, needed[1:], needed[0], *keep
    )
    return found


def _with_cotangent(plan: Plan, d: Tensor) -> list[Tensor]:
    """The tasks that ask for anything, [T], where diverged ones are skipped and so may ask for nothing."""
    if plan.engine != "batched" or plan.problem.nonfinite != "skip":
        return []
    return [(d != 0).flatten(1).any(1)]


def slices(plan: Plan) -> Iterator[slice]:
    """The tasks of each chunk."""
    for start in range(0, plan.sizes.tasks, plan.chunk):
        yield slice(start, min(start + plan.chunk, plan.sizes.tasks))


def _chunks(tasks: AdaptedTasks) -> range:
    return range(len(tasks.slices))


def _add(total: Gradients, gradients: Gradients) -> None:
    """Add a chunk's gradients to the sum of those before it."""
    for i, gradient in enumerate(gradients):
        before = total[i]
        total[i] = gradient if before is None or gradient is None else before.add_(gradient)


def _whole(chunks: Sequence[Tensor | None], x: Tensor, needed: bool) -> Tensor | None:
    """The gradient of all query features from those of the chunks."""
    found = [chunk for chunk in chunks if chunk is not None]
    return _joined(found) if found else torch.zeros_like(x) if needed else None


def as_dtypes(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> Gradients:
    """Each gradient in the dtype of what it is of."""
    return [
        None if g is None or t is None else g if g.dtype == t.dtype else g.to(t.dtype)
        for g, t in zip(gradients, inputs, strict=True)
    ]


def _total(terms: Sequence[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else torch.stack(list(terms)).sum()


def _joined(chunks: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(chunks)) if len(chunks) > 1 else chunks[0]


def _zeros_for_none(gradients: Gradients, parameters: FlatParameters, needed: Sequence[bool]) -> Gradients:
    """Zeros where a gradient is asked for and there was no task to give one."""
    return [
        torch.zeros_like(p) if g is None and need and p is not None else g
        for g, p, need in zip(gradients, parameters, needed, strict=True)
    ]


def without_autocast(like: Tensor) -> AbstractContextManager[None]:
    """Engines choose their own precision; inside one, autocast would mix dtypes in in-place operations."""
    device = like.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
