"""What compilers make of the kernels that public calls launch, for GPUs that need not be there: a table of resources.

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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import IO, Any

import triton

import fomaml_fused as ff
from fomaml_fused.engines import launching
from fomaml_fused.text import table
from fomaml_fused.train.files import save_json

from .compile_only import DEVICES, MAIN_DEVICES, Launch, recorded
from .workloads import WORKLOADS, Workload

Row = dict[str, Any]

MOST_INSTRUCTIONS = 1.10  # times those of the stored table

# What is measured of a kernel, in the order of the tables.
FIGURES = ("registers", "spilled", "shared", "matrix", "matrix_kind", "instructions", "loop")

# Operands of products by backend; the first is full precision: what matrix units make of float32 where they take it.
PRECISIONS = {"cuda": ("tf32x3", "tf32", "bf16", "fp16"), "hip": ("ieee", "bf16", "fp16")}


@dataclass(frozen=True)
class Case:
    """A workload on an engine of kernels.

    Attributes:
        precision: of products.
        predicts: whether `predict` is compiled too, or the meta-step alone.
        options: of `FOMAML`, further ones.
        ragged: whether tasks have unequal numbers of samples, and share packs.
        targets: devices to compile for, of those that the engine takes it on and that have the precision.
    """

    workload: Workload
    engine: str
    precision: str
    predicts: bool = False
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    ragged: bool = False
    targets: tuple[str, ...] = tuple(MAIN_DEVICES)

    def meta(self) -> ff.FOMAML:
        """The workload's network, to be called."""
        w = self.workload
        options = {"lr": w.lr, "steps": w.steps, "loss": w.loss, **self.options}
        return ff.FOMAML(w.model(), backend="triton", precision=self.precision, **options)

    def counts(self, tasks: int) -> dict[str, list[int]]:
        """What a call is told of its tasks: from 1 to all of the workload's shots, and as many queries."""
        counts = [1 + t % self.workload.shots for t in range(tasks)]
        return {"support_counts": counts, "query_counts": counts} if self.ragged else {}

    def name(self, launch: Launch) -> str:
        """As "sine meta_kernel tf32"; of a layer's kernel, "layered forward_kernel 1 query tf32".

        The query pass of the dual form in two launches is "omniglot query_kernel forward tf32" and "... backward tf32".
        """
        spec, layer, query, own = (launch.constant(name) for name in ("SPEC", "L", "QUERY", "OWN"))
        words = [self.workload.name, launch.kernel]
        if layer is not None:
            words.append(str(layer))
        if query is not None:
            moves = layer is None or spec.adapts[layer] or own
            words.append("shared" if not moves else "query" if query else "inner")
        if own:
            words.append("own")
        if launch.kernel == "query_kernel" and launch.leaves_out("p_y"):
            words.append("forward" if launch.leaves_out("p_cotangent") else "backward")
        return " ".join(words if spec is None else [*words, self.precision])


def _cases() -> list[Case]:
    sine, omniglot, crowd = WORKLOADS["sine"], WORKLOADS["omniglot"], WORKLOADS["crowd"]
    precisions = ("tf32x3", "ieee", "tf32", "bf16")
    classifier = Workload("small classifier", (16, 32, 5), "relu", 25, 5, 5, 1, "cross_entropy")
    momentum = replace(WORKLOADS["sine K=5"], name="momentum")
    # The workload "wide" without one of its two layers that are alike.
    layered = replace(WORKLOADS["wide"], name="layered", widths=(512, 1024, 1024, 10))
    # The workload "learnit" with one of its three layers that are alike; a policy with each rule that adds a kernel.
    field = replace(WORKLOADS["learnit"], name="field", widths=(2, 256, 256, 3))
    policy = Workload("policy", (20, 64, 64, 6), "tanh", 40, 200, 200, 2, "cross_entropy")
    folding = Workload("folding", (64, 128, 128, 5), "relu", 8, 20, 20, 8, "cross_entropy")
    everywhere = tuple(DEVICES)  # a case of each engine
    return [
        *(Case(sine, "resident", precision, predicts=True, targets=everywhere) for precision in precisions),
        *(Case(classifier, "resident", precision) for precision in precisions[:3]),
        Case(momentum, "resident", "tf32", options={"momentum": 0.9, "weight_decay": 0.01}),
        Case(replace(sine, name="walked", shots=100, queries=100), "resident", "tf32"),
        Case(replace(sine, name="half"), "resident", "fp16"),
        Case(replace(sine, name="wide", widths=(1, 128, 128, 1)), "resident", "bf16", targets=("sm_90", "sm_100")),
        *(Case(omniglot, "dual", precision, predicts=True) for precision in precisions),
        *(Case(crowd, "dual", precision, predicts=True, targets=everywhere) for precision in precisions[:3]),
        *(Case(layered, "layered", precision, targets=everywhere) for precision in precisions[:3]),
        *(Case(replace(crowd, name="ragged"), "dual", precision, ragged=True) for precision in precisions[:3]),
        Case(replace(layered, name="ragged layers"), "layered", "tf32", ragged=True),
        Case(folding, "layered", "tf32"),
        *(Case(WORKLOADS["meta_siren"], "chained", precision) for precision in ("tf32", "bf16")),
        *(Case(policy, "chained", precision, predicts=True, targets=everywhere) for precision in precisions[:3]),
        *(Case(field, "primal", precision, targets=everywhere) for precision in precisions),
        Case(replace(field, name="wide field"), "chained", "bf16", targets=("sm_90", "gfx942")),
    ]


CASES = _cases()


@cache
def launches(case: Case, target: str) -> dict[str, Launch]:
    """What the public calls launch, by name; of a name that comes again, with arguments left out, the first."""
    meta, batch = case.meta(), case.workload.batch()
    with recorded(target) as found, ff.override(engine=case.engine, packs=case.ragged):
        meta(*batch, **case.counts(case.workload.tasks)).backward()
        if case.predicts:
            meta.predict(*batch[:3]).sum().backward()
    names = [case.name(launch) for launch in found]
    return {name: found[names.index(name)] for name in names}


def jobs(targets: Iterable[str] = tuple(DEVICES), only: str = "") -> list[tuple[Case, str, str]]:
    """Case, target and name of each launch to compile; `only` is a pattern in names as "sine meta_kernel tf32 sm_90".

    What an earlier case's launch is compiled for already is left out.
    """
    found: dict[Any, tuple[Case, str, str]] = {}
    for case in CASES:
        for target in targets:
            if target in case.targets and case.precision in PRECISIONS[DEVICES[target].target.backend]:
                for name, launch in launches(case, target).items():
                    found.setdefault(launch.key, (case, target, name))
    return [job for job in found.values() if re.search(only, f"{job[2]} {job[1]}")]


def measure(job: tuple[Case, str, str]) -> Row:
    """Compile a launch: a row of the table, with an "error" in place of figures where that fails."""
    case, target, name = job
    row: Row = {"case": name, "target": target}
    with tempfile.TemporaryFile("w+") as said:
        try:
            with _stderr_to(said):
                kernel = launches(case, target)[name].compile()
        except Exception as error:  # whatever stops the compiler is what there is to report
            said.seek(0)
            reasons = [line.split("error: ")[1].strip() for line in said if "error: " in line]
            message = [type(error).__name__, *str(error).strip().splitlines()[-1:], *reasons[:1]]
            return row | {"error": ": ".join(message)}
    found = _of_cubin(kernel.asm["cubin"]) if "cubin" in kernel.asm else _of_amdgcn(kernel.asm["amdgcn"])
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
    # Its address, its name, and where it branches to.
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(?:[^;]*?\b0x([0-9a-f]+))?", text)
    code = [(int(at, 16), name, int(to, 16) if to and name.startswith("BRA") else None) for at, name, to in code]
    operations = Counter(name for _, name, _ in code)
    # Local memory holds nothing but what has no register.
    local = [(op, n) for op, n in operations.items() if re.match(r"(STL|LDL)\b", op)]
    return {
        "registers": int(re.findall(r"\bREG:(\d+)", text)[0]),
        "spilled": sum(n * (4 if ".128" in op else 2 if ".64" in op else 1) for op, n in local),
        **_matrix({op: n for op, n in operations.items() if re.match(r"\w*MMA\b", op)}),
        "instructions": operations.total() - operations["NOP"],  # which pad the end
        "loop": longest_loop([at for at, _, _ in code], [(at, to) for at, _, to in code if to is not None]),
    }


def _of_amdgcn(text: str) -> Row:
    code = re.findall(
        r"^(?:(\.LBB\w+):|\t((?:v|s|ds|global|buffer|scratch|flat)_\w+)(?: +(\.LBB\w+))?)", text, re.MULTILINE
    )
    labels = {label: at for at, (label, _, _) in enumerate(code)}
    branches = [(at, labels[to]) for at, (_, _, to) in enumerate(code) if to]
    operations = Counter(name for _, name, _ in code if name)
    usage = dict(re.findall(r"^\s*\.(vgpr_count|vgpr_spill_count):\s*(\d+)", text, re.MULTILINE))
    return {
        "registers": int(usage["vgpr_count"]),
        "spilled": int(usage["vgpr_spill_count"]),
        **_matrix({op: n for op, n in operations.items() if re.match("v_(mfma|wmma)_", op)}),
        "instructions": operations.total(),
        "loop": longest_loop([at for at, (_, name, _) in enumerate(code) if name], branches),
    }


def longest_loop(instructions: Sequence[int], branches: Iterable[tuple[int, int]]) -> int:
    """Instructions of the longest loop that has no other one in it; 0 where there is none.

    Args:
        instructions: where each is.  branches: from where, and to where.
    """
    ends: dict[int, int] = {}  # of each loop, by where it starts
    for at, to in branches:
        if to < at:
            ends[to] = max(at, ends.get(to, at))
    innermost = [
        (start, end)
        for start, end in ends.items()
        if not any(start < other and other_end <= end for other, other_end in ends.items())
    ]
    return max((sum(start <= at <= end for at in instructions) for start, end in innermost), default=0)


def _matrix(operations: dict[str, int]) -> Row:
    return {"matrix": sum(operations.values()), "matrix_kind": ", ".join(sorted(operations))}


def violations(rows: list[Row], stored: list[Row]) -> list[str]:
    """What is wrong with freshly compiled rows, by themselves or beside the stored table; empty where nothing is."""
    found, known = [], {(row["case"], row["target"]): row for row in stored}
    for row in rows:
        name, limit = f"{row['case']} on {row['target']}", DEVICES[row["target"]].shared_memory
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
    columns = ("case", "target", "warps", *FIGURES)
    lines = table([columns, *([str(row.get(column, "")) for column in columns] for row in rows if "error" not in row)])
    return "\n".join([*lines, *(f"{row['case']}  {row['target']}  {row['error']}" for row in rows if "error" in row)])


def markdown(rows: list[Row], case: str) -> str:
    """The rows of a case for the main devices, as a Markdown table."""
    columns = ("target", *(figure for figure in FIGURES if figure != "matrix_kind"))
    lines = [f"| precision | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for row in rows:
        name, _, precision = row["case"].rpartition(" ")
        if name == case and row["target"] in MAIN_DEVICES:
            lines.append(f"| {precision} | {' | '.join(str(row[column]) for column in columns)} |")
    return "\n".join(lines)


def limits(rows: list[Row]) -> str:
    """Kernels, those that spill, the most words, and shared memory in bytes, by device: a Markdown table."""
    lines = ["| device | kernels | that spill | most words | most shared memory | of |", "|---" * 6 + "|"]
    for name, device in DEVICES.items():
        own = [row for row in rows if row["target"] == name]
        spilled = [row["spilled"] for row in own if row["spilled"]]
        most = max(row["shared"] for row in own)
        numbers = (len(own), len(spilled), max(spilled, default=0), most, device.shared_memory)
        lines.append(f"| {name} | {' | '.join(f'{number:,}' for number in numbers)} |")
    return "\n".join(lines)


def _compile_into(folder: str) -> None:
    triton.knobs.cache.dir = folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(DEVICES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--only", default="", help="a pattern in names such as 'sine meta_kernel tf32 sm_90'")
    parser.add_argument("--save", type=Path, help="keep the table as JSON")
    options = parser.parse_args()
    targets = options.targets.split(",")
    if not set(targets) <= set(DEVICES):
        parser.error(f"--targets is {options.targets}; it takes {', '.join(DEVICES)}")
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
