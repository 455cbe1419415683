"""Settings of all tests: the `--quick` ones, memory poisoned with NaN, one thread, repeatable random problems."""

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "full", derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("quick", settings.get_profile("full"), max_examples=20)
settings.register_profile("explore", settings.get_profile("full"), derandomize=False, max_examples=5000)

# Tests that `--quick` leaves out; pyproject.toml says what each marker means.
LEFT_OUT = ("kernels", "compiles", "processes", "full")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="run the tests of `make test`; without it, all")
    parser.addoption(
        "--kernels",
        choices=("interpreted", "driver", "gpu", "sm_80", "sm_86", "sm_89", "sm_90"),
        default="interpreted",
        help="where kernel tests run: in Triton's interpreter, on what its driver serves, on a GPU, or emulated",
    )
    parser.addoption("--races", action="store_true", help="watch an emulated GPU for races; several times slower")
    parser.addoption(
        "--sums",
        choices=("exact", "hardware"),
        default="exact",
        help="how an emulated GPU sums matrix products; hardware: as tensor cores are described to",
    )


def pytest_configure(config: pytest.Config) -> None:
    quick = config.getoption("--quick")
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick" if quick else "full"))
    # Triton reads this where a kernel is defined, so it is set before anything imports one.
    where = config.getoption("--kernels")
    if where == "interpreted":
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    if where.startswith("sm_"):
        from tests import virtual_gpu

        hardware = config.getoption("--sums") == "hardware"
        virtual_gpu.activate(int(where[3:]), races=config.getoption("--races"), hardware_sums=hardware)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--quick`, leave out the tests that are marked so, and all but a sample of a grid's cases."""
    if not config.getoption("--quick"):
        return
    position: Counter[str] = Counter()  # of a case within its test's grid
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        test = item.nodeid.partition("[")[0]
        sampled = item.get_closest_marker("sampled")
        every = 1 if sampled is None else sampled.args[0]
        marked = any(item.get_closest_marker(name) for name in LEFT_OUT)
        (left_out if marked or position[test] % every else kept).append(item)
        position[test] += 1
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(autouse=True)
def _poisoned_and_seeded() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def emulated(request: pytest.FixtureRequest) -> int:
    """The architecture of the emulated GPU; a test that needs one is skipped without."""
    where: str = request.config.getoption("--kernels")
    if not where.startswith("sm_"):
        pytest.skip("kernels are not emulated")
    return int(where[3:])
