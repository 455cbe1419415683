"""What is installed: the packages, kernels under their own roof, no import that needs Triton."""

import subprocess
import sys
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_packages_and_no_top_level_kernels(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"fomaml_fused"}
    source = {
        f"fomaml_fused/{path.relative_to(ROOT / 'fomaml_fused')}" for path in (ROOT / "fomaml_fused").rglob("*.py")
    }
    kernels = {
        f"fomaml_fused/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == source | kernels
    assert "fomaml_fused/kernels/configs/default.json" in names


def test_the_wheel_installs_and_trains_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True, system_site_packages=False)
    python = environment / "bin" / "python"
    # torch is too large to install again: the new environment sees that of this one, behind its own packages.
    site = next(environment.glob("lib/python*/site-packages"))
    torch_home = Path(find_spec("torch").origin).parent.parent  # type: ignore[union-attr,arg-type]
    (site / "borrowed.pth").write_text(f"{torch_home}\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True, cwd=tmp_path)
    program = """
import importlib.util, torch, fomaml_fused as ff
assert importlib.util.find_spec("kernels") is None
assert importlib.util.find_spec("fomaml_fused.kernels") is not None
assert "venv" in ff.__file__, ff.__file__
model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
ff.FOMAML(model)(torch.randn(3, 5, 2), torch.randn(3, 5, 1), torch.randn(3, 5, 2), torch.randn(3, 5, 1)).backward()
assert all(p.grad.isfinite().all() for p in model.parameters())
"""
    subprocess.run([python, "-c", program], check=True, cwd=tmp_path)
    found = subprocess.run(
        [environment / "bin" / "fomaml-fused", "--version"], check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == "0.1.0"


def test_the_editable_install_leaves_no_top_level_kernels(tmp_path: Path) -> None:
    program = """
import importlib.util
assert importlib.util.find_spec("kernels") is None
assert importlib.util.find_spec("fomaml_fused.kernels") is not None
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_importing_needs_neither_triton_nor_a_driver(tmp_path: Path) -> None:
    program = """
import sys
sys.modules["triton"] = None
import fomaml_fused, fomaml_fused.cli
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_kernels_stand_on_their_own() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        lines = [line.split() for line in path.read_text().splitlines()]
        imports = [words[1] for words in lines if words[:1] in (["import"], ["from"])]
        allowed = {"triton", "torch", "", *sys.stdlib_module_names}
        assert all(name.split(".")[0] in allowed for name in imports), path


def test_imports_go_one_way() -> None:
    """Cli -> train -> module -> autograd -> planner -> engines -> kernels, problem, batch; nothing the other way."""
    order = [
        ["kernels", "outside", "text", "version"],
        ["inner"],
        ["problem", "rates"],
        ["batch", "network", "reference", "sirens", "tasks"],
        ["engines"],
        ["costs", "kernel_costs", "plans"],
        ["batched_plans", "kernel_plans"],
        ["planner"],
        ["autograd"],
        ["adapted", "metrics", "parts", "ragged"],
        ["calls"],
        ["graph"],
        ["module"],
        ["presets"],
        ["diagnostics", "train", "tuning"],
        ["cli"],
    ]
    rank = {name: i for i, names in enumerate(order) for name in names}
    package = ROOT / "fomaml_fused"
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for line in path.read_text().splitlines():
            words = line.split()
            inside = path.parent != package
            if words[:1] != ["from"] or not words[1].startswith("." * (2 if inside else 1)):
                continue
            target = words[1].lstrip(".").split(".")[0] or words[3].rstrip(",")
            assert rank[target] <= rank[room], f"{path.name} imports {target}"
