"""What compilers make of every shipped kernel configuration, for GPUs that need not be there: a table of resources.

python -m bench.compiled [--targets sm_80,sm_90] [--only 'sine meta_kernel'] [--save bench/results/compiled.json]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import triton
from fomaml_fused.kernels import outer, resident
from fomaml_fused.kernels.configuration import Config, configuration
from fomaml_fused.kernels.resources import REGISTERS, weight_tiles
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fomaml_fused as ff
from fomaml_fused.engines import launching
from fomaml_fused.engines import resident as launcher
from fomaml_fused.problem import Problem
from fomaml_fused.text import table
from fomaml_fused.train.files import save_json

Row = dict[str, Any]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes that a program may have; no compiler checks it, only a launch would.
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
MOST_INSTRUCTIONS = 1.10  # times those of the stored table

# Operands of products by backend; the first is full precision: what matrix units make of float32 where they take it.
PRECISIONS = {"cuda": ("tf32x3", "tf32", "bf16", "fp16"), "hip": ("ieee", "bf16", "fp16")}

# Every kernel, with the pointers that are None in the launch that is compiled here.
KERNELS = {
    "meta_kernel": ("p_r", "p_query_r", "p_share", "p_out", "p_dx"),
    "adapt_kernel": ("p_r",),
    "query_kernel": (),
    "query_backward_kernel": ("p_dx",),
    "reduce_kernel": ("p_share",),
}


@dataclass(frozen=True)
class Case:
    """A kernel as one problem launches it; `str` names it in the table.

    Attributes:
        kernel: one of `KERNELS`.
        precision: of products; None for the reduction, which has none.
    """

    name: str
    problem: Problem
    shots: int
    queries: int
    kernel: str
    precision: str | None

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name, self.kernel, self.precision)))

    def config(self, target: GPUTarget) -> Config:
        """Warps and tiles, as the planner takes them."""
        largest = max(weight_tiles(self.problem.network.widths))
        config = configuration(f"{target.backend}-{target.arch}", "resident", largest)
        assert config is not None, f"no configuration takes {self.problem}"
        return config

    def constants(self, target: GPUTarget) -> dict[str, Any]:
        """The compile-time arguments of the kernel."""
        unasked = dict.fromkeys(KERNELS[self.kernel])
        if self.precision is None:
            return {**unasked, **launching.REDUCTION}
        config = self.config(target)
        return {**unasked, "SPEC": launcher.spec_of(self.problem, self.shots, self.queries, self.precision, config)}

    def source(self, target: GPUTarget) -> ASTSource:
        """What a launch hands to the compiler: the kernel and, of each argument, its type or its value."""
        kernel = getattr(outer if self.precision is None else resident, self.kernel)
        constants = self.constants(target)
        signature = {name: "constexpr" if name in constants else self._type(name) for name in kernel.arg_names}
        # torch allocates at multiples of 16 bytes; what AMD's compiler is told beside that holds below 2 GB.
        facts = [["tt.divisibility", 16]] + ([["tt.pointer_range", 32]] if target.backend == "hip" else [])
        attributes = {path: facts for path, kind in _paths(signature) if kind.startswith("*")}
        return ASTSource(kernel, signature, constants, attributes)

    def options(self, target: GPUTarget) -> dict[str, Any]:
        """The options that the engine launches with."""
        if self.precision is None:
            return launching.REDUCTION_OPTIONS
        options: dict[str, Any] = {"num_warps": self.config(target).warps, "num_stages": 1, "enable_fp_fusion": True}
        return options | ({"maxnreg": REGISTERS} if target.backend == "cuda" else {})

    def _type(self, name: str) -> Any:
        """The type of an argument that stays one at run time; pointers are those named p_..."""
        if name in ("p_weights", "p_biases"):
            return ("*fp32",) * self.problem.network.depth
        if name in ("p_y", "p_query_y") and self.problem.loss.takes_classes:
            return "*i64"
        if name.startswith("p_"):
            return "*fp32"
        return "fp32" if name == "share" else "i32"


def _paths(signature: dict[str, Any]) -> list[tuple[tuple[int, ...], str]]:
    """Each argument's position, (i,) or within a tuple (i, j), and its type."""
    found: list[tuple[tuple[int, ...], str]] = []
    for i, kind in enumerate(signature.values()):
        found += [((i, j), inner) for j, inner in enumerate(kind)] if isinstance(kind, tuple) else [((i,), kind)]
    return found


def _mlp(*widths: int, **options: Any) -> Problem:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, device="meta"), nn.ReLU()]
    return ff.FOMAML(nn.Sequential(*layers[:-1]), **options).problem


def _cases() -> list[Case]:
    sine, classifier = _mlp(1, 40, 40, 1), _mlp(16, 32, 5, loss="cross_entropy")
    momentum = _mlp(1, 40, 40, 1, steps=5, momentum=0.9, weight_decay=0.01)
    products = [kernel for kernel in KERNELS if kernel != "reduce_kernel"]
    return [
        *(Case("sine", sine, 10, 10, kernel, p) for p in ("tf32x3", "ieee", "tf32", "bf16") for kernel in products),
        Case("sine", sine, 10, 10, "reduce_kernel", None),
        *(Case("small classifier", classifier, 5, 5, "meta_kernel", p) for p in ("tf32x3", "ieee", "tf32")),
        Case("momentum", momentum, 10, 10, "meta_kernel", "tf32"),
        Case("walked", sine, 100, 100, "meta_kernel", "tf32"),
        Case("half", sine, 10, 10, "meta_kernel", "fp16"),
        Case("wide", _mlp(1, 128, 128, 1), 10, 10, "meta_kernel", "bf16"),
    ]


CASES = _cases()


def jobs(targets: list[str], only: str = "") -> list[tuple[Case, str]]:
    """The cases of each target whose name, as in "sine meta_kernel tf32 sm_90", the pattern `only` is found in."""
    return [
        (case, target)
        for case in CASES
        for target in targets
        if case.precision in (None, *PRECISIONS[TARGETS[target].backend]) and re.search(only, f"{case} {target}")
    ]


def measure(job: tuple[Case, str]) -> Row:
    """Compile a case for a target: a row of the table, with an "error" in place of figures where that fails."""
    case, name = job
    target, row = TARGETS[name], {"case": str(case), "target": name}
    with tempfile.TemporaryFile("w+") as said:
        try:
            with _stderr_to(said):
                kernel = triton.compile(case.source(target), target=target, options=case.options(target))
        except Exception as error:  # whatever stops the compiler is what there is to report
            said.seek(0)
            reasons = [line.split("error: ")[1].strip() for line in said if "error: " in line]
            message = [type(error).__name__, *str(error).strip().splitlines()[-1:], *reasons[:1]]
            return row | {"error": ": ".join(message)}
    found = _of_cubin(kernel.asm["cubin"]) if target.backend == "cuda" else _of_amdgcn(kernel.asm["amdgcn"])
    return row | {"warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared} | found


@contextmanager
def _stderr_to(file: IO[str]) -> Iterator[None]:
    """MLIR writes why it failed, and pages of a program beside it, straight to the descriptor."""
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _of_cubin(cubin: bytes) -> Row:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # Not Triton's own disassembly, which ends at the first address of five digits.
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    operations = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text))
    # Local memory holds nothing but what has no register.
    local = [(op, n) for op, n in operations.items() if re.match(r"(STL|LDL)\b", op)]
    return {
        "registers": int(re.findall(r"\bREG:(\d+)", text)[0]),
        "spilled": sum(n * (4 if ".128" in op else 2 if ".64" in op else 1) for op, n in local),
        **_matrix({op: n for op, n in operations.items() if re.match(r"\w*MMA\b", op)}),
        "instructions": operations.total() - operations["NOP"],  # which pad the end
    }


def _of_amdgcn(text: str) -> Row:
    operations = Counter(re.findall(r"^\t((?:v|s|ds|global|buffer|scratch|flat)_\w+)", text, re.MULTILINE))
    usage = dict(re.findall(r"^\s*\.(vgpr_count|vgpr_spill_count):\s*(\d+)", text, re.MULTILINE))
    return {
        "registers": int(usage["vgpr_count"]),
        "spilled": int(usage["vgpr_spill_count"]),
        **_matrix({op: n for op, n in operations.items() if op.startswith("v_mfma_")}),
        "instructions": operations.total(),
    }


def _matrix(operations: dict[str, int]) -> Row:
    return {"matrix": sum(operations.values()), "matrix_kind": ", ".join(sorted(operations))}


def violations(rows: list[Row], stored: list[Row]) -> list[str]:
    """What is wrong with freshly compiled rows, by themselves or beside the stored table; empty where nothing is."""
    found, known = [], {(row["case"], row["target"]): row for row in stored}
    for row in rows:
        name, limit = f"{row['case']} on {row['target']}", SHARED_MEMORY[row["target"]]
        before = known.get((row["case"], row["target"]))
        if before is None:
            found.append(f"{name} is not in the stored table")
        if "error" in row:
            found.append(f"{name} does not compile: {row['error']}")
            continue
        if row["spilled"]:
            found.append(f"{name} spills {row['spilled']} words")
        if row["shared"] > limit:
            found.append(f"{name} takes {row['shared']:,} bytes of shared memory, a program has {limit:,}")
        if before is None or "error" in before:
            continue
        if before["matrix"] and not row["matrix"]:
            found.append(f"{name} has lost its {before['matrix']} matrix instructions, {before['matrix_kind']}")
        if row["instructions"] > MOST_INSTRUCTIONS * before["instructions"]:
            found.append(f"{name} has {row['instructions']} instructions, the stored table {before['instructions']}")
    return found


def render(rows: list[Row]) -> str:
    """The table of rows as plain text."""
    columns = ("case", "target", "warps", "registers", "spilled", "shared", "matrix", "matrix_kind", "instructions")
    lines = table([columns, *([str(row.get(column, "")) for column in columns] for row in rows if "error" not in row)])
    return "\n".join([*lines, *(f"{row['case']}  {row['target']}  {row['error']}" for row in rows if "error" in row)])


def markdown(rows: list[Row], case: str) -> str:
    """The rows of a case as a Markdown table."""
    columns = ("target", "registers", "spilled", "shared", "matrix", "instructions")
    lines = [f"| precision | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for row in rows:
        name, _, precision = row["case"].rpartition(" ")
        if name == case:
            lines.append(f"| {precision} | {' | '.join(str(row[column]) for column in columns)} |")
    return "\n".join(lines)


def _compile_into(folder: str) -> None:
    triton.knobs.cache.dir = folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--only", default="", help="a pattern in names such as 'sine meta_kernel tf32 sm_90'")
    parser.add_argument("--save", type=Path, help="keep the table as JSON")
    options = parser.parse_args()
    targets = options.targets.split(",")
    if not set(targets) <= set(TARGETS):
        parser.error(f"--targets is {options.targets}; it takes {', '.join(TARGETS)}")
    if launching.interpreted():
        parser.error("TRITON_INTERPRET is set, so kernels are interpreted; unset it to compile them")
    # A cache of its own, for what an earlier run left in the usual one says nothing of this compiler. Two processes,
    # spawned: a fork would copy torch's threads in whatever state they are.
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(2, spawn, initializer=_compile_into, initargs=(cache,)) as pool,
    ):
        rows = list(pool.map(measure, jobs(targets, options.only)))
    if options.save:
        save_json(options.save, {"triton": triton.__version__, "rows": rows})
    print(render(rows))


if __name__ == "__main__":
    main()
