"""The planner: its choices follow the mathematics, its bound holds, its explanation can be read."""

import json
import os
import re
import subprocess
import sys
import warnings
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import fomaml_fused as ff
from fomaml_fused.batch import Sizes, Support
from fomaml_fused.planner import forget_plans, make_plan
from fomaml_fused.plans import MEMORY_BOUND

from .cases import flat
from .peak_memory import PeakMemory


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, device="meta"), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def plan(model: nn.Module, tasks: int, shots: int, queries: int, **options: Any) -> ff.Plan:
    return ff.FOMAML(model, **options).plan(tasks, shots, queries, device="cpu")


def test_few_shots_on_wide_layers_are_dual() -> None:
    chosen = plan(mlp(512, 1024, 1024, 10), 32, 10, 10, steps=5)
    assert chosen.forms[:2] == ("dual", "dual")
    assert chosen.memory < chosen.naive_memory / 5


def test_many_samples_on_narrow_layers_are_primal() -> None:
    assert plan(mlp(2, 128, 128, 3), 32, 1024, 1024, steps=3).forms == ("primal",) * 3


def test_few_shots_and_many_queries_fold() -> None:
    assert plan(mlp(64, 256, 256, 5), 16, 2, 300, steps=3).forms[1] == "dual:3"


def test_layers_that_do_not_move_are_shared() -> None:
    model = mlp(64, 64, 64, 5)
    assert plan(model, 8, 5, 5, steps=3, adapt="head").forms[:2] == ("shared", "shared")
    assert plan(model, 8, 5, 5, steps=0).forms == ("shared",) * 3


@pytest.mark.parametrize("bound", [1 << 20, 1 << 24, 1 << 28])
def test_the_bound_on_memory_holds(bound: int) -> None:
    meta = ff.FOMAML(mlp(784, 256, 128, 64, 64, 5), steps=5)
    with ff.override(memory_bound=bound):
        chosen = meta.plan(10_000, 5, 5, device="cpu")
    assert chosen.memory <= bound or chosen.chunk == 1
    assert plan(mlp(784, 256, 5), 10_000, 5, 5).memory <= MEMORY_BOUND


@pytest.mark.parametrize("form", ["primal", "dual", "dual:2", "dual:4"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_peak_over_many_chunks_is_that_of_one(form: str, momentum: float) -> None:
    model = nn.Sequential(nn.Linear(60, 80), nn.Tanh(), nn.Linear(80, 40), nn.Tanh(), nn.Linear(40, 5))
    meta = ff.FOMAML(model, steps=4, momentum=momentum)
    tensors = [torch.randn(40, 6, 60), torch.randn(40, 6, 5), torch.randn(40, 7, 60), torch.randn(40, 7, 5)]
    with ff.override(forms=(form,) * 3, chunk=10):
        estimate = meta.plan(40, 6, 7).memory
        with PeakMemory() as memory:
            meta(*tensors)
        assert memory.peak < 1.3 * estimate
        with ff.override(forms=(form,) * 3, chunk=10, memory_bound=1), PeakMemory() as memory:
            meta.predict(*tensors[:3]).sum().backward()
        assert memory.peak < 1.3 * estimate


def test_a_fold_holds_the_history_of_the_steps_before_it_alone() -> None:
    meta = ff.FOMAML(nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20)), steps=40)
    tensors = [torch.randn(8, 6, 20) for _ in range(4)]
    peaks = {}
    for form in ("primal", "dual:1", "dual"):
        with ff.override(forms=("primal", form)), PeakMemory() as memory:
            meta(*tensors)
        peaks[form] = memory.peak
    assert peaks["dual:1"] < 1.2 * peaks["primal"] < 0.2 * peaks["dual"]


def test_the_model_of_memory_covers_what_is_allocated() -> None:
    """What a chunk holds, by the model, against the storage that its adapted layers and its query pass really hold."""
    from fomaml_fused.engines import batched
    from fomaml_fused.engines.forms import FoldingLayer, PrimalLayer

    for form in ("primal", "dual", "dual:2", "dual:4"):
        model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 5))
        meta = ff.FOMAML(model, steps=4, lr=0.1)
        with ff.override(forms=(form,) * 3):
            chosen = meta.plan(16, 6, 7)
        x, q = torch.randn(16, 6, 30), torch.randn(16, 7, 30)
        pairs = [(layer.weight, layer.bias) for layer in model if isinstance(layer, nn.Linear)]
        with torch.no_grad():
            adapted = batched.adapt(chosen, flat(model), Support(x, torch.randn(16, 6, 5)))
            trace = batched.query_pass(adapted, q)
        shared = {t.data_ptr() for pair in pairs for t in pair} | {x.data_ptr()}
        forms = [cell.form for cell in adapted.cells]
        layers: list[object] = [form.layer if isinstance(form, FoldingLayer) else form for form in forms]
        layers += [own for form in layers if isinstance(form, PrimalLayer) for own in (form.own_weight, form.own_bias)]
        tensors = [v for layer in layers for v in vars(layer).values() if isinstance(v, torch.Tensor)]
        tensors += [t for saved in trace.saved for t in (saved.x, saved.kept)]
        held = {t.data_ptr(): t.numel() * 4 for t in tensors if t.data_ptr() not in shared}
        assert sum(held.values()) <= chosen.memory


def test_blocks_of_samples_bound_what_a_long_support_set_holds() -> None:
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    meta = ff.FOMAML(model, steps=2)
    tensors = [torch.randn(2, 4000, n) for n in (2, 1, 2, 1)]
    peaks = {}
    for rows in (4000, 250):
        with ff.override(rows=rows, chunk=1), PeakMemory() as memory:
            meta(*tensors)
        peaks[rows] = memory.peak
    assert peaks[250] < 0.15 * peaks[4000]
    with ff.override(memory_bound=1 << 20):
        bounded = meta.plan(2, 4000, 4000)
        with PeakMemory() as memory:
            meta(*tensors)
    assert bounded.rows is not None
    assert memory.peak < 1.3 * bounded.memory < 1.3 * (1 << 20)
    assert f"1, of each {bounded.rows} samples" in str(bounded)


@pytest.mark.parametrize(
    ("options", "told", "message"),
    [
        ({}, {"forms": ["dual", "primal"]}, "rows is 5.*layer 0 is dual"),
        ({"nonfinite": "skip"}, {}, "rows is 5.*which tasks are skipped"),
        ({}, {"rows": 0}, "rows is 0"),
    ],
)
def test_blocks_that_cannot_be(options: dict[str, Any], told: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), ff.override(**({"rows": 5} | told)):
        ff.FOMAML(mlp(3, 4, 2), **options).plan(4, 20, device="cpu")


def test_blocks_that_hold_all_samples_are_none() -> None:
    with ff.override(rows=20, forms=["dual", "primal"]):
        assert ff.FOMAML(mlp(3, 4, 2)).plan(4, 20, device="cpu").rows is None


def test_plans_are_deterministic_and_cached() -> None:
    problem = ff.FOMAML(mlp(3, 4, 2)).problem
    sizes = Sizes(5, 3, 3, torch.float32, torch.device("cpu"))
    assert make_plan(problem, sizes) is make_plan(problem, sizes)


def test_an_override_ends_with_its_block() -> None:
    meta = ff.FOMAML(mlp(3, 4, 2))
    free = meta.plan(4, 2, device="cpu")
    with ff.override(forms=["dual:1", "primal"], chunk=3):
        told = meta.plan(4, 2, device="cpu")
    assert (told.forms, told.chunk) == (("dual:1", "primal"), 3)
    assert meta.plan(4, 2, device="cpu") == free


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forms": ["dual"]}, r"forms is \('dual',\).*each of the 2 layers"),
        ({"forms": ["dual", "triple"]}, "'primal', 'dual' or 'dual:k'"),
        ({"forms": ["dual", "dual:0"]}, "'dual:0'.*k >= 1"),
        ({"forms": ["dual", "dual:2"]}, "forms has 'dual:2'; .* 1 <= k <= 1"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_bad_overrides(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), ff.override(**options):
        ff.FOMAML(mlp(3, 4, 2)).plan(4, 2, device="cpu")


def test_the_explanation_names_what_was_chosen_and_what_was_not() -> None:
    text = str(plan(mlp(784, 256, 5), 32, 5, 5, steps=5, loss="cross_entropy"))
    for expected in (
        "784-256-5 relu",
        "K=5",
        "T=32 tasks",
        "engine batched",
        "0: 784 -> 256  dual",
        "primal",
        "all primal",
    ):
        assert expected in text
    with ff.override(forms=["dual:2", "dual:3"]):
        text = str(plan(mlp(784, 256, 5), 32, 5, 5, steps=3))
    assert "0: 784 -> 256  dual, primal from step 2" in text
    assert "1: 256 -> 5    dual, primal for queries" in text
    assert "autograd" in str(plan(mlp(3, 2), 1, 1, 1, backend="reference"))
    assert "does not move" in str(plan(mlp(3, 4, 2), 1, 1, 1, adapt="head"))


def test_networks_that_fit_on_chip_run_in_the_resident_kernel() -> None:
    chosen = plan(mlp(1, 40, 40, 1), 25, 10, 10, steps=5, backend="triton", precision="high")
    assert (chosen.engine, chosen.precision, chosen.chunk) == ("resident", "tf32", 25)
    assert "4 warps, tiles of 16 samples, products in tf32" in str(chosen)
    assert "all dual" in str(chosen)


@pytest.mark.parametrize(
    ("model", "shots", "options", "engines", "reason"),
    [
        (mlp(64, 256, 256, 5), 5, {}, "resident", "65,536 numbers when padded, is more than a program holds on chip"),
        (mlp(64, 64, 64, 64, 64), 5, {"precision": "tf32"}, "resident", r"about \d+ registers .*a thread has 255"),
        (mlp(3, 4), 5, {"loss": torch.nn.functional.mse_loss}, "resident dual", "loss is a callable"),
        (mlp(3, 4), 5, {"outer_loss": torch.nn.functional.mse_loss}, "resident dual", "outer_loss is a callable"),
        (mlp(3, 4, 2), 30, {"steps": 4}, "dual", "the 120 samples of a program's history are more than a tile of 64"),
        (mlp(3, 4, 2), 65, {}, "dual layered", "the 65 shots of a program's tasks are more than a tile of 64 samples"),
        (mlp(3, 4).double(), 5, {}, "resident dual layered", "kernels compute in float32, the model is float64"),
    ],
    ids=["width", "registers", "callable", "outer callable", "history", "shots", "float64"],
)
def test_a_kernel_that_cannot_run_is_named_with_the_reason(
    model: nn.Module, shots: int, options: dict[str, Any], engines: str, reason: str
) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        chosen = plan(model, 7, shots, 5, backend="triton", **options)
    for engine in engines.split():
        assert re.search(f"{engine}( cannot run)?: .*{reason}", str(chosen))
        with pytest.raises(ValueError, match=f"engine is '{engine}', which cannot run: .*{reason}"), override(engine):
            plan(model, 7, shots, 5, backend="triton", **options)
    if len(engines.split()) < 3:
        assert chosen.engine not in (*engines.split(), "batched")
        assert not said
    else:
        assert chosen.engine == "batched"
        assert re.search(f"runs the batched engine instead: .*{reason}", str(said[0].message))


def override(engine: str) -> AbstractContextManager[None]:
    return ff.override(engine=engine)


def test_few_shots_on_wide_networks_run_in_the_dual_kernels() -> None:
    """In one launch while a program's chain of tiles is short, spread over the device where it is not."""
    omniglot = plan(mlp(784, 256, 128, 64, 64, 5), 32, 5, 5, steps=5, backend="triton")
    wide = plan(mlp(512, 1024, 1024, 1024, 10), 32, 10, 10, steps=5, backend="triton")
    crowd = plan(mlp(64, 128, 64, 10), 10_000, 5, 5, steps=3, backend="triton")
    assert (omniglot.engine, wide.engine) == ("dual", "layered")
    assert crowd.engine in ("dual", "layered")
    assert omniglot.forms == ("dual",) * 5
    assert "2 tasks a program" in crowd.reason
    assert wide.memory < 0.1 * wide.naive_memory
    for chosen in (omniglot, wide, crowd):
        assert re.search("(?m)^batched +", str(chosen))


def test_many_samples_run_on_weights_of_each_task() -> None:
    """Through all layers in one launch where they are narrow, a layer a launch where they are not."""
    rl = plan(mlp(20, 64, 64, 6), 40, 200, 200, backend="triton")
    field = plan(mlp(2, 256, 256, 256, 256, 3), 4, 4096, 4096, steps=2, backend="triton")
    assert (rl.engine, field.engine) == ("chained", "primal")
    assert rl.forms == ("primal",) * 3
    assert re.search("dual cannot run: the 4096 shots", str(field))
    assert re.search("(?m)^primal +", str(rl))
    head = plan(mlp(20, 64, 64, 6), 40, 200, 200, backend="triton", adapt="head")
    assert head.forms == ("shared", "shared", "primal")
    mixed = ff.override(forms=("primal", "dual", "primal"), engine="primal")
    with mixed, pytest.raises(ValueError, match="the forms primal, dual, primal are not its own"):
        plan(mlp(20, 64, 64, 6), 40, 10, 10, backend="triton")


def test_nested_overrides_add_up() -> None:
    with ff.override(engine="batched"), ff.override(chunk=3):
        assert plan(mlp(3, 4), 7, 5, 5, backend="triton").chunk == 3
        assert plan(mlp(3, 4), 7, 5, 5, backend="triton").engine == "batched"
    with pytest.raises(ValueError, match="engine is 'fast'; it takes one of batched, native, resident, dual, layered"):
        override("fast").__enter__()


def test_shared_memory_that_a_device_lacks_is_known_before_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    from fomaml_fused.engines import launching

    monkeypatch.setattr(launching, "shared_memory", lambda device: 10_000)
    with pytest.warns(UserWarning, match=r"(about [\d,]+ bytes of shared memory, and a program has 10,000.*){3}"):
        assert plan(mlp(1, 40, 40, 1), 26, 10, 10, backend="triton").engine == "batched"


@pytest.mark.parametrize(("version", "runs"), [("3.5.1", False), ("3.6.0", True), ("3.10.0+git1a2b3c", True)])
def test_an_old_triton_is_named(version: str, runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    forget_plans()
    try:
        if runs:
            assert plan(mlp(1, 40, 40, 1), 26, 10, 10, backend="triton").engine == "resident"
        else:
            with pytest.raises(RuntimeError, match=r"Triton is 3\.5\.1, and the kernels need 3\.6 or newer\. Move"):
                plan(mlp(1, 40, 40, 1), 26, 10, 10, backend="triton")
    finally:
        forget_plans()


@pytest.mark.parametrize(
    ("architecture", "obstacle"), [(75, "the GPU is an sm_75, and .* an sm_80 or newer"), (80, None)]
)
def test_a_gpu_without_the_matrix_instructions_is_named(
    architecture: int, obstacle: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels would be scalar code with thousands of spilled words; "auto" takes torch ops and says why."""
    import triton

    from fomaml_fused.engines import launching

    driver = Mock()
    driver.get_active_torch_device.return_value = torch.device("cpu")
    driver.get_current_target.return_value = Mock(backend="cuda", arch=architecture)
    monkeypatch.setattr(launching, "interpreted", lambda: False)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    found = launching.obstacle(torch.device("cpu"))
    assert found is None if obstacle is None else re.fullmatch(obstacle, str(found))


@pytest.mark.processes
def test_without_interpreter_and_driver_the_error_says_the_ways_out() -> None:
    program = """
import torch, fomaml_fused as ff
model = torch.nn.Sequential(torch.nn.Linear(3, 4))
ff.FOMAML(model)(*[torch.ones(2, 5, n) for n in (3, 4, 3, 4)])
ff.FOMAML(model, backend="triton").plan(2, 5)
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "VIRTUAL_GPU")}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: backend 'triton' cannot run on cpu tensors: Triton"), run.stderr
    assert "TRITON_INTERPRET=1" in last
    assert "backend 'torch'" in last


@pytest.mark.parametrize(
    ("setting", "operands"),
    [("highest", "tf32x3"), ("high", "tf32"), ("medium", "bf16"), ("ieee", "ieee"), ("fp16", "fp16")],
)
def test_the_precision_of_kernels(setting: str, operands: str) -> None:
    assert plan(mlp(3, 4), 2, 5, 5, backend="triton", precision=setting).precision == operands
    if setting in ("highest", "high", "medium"):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(setting)
        assert plan(mlp(3, 4), 2, 5, 5, backend="triton").precision == operands
        torch.set_float32_matmul_precision(before)


def test_autocast_decides_where_no_precision_is_given() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert plan(mlp(3, 4), 2, 5, 5, backend="triton").precision == "bf16"
        assert plan(mlp(3, 4), 2, 5, 5, backend="triton", precision="tf32").precision == "tf32"


def test_a_compiler_makes_thin_layers_cheap() -> None:
    """The products of a layer with one input are no ops of their own there, so its weights cost nothing to keep."""
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    with ff.override(engine="batched"):
        plans = [ff.FOMAML(model, steps=5, compile=compiled).plan(25, 10) for compiled in (False, True)]
    assert [plan.layers[0].form for plan in plans] == ["dual", "primal"]
    assert plans[1].estimate.seconds < plans[0].estimate.seconds


def test_what_is_said_of_shared_memory_covers_what_was_compiled() -> None:
    """And every configuration that ships is said to fit."""
    from fomaml_fused.kernels.configuration import configuration
    from fomaml_fused.kernels.resources import REGISTERS, resident_need, weight_tiles

    from bench.compile_only import DEVICES
    from bench.compiled import CASES
    from fomaml_fused.engines.resident import spec_of

    stored = json.loads((Path(__file__).parent.parent / "bench" / "results" / "compiled.json").read_text())["rows"]
    checked = 0
    for case in CASES:
        w, problem = case.workload, case.meta().problem
        names = re.compile(rf"{w.name} (meta|adapt|query|query_backward)_kernel {case.precision}")
        for row in stored if case.engine == "resident" else []:
            if names.fullmatch(row["case"]):
                target = DEVICES[row["target"]].target
                largest = max(weight_tiles(w.widths))
                config = configuration(f"{target.backend}-{target.arch}", "resident", largest)
                need = resident_need(spec_of(problem, w.shots, w.queries, case.precision, config), config)
                assert need.registers <= REGISTERS
                assert row["shared"] <= need.shared, row
                checked += 1
    assert checked > 60


def test_memory_does_not_grow_with_tasks() -> None:
    """In the fused engine beyond a loss a task: programs walk over tasks."""
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    meta = ff.FOMAML(model, backend="triton")
    peaks = []
    for tasks in (20, 60):
        with PeakMemory() as memory:
            meta(*[torch.randn(tasks, 2, 1) for _ in range(4)])
        data = 4 * tasks * 2 * 4
        peaks.append(memory.peak - data)
    assert peaks[1] - peaks[0] <= 4 * 40


@pytest.mark.parametrize("engine", ["dual", "layered"])
@pytest.mark.kernels
def test_in_the_dual_kernels_no_task_has_weights_of_its_own(engine: str) -> None:
    """What a task adds to the peak is its history and its samples, far less than its weights would be."""
    widths, shots, queries, steps = (16, 96, 96, 4), 2, 3, 2
    model = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 4))
    meta = ff.FOMAML(model, steps=steps, backend="triton")
    history = shots * (widths[0] + widths[1]) + steps * shots * (2 * 96 + 96 + 4)
    samples = (shots + 3 * queries) * sum(widths) + (shots + queries) * (widths[0] + widths[-1])
    parameters = sum(p.numel() for p in model.parameters())
    assert history + samples < 0.5 * parameters
    for call in ("meta", "predict"):
        peaks = []
        for tasks in (2, 4):
            x, y, q, t = (torch.randn(tasks, n, w) for n in (2, 3) for w in (16, 4))
            with ff.override(engine=engine), PeakMemory() as memory:
                value = meta(x, y, q, t) if call == "meta" else meta.predict(x, y, q).sum()
                torch.autograd.grad(value, list(model.parameters()))
            peaks.append(memory.peak)
        assert peaks[1] - peaks[0] <= 2 * 4 * (history + samples)


def test_what_is_tuned_is_for_the_inner_loop_it_was_tuned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack of several tasks, found for few steps, would share the weights that tasks have where layers fold."""
    from fomaml_fused.kernels import configuration

    from fomaml_fused.kernel_plans import tuned_for

    monkeypatch.setattr(configuration, "_tuned", {})
    model, options = mlp(3, 17, 20, 3), {"backend": "triton"}
    with ff.override(engine="layered"):
        few, many = (plan(model, 4, 5, 5, steps=steps, **options) for steps in (1, 16))
        assert few.config is not None
        packed = replace(few.config, tasks=3)
        configuration.remember("cpu-0", "layered", tuned_for(few.problem, few.sizes, few.precision), packed)
        ff.planner.forget_plans()
        assert plan(model, 4, 5, 5, steps=1, **options).config == packed
        assert plan(model, 4, 5, 5, steps=16, **options) == many
        assert "dual:13" in many.forms
        with pytest.raises(ValueError, match="3 tasks a program share weights"), ff.override(config=packed):
            plan(model, 4, 5, 5, steps=16, **options)
    ff.planner.forget_plans()


def test_layers_that_do_not_move_have_no_history() -> None:
    with ff.override(engine="layered"):
        assert plan(mlp(3, 17, 20, 3), 4, 20, 5, steps=9, adapt=[0], backend="triton").forms[1:] == ("shared", "shared")


def test_a_plan_of_nothing() -> None:
    assert plan(mlp(3, 4), 3, 0, 0, steps=0, backend="triton").chunk == 3


def test_overrides_that_make_no_sense_are_refused_whatever_the_engine() -> None:
    with pytest.raises(ValueError, match="for each of the 2 layers"), ff.override(forms=("dual",)):
        plan(mlp(3, 4, 2), 3, 2, 2, backend="triton")
