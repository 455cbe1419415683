"""Prints, as JSON, what the public calls launch on a GPU that need not be there; or compiles it.

python -m tests.launched sm_90              # the launches
python -m tests.launched sm_90 --compile    # compiles a cover of them: every choice of every kernel at least once
python -m tests.launched sm_90 --compile --all

In a process that does not interpret kernels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import nn

import fomaml_fused as ff
from bench.compile_only import DEVICES, Launch, recorded
from fomaml_fused.plans import KERNEL_ENGINES


def call(engine: str, everything: bool) -> None:
    """Every public call that launches a kernel, with all that a caller may leave out, or with none of it.

    Layer by layer, the last layer folds where there are two steps. Sizes are 1 in one, multiples of 16 in the other:
    numbers that Triton, if it may, compiles for.
    """
    tasks, shots, queries = (32, 16, 32) if everything else (1, 1, 1)
    x, q = torch.randn(tasks, shots, 16), torch.randn(tasks, queries, 16)
    y, t = torch.randn(tasks, shots, 16), torch.randn(tasks, queries, 16)
    model = nn.Sequential(nn.Linear(16, 16, bias=not everything), nn.GELU(), nn.Linear(16, 16), nn.Linear(16, 16))
    options: dict[str, Any] = {}
    support_weight, weights = None, {}
    if everything:
        options = {"loss": "cross_entropy", "steps": 2, "momentum": 0.9, "weight_decay": 0.01, "adapt": [1, 2]}
        q.requires_grad_()
        y, t = torch.randint(16, (tasks, shots)), torch.randint(16, (tasks, queries))
        support_weight = torch.rand(tasks, shots)
        weights = {"query_weight": torch.rand(tasks, queries), "task_weight": torch.rand(tasks)}
    meta = ff.FOMAML(model, backend="triton", precision="tf32", **options)
    forms = ("dual", "dual", "dual:1") if engine == "layered" and everything else None
    with ff.override(engine=engine, forms=forms):
        meta.adapt(x, y, support_weight=support_weight)(q)
        with torch.no_grad():
            meta(x, y, q, t)
        # A layer may need no gradient, nor, behind a backbone, any of them.
        for frozen in (model[:1], model) if everything else (model[:0],):
            frozen.requires_grad_(False)
            meta(x, y, q, t, support_weight=support_weight, **weights).backward()
            meta.predict(x, y, q, support_weight=support_weight).sum().backward()


def call_without_biases(engine: str) -> None:
    """Every public call that launches a kernel, on a network whose layers have no bias."""
    x, q = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Tanh(), nn.Linear(32, 16, bias=False))
    forms = ("dual", "dual:1") if engine == "layered" else None
    rules: list[dict[str, Any]] = [{}, {"momentum": 0.9, "weight_decay": 0.01}]
    if engine in ("chained", "primal"):
        rules.append({"max_grad_norm": 1.0})
    with ff.override(engine=engine, forms=forms):
        for options in rules:
            meta = ff.FOMAML(model, steps=2, backend="triton", precision="tf32", **options)
            meta(x, x, q.requires_grad_(), q.detach()).backward()
            meta.predict(x, x, q).sum().backward()
            meta.adapt(x, x)(q)


def call_dual_with_rules(engine: str) -> None:
    """The rules that change what the dual kernels are compiled for, or what they are launched with."""
    x, q = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Linear(16, 16))
    options: dict[str, Any] = {"steps": 2, "momentum": 0.9, "nesterov": True}
    options |= {"weight_decay": 0.01, "decoupled_weight_decay": True, "backend": "triton", "precision": "tf32"}
    passes: dict[str, Any] = {"step_weights": (0.5, 0.5)}
    passes |= {"learn_lr": "layer_step"} if engine == "dual" else {"max_grad_norm": 1.0}
    forms = ("dual", "dual", "dual:1") if engine == "layered" else None
    with ff.override(engine=engine, forms=forms):
        ff.FOMAML(model, **options, **passes)(x, x, q, q).backward()
        ff.FOMAML(model, **options, outer="reptile")(x, x).backward()
        ff.FOMAML(model, **options)(*(t[:, None].expand(-1, 2, -1, -1) for t in (x, x)), q, q).backward()
    with ff.override(engine=engine, packs=True):
        ff.FOMAML(model, **options)(x, x, q, q, support_counts=[3, 1]).backward()


def call_primal_with_rules(engine: str) -> None:
    """The rules that change what the primal kernels are compiled for, or which of them are launched."""
    x, q = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    rules: list[dict[str, Any]] = [
        {"optimizer": "adam", "learn_lr": "element", "max_grad_value": 1.0},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "max_grad_norm": 1.0, "learn_lr": "layer"},
        {"max_grad_norm": 1.0, "adapt": "head"},
        {"max_grad_norm": 1.0, "optimizer": "adam"},
        {"nonfinite": "skip", "steps": 0},
    ]
    with ff.override(engine=engine):
        for options in rules:
            ff.FOMAML(model, **{"steps": 2, **options}, backend="triton", precision="tf32")(x, x, q, q).backward()


def call_with_rules() -> None:
    """What launches the resident kernels under the rules of inner and outer loops."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    x, y, q, t = (torch.randn(32, 16, 16) for _ in range(4))
    adam = {"optimizer": "adam", "nonfinite": "skip", "max_grad_value": 1.0, "weight_decay": 0.1}
    many = {
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
        "max_grad_norm": 1.0,
    }
    rules: list[dict[str, Any]] = [
        adam,
        many | {"learn_lr": "layer", "step_weights": (0.5, 0.5), "nonfinite": "skip"},
        {"outer": "reptile", "nonfinite": "skip"},
        {"step_weights": (0.5, 0.5)},
    ]
    with ff.override(engine="resident"):
        for options in rules:
            meta = ff.FOMAML(model, steps=2, backend="triton", precision="tf32", **options)
            meta(x, y, *([] if "outer" in options else [q.requires_grad_(), t])).backward()
            meta.predict(x, y, q).sum().backward()
        meta(x[:, None].expand(-1, 2, -1, -1), y[:, None].expand(-1, 2, -1, -1), q, t).backward()


def described(launch: Launch) -> dict[str, Any]:
    """The kernel, the type of each argument and what is known of its value; of a tuple's, by element."""
    source = launch.source
    types: dict[str, str] = {}
    for name, kind in source.signature.items():
        types |= {f"{name}[{i}]": k for i, k in enumerate(kind)} if isinstance(kind, tuple) else {name: kind}

    def argument(path: tuple[int, ...]) -> str:
        return "".join([source.fn.arg_names[path[0]], *(f"[{i}]" for i in path[1:])])

    facts = {argument(path): facts for path, facts in source.attrs.items() if facts}
    module = source.fn.__module__.rpartition(".")[2]
    return {"kernel": f"{module}.{launch.kernel}", "types": types, "facts": facts}


def choices(launch: Launch) -> set[tuple[str, str, str]]:
    """What a launch is compiled for: each field of its spec, other constants, and the type of each pointer or None."""
    spec = launch.constant("SPEC")
    found = {} if spec is None else {f.name: str(getattr(spec, f.name)) for f in fields(spec)}
    found |= {name: kind for name, kind in described(launch)["types"].items() if name.startswith("p_")}
    names = launch.source.fn.arg_names
    for path, value in launch.source.constants.items():
        if names[path[0]] != "SPEC":
            found["".join([names[path[0]], *(f"[{i}]" for i in path[1:])])] = str(value)
    module = launch.source.fn.__module__
    return {(f"{module}.{launch.kernel}", name, value) for name, value in found.items()}


def cover(launches: Sequence[Launch]) -> list[Launch]:
    """A few of the launches that have every choice that any of them has."""
    of = {launch.key: (launch, choices(launch)) for launch in launches}
    missing = set().union(*(chosen for _, chosen in of.values()))
    taken = []
    while missing:
        launch, chosen = max(of.values(), key=lambda pair: len(pair[1] & missing))
        taken.append(launch)
        missing -= chosen
    return taken


def launched(target: str) -> list[Launch]:
    """Every different launch of the public calls on a device."""
    with recorded(target) as launches:
        for engine in KERNEL_ENGINES:
            call(engine, everything=False)
            call(engine, everything=True)
            call_without_biases(engine)
            if engine in ("dual", "layered"):
                call_dual_with_rules(engine)
            if engine in ("chained", "primal"):
                call_primal_with_rules(engine)
        call_with_rules()
    return list({launch.key: launch for launch in launches}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=DEVICES)
    parser.add_argument("--compile", action="store_true", help="compile, and print how many launches that were")
    parser.add_argument("--all", action="store_true", help="compile all launches instead of a cover of them")
    options = parser.parse_args()
    launches = launched(options.target)
    if not options.compile:
        print(json.dumps([described(launch) for launch in launches]))
        return
    launches = launches if options.all else cover(launches)
    for launch in launches:
        launch.compile()
    print(len(launches))


if __name__ == "__main__":
    main()
