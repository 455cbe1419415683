"""Images as fields: what tasks are made of, what the run writes, and that a resumed one comes to the same."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import torch
from torch import Tensor

from fomaml_fused import FOMAML, reference
from fomaml_fused.cli import main
from fomaml_fused.tasks import Crops, photographs
from fomaml_fused.train import images
from fomaml_fused.train.files import load_checkpoint
from fomaml_fused.train.loop import Outer

TINY: dict[str, Any] = {"iterations": 6, "size": 8, "width": 8, "tasks": 2, "eval_tasks": 3}


def typed(**more: Any) -> list[str]:
    words = ["train", "images"]
    for name, value in (TINY | more).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def within(crop: Tensor, picture: Tensor) -> bool:
    """Whether a crop [3, size, size] lies somewhere in a picture [3, height, width]."""
    size = crop.shape[-1]
    windows = picture.unfold(1, size, 1).unfold(2, size, 1)  # [3, tops, lefts, size, size]
    candidates = (windows[..., 0, 0] == crop[:, :1, :1]).all(0).nonzero()
    return any(torch.equal(windows[:, top, left], crop) for top, left in candidates)


def test_crops_are_squares_of_the_images_with_their_coordinates() -> None:
    pictures = [torch.rand(3, 20, 30), torch.rand(3, 9, 8)]
    support_x, support_y, query_x, query_y = Crops(pictures, 8, seed=1).sample(40)
    assert torch.equal(support_x, query_x)
    assert torch.equal(support_y, query_y)
    assert support_x.shape == (40, 64, 2)
    rows = (torch.arange(8) + 0.5) / 4 - 1
    assert torch.equal(support_x[7].view(8, 8, 2), torch.stack(torch.meshgrid(rows, rows, indexing="ij"), -1))
    found = [[within((y.T.view(3, 8, 8) + 1) / 2, picture) for y in support_y] for picture in _exact(pictures)]
    assert all(sum(places) == 1 for places in zip(*found, strict=True))
    assert all(5 < sum(places) < 35 for places in found)  # both images are drawn


def _exact(pictures: list[Tensor]) -> list[Tensor]:
    """As they come back from [-1, 1], rounding and all."""
    return [((picture * 2 - 1) + 1) / 2 for picture in pictures]


def test_crops_reach_every_edge_and_are_repeatable() -> None:
    picture = torch.arange(300.0).view(1, 15, 20).expand(3, -1, -1) / 300
    corners = Crops([picture], 8).sample(400).support_y[:, 0, 0].add(1).mul(150).round().long()
    assert set((corners // 20).tolist()) == set(range(8))
    assert set((corners % 20).tolist()) == set(range(13))
    first, again, other = (Crops([picture], 8, seed=seed).sample(5).support_y for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("pictures", [[], [torch.rand(3, 8, 7)], [torch.rand(8, 8)], [torch.rand(1, 8, 8)]])
def test_images_that_hold_no_crop_are_named(pictures: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"images is empty; it takes|images\[0\] has shape .* each at least 8"):
        Crops(pictures, 8)


def test_photographs_come_with_scikit_image_and_held_out_ones_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a photograph is not in the wheel")

    monkeypatch.setattr("socket.socket.connect", refuse)
    names = (*images.TRAINED, *images.HELD_OUT)
    pictures = dict(zip(names, photographs(names), strict=True))
    assert len(pictures) == len(names)
    for picture in pictures.values():
        assert picture.shape[0] == 3
        assert picture.min() >= 0
        assert 0.5 < picture.max() <= 1
    astronaut = torch.from_numpy(skimage.data.astronaut()).double()  # [512, 512, 3]
    torch.testing.assert_close(pictures["astronaut"][:, 2, 5].double(), astronaut[6:9, 15:18].mean((0, 1)) / 255)


def test_held_out_crops_are_of_photographs_that_are_not_trained_on() -> None:
    config = images.ImagesConfig(**TINY | {"eval_tasks": 30})
    batches = {
        images.HELD_OUT: images.held_out(config),
        images.TRAINED: images.sampler(config, images.TRAINED, config.seed).sample(30),
    }
    for own, batch in batches.items():
        other = images.TRAINED if own == images.HELD_OUT else images.HELD_OUT
        mine, others = (_exact(photographs(names)) for names in (own, other))
        for y in batch.support_y:
            crop = (y.T.reshape(3, 8, 8) + 1) / 2
            assert any(within(crop, picture) for picture in mine)
            assert not any(within(crop, picture) for picture in others)
    again = images.held_out(config)
    assert all(torch.equal(a, b) for a, b in zip(batches[images.HELD_OUT], again, strict=True))


def test_psnr_is_that_of_colours_between_minus_one_and_one() -> None:
    targets = torch.rand(3, 10, 3) * 2 - 1
    colours = targets + torch.tensor([0.2, 0.02, math.nan])[:, None, None]
    torch.testing.assert_close(images.psnr(colours, targets), torch.tensor([20.0, 40.0, -math.inf]), rtol=1e-3, atol=0)


@torch.no_grad()
def test_the_standard_initialisation_gets_the_best_rate_after_each_number_of_steps() -> None:
    config = images.ImagesConfig(**TINY)
    model, batch = images.network(config), images.held_out(config)
    found = images.reconstructed(images.standard(config, model), batch)
    for steps in images.STEPS:
        best = max(
            float(images.psnr(FOMAML(model, lr=rate, steps=steps).predict(*batch[:3]), batch.query_y).mean())
            for rate in images.STANDARD_RATES
        )
        assert float(images.psnr(found[steps], batch.query_y).mean()) == pytest.approx(best)


@pytest.mark.parametrize("outer", ["fomaml", "reptile"])
def test_what_is_descended_is_the_rules_loss_on_all_pixels(outer: str) -> None:
    config = images.ImagesConfig(**TINY | {"outer": outer})
    batch = images.sampler(config, images.TRAINED, config.seed).sample(config.tasks)
    expected = reference.meta_loss(
        images.network(config), *batch[: 2 if outer == "reptile" else 4], lr=config.lr, steps=2, loss="mse", outer=outer
    )
    torch.testing.assert_close(images.prepare(config)[1].loss(), expected)


@pytest.mark.parametrize("outer", ["fomaml", "reptile"])
def test_training_raises_the_psnr_of_new_crops(outer: str) -> None:
    config = images.ImagesConfig(**TINY | {"outer": outer, "iterations": 150, "width": 32, "eval_tasks": 20})
    meta, loop = images.prepare(config)
    batch = images.held_out(config)
    before = images.reconstructed(images.learned(config, meta), batch)
    loop.run(config.iterations, None, title=None)
    after = images.reconstructed(images.learned(config, meta), batch)
    for steps in (1, 2, 5):
        assert images.psnr(after[steps], batch.query_y).mean() > images.psnr(before[steps], batch.query_y).mean() + 1


def test_a_run_leaves_its_files_and_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*typed(), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    pictures, checkpoints = ("learning_curve", "reconstructions"), ("checkpoint_fomaml", "checkpoint_reptile")
    names = {f"{name}.png" for name in pictures} | {f"{name}.pt" for name in checkpoints} | {"results.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in pictures)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["psnr"]) == 3
    lines = printed.splitlines()
    for name, by_steps in results["psnr"].items():
        assert list(by_steps) == ["0", "1", "2", "5"]
        assert all(5 < value < 40 for value in by_steps.values())
        line = next(line for line in lines if line.startswith(name))
        assert line.split()[-4:] == [f"{value:.2f}" for value in by_steps.values()]
    before, after = (results["first_order_gap"][when]["cosine"] for when in ("start", "end"))
    assert f"start of training, first-order gradient: cosine {before:.4f}" in printed
    assert 0.5 < before < 1
    assert before != after


def interrupted(command: list[str], after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command and press Ctrl-C after so many iterations, of both rules together."""
    step, taken = Outer._step, 0

    def counted(outer: Outer) -> None:
        nonlocal taken
        step(outer)
        taken += 1
        if taken == after:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Outer, "_step", counted)
        assert main(command) == 130


@pytest.mark.parametrize("after", [2, 8], ids=["in the first rule", "in the second"])
@pytest.mark.full
def test_an_interrupted_run_resumes_to_the_same_results(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*typed(), "--out", str(whole)]) == 0
    assert main([*typed(seed=1), "--out", str(parts)]) == 0  # whose checkpoints are not to be gone on from
    interrupted([*typed(), "--out", str(parts)], after, monkeypatch)
    assert main([*typed(), "--out", str(parts), "--resume"]) == 0
    assert (parts / "results.json").read_text() == (whole / "results.json").read_text()
    for name in ("checkpoint_fomaml.pt", "checkpoint_reptile.pt"):
        found, expected = (load_checkpoint(folder / name) for folder in (parts, whole))
        assert found["pending"] == expected["pending"]
        assert all(torch.equal(found["model"][key], value) for key, value in expected["model"].items())


def test_one_rule_alone_takes_what_only_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*typed(learn_lr="layer"), "--out", str(tmp_path)]) == 1
    assert "learn_lr is given; outer 'reptile' has no query loss" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main([*typed(learn_lr="layer", outer="fomaml"), "--out", str(tmp_path)]) == 0
    assert "learned by FOMAML, learned rates" in capsys.readouterr().out
    assert "inner_lr.value" in load_checkpoint(tmp_path / "checkpoint_fomaml.pt")["model"]
    assert not (tmp_path / "checkpoint_reptile.pt").exists()
    assert main([*typed(outer="reptile"), "--out", str(tmp_path), "--resume"]) == 1
    assert "no checkpoint at" in capsys.readouterr().err


def test_a_run_whose_tasks_all_diverge_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*typed(lr=1e30, nonfinite="skip"), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name in ("FOMAML", "Reptile"):
        assert f"{name}, diverged tasks left out in training: {TINY['iterations'] * TINY['tasks']}\n" in printed
        line = next(line for line in printed.splitlines() if line.startswith(f"learned by {name}"))
        assert line.split()[-3:] == ["-inf"] * 3
