"""What every test runs under: fresh memory poisoned with NaN, one thread a worker, repeatable random problems."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", settings.get_profile("ci"), derandomize=False, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernels",
        choices=("interpreted", "driver", "gpu"),
        default="interpreted",
        help="where kernel tests run: in Triton's interpreter, on what its active driver serves, or on a GPU alone",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Triton reads this where a kernel is defined, so it is set before anything imports one.
    if config.getoption("--kernels") == "interpreted":
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)


@pytest.fixture(autouse=True)
def _poisoned_and_seeded() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    yield
    torch.use_deterministic_algorithms(False)
