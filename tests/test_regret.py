"""The sweep that measures the planner's choices: its problems, its measurements, and the goal that its file holds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.regret import NAMED, Case, cases, choices, regret, render, summarize
from bench.workloads import WORKLOADS, Workload

TINY = Case(Workload("", (3, 8, 5), "relu", 4, 3, 2, 2, "mse"), 0.9)


def test_a_seed_gives_its_problems() -> None:
    drawn = list(cases(20, 0))
    assert drawn == list(cases(20, 0))
    assert len({str(case) for case in [*drawn, *cases(20, 1)]}) == 40


def test_the_planners_choice_is_compared_with_others() -> None:
    chosen, *others = choices(TINY)
    plan = TINY.plan()
    assert (chosen.forms, chosen.chunk) == (plan.forms, plan.chunk)
    assert chosen not in others
    assert {("primal",) * 2, ("dual",) * 2, ("dual:1",) * 2, ("dual:2",) * 2} <= {c.forms for c in [chosen, *others]}
    assert {1, 2, 4} <= {c.chunk for c in [chosen, *others]}


@pytest.mark.parametrize("name", NAMED)
def test_a_workload_is_compared_in_other_chunks_and_blocks(name: str) -> None:
    case = Case(WORKLOADS[name], 0.0)
    chosen, *others = choices(case)
    plan = case.plan()
    assert (chosen.forms, chosen.chunk, chosen.rows) == (plan.forms, plan.chunk, plan.rows)
    assert chosen not in others
    found = {(choice.chunk, choice.rows) for choice in others if choice.forms == chosen.forms}
    assert len({chunk for chunk, _ in found}) >= 3
    assert None in {rows for _, rows in [*found, (chosen.chunk, chosen.rows)]}
    assert len({rows for _, rows in found}) >= 2
    for choice in others:
        told = case.plan(**choice.told)
        assert (told.forms, told.chunk, told.rows) == (choice.forms, choice.chunk, choice.rows)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_tiny_problem_is_measured(momentum: float) -> None:
    row = regret(replace(TINY, momentum=momentum), budget=0.0)
    assert row["regret"] == row["chosen_s"] / row["best_s"] >= 1.0
    assert {row["chosen"], row["best"]} <= set(row["seconds"])
    assert len(row["seconds"]) == row["choices"] == len(choices(replace(TINY, momentum=momentum)))


def test_the_report_counts_what_is_close_and_shows_the_worst() -> None:
    rows: list[dict[str, Any]] = [
        {"problem": f"problem {i}", "regret": 1 + i / 10, "chosen": "a", "chosen_s": 1e-3, "best": "b", "best_s": 5e-4}
        for i in range(5)
    ]
    summary = summarize(rows)
    assert (summary["problems"], summary["within_1.25"], summary["quantiles"]["50%"]) == (5, 0.6, 1.2)
    named = [{"problem": "rl", "regret": 1.0, "chosen": "a", "chosen_s": 1e-3, "best": "a", "best_s": 1e-3}]
    text = render(summary, rows, named, worst=2)
    assert "1.00    rl" in text
    assert "5 problems: 60.0% within 1.25 of the best choice" in text
    assert "1.40    problem 4" in text
    assert "problem 2" not in text


def test_what_is_stored_holds_the_goal() -> None:
    stored = json.loads((Path(__file__).parent.parent / "bench" / "results" / "regret-cpu-2-cores.json").read_text())
    assert stored["summary"] == summarize(stored["rows"])
    assert stored["summary"]["problems"] >= 200
    assert stored["summary"]["within_1.25"] >= 0.9
