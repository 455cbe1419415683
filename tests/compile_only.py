"""A Triton driver for an NVIDIA GPU that is not there: what is launched compiles, and does not run.

python -m tests.compile_only sm_90    # in a process that does not interpret: what the package launches, as JSON
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

import fomaml_fused as ff
from bench.compiled import CASES, SHARED_MEMORY, TARGETS, Case


class CompileOnlyDriver(DriverBase):  # type: ignore[misc]
    """Serves CPU tensors; it is its own `utils`, of which a launcher needs the properties of the device alone."""

    def __init__(self, target: GPUTarget, shared_memory: int) -> None:
        super().__init__()
        self.target, self.shared_memory, self.utils = target, shared_memory, self

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"multiprocessor_count": 100, "max_shared_mem": self.shared_memory}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("only a launcher that is built asks for it")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs, so nothing can be timed")


def compile_only(target: str) -> list[Any]:
    """For the rest of the process, launches compile for a target of `bench.compiled`; returns what they compiled to."""
    compiled: list[Any] = []
    run = JITFunction.run

    def warm_up(kernel: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(run(kernel, *args, warmup=True, **options))
        return compiled[-1]

    JITFunction.run = warm_up
    triton.runtime.driver.set_active(CompileOnlyDriver(TARGETS[target], SHARED_MEMORY[target]))
    return compiled


def launch(case: Case) -> None:
    """Every public call that launches a kernel, with the problem and the sizes of a case."""
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    meta = ff.FOMAML(model, backend="triton", precision=case.precision)
    assert meta.problem == case.problem, f"the model is {meta.problem}, the case {case.problem}"
    # 32 tasks and one step: numbers that Triton, if it may, takes for a multiple of 16 and for a constant.
    x, y = torch.randn(32, case.shots, 1), torch.randn(32, case.shots, 1)
    q, t = torch.randn(32, case.queries, 1), torch.randn(32, case.queries, 1)
    meta(x, y, q, t).backward()
    meta.predict(x, y, q).sum().backward()
    meta.adapt(x, y)(q)


def launch_with_every_argument() -> None:
    """The same calls with all that a caller may leave out, and a layer without what it may leave out, its bias."""
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Tanh(), nn.Linear(32, 5))
    inner: dict[str, Any] = {"steps": 2, "momentum": 0.9, "weight_decay": 0.01}
    meta = ff.FOMAML(model, backend="triton", precision="tf32", loss="cross_entropy", **inner)
    x, y, q, t = torch.randn(3, 5, 16), torch.randint(5, (3, 5)), torch.randn(3, 40, 16), torch.randint(5, (3, 40))
    weights = {"support_weight": torch.rand(3, 5), "query_weight": torch.rand(3, 40), "task_weight": torch.rand(3)}
    meta(x, y, q.requires_grad_(), t, **weights).backward()
    meta.predict(x, y, q, support_weight=weights["support_weight"]).sum().backward()


def described(source: ASTSource, options: dict[str, Any]) -> dict[str, Any]:
    """What decides what a kernel compiles to, by argument, so that two of them can be compared and read."""

    def argument(path: tuple[int, ...]) -> str:
        return "".join([source.fn.arg_names[path[0]], *(f"[{j}]" for j in path[1:])])

    return {
        "kernel": source.fn.__name__,
        "types": {name: str(kind) for name, kind in source.signature.items()},
        "constants": {argument(path): repr(value) for path, value in source.constants.items()},
        "facts": {argument(path): facts for path, facts in source.attrs.items() if facts},
        "options": {name: options[name] for name in ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")},
    }


def main() -> None:
    (name,) = sys.argv[1:]
    target = TARGETS[name]
    cases = [case for case in CASES if case.name == "sine" and case.precision in ("tf32x3", None)]
    compiled = compile_only(name)
    launch(cases[0])
    launch_with_every_argument()
    options = make_backend(target).parse_options
    report = [described(case.source(target), vars(options(case.options(target)))) for case in cases]
    launched = [described(kernel.src, kernel.metadata._asdict()) for kernel in compiled]
    binaries = [kernel.asm["cubin"][:4].hex() for kernel in compiled]
    print(json.dumps({"launched": launched, "binaries": binaries, "report": report}))


if __name__ == "__main__":
    main()
