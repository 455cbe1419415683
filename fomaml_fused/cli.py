"""The command line: `fomaml-fused train sine | digits | images`, `fomaml-fused plan`, `fomaml-fused doctor`."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .engines import native_library
from .module import FOMAML
from .network import MODULES
from .problem import LOSSES
from .text import table
from .train import digits, images, sine
from .train.loop import InterruptedRunError, require_demo_packages
from .train.ranks import launched
from .train.rules import Rules, described
from .version import __version__

RUNS: dict[str, tuple[type[Any], Callable[..., str], str]] = {
    "sine": (sine.SineConfig, sine.run, "sine regression of the MAML paper"),
    "digits": (digits.DigitsConfig, digits.run, "few-shot classification of held-out digits"),
    "images": (images.ImagesConfig, images.run, "learned initialisations for images as fields"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 1 for bad input, 130 for an interrupted run."""
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    try:
        return int(command(**options))
    except InterruptedRunError:
        typed = [*(sys.argv[1:] if arguments is None else arguments), "--resume"]
        print(f"interrupted and saved; go on with: fomaml-fused {shlex.join(typed)}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"fomaml-fused: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fomaml-fused", description="First-order MAML for multi-layer perceptrons.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="meta-train on real tasks").add_subparsers(required=True, metavar="TASKS")
    for name, (config, _, description) in RUNS.items():
        run = train.add_parser(name, help=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        rules = run.add_argument_group("rules of the inner and outer loop")
        for option, default, told in described(config):
            group = rules if option in {rule.name for rule in fields(Rules)} else run
            kind: dict[str, Any] = {"action": "store_true"} if isinstance(default, bool) else {"type": type(default)}
            group.add_argument(f"--{option.replace('_', '-')}", default=default, **{**kind, **told})
        run.add_argument("--out", type=Path, default=Path("runs") / name, help="folder for everything written")
        run.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
        run.set_defaults(command=_train, name=name)

    plan = commands.add_parser("plan", help="say how a problem of given sizes would be computed, and why")
    plan.add_argument("widths", help="widths from input to output, as 784-256-128-64-64-5")
    plan.add_argument("--activation", choices=MODULES, default="relu")
    plan.add_argument("--loss", choices=LOSSES, default="cross_entropy")
    plan.add_argument("--tasks", type=int, default=32)
    plan.add_argument("--shots", type=int, default=5, help="support samples a task")
    plan.add_argument("--queries", type=int, default=15, help="query samples a task")
    plan.add_argument("--steps", type=int, default=5)
    plan.add_argument("--adapt", choices=("all", "head", "body"), default="all")
    plan.add_argument("--momentum", type=float, default=0.0)
    plan.add_argument("--compile", action="store_true", help="as compiled code, where it is the faster")
    plan.add_argument("--device", default="cpu")
    plan.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32")
    plan.set_defaults(command=_plan)

    doctor = commands.add_parser("doctor", help="versions, devices, and what would run here")
    doctor.set_defaults(command=_doctor)
    return parser


def _train(name: str, out: Path, resume: bool, **options: Any) -> int:
    require_demo_packages()
    for option, value in options.items():
        if isinstance(value, int) and not isinstance(value, bool) and option != "seed" and value < 1:
            raise ValueError(f"{option} is {value}; it takes at least 1")
    config, run, _ = RUNS[name]
    with launched() as ranks:
        try:
            found = run(config(**options), out, resume=resume)
        except InterruptedRunError:
            if ranks.first:
                raise
            return 130
    if ranks.first:
        print(found)
    return 0


def _plan(
    widths: str,
    activation: str,
    loss: str,
    tasks: int,
    shots: int,
    queries: int,
    steps: int,
    adapt: str,
    momentum: float,
    compile: bool,
    device: str,
    dtype: str,
) -> int:
    try:
        sizes = [int(width) for width in widths.split("-")]
    except ValueError as error:
        raise ValueError(f"widths is {widths!r}; it takes numbers, as 784-256-128-64-64-5") from error
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"widths is {widths!r}; it takes at least an input and an output width, each 1 or more")
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after, device="meta"), MODULES[activation]()]
    options: dict[str, Any] = {"steps": steps, "loss": loss, "adapt": adapt, "momentum": momentum, "compile": compile}
    meta = FOMAML(nn.Sequential(*layers[:-1]), **options)
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; it takes a device of torch, as cpu or cuda") from error
    print(meta.plan(tasks, shots, queries, dtype=getattr(torch, dtype), device=where))
    return 0


def _doctor() -> int:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    packages = ("torch", "triton", "numpy", "matplotlib", "scikit-image", "scikit-learn", "tqdm")
    rows = [["fomaml-fused", __version__], ["python", platform.python_version()]]
    rows += [[name, version(name)] for name in packages]
    rows.append(["cpu", f"{platform.machine()}, {torch.get_num_threads()} threads"])
    rows.append(["float32 matmul precision", torch.get_float32_matmul_precision()])
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices:
        name = "" if device.type == "cpu" else f"{torch.cuda.get_device_name(device)}: "
        plan = FOMAML(nn.Linear(1, 1)).plan(1, 1, device=device)
        rows.append([f"on {device}", f"{name}engine {plan.engine}: {plan.reason}"])
    why = native_library.obstacle()
    rows.append(["native engine, with compile", f"kept in {native_library.folder()}" if why is None else why])
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
