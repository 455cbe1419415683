"""The comparison of initialisations of fields: what it runs and keeps, and that the docs quote what is stored."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.fields import INITIALISATIONS, QUICK, RATES, Budget, Job, main, render, render_gaps
from bench.rules import TUNING_SEED, cells, summarize
from fomaml_fused.train.images import STANDARD_RATES, STEPS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "fields.md").read_text()


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "bench" / "results" / "fields.json").read_text())
    return found


def assert_whole(found: dict[str, Any], budget: Budget) -> None:
    """Every initialisation with its seeds, at the best of all rates that were tried."""
    assert [row["initialisation"] for row in found["rows"]] == list(INITIALISATIONS)
    for row in found["rows"]:
        assert [len(seed) for seed in row["seeds"]] == [len(STEPS)] * budget.seeds
        assert summarize(row["seeds"]) == {name: row[name] for name in ("mean", "standard_error")}
        tried = {float(lr): value for lr, value in row["validation"].items() if value is not None}
        if INITIALISATIONS[row["initialisation"]].tuned:
            assert set(tried) <= set(RATES) == set(map(float, row["validation"]))
            assert tried[row["lr"]] == max(tried.values())
        else:
            assert (row["lr"], tried) == (None, {})


@pytest.mark.full
def test_the_quick_run_measures_every_initialisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "fields.json"
    monkeypatch.setattr("sys.argv", ["fields", "--quick", "--save", str(saved)])
    main()
    found = json.loads(saved.read_text())
    assert_whole(found, QUICK)
    printed = capsys.readouterr().out
    assert render(found["rows"]) in printed
    assert render_gaps(found["rows"]) in printed
    gaps = {row["initialisation"]: row["gap"] for row in found["rows"]}
    measured = {name for name, seeds in gaps.items() if all(len(ends) == 2 for ends in seeds)}
    assert measured == {"FOMAML", "FOMAML, rates by layer", "exact MAML"}


def test_some_are_renewed_and_the_others_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tmp_path / "fields.json"
    rows = [{"initialisation": "exact MAML", "is": "kept"}, {"initialisation": "standard", "is": "kept"}]
    saved.write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr("bench.fields.render", lambda _: "")
    monkeypatch.setattr("bench.fields.render_gaps", lambda _: "")
    monkeypatch.setattr("sys.argv", ["fields", "--quick", "--save", str(saved), "--only", "standard"])
    main()
    first, second = json.loads(saved.read_text())["rows"]
    assert second == rows[0]
    assert (first["initialisation"], len(first["seeds"])) == ("standard", QUICK.seeds)


def test_initialisations_differ_by_how_they_are_trained_alone() -> None:
    found = {name: Job(name, 0.01, 0, QUICK).run()["psnr"] for name in INITIALISATIONS}
    assert len({tuple(decibels) for decibels in found.values()}) == len(found)
    assert Job("exact MAML", 0.01, 0, QUICK).run()["psnr"] == found["exact MAML"]
    assert Job("FOMAML", 0.01, TUNING_SEED, QUICK).run()["psnr"] != found["FOMAML"]


def test_the_stored_comparison_is_a_whole_one(stored: dict[str, Any]) -> None:
    assert not stored["quick"]
    assert stored["budget"] == vars(Budget())
    assert (tuple(stored["rates"]), tuple(stored["standard_rates"])) == (RATES, STANDARD_RATES)
    assert_whole(stored, Budget())


def test_the_page_quotes_what_is_stored(stored: dict[str, Any]) -> None:
    assert render(stored["rows"]) in PAGE
    assert render_gaps(stored["rows"]) in PAGE
    known = {cell for row in stored["rows"] for cell in cells(row)}
    assert set(re.findall(r"\d+\.\d+ ± \d+\.\d+", " ".join(PAGE.split()))) <= known
    assert stored["environment"]["torch"] in PAGE
