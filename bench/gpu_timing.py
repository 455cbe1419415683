"""What the GPU suite does on the device, job after job, in a process of its own: a fault ends that, not the suite.

`bench.gpu` starts `python -m bench.gpu_timing` with a list of jobs, and reads the events that it appends to a file.
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fomaml_fused as ff
from fomaml_fused.plans import KERNEL_ENGINES, Plan
from fomaml_fused.tasks import TaskBatch

from . import jax_peer
from .gpu_clock import (
    DeviceLostError,
    capture,
    check_alive,
    errors,
    peak_bytes,
    replay_seconds,
    seconds,
    synchronize,
    told,
    turn,
    worst,
)
from .peers import PEERS, Result, Step, _batched, oracle, ours
from .summaries import quartiles
from .workloads import WORKLOADS, Workload

PRECISIONS = ("highest", "high", "medium")
TOLERANCES = {"highest": 1e-4, "high": 2e-2, "medium": 2e-2}  # what differs more is not the same step
FEW, MANY = 8, 64  # with more tasks than MANY, what goes one task at a time sees the first FEW of them
PATIENCE = 5.0  # a step that takes longer runs once
COMPILES = 25.0  # seconds that torch.compile may take; it is not started with less
SLICE = 50.0  # seconds that a job may take, or more where more is left for each
LEAST_ROUNDS = 3
JAX = "starting jax"  # what to avoid from then on if a process dies of it
REPLAYS_LAST = 0.002  # seconds of replays between two events, so that none waits for its launch

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """Something for a worker to do.

    Attributes:
        kind: "probe", "repeats" or "speed".
        precision: of "speed", what torch's float32 matmul precision is set to.
        avoid: what an earlier worker died of, and how.
    """

    kind: str
    workload: str = ""
    precision: str = "highest"
    avoid: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """How much is done: on a GPU, or in a dry run.

    Attributes:
        repeats: runs that must be equal.  rounds: of timing, at most.  seconds: for the rounds of a job, about.
        warm_up: seconds untimed before each timed step.
        precisions: of the kernels.
    """

    dry_run: bool
    repeats: int
    rounds: int
    seconds: float
    warm_up: float
    precisions: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.dry_run else torch.device("cuda", torch.cuda.current_device())

    def workload(self, name: str) -> Workload:
        """As registered; for a dry run so small that the interpreter is done with it at once."""
        found = WORKLOADS[name]
        if not self.dry_run:
            return found
        widths = (found.widths[0], min(found.widths[1], 12), found.widths[-1])
        shots, queries = min(found.shots, 6), min(found.queries, 7)
        return replace(found, widths=widths, tasks=2, shots=shots, queries=queries, steps=min(found.steps, 2))


FULL = Scale(dry_run=False, repeats=10, rounds=50, seconds=3.0, warm_up=0.01, precisions=PRECISIONS)
# In one precision, for the interpreter is slow, and as it comes it multiplies the bits of bfloat16 as integers.
DRY = Scale(dry_run=True, repeats=2, rounds=2, seconds=1.0, warm_up=0.0, precisions=PRECISIONS[:1])


@dataclass(frozen=True)
class Context:
    """What a job goes by: its scale, whom it tells what it is at, and when it should be done."""

    scale: Scale
    say: Callable[[str], None]
    until: float

    @property
    def left(self) -> float:
        return self.until - time.time()


@dataclass(frozen=True)
class Contender:
    """One way to take the meta-step.

    Attributes:
        precision: what its tolerance goes by.  unit: what does its arithmetic, "fp32", "tf32" or "bf16".
        build: gives the step, and how its result is read as torch tensors.
        first_call: seconds that it may take beyond a step.
        capture: whether its device time is to be had by replaying its graph; else why not.
        counted: whether its memory comes from torch's allocator, step by step.
        one_by_one: whether it takes one task at a time.
    """

    name: str
    precision: str
    unit: str
    build: Callable[[Workload, nn.Module, TaskBatch], tuple[Callable[[], Any], Callable[[Any], Result]]]
    first_call: float = 0.0
    capture: bool | str = "device time is taken of ours and of the compiled peer"
    counted: bool = True
    one_by_one: bool = False


def contenders(
    workload: Workload, precision: str, job: Job, context: Context
) -> tuple[list[Contender], dict[str, str]]:
    """Who takes part at a precision of torch's float32 products, and who does not and why."""
    found, absent = [], {}
    own = PRECISIONS if precision == "highest" else (precision,)
    for kernel in own:
        name = f"ours, {kernel}"
        plan = plan_of(workload, kernel, context.scale.device)
        if kernel not in context.scale.precisions:
            absent[name] = "not in a dry run"
        elif plan.engine == "batched":
            absent[name] = plan.reason
        else:
            unit = "bf16" if kernel == "medium" else "tf32"
            # Beside what the planner chooses, the engines that it did not choose: were they faster, it is to learn.
            rest = [n for n, p in plan.others if isinstance(p, Plan) and n in KERNEL_ENGINES and kernel == precision]
            rest = rest if not context.scale.dry_run or workload.name == "sine" else []
            for engine in (None, *rest):
                build = _torch_step(partial(ours, engine=engine, backend="triton", precision=kernel))
                label = name if engine is None else f"{name}, {engine}"
                found.append(Contender(label, kernel, unit, build, first_call=30.0, capture=True))
    unit = "fp32" if precision == "highest" else "tf32"
    of_torch = partial(Contender, precision=precision, unit=unit)
    found.append(of_torch("ours, torch", build=_torch_step(partial(ours, backend="torch")), capture=True))
    for name, peer in PEERS.items():
        if "compile" not in name:
            found.append(of_torch(name, build=_torch_step(peer), one_by_one="loop" in name))
        elif context.scale.dry_run:
            absent[name] = absent[f"{name}, CUDA graphs"] = "not in a dry run"
        else:
            found.append(of_torch(name, build=_torch_step(peer), first_call=COMPILES, capture=True))
            # Behind the other one, which forgets all that was compiled before it.
            build, why = _torch_step(compiled_with_graphs), "it replays graphs of its own"
            found.append(of_torch(f"{name}, CUDA graphs", build=build, first_call=COMPILES, capture=why, counted=False))
    name = "jax jit(vmap(grad))"
    context.say(JAX)
    obstacle = job.avoid.get(JAX) or jax_peer.obstacle()
    if obstacle is None:
        build = partial(jax_peer.jit_vmap_grad, precision=precision)
        found.append(of_torch(name, build=build, first_call=10.0, capture="its stream is not torch's", counted=False))
    else:
        absent[name] = obstacle
    return found, absent


def compiled_with_graphs(workload: Workload, model: nn.Module, batch: TaskBatch) -> Step:
    """`peers.compiled_vmap_grad` with CUDA graphs, as torch.compile makes them."""
    step = _batched(
        workload, model, batch, lambda f: torch.compile(f, fullgraph=True, dynamic=False, mode="reduce-overhead")
    )

    def marked() -> Result:
        torch.compiler.cudagraph_mark_step_begin()  # the results of the step before may be overwritten
        return step()

    return marked


def plan_of(workload: Workload, precision: str, device: torch.device) -> Plan:
    """The plan where the kernel is asked for; its reason says why if it does not run."""
    meta = ff.FOMAML(workload.model(), steps=workload.steps, loss=workload.loss, backend="triton", precision=precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # which says what the plan's reason says
        return meta.plan(workload.tasks, workload.shots, workload.queries, device=device)


def probe(context: Context) -> Row:
    """What is there, and the plan of every workload; with an "obstacle" where there is nothing to measure."""
    try:
        from fomaml_fused.engines import launching
    except ImportError as error:
        return {"obstacle": f"the kernels cannot be imported ({error})"}
    if not context.scale.dry_run and not torch.cuda.is_available():
        return {"obstacle": "torch finds no GPU"}
    device = context.scale.device
    obstacle = launching.obstacle(device)
    if obstacle is not None:
        return {"obstacle": obstacle}
    plans: dict[str, dict[str, Row]] = {}
    for name in WORKLOADS:
        found = {p: plan_of(context.scale.workload(name), p, device) for p in PRECISIONS}
        plans[name] = {p: {"engine": plan.engine, "reason": plan.reason} for p, plan in found.items()}
    return {"environment": environment(context.scale), "plans": plans}


def environment(scale: Scale) -> Row:
    """Device and versions that a figure depends on."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    found: Row = {"device": device_name(scale), "python": platform.python_version(), "torch": torch.__version__}
    found |= {package: version(package) for package in ("triton", "numpy", "jax", "pytest", "hypothesis")}
    found |= {"cuda": torch.version.cuda, "fomaml_fused": ff.__version__}
    if not scale.dry_run:
        properties = torch.cuda.get_device_properties(scale.device)
        found |= {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return found


def device_name(scale: Scale) -> str:
    """What figures are labelled with."""
    return "dry run: a CPU, kernels interpreted" if scale.dry_run else torch.cuda.get_device_name(scale.device)


def repeats(job: Job, context: Context) -> Row:
    """Whether the kernel gives the same bits every time, and how far it is from the oracle, in each precision."""
    workload, device = context.scale.workload(job.workload), context.scale.device
    model, batch = workload.model().to(device), _to(workload.batch(), device)
    few = first_tasks(batch, FEW) if workload.tasks > MANY else batch
    expected = oracle(workload, *in_float64(model, few))
    found: Row = {}
    for precision in context.scale.precisions:
        row = found[precision] = Row(device=device_name(context.scale))
        plan = plan_of(workload, precision, device)
        if precision in job.avoid:
            row["failed"] = job.avoid[precision]
        elif plan.engine == "batched":
            row["skipped"] = plan.reason
        else:
            context.say(precision)
            try:
                own = partial(ours, backend="triton", precision=precision)
                runs = [_bits(step()) for step in [own(workload, model, batch)] * context.scale.repeats]
                loss, gradient = errors(own(workload, model, few)(), expected)
                row |= {"runs": len(runs), "equal": all(torch.equal(runs[0], run) for run in runs)}
                row |= {"loss_error": _number(loss), "gradient_error": _number(gradient), "against": len(few.support_x)}
            except Exception as error:
                row["failed"] = told(error)
                check_alive(device)
    return found


def speed(job: Job, context: Context) -> Row:
    """Times every contender that agrees with the oracle, in interleaved rounds."""
    torch.set_float32_matmul_precision(job.precision)
    workload, device = context.scale.workload(job.workload), context.scale.device
    model, batch = workload.model().to(device), _to(workload.batch(), device)
    context.say("the oracle")
    expected, how = exact(workload, model, batch)
    present, rows = contenders(workload, job.precision, job, context)
    rows_of: dict[str, Row] = {c.name: {} for c in present} | {name: {"skipped": why} for name, why in rows.items()}
    steps: dict[str, Callable[[], Any]] = {}
    times: dict[str, list[float]] = {}
    for contender in present:
        row, name = rows_of[contender.name], contender.name
        try:
            step = admit(contender, job, context, (workload, model, batch), expected, row)
            if step is None:
                continue
            if contender.first_call == COMPILES:  # CUDA graphs are recorded in the second call
                for _ in range(2):
                    step()
            took = row["first_call_s"]
            if took > PATIENCE and contender.first_call:
                took = seconds(step, device)
            row["peak_bytes"] = peak_bytes(step, device) if contender.counted and took < PATIENCE else None
            times[name] = [took] if took > PATIENCE else []
            steps[name] = step
        except Exception as error:
            row["failed"] = told(error)
            check_alive(device)

    context.say("the rounds")
    turns = {n: partial(turn, step, device, context.scale.warm_up) for n, step in steps.items() if not times[n]}
    times |= interleave(turns, context)
    graphs = {} if context.scale.dry_run else captures(present, steps, job, context, expected, rows_of)
    device_times = interleave({name: partial(replay_seconds, *graph) for name, graph in graphs.items()}, context)

    for contender in present:
        row, name = rows_of[contender.name], contender.name
        if name in times:
            row["wall_s"] = quartiles(times[name])
        if name in device_times:
            row["device_s"] = quartiles(device_times[name])
        elif "wall_s" in row and "device_skipped" not in row:
            row["device_skipped"] = "no CUDA device" if context.scale.dry_run else contender.capture
    return {
        "device": device_name(context.scale),
        "torch_float32_matmul_precision": torch.get_float32_matmul_precision(),
        "sizes": {n: getattr(workload, n) for n in ("widths", "tasks", "shots", "queries", "steps", "loss")},
        "expected": how,
        "contenders": rows_of,
    }


def admit(
    contender: Contender,
    job: Job,
    context: Context,
    problem: tuple[Workload, nn.Module, TaskBatch],
    expected: Result,
    row: Row,
) -> Callable[[], Any] | None:
    """The step of a contender that may be timed, after its first call; else None, and why in its row."""
    workload, model, batch = problem
    row |= {"precision": contender.precision, "unit": contender.unit}
    if contender.name in job.avoid:
        row["failed"] = job.avoid[contender.name]
        return None
    if context.left < contender.first_call:
        row["skipped"] = f"its first call may take {contender.first_call:g} s, {max(context.left, 0):.0f} were left"
        return None
    context.say(contender.name)
    device = batch.support_x.device
    if contender.one_by_one and workload.tasks > MANY:
        few, _ = contender.build(workload, model, first_tasks(batch, FEW))
        few()
        whole = seconds(few, device) * workload.tasks / FEW
        if whole > context.left / 3:
            row["skipped"] = f"a step would take about {whole:.0f} s, going by one of {FEW} tasks"
            return None
    start = time.perf_counter()
    step, read = contender.build(workload, model, batch)
    found = step()
    synchronize(device)
    row["first_call_s"] = time.perf_counter() - start
    error = worst(errors(read(found), expected))
    row["error"] = _number(error)
    if not error <= TOLERANCES[contender.precision]:
        row["disagrees"] = f"its relative error is {error:.2g}, {TOLERANCES[contender.precision]:g} is allowed"
        return None
    return step


def exact(workload: Workload, model: nn.Module, batch: TaskBatch) -> tuple[Result, str]:
    """The meta-step in float64, and where it is from; of many tasks from what agrees with the oracle on a few.

    Raises:
        RuntimeError: it does not agree.
    """
    model, batch = in_float64(model, batch)
    if workload.tasks <= MANY:
        return oracle(workload, model, batch), "the oracle in float64"
    few = first_tasks(batch, FEW)
    apart = worst(errors(ours(workload, model, few, backend="torch")(), oracle(workload, model, few)))
    if not apart < 1e-9:
        raise RuntimeError(f"batched torch ops in float64 are {apart:.2g} from the oracle on the first {FEW} tasks")
    whole = ours(workload, model, batch, backend="torch")()
    return whole, f"batched torch ops in float64, {apart:.1g} from the oracle on the first {FEW} tasks"


def in_float64(model: nn.Module, batch: TaskBatch) -> tuple[nn.Module, TaskBatch]:
    """Copies; class indices as they are."""
    return copy.deepcopy(model).double(), TaskBatch(*(t.double() if t.is_floating_point() else t for t in batch))


def first_tasks(batch: TaskBatch, tasks: int) -> TaskBatch:
    """The first of a batch's tasks."""
    return TaskBatch(*(t[:tasks] for t in batch))


def captures(
    present: list[Contender],
    steps: dict[str, Callable[[], Any]],
    job: Job,
    context: Context,
    expected: Result,
    rows: dict[str, Row],
) -> dict[str, tuple[torch.cuda.CUDAGraph, int]]:
    """The graphs of those steps that can be captured, with how many replays to time at once."""
    found = {}
    for contender in present:
        name, label = contender.name, f"graph of {contender.name}"
        if name not in steps or contender.capture is not True:
            continue
        if label in job.avoid:
            rows[name]["device_skipped"] = job.avoid[label]
            continue
        context.say(label)
        try:
            graph = capture(steps[name], context.scale.device, expected, TOLERANCES[contender.precision])
            replay_seconds(graph, 2)
            found[name] = graph, max(3, min(100, math.ceil(REPLAYS_LAST / replay_seconds(graph, 3))))
        except Exception as error:
            rows[name]["device_skipped"] = f"no graph: {told(error)}"
            check_alive(context.scale.device)
    return found


def interleave(turns: Mapping[str, Callable[[], float]], context: Context) -> dict[str, list[float]]:
    """The seconds of each contender's turns; every other round goes backwards, so that none follows the same always."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    until = time.time() + min(context.scale.seconds, max(context.left, 0.0))
    for i in range(context.scale.rounds if turns else 0):
        if i >= LEAST_ROUNDS and time.time() > until:
            break
        for name in list(turns)[:: 1 if i % 2 == 0 else -1]:
            times[name].append(turns[name]())
    return times


def _torch_step(build: Callable[..., Step]) -> Callable[..., tuple[Step, Callable[[Any], Result]]]:
    return lambda *problem: (build(*problem), lambda result: result)


def _to(batch: TaskBatch, device: torch.device) -> TaskBatch:
    return TaskBatch(*(t.to(device) for t in batch))


def _bits(result: Result) -> Tensor:
    return torch.cat([result[0].reshape(1), *(g.flatten() for g in result[1].values())]).view(torch.int32)


def _number(value: float) -> float | str:
    """JSON has no nan."""
    return value if math.isfinite(value) else str(value)


def attempt(job: Job, context: Context) -> Row:
    """The result of a job, or what it failed of.

    Raises:
        DeviceLostError: this process gets no more from the device.
    """
    try:
        match job.kind:
            case "probe":
                return probe(context)
            case "repeats":
                return repeats(job, context)
            case _:
                return speed(job, context)
    except DeviceLostError:
        raise
    except Exception as error:
        failed = told(error)
    # Outside of the handler, which would keep the tensors of every frame that the error went through.
    check_alive(context.scale.device)
    return {"failed": failed}


def main() -> int:
    """Do the jobs of the JSON in the first argument; exit status 3 where the device is lost."""
    order = json.loads(sys.argv[1])
    scale, jobs = DRY if order["dry_run"] else FULL, [Job(**job) for job in order["jobs"]]
    if scale.dry_run:
        torch.set_num_threads(1)  # sizes are too small for more

    def emit(**event: Any) -> None:
        with Path(order["events"]).open("a") as file:
            file.write(json.dumps(event) + "\n")

    for i, job in enumerate(jobs):
        left = order["deadline"] - time.time()
        if left <= 0:
            break
        share = max(SLICE, left / (len(jobs) - i))
        context = Context(scale, lambda what: emit(doing=what), time.time() + min(left, share))
        context.say("")
        try:
            result = attempt(job, context)
        except DeviceLostError as error:
            emit(lost=str(error))
            return 3
        emit(done=result)
        gc.collect()
        if not scale.dry_run and job.kind != "probe":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
