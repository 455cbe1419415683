"""What is installed: the packages, kernels under their own roof, no import that needs Triton."""

import os
import subprocess
import sys
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parent.parent
OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive, as a package index would have both: that has to be whole too."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the wheel in it.

    torch is too large to install again: the environment sees that of this one, behind its own packages.
    """
    environment = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True, env=OUTSIDE)
    (site,) = environment.glob("lib/python*/site-packages")
    torch_home = Path(find_spec("torch").origin).parent.parent  # type: ignore[union-attr,arg-type]
    (site / "borrowed.pth").write_text(f"{torch_home}\n")
    return python


def test_the_wheel_holds_the_packages_and_no_top_level_kernels(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"fomaml_fused"}
    source = {
        f"fomaml_fused/{path.relative_to(ROOT / 'fomaml_fused')}" for path in (ROOT / "fomaml_fused").rglob("*.py")
    }
    kernels = {
        f"fomaml_fused/kernels/{path.relative_to(ROOT / 'kernels')}"
        for pattern in ("*.py", "configs/*.json", "native/*")
        for path in (ROOT / "kernels").rglob(pattern)
    }
    assert {f"fomaml_fused/kernels/{name}" for name in ("configs/default.json", "native/step.cpp")} < kernels
    assert {name for name in names if ".dist-info" not in name} == source | kernels


def test_the_wheel_trains_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    program = """
import importlib.util, sys, torch, fomaml_fused as ff
from fomaml_fused.kernels.configuration import configuration
assert importlib.util.find_spec("kernels") is None
assert ff.__file__.startswith(sys.prefix), ff.__file__
assert configuration("cuda-90", "resident", 64).warps in (1, 2, 4, 8)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(1, 20), torch.nn.ReLU(), torch.nn.Linear(20, 1))
meta, sampler = ff.FOMAML(model, lr=0.01, steps=2), ff.tasks.Sinusoids(shots=5, queries=5)
optimizer, batch = torch.optim.SGD(model.parameters(), lr=0.01), sampler.sample(4)
losses = []
for _ in range(3):
    optimizer.zero_grad()
    losses.append(meta(*batch))
    losses[-1].backward()
    optimizer.step()
assert losses[0] > losses[1] > losses[2], losses
native = ff.FOMAML(model, lr=0.01, steps=2, compile=True)
assert native.plan(4, 5).engine == "native"
torch.testing.assert_close(native(*batch), meta(*batch))
"""
    subprocess.run([str(installed), "-I", "-c", program], check=True, cwd=tmp_path)


def test_the_wheel_brings_the_command(installed: Path, tmp_path: Path) -> None:
    command = [str(installed.with_name("fomaml-fused")), "--version"]
    found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=OUTSIDE)
    assert found.stdout.strip() == "0.1.0"


def test_the_editable_install_leaves_no_top_level_kernels(tmp_path: Path) -> None:
    program = """
import importlib.util
assert importlib.util.find_spec("kernels") is None
assert importlib.util.find_spec("fomaml_fused.kernels") is not None
"""
    subprocess.run([sys.executable, "-I", "-c", program], check=True, cwd=tmp_path)


def test_importing_needs_neither_triton_nor_a_driver_nor_the_compiler(tmp_path: Path) -> None:
    program = """
import sys
sys.modules["triton"] = None
import fomaml_fused, fomaml_fused.cli
assert "torch._dynamo" not in sys.modules, "the import takes seconds"
"""
    subprocess.run([sys.executable, "-I", "-c", program], check=True, cwd=tmp_path)


def test_kernels_stand_on_their_own() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        lines = [line.split() for line in path.read_text().splitlines()]
        imports = [words[1] for words in lines if words[:1] in (["import"], ["from"])]
        allowed = {"triton", "torch", "", *sys.stdlib_module_names}
        assert all(name.split(".")[0] in allowed for name in imports), path


def test_imports_go_one_way() -> None:
    """Cli -> train -> module -> autograd -> planner -> engines -> kernels, problem, batch; nothing the other way."""
    order = [
        ["hashing", "kernels", "numbered", "outside", "text", "version"],
        ["inner"],
        ["problem", "rates"],
        ["batch", "network", "reference", "sirens", "tasks"],
        ["engines"],
        ["costs", "kernel_costs", "plans"],
        ["batched_plans", "kernel_plans"],
        ["native_plans"],
        ["planner"],
        ["autograd", "packs"],
        ["adapted", "metrics", "parts", "ragged"],
        ["calls"],
        ["graph"],
        ["module"],
        ["presets"],
        ["compat", "diagnostics", "train", "tuning"],
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


def test_a_checkout_is_imported_without_being_installed() -> None:
    """As `make gpu` does, whose machine may have no setuptools that builds this."""
    program = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import fomaml_fused, fomaml_fused.kernels.configuration as configuration
print(configuration.__file__, configuration.configuration("cuda-90", "resident", 64).warps)
"""
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(ROOT / "kernels" / "configuration.py"))
