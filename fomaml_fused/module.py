"""`FOMAML`, the drop-in `nn.Module`: the step from a user's model and tensors to a plan and an engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .adapted import AdaptedMLP, ReferenceAdapted
from .autograd import AdaptedTasks
from .batch import Sizes, Support, check_parameters, check_query_features
from .calls import Batch, Call, Given
from .engines import FlatParameters
from .inner import PARTS, Adapt, InnerLoop, adapted_parts, inner_rates
from .metrics import InnerLosses, inner_losses, joined
from .network import part_names, read_network
from .numbered import number_of
from .parts import in_steps, in_torch, places
from .planner import BACKENDS, PRECISIONS, make_plan
from .plans import Plan
from .problem import Loss, Problem, SampleLoss
from .ragged import Counts
from .rates import LearnedRates

REDUCTIONS = ("mean", "sum", "none")


class FOMAML(nn.Module):
    """First-order MAML (Finn et al. 2017, section 5.2; Nichol et al. 2018) around a multi-layer perceptron::

        meta = FOMAML(model, lr=0.4, steps=5, loss="cross_entropy")
        loss = meta(support_x, support_y, query_x, query_y)
        loss.backward()                      # the FOMAML gradient, on model.parameters()

    `docs/rules.md` has the formula and the source of every rule among the arguments.

    Args:
        model: an `nn.Sequential` of `nn.Linear` and activations. Its parameters stay the parameters, and its state
            dict is this module's.
        lr: the inner learning rate: a number, or anything that broadcasts to [steps, layers].
        steps: inner steps of gradient descent on the support loss, 0 or more.
        loss: "mse", "l1", "huber", "cross_entropy", "bce_with_logits", a `Loss` with its options, or a callable
            (outputs [N, out], targets [N, ...]) -> loss per sample [N].
        outer_loss: the loss on the query set; None for the same.
        optimizer: of the inner loop, "sgd" or "adam", with a state of its own for each task.
        momentum, nesterov: of "sgd", as in `torch.optim.SGD`.
        weight_decay: of the inner loop, as in `torch.optim.SGD`.
        decoupled_weight_decay: keep the decay out of momentum and of Adam's moments, as `torch.optim.AdamW` does.
        betas, eps: of "adam", as in `torch.optim.Adam`.
        max_grad_norm: the longest gradient of a task, all that moves taken together, as in
            `torch.nn.utils.clip_grad_norm_`.
        max_grad_value: the largest element of a gradient, as in `torch.nn.utils.clip_grad_value_`.
        learn_lr: learn one rate for all ("global"), or for each "step", "layer", layer and step ("layer_step") or
            "element" of a parameter, starting from `lr`; None for fixed rates. Learned ones are parameters of this
            module.
        positive_lr: "softplus" or "clamp" keep learned rates from falling below 0; None lets them.
        adapt: what moves: "all", "head" (the last layer), "body" (all others), indices of layers, names of parameters
            and modules, or a predicate of a parameter's name and value.
        outer: "fomaml", or "reptile", which takes no query set.
        step_weights: what the query loss after each inner step counts, [K], as in MAML++; None for the last one alone.
        nonfinite: what becomes of a task whose loss is not finite: "propagate" it, or "skip" the task.
        backend: "auto", "triton" (fused kernels), "torch" (batched torch ops), or "reference" (autograd, one task at a
            time).
        precision: of products in fused kernels: "ieee", "tf32x3", "tf32", "bf16" or "fp16" operands, or torch's names
            "highest" ("tf32x3", on AMD "ieee"), "high" ("tf32") and "medium" ("bf16"). None for that of an enabled
            autocast, else `torch.get_float32_matmul_precision()`. Sums are float32 always; batched torch ops follow
            torch's own setting.
        compile: run the meta-step as compiled C++ on a CPU, which waits for a compiler once on a machine; or where that
            does not take it (`plan` says why), batched torch ops through `torch.compile`, which waits at the first call
            of each size. `predict` and `adapt` are never compiled, and fused kernels need none of it.

    Raises:
        TypeError, ValueError: an argument is not taken; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: Any = 0.01,
        steps: int = 1,
        loss: str | Loss | SampleLoss = "mse",
        outer_loss: str | Loss | SampleLoss | None = None,
        optimizer: str = "sgd",
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_grad_norm: float | None = None,
        max_grad_value: float | None = None,
        learn_lr: str | None = None,
        positive_lr: str | None = None,
        adapt: Adapt = "all",
        outer: str = "fomaml",
        step_weights: Sequence[float] | None = None,
        nonfinite: str = "propagate",
        backend: str = "auto",
        precision: str | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        network, blocks = read_network(model)
        inner = InnerLoop(
            rates=inner_rates(lr, steps, network.depth),
            adapt=adapted_parts(adapt, part_names(model, blocks), dict(model.named_parameters())),
            optimizer=optimizer,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            decoupled=decoupled_weight_decay,
            betas=(betas[0], betas[1]) if len(betas) == 2 else betas,
            eps=eps,
            max_grad_norm=max_grad_norm,
            max_grad_value=max_grad_value,
            learn_lr=learn_lr,
        )
        inner_loss = Loss.of(loss)
        outer_rule = inner_loss if outer_loss is None else Loss.of(outer_loss, "outer_loss")
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; it takes one of {', '.join(BACKENDS)}")
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}; it takes None or one of {', '.join(PRECISIONS)}")
        self.model = model
        multi_step = step_weights is not None
        self.problem = Problem(network, inner, inner_loss, outer_rule, outer, multi_step, nonfinite)
        self.backend, self.precision, self.compiled = backend, precision, compile
        self._blocks, self._read = blocks, _children(model)
        # Of the parameters in the model, as engines list them.
        self._names = [names.get(part) for names in part_names(model, blocks) for part in PARTS]
        self.step_weights = step_weights
        self.skipped: Tensor | None = None
        if learn_lr is not None:
            self.inner_lr = LearnedRates(inner, positive_lr, [block.parameters() for block in blocks])
        elif positive_lr is not None:
            raise ValueError(f"positive_lr is {positive_lr!r}; it takes learn_lr beside it")
        self.graph_number = number_of(self)
        self.register_state_dict_post_hook(_to_plain_names)
        self.register_load_state_dict_pre_hook(_from_plain_names)

    @property
    def step_weights(self) -> tuple[float, ...] | None:
        """What the query loss after each inner step counts, [K]; may be set anew, as MAML++ anneals it."""
        return self._step_weights

    @step_weights.setter
    def step_weights(self, weights: Sequence[float] | None) -> None:
        if (weights is not None) != self.problem.multi_step:
            raise ValueError(f"step_weights is {weights!r}; whether there are any is decided when the module is made")
        if weights is not None:
            values = [float(w) for w in weights]
            steps = self.problem.inner.steps
            fine = len(values) == steps and all(math.isfinite(w) and w >= 0.0 for w in values)
            if not fine or not any(values):
                raise ValueError(
                    f"step_weights is {values}; it takes a number for each of the {steps} steps, not negative nor all 0"
                )
            weights = tuple(values)
        self._step_weights = weights
        # On the CPU, and in a graph as values that it does not take for constants.
        self.step_weight_values = None if weights is None else torch.tensor(weights, dtype=torch.float64)

    def forward(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor | None = None,
        query_y: Tensor | None = None,
        *,
        support_weight: Tensor | None = None,
        query_weight: Tensor | None = None,
        task_weight: Tensor | None = None,
        support_counts: Counts | None = None,
        query_counts: Counts | None = None,
        step_counts: Counts | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """The query loss of the adapted networks.

        Args:
            support_x: [T, S, in]; or [T, K, S, in], samples of their own for each inner step.
            query_x: [T, Q, in]; its gradient flows, to first order. None, as `query_y`, with `outer="reptile"`.
            support_y, query_y: [T, S] and [T, Q] int64 for cross-entropy, else [T, S, out] and [T, Q, out].
            support_weight, query_weight: a weight per sample, [T, S] and [T, Q]; a mask is a weight of 0 or 1. A task's
                loss is the weighted mean over its samples.
            task_weight: [T].
            support_counts, query_counts: how many of its samples, the first ones, each task has, [T]. Tasks of about
                as many run together, so that none pays for another's. Tensors are read, which waits for their device.
                What lies behind the first ones does not matter, but that classes are some that exist.
            step_counts: how many inner steps each task takes, [T].
            reduction: over tasks, as in `torch.nn.functional.cross_entropy`: "mean" (weighted), "sum" or "none".

        Returns:
            A scalar, or [T] with `reduction="none"`. A mean over nothing is nan, as in torch. With `outer="reptile"`,
            half the squared distance that a task moves, whose gradient is Reptile's.

        Raises:
            TypeError, ValueError: an argument is not taken; the message names it.
        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; it takes one of {', '.join(REDUCTIONS)}")
        tensors = support_x, support_y, query_x, query_y, support_weight, query_weight, task_weight
        given = Given(*tensors, support_counts, query_counts, step_counts)
        if torch.compiler.is_compiling():
            from . import graph  # which imports torch's compiler

            if (obstacle := graph.obstacle(self, given)) is not None:
                from .outside import OUTSIDE

                found: Tensor = OUTSIDE[obstacle](self._loss, given, reduction)
                return found
            loss, self.skipped = graph.loss(self, given, reduction)
            return loss
        return self._loss(given, reduction)

    def grad_and_value(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor | None = None,
        query_y: Tensor | None = None,
        *,
        support_weight: Tensor | None = None,
        query_weight: Tensor | None = None,
        task_weight: Tensor | None = None,
        support_counts: Counts | None = None,
        query_counts: Counts | None = None,
        step_counts: Counts | None = None,
        reduction: str = "mean",
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The gradients of the parameters, and the loss, as of `torch.func.grad_and_value`.

        What `loss.backward()` would find, without autograd's way there and back, which is a third of a step of the
        smallest networks. Autograd still puts together what counts, `nonfinite="skip"`, learned rates and
        `backend="reference"` need it for.

        Arguments as of a call; a reduction to "none" has no gradient.

        Returns:
            By the names of the state dict, the gradient of each parameter that asks for one; and a scalar.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}; gradients are of a scalar, so it takes mean or sum")
        tensors = support_x, support_y, query_x, query_y, support_weight, query_weight, task_weight
        given = Given(*tensors, support_counts, query_counts, step_counts)
        if torch.compiler.is_compiling():
            from .outside import OUTSIDE

            found: tuple[dict[str, Tensor], Tensor] = OUTSIDE["objects"](self._grad_and_value, given, reduction)
            return found
        return self._grad_and_value(given, reduction)

    def predict(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, *, support_weight: Tensor | None = None
    ) -> Tensor:
        """Outputs [T, Q, out] of the adapted networks, differentiable to first order: bring your own outer loss."""
        given = Given(support_x, support_y, query_x, support_weight=support_weight)
        if torch.compiler.is_compiling():
            from . import graph  # which imports torch's compiler

            if (obstacle := graph.obstacle(self, given)) is not None:
                from .outside import OUTSIDE

                found: Tensor = OUTSIDE[obstacle](self._predict, given)
                return found
            return graph.predict(self, given)
        return self._predict(given)

    def adapt(
        self, support_x: Tensor, support_y: Tensor, *, support_weight: Tensor | None = None
    ) -> AdaptedMLP | ReferenceAdapted:
        """The adapted networks, to be called on any number of query samples."""
        if torch.compiler.is_compiling():
            from .outside import OUTSIDE  # which imports torch's compiler, as `graph` does

            adapted: AdaptedMLP | ReferenceAdapted = OUTSIDE["objects"](
                self.adapt, support_x, support_y, support_weight=support_weight
            )
            return adapted
        call = self._call()
        support = call.support(Given(support_x, support_y, support_weight=support_weight))
        plan = in_steps(call.plan(support, support.x.shape[-2]))
        if plan.engine == "reference":
            return ReferenceAdapted(self.model, self.problem, self._reference_weights(support))
        snapshot = tuple(None if p is None else p.detach().clone() for p in call.flat)
        tasks = AdaptedTasks(plan, support.clone(), snapshot, keep=True)
        return AdaptedMLP(self.model, self._names, tasks, self._parameters_flat)

    def losses(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor | None = None,
        query_y: Tensor | None = None,
        *,
        support_weight: Tensor | None = None,
        query_weight: Tensor | None = None,
        support_counts: Counts | None = None,
        query_counts: Counts | None = None,
        step_counts: Counts | None = None,
    ) -> InnerLosses:
        """What happens inside: losses, accuracies and gradient norms of every task and step, without gradients.

        Arguments as of a call; query sets may be left out whatever the outer rule. Runs as batched torch ops, and for a
        log beside the training loop: `log(meta.losses(...).scalars())`.
        """
        if torch.compiler.is_compiling():
            from .outside import OUTSIDE

            inside: InnerLosses = OUTSIDE["objects"](
                self.losses,
                support_x,
                support_y,
                query_x,
                query_y,
                support_weight=support_weight,
                query_weight=query_weight,
                support_counts=support_counts,
                query_counts=query_counts,
                step_counts=step_counts,
            )
            return inside
        given = Given(support_x, support_y, query_x, query_y, support_weight, query_weight)
        call = self._call()
        batch = call.check(
            given._replace(support_counts=support_counts, query_counts=query_counts, step_counts=step_counts),
            measured=True,
        )
        parts = call.parts(batch)
        found = [
            inner_losses(in_torch(part.plan), part.support, part.query, call.parameters(part.plan.problem))
            for part in parts
        ]
        if parts[0].tasks is None:
            return found[0]
        return joined(found, places(parts, self._like.device), self.problem.inner.steps)

    def plan(
        self,
        tasks: int,
        shots: int,
        queries: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Plan:
        """How a batch of these sizes would be computed, and why; `print` it.

        Args:
            queries: None for as many as shots.
            dtype, device: None for those of the model.
        """
        sizes = Sizes(
            tasks,
            shots,
            shots if queries is None else queries,
            self._like.dtype if dtype is None else dtype,
            self._like.device if device is None else torch.device(device),
        )
        precision = self._precision(sizes.device)
        return make_plan(self.problem, sizes, self.backend, precision, compiled=self.compiled, explained=True)

    def adapted_names(self) -> list[str]:
        """The names of the parameters that move in the inner loop."""
        layers = part_names(self.model, self._blocks)
        return [names[part] for names, parts in zip(layers, self.problem.inner.adapt, strict=True) for part in parts]

    def reference_options(self) -> dict[str, Any]:
        """The inner loop as the functions of `reference` take it; learned rates ask for their gradient."""
        options = self.problem.inner.options() | {"adapt": self.adapted_names(), "loss": self.problem.loss}
        if self.problem.inner.learn_lr is not None:
            options["lr"] = self.inner_lr.for_reference(part_names(self.model, self._blocks))
        return options

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.graph_number = number_of(self)  # a copy is another module

    def extra_repr(self) -> str:
        return f"{self.problem}, backend={self.backend!r}"

    @property
    def _like(self) -> Tensor:
        return self._blocks[0].linear.weight

    def _call(self) -> Call:
        """What calls compute with, as the module is now."""
        precision = self._precision(self._like.device)
        return Call(self.problem, self._parameters_flat(), self.backend, precision, self.step_weights, self.compiled)

    def _loss(self, given: Given, reduction: str) -> Tensor:
        call = self._call()
        batch = call.check(given)
        skipped = self.__dict__  # past nn.Module, which would look among parameters and modules first
        skipped["skipped"] = None
        if self.backend == "reference":
            return self._reference_loss(batch, reduction)
        loss, skipped["skipped"] = call.loss(batch, reduction)
        return loss

    def _grad_and_value(self, given: Given, reduction: str) -> tuple[dict[str, Tensor], Tensor]:
        # What is returned is for a training loop, which an optimizer changes in place.
        with torch.inference_mode(mode=False):
            call = self._call()
            if call.needs_autograd(given):
                return self._by_autograd(given, reduction)
            with torch.no_grad():
                loss, gradients = call.gradients(call.check(given), reduction)
        self.__dict__["skipped"] = None  # as in `_loss`
        return {name: g for name, g in zip(self._names, gradients, strict=True) if name and g is not None}, loss

    def _by_autograd(self, given: Given, reduction: str) -> tuple[dict[str, Tensor], Tensor]:
        named = {name.removeprefix("model."): p for name, p in self.named_parameters() if p.requires_grad}
        with torch.enable_grad():
            loss = self._loss(given, reduction)
            found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True) if named else ()
        return dict(zip(named, found, strict=True)), loss.detach()

    def _reference_loss(self, batch: Batch, reduction: str) -> Tensor:
        support, query, task_weight, counts = batch
        problem = self.problem
        return reference.meta_loss(
            self.model,
            support.x,
            support.y,
            None if query is None else query.x,
            None if query is None else query.y,
            **self.reference_options(),
            outer_loss=problem.outer_loss,
            outer=problem.outer,
            step_weights=self.step_weights,
            nonfinite=problem.nonfinite,
            support_weight=support.weight,
            query_weight=None if query is None else query.weight,
            task_weight=task_weight,
            support_counts=None if counts is None else counts.shots,
            query_counts=None if counts is None else counts.queries,
            step_counts=None if counts is None else counts.steps,
            reduction=reduction,
        )

    def graph_precision(self, device: torch.device) -> str | None:
        """One of `PRECISIONS`; None for what torch is set to, which a graph leaves to when it runs."""
        if self.precision is not None:
            return self.precision
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
            return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(torch.get_autocast_dtype(device.type), "highest")
        return None

    def _precision(self, device: torch.device) -> str:
        return self.graph_precision(device) or torch.get_float32_matmul_precision()

    def _predict(self, given: Given) -> Tensor:
        call = self._call()
        if self.backend != "reference":
            return call.predict(given)
        support = call.support(given)
        assert given.query_x is not None
        query_x = check_query_features(self.problem, self._like, support.x.shape[0], given.query_x)
        return reference.run_tasks(self.model, self._reference_weights(support), query_x)

    def _reference_weights(self, support: Support) -> list[dict[str, Tensor]]:
        options, weight = self.reference_options(), support.weight
        return [
            reference.adapt_task(
                self.model, support.x[t], support.y[t], **options, weight=None if weight is None else weight[t]
            )
            for t in range(support.x.shape[0])
        ]

    def _parameters_flat(self) -> FlatParameters:
        """As engines list them."""
        self.check_layers()
        flat = self.listed()
        check_parameters(flat[: len(PARTS) * self.problem.network.depth])
        return flat

    def check_layers(self) -> None:
        """Raises a RuntimeError where the model is not made of the modules that it was made of."""
        if any(tuple(module._modules.values()) != children for module, children in self._read):
            raise RuntimeError("model has other layers than when FOMAML read it; make a new FOMAML around it")

    def listed(self) -> FlatParameters:
        """The parameters and learned rates, as engines list them."""
        flat = [p for block in self._blocks for p in block.listed()]
        return flat if self.problem.inner.learn_lr is None else [*flat, *self.inner_lr.listed()]


def _children(model: nn.Module) -> list[tuple[nn.Module, tuple[nn.Module | None, ...]]]:
    """The modules of a model that hold others, by which it is known whether layers were put in others' places."""
    return [(module, tuple(module._modules.values())) for module in model.modules() if module._modules]


def _to_plain_names(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Drop `model.` from the names, so that the state dict is the plain model's."""
    assert isinstance(module, FOMAML)
    for name in module.model.state_dict(keep_vars=True):
        state[prefix + name] = state.pop(f"{prefix}model.{name}")


def _from_plain_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, FOMAML)
    plain = {name: state.pop(prefix + name) for name in module.model.state_dict() if prefix + name in state}
    state.update({f"{prefix}model.{name}": value for name, value in plain.items()})
