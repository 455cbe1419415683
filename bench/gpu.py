"""The one GPU command: kernel tests, runs repeated bit by bit, and every workload timed against its peers.

python -m bench.gpu [--out bench/results] [--budget 500]      measures, on a GPU that Triton serves
python -m bench.gpu --dry-run [--out FOLDER]                  goes the same way on a CPU, tiny and interpreted
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fomaml_fused.text import scaled
from fomaml_fused.train.files import replacing, save_json

from .gpu_timing import DRY, FULL, JAX, PRECISIONS, Job, Row
from .workloads import WORKLOADS, Workload

ROOT = Path(__file__).parent.parent
# When, as parts of the budget, the tests and the repeated runs are to be done; the timing may take all that is left.
TESTS_END, REPEATS_END = 0.38, 0.48
BUDGETS = {False: 500.0, True: 60.0}  # seconds; of a dry run and not
GRACE = 15.0  # seconds past its deadline until a process is killed
STUCK = 120.0  # seconds without a sign until it is
COMPILED = ("compile(vmap(grad))",)  # the peers whose device time is asked for
KERNEL_TESTS = tuple(f"tests/test_{name}.py" for name in ("resident", "dual", "packs", "primal", "resident_rules"))
WORKER = (sys.executable, "-m", "bench.gpu_timing")
# For time may run out: the workloads in the order of what is to be learned from them.
ORDER = tuple(dict.fromkeys(("sine K=5", "omniglot", "wide", "crowd", *WORKLOADS)))


@dataclass(frozen=True)
class Peaks:
    """What a device's data sheet states: dense operations a second by the unit that does them, bytes a second."""

    tf32: float
    bf16: float
    fp32: float
    memory: float
    source: str


PEAKS = {
    "NVIDIA H100 80GB HBM3": Peaks(494.7e12, 989e12, 66.9e12, 3.35e12, "H100 SXM, data sheet, dense"),
    "NVIDIA H200": Peaks(494.7e12, 989e12, 66.9e12, 4.8e12, "H200 SXM, data sheet, dense"),
    "NVIDIA A100-SXM4-80GB": Peaks(156e12, 312e12, 19.5e12, 2.0e12, "A100 SXM 80 GB, data sheet, dense"),
}


class Suite:
    """A run of the suite: what it found so far, and the file that holds it after every step."""

    def __init__(self, out: Path, budget: float, dry_run: bool) -> None:
        self.out, self.budget, self.dry_run = out, budget, dry_run
        self.scale = DRY if dry_run else FULL
        self.begin = time.time()
        self.results: Row = {
            "what": "DRY RUN on a CPU, kernels interpreted, tiny sizes: no figure here is a measurement"
            if dry_run
            else "GPU suite of fomaml-fused: kernel tests, repeated runs, meta-steps timed against their peers",
            "dry_run": dry_run,
            "budget_s": budget,
            "notes": NOTES,
        }

    def run(self) -> str | None:
        """Everything; the reason where there is nothing to measure, and then nothing is written."""
        found = self._do([Job("probe")], self.begin + self.budget)[0]
        if "environment" not in found:
            return str(found.get("obstacle") or found.get("failed") or found.get("skipped"))
        found["environment"] |= {"nvidia_smi": nvidia_smi(), "commit": commit()}
        self.results |= {**found, "tests": {}, "repeats": {}, "speed": {}}
        self.save()
        deadline = self.begin + TESTS_END * self.budget
        self.results["tests"] = kernel_tests(self.dry_run, deadline - time.time())
        self.save()
        self._repeats()
        self._speed()
        self.results["environment"]["nvidia_smi_after"] = nvidia_smi()
        self.save()
        return None

    def save(self) -> None:
        """Write both files, each under a temporary name first."""
        self.results["took_s"] = round(time.time() - self.begin, 1)
        device = self.results["environment"]["device"]
        path = self.out / f"{slug(device)}.json"
        save_json(path, self.results)
        with replacing(path.with_suffix(".md")) as temporary:
            temporary.write_text(summary(self.results) + "\n")

    def _repeats(self) -> None:
        def keep(job: Job, result: Row) -> None:
            self.results["repeats"][job.workload] = result
            self.save()

        jobs = [Job("repeats", name) for name in self._taken()]
        run_jobs(jobs, self.begin + REPEATS_END * self.budget, self.dry_run, keep)

    def _speed(self) -> None:
        def keep(job: Job, result: Row) -> None:
            add_rooflines(self.scale.workload(job.workload), result)
            self.results["speed"].setdefault(job.workload, {})[job.precision] = result
            self.save()

        first = self._taken()
        others = [name for name in ORDER if name not in first]
        jobs = [Job("speed", name, at) for at in ("highest", "high") for name in first]
        jobs += [Job("speed", name, at) for at in ("highest", "high") for name in others]
        if self.dry_run:
            jobs = [job for job in jobs if job.precision == "highest" or job.workload == "sine"]
        run_jobs(jobs, self.begin + self.budget, self.dry_run, keep)

    def _taken(self) -> list[str]:
        """The workloads that a kernel takes, in some precision."""
        plans = self.results["plans"]
        return [name for name in ORDER if any(plan["engine"] != "batched" for plan in plans[name].values())]

    def _do(self, jobs: list[Job], deadline: float) -> list[Row]:
        found: list[Row] = []
        run_jobs(jobs, deadline, self.dry_run, lambda _, result: found.append(result))
        return found


NOTES = {
    "wall_s": "medians and quartiles of rounds in which all contenders take turns, in one process a workload; each "
    "runs a while untimed, then one step between two synchronisations",
    "device_s": "replays of the step's CUDA graph, several between two events, inputs where they were; a step whose "
    "graph takes longer to launch than to run shows the launch",
    "peak_bytes": "of torch's allocator during a step, beside what was held before it",
    "error": "the larger of the relative errors of loss and gradient vector against float64; who is further off than "
    "1e-4 ('highest') or 2e-2 is not timed",
    "primal_flops": "6 * tasks * (steps * shots + queries) * parameters: every row through every parameter forward and "
    "twice backward. A bound to compare with: the dual form does fewer, and the first layer fewer too",
    "least_bytes": "tasks and parameters read once, one gradient written",
    "roofline": "primal_flops over device_s and the peak of the unit, least_bytes over device_s and the bandwidth, and "
    "the larger; three tf32 products that make one of float32 count as one; null where no data sheet is stated",
}


def run_jobs(
    jobs: Sequence[Job],
    deadline: float,
    dry_run: bool,
    keep: Callable[[Job, Row], None],
    command: Sequence[str] = WORKER,
    stuck: float = STUCK,
) -> None:
    """Have workers do the jobs, one worker at a time, and `keep` each result as it comes.

    A worker that dies, or gives no sign for `stuck` seconds, costs the job at hand what it was busy with: another one
    takes it from there, and is told to avoid that.
    """
    pending = deque(jobs)
    while pending:
        doing, why = _work(pending, deadline, dry_run, keep, command, stuck)
        if time.time() > deadline or (pending and why is None):
            for job in pending:
                keep(job, {"skipped": "no time was left for it"})
            return
        if not pending:
            return
        job = pending.popleft()
        if doing and doing not in job.avoid and why is not None:
            pending.appendleft(replace(job, avoid={**job.avoid, doing: why}))
            if doing == JAX:
                pending = deque(replace(other, avoid={**other.avoid, JAX: why}) for other in pending)
        else:
            keep(job, {"failed": why})
            if doing is None:  # it never began, nor would the next
                for job in pending:
                    keep(job, {"failed": why})
                return


def _work(
    pending: deque[Job],
    deadline: float,
    dry_run: bool,
    keep: Callable[[Job, Row], None],
    command: Sequence[str],
    stuck: float,
) -> tuple[str | None, str | None]:
    """One worker's life: what it was busy with at its end, and what it died of; done jobs leave `pending`."""
    doing: str | None = None
    why: str | None = None
    with tempfile.TemporaryDirectory() as folder:
        events, log = Path(folder) / "events", Path(folder) / "log"
        events.touch()
        order = {"jobs": [asdict(job) for job in pending], "deadline": deadline, "dry_run": dry_run}
        with log.open("w") as said:
            process = subprocess.Popen(
                [*command, json.dumps({**order, "events": str(events)})],
                cwd=ROOT,
                env=_environment(dry_run),
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            read, heard = 0, time.time()
            while True:
                ended = process.poll() is not None
                for line in events.read_text().split("\n")[read:-1]:  # behind the last line break is half a line
                    read, heard, event = read + 1, time.time(), json.loads(line)
                    doing, why = event.get("doing", doing), event.get("lost", why)
                    if "done" in event:
                        keep(pending.popleft(), event["done"])
                if ended:
                    break
                if time.time() > min(deadline + GRACE, heard + stuck):
                    why = f"killed: no sign of life for {time.time() - heard:.0f} s"
                    _kill(process)
                time.sleep(0.05)
        finally:
            _kill(process)
        if process.returncode and why is None:
            last = " ".join(log.read_text(errors="replace").split())[-400:]
            why = f"its process ended with status {process.returncode}: {last}"
    return doing, why


def kernel_tests(dry_run: bool, timeout: float) -> Row:
    """Run the kernel tests: counts, what failed and why, and the end of what pytest said."""
    where = "interpreted" if dry_run else "gpu"
    command = [sys.executable, "-m", "pytest", *KERNEL_TESTS, f"--kernels={where}", "-v"]
    command += ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    if dry_run:
        command += ["-k", "test_results_repeat and TestResident"]
    elif find_spec("xdist") is not None:
        command += ["-n", "4", "--dist=worksteal"]
    if timeout < 5:
        return {"skipped": "no time was left for it"}
    environment = _environment(dry_run) | {
        "PYTEST_ADDOPTS": "",  # options for a process around this one are not for this one
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "240",  # as wide as pytest prints reasons
        # The tests run under torch's deterministic algorithms, where cuBLAS refuses to work without this.
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
    }
    start, timed_out = time.time(), False
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
            process.send_signal(signal.SIGINT)  # at which pytest still says what failed
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            _kill(process)
        said.seek(0)
        text = said.read()
    return {
        "what": "dry run: one test, kernels interpreted" if dry_run else "compiled kernels",
        "command": " ".join(["python", *command[1:]]),
        "exit_status": process.returncode,
        "timed_out": timed_out,
        "took_s": round(time.time() - start, 1),
        **read_tests(text),
        "tail": text.splitlines()[-40:],
    }


def read_tests(text: str) -> Row:
    """Counts of results, and the name and short reason of what failed, from the output of `pytest -v` so far."""
    results = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
    found: dict[str, str] = {}
    for line in text.splitlines():
        alone = re.match(rf"(tests/\S+?::.*?) ({results})(?: \(.*\))?(?:\s+\[ *\d+%\])?\s*$", line)
        shared = re.match(rf"\[gw\d+\] \[ *\d+%\] ({results}) (tests/\S+?::.*?)\s*$", line)
        if alone or shared:
            name, result = (alone[1], alone[2]) if alone else (shared[2], shared[1])  # type: ignore[index]
            if found.get(name) not in ("FAILED", "ERROR"):  # a test may pass and its clean-up fail
                found[name] = result
    failures = {name: "" for name, result in found.items() if result in ("FAILED", "ERROR")}
    for line in text.splitlines():
        for name in failures:
            for start in (f"FAILED {name} - ", f"ERROR {name} - "):
                if line.startswith(start):
                    failures[name] = line.removeprefix(start)
    counts = Counter(found.values())
    collected = re.search(r"(\d+) (?:items? / \d+ deselected / (\d+) selected|items?)", text)
    expected = int(collected[2] or collected[1]) if collected else len(found)
    return {
        "passed": counts["PASSED"],
        "failed": counts["FAILED"] + counts["ERROR"],
        "skipped": counts["SKIPPED"],
        "without_result": max(expected - len(found), 0),
        "failures": failures,
    }


def add_rooflines(workload: Workload, result: Row) -> None:
    """Put what a workload costs at least beside its times, and what part of the device's peaks each time is."""
    if "contenders" not in result:
        return
    flops, traffic = primal_flops(workload), least_bytes(workload)
    result |= {"primal_flops": flops, "least_bytes": traffic}
    for row in result["contenders"].values():
        if "device_s" in row:
            row["roofline"] = roofline(result["device"], row["unit"], flops, traffic, row["device_s"]["median"])


def primal_flops(workload: Workload) -> float:
    """Operations of a meta-step in the primal form; see `NOTES`."""
    parameters = sum(p.numel() for p in workload.model().parameters())
    return 6.0 * workload.tasks * (workload.steps * workload.shots + workload.queries) * parameters


def least_bytes(workload: Workload) -> float:
    """Bytes that any meta-step moves; see `NOTES`."""
    tensors = [*workload.batch(), *(p for p in workload.model().parameters() for _ in range(2))]
    return float(sum(t.numel() * t.element_size() for t in tensors))


def roofline(device: str, unit: str, flops: float, traffic: float, seconds: float) -> dict[str, float] | None:
    """How close a time is to what the device's data sheet allows; None for a device whose sheet is not here.

    Args:
        unit: "tf32", "bf16" or "fp32".

    Returns:
        The fractions of the unit's arithmetic and of the memory's bandwidth that were used, and the larger.
    """
    peaks = PEAKS.get(device)
    if peaks is None:
        return None
    compute, memory = flops / getattr(peaks, unit) / seconds, traffic / peaks.memory / seconds
    return {"arithmetic": compute, "memory": memory, "fraction": max(compute, memory)}


def summary(results: Row) -> str:
    """The results for reading, in Markdown."""
    env, tests = results["environment"], results["tests"]
    parts = [env["device"], *(f"{name} {env[name]}" for name in ("torch", "triton", "cuda", "python") if env.get(name))]
    smi = env.get("nvidia_smi") or [{}]
    parts += [f"driver {smi[0]['driver_version']}"] if "driver_version" in smi[0] else []
    parts += [f"commit {env['commit']}"] if env.get("commit") else []
    lines = [f"# {results['what']}", "", ", ".join(parts), ""]
    if "passed" in tests:
        told = f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
        told += f", {tests['without_result']} without a result" if tests["without_result"] else ""
        told += ", cut short" if tests["timed_out"] else ""
        lines += [f"Kernel tests ({tests['what']}): {told}; {tests['took_s']:g} s", ""]
        lines += [f"* failed: `{name}` {reason}" for name, reason in tests["failures"].items()]
    else:
        lines.append(f"Kernel tests: {tests.get('skipped', 'not run yet')}")
    lines += [
        "",
        *_repeats_table(results),
        "",
        *_speed_table(results),
        "",
        "Left out, and why:",
        "",
        *_left_out(results),
    ]
    return "\n".join(lines)


def _repeats_table(results: Row) -> list[str]:
    head = ["workload", "precision", "runs", "equal bit by bit", "error of loss", "error of gradient", "against tasks"]
    rows = []
    for name, found in results["repeats"].items():
        for precision, row in found.items():
            if isinstance(row, dict) and "runs" in row:
                told = [f"{e:.2g}" if isinstance(e, float) else e for e in (row["loss_error"], row["gradient_error"])]
                equal = "yes" if row["equal"] else "**NO**"
                rows.append([name, precision, str(row["runs"]), equal, *told, str(row["against"])])
    return ["The kernels, repeated and against the oracle in float64:", "", *_markdown(head, rows)]


def _speed_table(results: Row) -> list[str]:
    own = [f"ours, {precision}" for precision in PRECISIONS] + ["ours, torch"]
    head = ["workload", "float32 products", *own, "best peer", "its time", "best peer / ours"]
    head += ["device, ours", "device, best peer", "ratio", "roofline"]
    rows = []
    for name in WORKLOADS:
        for at, result in results["speed"].get(name, {"highest": {"skipped": "not run"}}).items():
            contenders = result.get("contenders", {})
            wall, device = (_medians(contenders, kind) for kind in ("wall_s", "device_s"))
            mine, mine_device = (_mine(times, at) for times in (wall, device))
            peer, peer_device = (_best_peer(times) for times in (wall, device))
            cells = [_time(wall.get(column)) for column in own]
            cells += [peer or "-", _time(wall.get(peer)), _ratio(wall, peer, mine)]
            cells += [_time(device.get(mine_device)), _time(device.get(peer_device))]
            share = (contenders.get(mine_device) or {}).get("roofline")
            cells += [_ratio(device, peer_device, mine_device), f"{share['fraction']:.1%}" if share else "-"]
            rows.append([name, at, *cells])
    return ["One meta-step, medians:", "", *_markdown(head, rows)]


def _medians(contenders: Row, kind: str) -> dict[str, float]:
    return {name: row[kind]["median"] for name, row in contenders.items() if kind in row}


def _mine(times: dict[str, float], precision: str) -> str:
    """What of ours peers are compared with: the kernel in their precision, or torch ops where it does not run."""
    return next((name for name in (f"ours, {precision}", "ours, torch") if name in times), "")


def _best_peer(times: dict[str, float]) -> str:
    return min((name for name in times if not name.startswith("ours")), key=lambda name: times[name], default="")


def _ratio(times: dict[str, float], peer: str, mine: str) -> str:
    return f"{times[peer] / times[mine]:.2f}" if peer and mine else "-"


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else scaled(seconds, "s")


def _left_out(results: Row) -> list[str]:
    """One line a reason: who was left out, and of which workloads."""
    found: dict[str, dict[str, list[str]]] = {}

    def note(row: Row, who: str, workload: str) -> None:
        for kind, words in (("skipped", ""), ("failed", "failed: "), ("disagrees", "disagrees: ")):
            if kind in row:
                found.setdefault(f"{words}{row[kind]}", {}).setdefault(who, []).append(workload)
        if "device_skipped" in row and (who.startswith("ours") or who in COMPILED):
            found.setdefault(f"no device time: {row['device_skipped']}", {}).setdefault(who, []).append(workload)

    for name, result in results["repeats"].items():
        note(result, "repeated runs", name)
        for precision, row in result.items():
            if isinstance(row, dict):
                note(row, f"repeated runs, {precision}", name)
    for name, by_precision in results["speed"].items():
        for at, result in by_precision.items():
            workload = name if at == "highest" else f"{name} ({at})"
            note(result, "timing", workload)
            for contender, row in result.get("contenders", {}).items():
                note(row, contender, workload)
    lines = []
    for reason, groups in found.items():
        who = "; ".join(f"{contender} on {', '.join(workloads)}" for contender, workloads in groups.items())
        lines.append(f"* {who}: {reason}")
    return lines or ["* nothing"]


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def slug(device: str) -> str:
    """The name of a device as that of a file."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def nvidia_smi() -> list[dict[str, str]] | None:
    """Driver, clocks and power of each GPU as they are; None where the tool is not there."""
    fields = "name driver_version pstate clocks.sm clocks.mem clocks.max.sm clocks.max.mem power.draw power.limit"
    fields += " temperature.gpu memory.total memory.used utilization.gpu"
    names = fields.split()
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    return [dict(zip(names, row, strict=False)) for row in rows]


def commit() -> str | None:
    """The commit that is measured, marked where files differ from it; None outside of a git checkout."""
    try:
        run = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        only_read = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(run, cwd=ROOT, env=only_read, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _environment(dry_run: bool) -> dict[str, str]:
    """Of a process that runs kernels: Triton reads where they are defined whether to interpret them."""
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return found | ({"TRITON_INTERPRET": "1"} if dry_run else {})


def _kill(process: subprocess.Popen[Any]) -> None:
    """End a process and those that it started, if it has not ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own
    process.wait()


def main() -> int:
    """Run the suite; the exit status is 0 if it measured, 1 where there is no GPU to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the results")
    parser.add_argument("--budget", type=float, help="seconds in all (default: 500, of a dry run 60)")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU: shows that the suite works, measures nothing")
    options = parser.parse_args()
    suite = Suite(options.out, options.budget or BUDGETS[options.dry_run], options.dry_run)
    obstacle = suite.run()
    if obstacle is not None:
        print(f"bench.gpu: there is no GPU to measure on: {obstacle}", file=sys.stderr)
        return 1
    print(summary(suite.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
