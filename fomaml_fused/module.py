"""`FOMAML`, the drop-in `nn.Module`: the step from a user's model and tensors to a plan and an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .adapted import AdaptedMLP, ReferenceAdapted
from .autograd import AdaptedTasks, meta_loss, predict
from .batch import Sizes, Support, cast_targets, check_query, check_query_features, check_support, compute_dtype
from .engines import FlatParameters
from .engines.losses import task_loss
from .inner import Adapt, InnerLoop, adapted_parts, inner_rates
from .network import part_names, read_network
from .planner import BACKENDS, PRECISIONS, make_plan
from .plans import Plan
from .problem import Loss, Problem, SampleLoss

REDUCTIONS = ("mean", "sum", "none")


class FOMAML(nn.Module):
    """First-order MAML (Finn et al. 2017, section 5.2; Nichol et al. 2018) around a multi-layer perceptron.

        meta = FOMAML(model, lr=0.4, steps=5, loss="cross_entropy")
        loss = meta(support_x, support_y, query_x, query_y)
        loss.backward()                      # the FOMAML gradient, on model.parameters()

    Args:
        model: an `nn.Sequential` of `nn.Linear` and activations. Its parameters stay the parameters, and its state
            dict is this module's.
        lr: the inner learning rate: a number, or anything that broadcasts to [steps, layers].
        steps: inner steps of gradient descent on the support loss, 0 or more.
        loss: "mse", "l1", "huber", "cross_entropy", "bce_with_logits", a `Loss` with its options, or a callable
            (outputs [N, out], targets [N, ...]) -> loss per sample [N].
        outer_loss: the loss on the query set; None for the same.
        momentum, weight_decay: of the inner loop, as in `torch.optim.SGD`.
        adapt: the layers that move: "all", "head" (the last), "body" (all others) or indices.
        backend: "auto", "triton" (fused kernels), "torch" (batched torch ops), or "reference" (autograd, one task at a
            time).
        precision: of products in fused kernels: "ieee", "tf32x3", "tf32", "bf16" or "fp16" operands, or torch's names
            "highest" ("tf32x3", on AMD "ieee"), "high" ("tf32") and "medium" ("bf16"). None for that of an enabled
            autocast, else `torch.get_float32_matmul_precision()`. Sums are float32 always; batched torch ops follow
            torch's own setting.
        compile: run batched torch ops through `torch.compile`: the first call of each size waits for the compiler,
        later
            ones have less to launch. `predict` and `adapt` are never compiled, and fused kernels need none of it.

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
            betas=betas,
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
        self._blocks, self._read = blocks, list(model.modules())
        self.register_state_dict_post_hook(_to_plain_names)
        self.register_load_state_dict_pre_hook(_from_plain_names)

    def forward(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        *,
        support_weight: Tensor | None = None,
        query_weight: Tensor | None = None,
        task_weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """The query loss of the adapted networks.

        Args:
            support_x: [T, S, in].  query_x: [T, Q, in]; its gradient flows, to first order.
            support_y, query_y: [T, S] and [T, Q] int64 for cross-entropy, else [T, S, out] and [T, Q, out].
            support_weight, query_weight: a weight per sample, [T, S] and [T, Q]; a mask is a weight of 0 or 1. A task's
                loss is the weighted mean over its samples.
            task_weight: [T].
            reduction: over tasks, as in `torch.nn.functional.cross_entropy`: "mean" (weighted), "sum" or "none".

        Returns:
            A scalar, or [T] with `reduction="none"`. A mean over nothing is nan, as in torch.

        Raises:
            TypeError, ValueError: an argument is not taken; the message names it.
        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; it takes one of {', '.join(REDUCTIONS)}")
        support = self._support(support_x, support_y, support_weight)
        query = check_query(self.problem, self._like, support.x.shape[0], query_x, query_y, query_weight, task_weight)
        plan = self._plan(support, query_x.shape[1])
        # The fused loss has gradients for parameters and query features. What else may ask for one, a callable's own
        # parameters included, goes through predict.
        asks = any(t is not None and t.requires_grad for t in (query.y, query.weight, query.task_weight))
        asks = asks or (self.problem.outer_loss.name == "callable" and torch.is_grad_enabled())
        if plan.engine != "reference" and reduction != "none" and not asks:
            return meta_loss(plan, support, query, reduction, self._parameters_flat(), compiled=self.compiled)
        dtype = compute_dtype(query_x.dtype)
        outputs = self._predict(plan, support, query_x).to(dtype)
        y = cast_targets(query.y, dtype)
        loss = task_loss(self.problem.outer_loss, y, query.weight, outputs.shape[2], dtype)
        return reference.reduce_tasks(loss.values(outputs), query.task_weight, reduction).to(query_x.dtype)

    def predict(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, *, support_weight: Tensor | None = None
    ) -> Tensor:
        """Outputs [T, Q, out] of the adapted networks, differentiable to first order: bring your own outer loss."""
        support = self._support(support_x, support_y, support_weight)
        check_query_features(self.problem, self._like, support.x.shape[0], query_x)
        return self._predict(self._plan(support, query_x.shape[1]), support, query_x)

    def adapt(
        self, support_x: Tensor, support_y: Tensor, *, support_weight: Tensor | None = None
    ) -> AdaptedMLP | ReferenceAdapted:
        """The adapted networks, to be called on any number of query samples."""
        support = self._support(support_x, support_y, support_weight)
        plan = self._plan(support, support.x.shape[1])
        if plan.engine == "reference":
            return ReferenceAdapted(self.model, self.problem, self._reference_weights(support))
        live = self._parameters_flat()
        snapshot = tuple(None if p is None else p.detach().clone() for p in live)
        tasks = AdaptedTasks(plan, support.clone(), snapshot, keep=True)
        return AdaptedMLP(self.model, self._names(), tasks, live)

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
        return make_plan(self.problem, sizes, self.backend, self._precision(sizes.device))

    def extra_repr(self) -> str:
        return f"{self.problem}, backend={self.backend!r}"

    @property
    def _like(self) -> Tensor:
        return self._blocks[0].linear.weight

    def _support(self, x: Tensor, y: Tensor, weight: Tensor | None) -> Support:
        return check_support(self.problem, self._like, x, y, weight)

    def _plan(self, support: Support, queries: int) -> Plan:
        tasks, shots, _ = support.x.shape
        sizes = Sizes(tasks, shots, queries, support.x.dtype, support.x.device)
        return make_plan(self.problem, sizes, self.backend, self._precision(sizes.device))

    def _precision(self, device: torch.device) -> str:
        if self.precision is not None:
            return self.precision
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
            return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(torch.get_autocast_dtype(device.type), "highest")
        return torch.get_float32_matmul_precision()

    def _predict(self, plan: Plan, support: Support, query_x: Tensor) -> Tensor:
        if plan.engine == "reference":
            return reference.run_tasks(self.model, self._reference_weights(support), query_x)
        parameters = self._parameters_flat()
        return predict(AdaptedTasks(plan, support, parameters, keep=plan.keeps_state), query_x, parameters)

    def _reference_weights(self, support: Support) -> list[dict[str, Tensor]]:
        return [
            reference.adapt_task(
                self.model,
                support.x[t],
                support.y[t],
                **self.problem.inner.options(),
                adapt=self.adapted_names(),
                loss=self.problem.loss,
                weight=None if support.weight is None else support.weight[t],
            )
            for t in range(support.x.shape[0])
        ]

    def _parameters_flat(self) -> FlatParameters:
        if list(self.model.modules()) != self._read:
            raise RuntimeError("model has other layers than when FOMAML read it; make a new FOMAML around it")
        flat = tuple(p for block in self._blocks for p in block.parameters().values())
        like = self._like
        for p in flat:
            if p is not None and (p.dtype != like.dtype or p.device != like.device):
                raise ValueError(
                    f"model has parameters of {like.dtype} on {like.device} and of {p.dtype} on {p.device}; "
                    "all take the same dtype and device"
                )
        return flat

    def adapted_names(self) -> list[str]:
        """The names of the parameters that move."""
        layers = part_names(self.model, self._blocks)
        return [names[part] for names, parts in zip(layers, self.problem.inner.adapt, strict=True) for part in parts]

    def _names(self) -> tuple[tuple[str, str | None], ...]:
        names = {id(p): name for name, p in self.model.named_parameters()}
        return tuple(
            (names[id(linear.weight)], None if linear.bias is None else names[id(linear.bias)])
            for linear in (block.linear for block in self._blocks)
        )


class ANIL(FOMAML):
    """`FOMAML` whose inner loop moves the head alone (Raghu et al. 2020); every layer gets its outer gradient."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        if "adapt" in options:
            raise TypeError("ANIL adapts the head; FOMAML takes adapt")
        super().__init__(model, adapt="head", **options)


def _to_plain_names(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Drop `model.` from the names, so that the state dict is the plain model's."""
    assert isinstance(module, FOMAML)
    for name in module.model.state_dict(keep_vars=True):
        state[prefix + name] = state.pop(f"{prefix}model.{name}")


def _from_plain_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, FOMAML)
    plain = {name: state.pop(prefix + name) for name in module.model.state_dict() if prefix + name in state}
    state.update({f"{prefix}model.{name}": value for name, value in plain.items()})
