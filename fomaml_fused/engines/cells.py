"""A layer as the batched engine runs it: its form, the normalisation and the activation behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..inner import PARTS
from ..problem import Activation, Problem
from . import FlatParameters, fold_step, layers_of, rates_of
from .activations import activation_ops
from .coefficients import Coefficients, LearnedCoefficients, coefficients, learned_coefficients
from .dual_forms import DualFirstLayer, DualLayer
from .forms import FoldingLayer, PrimalLayer, SharedLayer
from .norms import NormLayer, NormSaved
from .products import product
from .rules import OwnParameter, Rate, kept

Parts = dict[str, Tensor]


@dataclass
class Saved:
    """What a pass through a cell leaves for its derivative."""

    x: Tensor  # the cell's input
    kept: Tensor  # what the activation's derivative needs
    norm: NormSaved | None


@dataclass
class Reversed:
    """A cell's part of a backward pass.

    Attributes:
        x, d: its input and the gradient of its pre-activation, whose product is the gradient of its weight.
        norm: gradients of its normalisation's parameters, [T, H] by part.
    """

    x: Tensor
    d: Tensor
    norm: Parts

    def outer_gradients(self, needed: Sequence[bool], keep: Tensor | None) -> list[Tensor | None]:
        """The gradients of the parts asked for, in the order of `PARTS`, summed over tasks, those to keep."""
        rows = kept(self.d, keep).flatten(0, 1)  # [T * Q, out]
        weight = product(rows.t(), kept(self.x, keep).flatten(0, 1)) if needed[0] else None
        bias = rows.sum(0) if needed[1] else None
        norms = [
            kept(self.norm[part], keep).sum(0) if need else None
            for part, need in zip(PARTS[2:], needed[2:], strict=True)
        ]
        return [weight, bias, *norms]


Backward = dict[int, Reversed]  # by layer, of those that a backward pass reaches


@dataclass
class Cell:
    """One layer of the network.

    Attributes:
        moves: the parts that do in the inner loop.
    """

    form: SharedLayer
    norm: NormLayer | None
    activation: Activation
    moves: tuple[str, ...]

    @property
    def form_moves(self) -> bool:
        return "weight" in self.moves or "bias" in self.moves

    def forward(self, x: Tensor, *, query: bool = False) -> tuple[Tensor, Saved]:
        """The output [T, S, out] for inputs [T, S, in]; query: they are other than the support set."""
        ops, norm = activation_ops(self.activation), None
        scale = ops.scale if self.norm is None else 1.0
        z = self.form.query(x, scale) if query else self.form.forward(x, scale)
        if self.norm is not None:
            z, norm = self.norm.forward(z)
            z = z if ops.scale == 1.0 else z.mul_(ops.scale)
        h, saved = ops.run(z)
        return h, Saved(x, saved, norm)

    def reverse(self, d: Tensor, saved: Saved) -> Reversed:
        """From the gradient of the output, which is overwritten."""
        d, norm = activation_ops(self.activation).backward(d, saved.kept), {}
        if self.norm is not None and saved.norm is not None:
            norm = self.norm.gradients(d, saved.norm)
            d = self.norm.backward(d, saved.norm)
        return Reversed(saved.x, d, norm)

    def step(self, found: Reversed, factor: Tensor | None) -> None:
        """Take the next inner step; factor: what clipping leaves of each task's gradient, [T], or None for all."""
        if self.form_moves:
            self.form.step(found.x, found.d if factor is None else found.d * factor[:, None, None])
        self.step_norm(found.norm, factor)

    def step_norm(self, gradients: Parts, factor: Tensor | None) -> None:
        for part in self.moves:
            if part in gradients:
                assert self.norm is not None
                own = gradients[part] if factor is None else gradients[part] * factor[:, None]
                self.norm.parameters[part].step(own)

    def squared_norm(self, found: Reversed) -> Tensor:
        """The square of the norm of each task's gradient, [T]."""
        parts = [found.norm[part].square().sum(1) for part in self.moves if part in found.norm]
        if self.form_moves:
            parts.append(self.form.squared_norm(found.x, found.d))
        return torch.stack(parts).sum(0)

    def add_gradients(self, found: Reversed, total: Parts) -> None:
        """Add each task's gradient of each part that moves to those of other samples."""
        if self.form_moves:
            assert isinstance(self.form, PrimalLayer)
            self.form.add_gradients(found.x, found.d, total)
        for part in self.moves:
            if part in found.norm:
                total[part] = found.norm[part] if part not in total else total[part].add_(found.norm[part])

    def own(self, part: str) -> OwnParameter | None:
        """A part that each task has for itself; None where no task has."""
        if part.startswith("norm"):
            return self.norm.parameters[part] if self.norm is not None and part in self.moves else None
        if not isinstance(self.form, PrimalLayer):
            return None
        return self.form.own_weight if part == "weight" else self.form.own_bias

    def finish(self) -> None:
        self.form.finish()
        for part in PARTS[2:]:
            if (own := self.own(part)) is not None:
                own.finish()

    def adapted(self, task: slice) -> list[Tensor | None]:
        """Its parameters after the last step, in the order of `PARTS`, of a slice of t tasks."""
        norms = [None if self.norm is None else self.norm.adapted(part, task) for part in PARTS[2:]]
        return [*self.form.adapted(task), *norms]

    def displacement(self, shares: Tensor, keep: Tensor | None) -> list[Tensor | None]:
        """How far tasks have moved, times shares [T], summed over the tasks to keep; in the order of `PARTS`."""
        norms = [None if self.norm is None else self.norm.parameters.get(part) for part in PARTS[2:]]
        found = [None if own is None else own.displacement(shares, keep) for own in norms]
        return [*self.form.displacement(shares, keep), *found]

    def squared_displacement(self) -> list[Tensor]:
        """Of form and normalisation, the square of how far each task has moved, [T]."""
        found = [] if not self.form_moves else [self.form.squared_displacement()]
        found += [own.squared_displacement() for part in PARTS[2:] if (own := self.own(part)) is not None]
        return [squared for squared in found if squared is not None]

    def rate_gradient(self, found: Reversed) -> Tensor | None:
        """Of the layer's rates, for each task, [T, steps taken, or 1 where they share a rate]."""
        terms = [self.form.rate_gradient(found.x, found.d)] if self.form_moves else []
        for part in PARTS[2:]:
            own = self.own(part)
            if own is not None and own.moved:
                terms.append(-torch.stack([(moved * found.norm[part]).sum(1) for moved in own.moved], 1))
        present = [term for term in terms if term is not None]
        return torch.stack(present).sum(0) if present else None

    def element_rate_gradient(self, part: str, found: Reversed) -> Tensor:
        """Of the rates of one part's elements, for each task, [T, *shape]."""
        own = self.own(part)
        assert own is not None
        if part.startswith("norm"):
            gradient = found.norm[part]
        else:
            assert isinstance(self.form, PrimalLayer)
            gradient = self.form.gradients(found.x, found.d)[part]
        return own.rate_gradient(gradient).view(-1, *own.shared.shape)


class Builder:
    """Makes the cells of a problem from its parameters, in the forms of a plan.

    Args:
        parameters: as engines list them, in the dtype to compute in.
    """

    def __init__(self, problem: Problem, forms: tuple[str, ...], parameters: FlatParameters) -> None:
        self.problem, self.forms = problem, forms
        self.parameters = layers_of(problem, parameters)
        self.rates = rates_of(problem, parameters)
        self.learned: list[LearnedCoefficients] | None = None
        inner = problem.inner
        if inner.learn_lr not in (None, "element"):
            (rates,) = self.rates
            assert rates is not None
            self.step_rates = rates.expand(inner.steps, -1)
            if any(form == "dual" for form in forms):
                self.learned = learned_coefficients(
                    self.step_rates, inner.momentum, inner.weight_decay, inner.nesterov, inner.decoupled
                )

    def cell(self, i: int, support: Tensor | None, tasks: int, shots: int) -> Cell:
        """Layer i; support: its input on the support set [T, S, in] where that is the same at every step."""
        layer, parameters = self.problem.network.layers[i], self.parameters[i]
        moves = self.problem.inner.adapt[i] if self.problem.inner.steps else ()
        norm = None
        if layer.norm is not None:
            norm = NormLayer(layer.norm, {p: self._own(i, p) for p in PARTS[2:] if parameters[p] is not None})
        form = self._form(i, moves, support, tasks, shots)
        return Cell(form, norm, layer.activation, moves)

    def _form(self, i: int, moves: tuple[str, ...], support: Tensor | None, tasks: int, shots: int) -> SharedLayer:
        inner, name, fold = self.problem.inner, self.forms[i], fold_step(self.forms[i])
        weight, bias = self.parameters[i]["weight"], self.parameters[i]["bias"]
        assert weight is not None

        def primal() -> PrimalLayer:
            own = [self._own(i, part) if part in moves else None for part in PARTS[:2]]
            return PrimalLayer(weight, bias, *own)

        def dual(steps: int) -> DualFirstLayer | DualLayer:
            rates = tuple(self._rates(i, "weight"))[:steps]
            options = (weight, bias, inner, self._coefficients(i, rates), "bias" in moves)
            if support is not None:
                return DualFirstLayer(*options, rates, support)
            return DualLayer(*options, steps, tasks, shots)

        if name == "shared":
            return SharedLayer(weight, bias)
        if name == "primal":
            return primal()
        if name == "dual":
            return dual(inner.steps)
        assert fold is not None, f"no form {name!r}"
        return FoldingLayer(dual(fold), primal(), fold, inner.momentum > 0.0 and fold < inner.steps)

    def _coefficients(self, i: int, rates: tuple[Rate, ...]) -> Coefficients | LearnedCoefficients:
        if self.learned is not None:
            return self.learned[i]
        inner = self.problem.inner
        fixed = tuple(float(rate) for rate in rates)
        return coefficients(fixed, inner.momentum, inner.weight_decay, inner.nesterov, inner.decoupled)

    def _own(self, i: int, part: str) -> OwnParameter:
        shared = self.parameters[i][part]
        assert shared is not None
        return OwnParameter(shared, self.problem.inner, self._rates(i, part))

    def _rates(self, i: int, part: str) -> tuple[Rate, ...]:
        """The rate of each step."""
        inner = self.problem.inner
        if inner.learn_lr is None:
            return inner.layer_rates(i)
        if inner.learn_lr == "element":
            rate = self.rates[len(PARTS) * i + PARTS.index(part)]
            return () if rate is None else (rate,) * inner.steps
        return self.step_rates[:, i].unbind()
