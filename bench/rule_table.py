"""Which engine and form takes which rule, as the planner says: `python -m bench.rule_table docs/rules.md`.

Writes the table and the reasons under the page's heading `<!-- table: rules -->`, in place of what is there.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fomaml_fused as ff
from fomaml_fused.batch import Sizes
from fomaml_fused.batched_plans import form_obstacle
from fomaml_fused.native_plans import native_obstacle
from fomaml_fused.plans import KERNEL_ENGINES, Override

from .pages import put

PLACE = "rules"


@dataclass(frozen=True)
class Rule:
    """A rule by its name, and how one asks for it.

    Attributes:
        options: of `FOMAML`.  norm: a module behind the first Linear.  each_step: support samples of every step.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    norm: type[nn.Module] | None = None
    each_step: bool = False


RULES = (
    Rule("SGD"),
    Rule("momentum, coupled decay", {"momentum": 0.9, "weight_decay": 0.1}),
    Rule("Nesterov's momentum", {"momentum": 0.9, "nesterov": True}),
    Rule("decoupled decay", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    Rule("Adam", {"optimizer": "adam"}),
    Rule("`max_grad_norm`", {"max_grad_norm": 1.0}),
    Rule("`max_grad_value`", {"max_grad_value": 0.1}),
    Rule("Reptile", {"outer": "reptile"}),
    Rule("multi-step loss", {"step_weights": (0.2, 0.3, 0.5)}),
    Rule('`learn_lr="global"`, `"layer"`', {"learn_lr": "layer"}),
    Rule('`learn_lr="step"`, `"layer_step"`', {"learn_lr": "layer_step"}),
    Rule('`learn_lr="element"` (Meta-SGD)', {"learn_lr": "element"}),
    Rule("layers that move or stay whole", {"adapt": "head"}),
    Rule("parts of a layer, weights among them", {"adapt": lambda name, _: "weight" in name}),
    Rule("biases alone", {"adapt": lambda name, _: "bias" in name}),
    Rule("support samples of each step", each_step=True),
    Rule("tasks of different counts"),  # groups of tasks that are alike, each a batch like any other
    Rule("LayerNorm", norm=nn.LayerNorm),
    Rule("BatchNorm by task", norm=nn.BatchNorm1d),
    Rule('`nonfinite="skip"`', {"nonfinite": "skip"}),
    Rule("callable losses", {"loss": lambda outputs, targets: (outputs - targets).square().sum(1)}),
)
COLUMNS = ("batched, primal", "batched, dual", "native", *KERNEL_ENGINES)


def obstacles(rule: Rule) -> Iterator[str | None]:
    """For each of the columns, why it does not take a rule; None where it does."""
    from fomaml_fused.kernel_plans import kernel_plans

    layers: list[nn.Module] = [nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)]
    if rule.norm is not None:
        statistics = {"track_running_stats": False} if rule.norm is nn.BatchNorm1d else {}
        layers.insert(1, rule.norm(16, **statistics))
    problem = ff.FOMAML(nn.Sequential(*layers), lr=0.1, steps=3, **rule.options).problem
    sizes = Sizes(8, 4, 4, torch.float32, torch.device("cpu"), rule.each_step)
    for form in ("primal", "dual"):
        moving = [i for i, parts in enumerate(problem.inner.adapt) if parts]
        yield next((why for i in moving if (why := form_obstacle(problem, i, form)) is not None), None)
    yield native_obstacle(problem, sizes, Override())
    plans = kernel_plans(problem, sizes, Override(), "highest")
    for engine in KERNEL_ENGINES:
        plan = plans[engine]
        yield plan if isinstance(plan, str) else None


def table() -> str:
    """The table as Markdown, and below it the reasons that its numbers stand for."""
    reasons: dict[str, int] = {}
    lines = [f"| rule | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for rule in RULES:
        cells = [
            "yes" if why is None else f"no ({reasons.setdefault(why, len(reasons) + 1)})" for why in obstacles(rule)
        ]
        lines.append(f"| {rule.name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {why}." for why, number in reasons.items())])


def written(page: str) -> str:
    """A page with the table in its place.

    Raises:
        ValueError: it has no such place.
    """
    return put(page, PLACE, table())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    page: Path = parser.parse_args().page
    page.write_text(written(page.read_text()))


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels' part of the planner asks for no device then
    main()
