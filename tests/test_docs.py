"""The code that README shows runs, and the figures it quotes are those of the stored benchmark."""

import inspect
import json
import re
from pathlib import Path

import pytest

import fomaml_fused as ff
from bench import compiled, counted, report
from bench.compile_only import MAIN_DEVICES
from bench.rule_table import written

ROOT = Path(__file__).parent.parent


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_readme_runs_as_it_stands() -> None:
    program = "\n".join(block for block in blocks("README.md") if "l2l" not in block).replace("range(1000)", "range(3)")
    assert "meta.plan" in program
    space: dict[str, object] = {}
    exec(compile(program, "README.md", "exec"), space)
    assert float(space["loss"].detach()) > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", ["docs/index.md", "docs/rules.md", "docs/fields.md", "docs/pytorch.md"])
def test_every_block_of_a_page_runs_as_it_stands(page: str) -> None:
    space: dict[str, object] = {}
    for i, block in enumerate(blocks(page)):
        exec(compile(block.replace("range(600)", "range(2)"), f"{page}, block {i}", "exec"), space)
        if "loss" in space and "nonfinite" not in block:
            assert space["loss"].isfinite()  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_tables_of_figures_are_the_stored_ones(page: str) -> None:
    """Else: python -m bench.report --write README.md docs/benchmarks.md"""
    text = (ROOT / page).read_text()
    assert report.written(text) == text


def test_the_kernels_page_shows_what_was_counted_and_compiled() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    counts = json.loads((ROOT / "bench" / "results" / "counted.json").read_text())
    for kernel in ("meta_kernel", "inner_kernel", "query_kernel", "pass_kernel"):
        assert counted.render(counts, kernel) in text
    rows = json.loads((ROOT / "bench" / "results" / "compiled.json").read_text())["rows"]
    assert compiled.limits(rows) in text
    assert compiled.markdown(rows, "sine meta_kernel") in text
    assert compiled.markdown(rows, "meta_siren pass_kernel inner own") in text
    main = [row["case"] for row in rows if row["target"] in MAIN_DEVICES]
    assert f"{len([case for case in main if re.match('(meta_siren|policy|field) ', case)])} rows spills" in text


def test_docs_link_to_what_is_there() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_reference_page_has_all_that_is_public() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    directives = re.findall(r"^\.\. auto\w+:: (?:fomaml_fused\.)?([\w.]+)$", page, re.M)
    assert {*ff.__all__} - {*directives} == {"__version__"}


@pytest.mark.parametrize("documented", [ff.FOMAML, ff.FOMAML.forward])
def test_every_argument_of_the_module_is_documented(documented: object) -> None:
    text = inspect.getdoc(documented) or ""
    named = {name for line in re.findall(r"^    ([\w, ]+):", text, re.M) for name in line.split(", ")}
    assert {*inspect.signature(documented).parameters} - named <= {"self"}  # type: ignore[arg-type]


def test_every_statement_that_claims_a_test_has_it() -> None:
    text = (ROOT / "docs" / "math.md").read_text()
    mentioned = re.findall(r"✓\s+`(tests/\w+\.py)::(\w+)`", text)
    assert len(mentioned) == text.count("✓") - 1  # the first one explains the sign
    for path, name in mentioned:
        assert f"def {name}(" in (ROOT / path).read_text(), name


def test_the_table_of_rules_is_the_planners() -> None:
    """Else: python -m bench.rule_table docs/rules.md"""
    pytest.importorskip("triton")
    page = (ROOT / "docs" / "rules.md").read_text()
    assert written(page) == page
