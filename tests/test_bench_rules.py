"""The comparison of rules: what it runs and keeps, and that the docs quote what is stored."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from bench.rules import MEASURES, QUICK, RATES, RULES, SHARED, TUNING_SEED, Job, cells, main, merged, render, summarize

ROOT = Path(__file__).parent.parent
STORED: dict[str, Any] = json.loads((ROOT / "bench" / "results" / "rules.json").read_text())
PAGE = (ROOT / "docs" / "rules.md").read_text()


@pytest.mark.full
def test_the_quick_run_measures_every_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, figure = tmp_path / "rules.json", tmp_path / "rules.png"
    monkeypatch.setattr("sys.argv", ["rules", "--quick", "--save", str(saved), "--figure", str(figure)])
    main()
    found = json.loads(saved.read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"rules.json", "rules.png"}
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert [(row["tasks"], row["rule"]) for row in found["rows"]] == [(t, r) for t in SHARED for r in RULES]
    for row in found["rows"]:
        assert [len(steps) for steps in row["seeds"]] == [SHARED[row["tasks"]]["steps"] + 1] * QUICK.seeds
        assert_well_chosen(row)
    printed = capsys.readouterr().out
    for tasks in MEASURES:
        assert render(found["rows"], tasks) in printed


def assert_well_chosen(row: dict[str, Any]) -> None:
    """The inner rate is the best of those tried, and both its neighbours were."""
    sign = 1 if row["tasks"] == "sine" else -1
    tried = {float(lr): math.inf if value is None else sign * value for lr, value in row["validation"].items()}
    assert tried[row["lr"]] == min(tried.values())
    i = RATES.index(row["lr"])
    assert set(RATES[max(i - 1, 0) : i + 2]) <= set(tried)


@pytest.mark.parametrize("tasks", SHARED)
def test_a_run_is_repeatable_and_rates_are_chosen_on_other_tasks(tasks: str) -> None:
    def run(seed: int) -> list[float | None]:
        return Job(tasks, "FOMAML", 0.01, seed, 2, 5).run()

    assert run(0) == run(0) != run(1)
    assert run(TUNING_SEED) != run(0)


def test_mean_and_standard_error_are_over_seeds() -> None:
    seeds: list[list[float | None]] = [[1.0, 5.0, 2.0], [3.0, 5.0, None]]
    row = {"tasks": "sine", "seeds": seeds, **summarize(seeds)}
    assert (row["mean"], row["standard_error"]) == ([2.0, 5.0, None], [1.0, 0.0, None])
    assert cells(row) == ["2.000 ± 1.000", "5.000 ± 0.000", "1 of 2 diverged"]


def test_renewed_rows_take_the_place_of_kept_ones() -> None:
    kept = [{"tasks": tasks, "rule": rule, "is": "kept"} for tasks in SHARED for rule in ("ANIL", "FOMAML")]
    rows = merged(kept, [{"tasks": "sine", "rule": "ANIL", "is": "renewed"}])
    assert [(row["tasks"], row["rule"], row["is"]) for row in rows] == [
        ("sine", "FOMAML", "kept"),
        ("sine", "ANIL", "renewed"),
        ("digits", "FOMAML", "kept"),
        ("digits", "ANIL", "kept"),
    ]


def test_the_stored_comparison_is_a_whole_one() -> None:
    assert not STORED["quick"]
    assert (STORED["shared"], STORED["rules"], tuple(STORED["rates"])) == (SHARED, RULES, RATES)
    for row in STORED["rows"]:
        assert summarize(row["seeds"]) == {name: row[name] for name in ("mean", "standard_error")}
        assert_well_chosen(row)


def test_the_page_quotes_what_is_stored() -> None:
    for tasks in MEASURES:
        assert render(STORED["rows"], tasks) in PAGE
    known = {cell for row in STORED["rows"] for cell in cells(row)}
    quoted = re.findall(r"\d+\.\d+ ± \d+\.\d+", " ".join(PAGE.split()))
    assert set(quoted) <= known
    assert len(quoted) > len(known)  # beyond the tables, where each stands once
    assert "(rules.png)" in PAGE
    assert (ROOT / "docs" / "rules.png").exists()
