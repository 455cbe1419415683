"""The rules as options of the training runs: each one trains, is measured and resumes exactly; bad ones are named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fomaml_fused import FOMAML
from fomaml_fused.cli import main
from fomaml_fused.tasks import FewShot
from fomaml_fused.train import digits, sine
from fomaml_fused.train.files import load_checkpoint
from fomaml_fused.train.loop import Outer
from fomaml_fused.train.rules import dealt

# By the options that ask for it.
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "adam": {"optimizer": "adam"},
    "nesterov": {"momentum": 0.5, "nesterov": True},
    "decay": {"weight_decay": 0.01},
    "decoupled decay": {"weight_decay": 0.01, "decoupled_weight_decay": True, "momentum": 0.5},
    "clipped norm": {"max_grad_norm": 1.0},
    "head": {"adapt": "head"},
    "by name": {"adapt": "0.bias,4"},
    "global rate": {"learn_lr": "global", "positive_lr": "clamp"},
    "rates by step": {"learn_lr": "step"},
    "rates by layer": {"learn_lr": "layer"},
    "rates by layer and step": {"learn_lr": "layer_step", "step_weights": "annealed"},
    "rates of elements": {"learn_lr": "element", "positive_lr": "softplus"},
    "reptile": {"outer": "reptile"},
    "multi-step loss": {"step_weights": "uniform"},
    "skips": {"nonfinite": "skip"},
}
SIZES: dict[str, Any] = {"steps": 3, "tasks": 5, "eval_tasks": 20}


def sine_config(rule: str, **more: Any) -> sine.SineConfig:
    options: dict[str, Any] = {"iterations": 8, "schedule": "constant"}
    return sine.SineConfig(**options | SIZES | RULES[rule] | more)


def typed(rule: str, **more: Any) -> list[str]:
    words = []
    for name, value in (SIZES | RULES[rule] | more).items():
        words += [f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)]
    return words


def trained(outer: Outer, iterations: int, path: Path) -> dict[str, Any]:
    outer.run(iterations, path, title=None)
    return load_checkpoint(path)


MEASURED = [("digits", rule) for rule in RULES] + [("sine", rule) for rule in ("adam", "rates of elements", "reptile")]


@pytest.mark.parametrize(("tasks", "rule"), MEASURED)
@pytest.mark.sampled(5)
def test_a_run_is_as_the_rule_says_and_is_measured(tasks: str, rule: str, tmp_path: Path) -> None:
    more = ["--joint-iterations", "1"] if tasks == "sine" else []
    assert main(["train", tasks, *typed(rule, iterations=2), *more, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["config"] | RULES[rule] == results["config"]
    learned = [name for name in load_checkpoint(tmp_path / "checkpoint.pt")["model"] if name.startswith("inner_lr")]
    assert bool(learned) == ("learn_lr" in RULES[rule])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.sampled(5)
def test_training_lowers_the_error_after_adaptation(rule: str) -> None:
    config = sine_config(rule, iterations=150, tasks=25, outer_lr=0.003)
    meta, outer = sine.prepare(config)
    batch = sine.held_out(10, config)
    before = config.trained(meta, config.steps)(*batch)
    outer.run(config.iterations, None, title=None)
    assert config.trained(meta, config.steps)(*batch) < 0.95 * before


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_comes_to_the_same_bits(rule: str, tmp_path: Path) -> None:
    config = sine_config(rule)
    whole = trained(sine.prepare(config)[1], config.iterations, tmp_path / "whole.pt")
    trained(sine.prepare(config)[1], 3, tmp_path / "parts.pt")
    outer = sine.prepare(config)[1]
    outer.resume(tmp_path / "parts.pt")
    parts = trained(outer, config.iterations, tmp_path / "parts.pt")
    assert parts["pending"] == whole["pending"]
    for name, value in whole["model"].items():
        assert torch.equal(parts["model"][name], value), name


def test_annealed_weights_go_from_all_steps_to_the_last() -> None:
    config = sine_config("rates by layer and step", steps=4)
    seen = [config.weights_of_steps(progress) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert seen == [(0.25,) * 4, (0.125, 0.125, 0.125, 0.625), (0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 1.0)]


def test_the_run_anneals_them() -> None:
    config = sine_config("rates by layer and step")
    meta, outer = sine.prepare(config)
    seen: list[Any] = []
    forward = meta.register_forward_pre_hook(lambda module, _: seen.append(module.step_weights))
    outer.run(config.iterations, None, title=None)
    forward.remove()
    assert seen == [config.weights_of_steps(i / config.iterations) for i in range(config.iterations)]


@pytest.mark.parametrize("rule", ["rates by step", "rates by layer and step", "rates of elements"])
def test_a_network_is_measured_at_its_learned_rates(rule: str) -> None:
    config = sine_config(rule, outer_lr=0.01)
    meta, outer = sine.prepare(config)
    outer.run(config.iterations, None, title=None)
    batch = sine.held_out(10, config)[:3]
    with torch.no_grad():
        torch.testing.assert_close(config.trained(meta, config.steps).predict(*batch), meta.predict(*batch))
        if "step" in rule:  # a step past the last is one more at the last rate
            rates = meta.inner_lr.listed()[0]
            assert rates is not None
            longer = FOMAML(meta.model, lr=torch.cat([rates, rates[-1:]]), steps=4, loss="mse")
            torch.testing.assert_close(config.trained(meta, 4).predict(*batch), longer.predict(*batch))


@pytest.mark.parametrize("rule", ["global rate", "rates by step", "rates of elements"])
def test_a_network_whose_rates_diverged_is_measured_as_such(rule: str) -> None:
    config = sine_config(rule)
    meta, _ = sine.prepare(config)
    with torch.no_grad():
        for rate in meta.inner_lr.parameters():
            rate.fill_(torch.nan)
        assert config.trained(meta, 2)(*sine.held_out(10, config)).isnan()


def test_reptile_gets_each_sample_of_a_task_once() -> None:
    x = torch.arange(40.0).view(40, 1)
    sampler = FewShot(x, torch.arange(40) // 10, ways=2, shots=1, queries=6)
    batch = sampler.sample(3)
    dealt_x, dealt_y = dealt(batch, 4, sampler.generator)
    assert dealt_x.shape == (3, 4, 3, 1)  # 14 samples, so two are left over
    for t in range(3):
        own = torch.cat([batch.support_x[t], batch.query_x[t]]).flatten().tolist()
        found = dealt_x[t].flatten().tolist()
        assert len(set(found)) == 12
        assert set(found) <= set(own)
        label = dict(zip(own, torch.cat([batch.support_y[t], batch.query_y[t]]).tolist(), strict=True))
        assert [label[value] for value in found] == dealt_y[t].flatten().tolist()
    with pytest.raises(ValueError, match="steps is 15; outer 'reptile' deals the 14 samples of a task"):
        dealt(batch, 15, sampler.generator)


def test_diverged_tasks_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = digits.DigitsConfig(iterations=3, lr=1e20, **SIZES | {"nonfinite": "skip"})
    outer = digits.prepare(config)[1]
    assert trained(outer, 3, tmp_path / "checkpoint.pt")["skipped"] == outer.skipped > 0
    options = typed("skips", iterations=3, lr=1e20)
    assert main(["train", "digits", *options, "--out", str(tmp_path / "run")]) == 0
    assert f"diverged tasks left out in training: {outer.skipped}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer", "adam", "--momentum", "0.9"], "momentum is 0.9; optimizer 'adam' takes betas instead"),
        (["--nesterov"], "nesterov is True; it takes a momentum above 0"),
        (["--outer", "reptile", "--learn-lr", "layer"], "learn_lr is given; outer 'reptile' has no query loss"),
        (["--outer", "reptile", "--step-weights", "uniform"], "step_weights is given; outer 'reptile' has no query"),
        (["--outer", "reptile", "--steps", "500"], "steps is 500; outer 'reptile' deals the"),
        (["--positive-lr", "softplus"], "positive_lr is 'softplus'; it takes learn_lr beside it"),
        (["--adapt", "2.weights"], "adapt names '2.weights'; the model has the parameters 0.weight,"),
        (["--weight-decay", "-1"], "weight_decay is -1.0; it takes a finite number, not negative"),
        (["--max-grad-norm", "0"], "max_grad_norm is 0; it takes None or a positive number"),
    ],
)
@pytest.mark.parametrize("tasks", ["sine", "digits"])
def test_rules_that_do_not_go_together_are_named(
    tasks: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", tasks, *options, "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_resuming_with_another_rule_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["train", "digits", "--out", str(tmp_path)]
    assert main([*run, *typed("head", iterations=1)]) == 0
    assert main([*run, *typed("plain", iterations=1), "--resume"]) == 1
    assert f"adapt is all; the checkpoint at {tmp_path / 'checkpoint.pt'} was made with head" in capsys.readouterr().err
