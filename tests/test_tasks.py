"""Task samplers: what they draw is what they say, and their state can be saved."""

import math

import pytest
import torch

from fomaml_fused.tasks import FewShot, Sinusoids, rotated_digits


def test_sinusoids_lie_on_sinusoids_within_their_ranges() -> None:
    batch = Sinusoids(10, 15, seed=3).sample(200)
    assert [t.shape for t in batch] == [(200, 10, 1), (200, 10, 1), (200, 15, 1), (200, 15, 1)]
    x, y = torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_y, batch.query_y], 1)
    assert x.min() >= -5
    assert x.max() <= 5
    # a * sin(x - p) = (a cos p) sin x - (a sin p) cos x: two unknowns a task, 25 equations
    basis = torch.cat([x.sin(), -x.cos()], 2)
    solution = torch.linalg.lstsq(basis, y).solution
    assert (basis @ solution - y).abs().max() < 1e-4
    amplitude, phase = solution.norm(dim=1), torch.atan2(solution[:, 1], solution[:, 0])
    assert amplitude.min() + 1e-3 >= 0.1
    assert amplitude.max() <= 5 + 1e-3
    assert phase.min() >= -1e-2
    assert phase.max() <= math.pi + 1e-2
    assert amplitude.std() > 1
    assert phase.std() > 0.5


def test_sinusoids_resume_from_the_state_of_their_generator() -> None:
    sampler = Sinusoids(seed=1)
    sampler.sample(4)
    state = sampler.generator.get_state()
    expected = sampler.sample(4)
    other = Sinusoids(seed=2)
    other.generator.set_state(state)
    assert all(torch.equal(a, b) for a, b in zip(other.sample(4), expected, strict=True))


def test_few_shot_tasks_draw_classes_and_samples_without_replacement() -> None:
    counts = [7, 9, 30, 8, 12]
    y = torch.cat([torch.full((n,), 10 * c) for c, n in enumerate(counts)])
    x = torch.stack([y.float(), torch.arange(len(y)).float()], 1)  # each sample says its class and its row
    batch = FewShot(x, y, ways=3, shots=2, queries=5).sample(300)
    assert [t.shape for t in batch] == [(300, 6, 2), (300, 6), (300, 15, 2), (300, 15)]
    features, names = torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_y, batch.query_y], 1)
    for t in range(300):
        rows = features[t, :, 1].long()
        assert rows.unique().numel() == 21  # no sample twice, no sample in both sets
        classes = [features[t, names[t] == name, 0].unique() for name in range(3)]
        assert all(c.numel() == 1 for c in classes)  # a name is a class
        assert torch.cat(classes).unique().numel() == 3  # and a class has one name
    assert features[..., 0].unique().tolist() == [0.0, 10.0, 20.0, 30.0, 40.0]
    assert all(batch.support_x[:, 0, 0].eq(10 * c).float().mean() > 0.1 for c in range(5))  # every class is any name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 4, "shots": 1, "queries": 1}, "y holds 3 classes"),
        ({"ways": 2, "shots": 3, "queries": 2}, "has 4 samples; 3 shots and 2 queries take 5"),
    ],
)
def test_few_shot_needs_enough_classes_and_samples(options: dict[str, int], message: str) -> None:
    y = torch.tensor([0] * 5 + [1] * 4 + [2] * 6)
    with pytest.raises(ValueError, match=message):
        FewShot(torch.randn(15, 2), y, **options)


def test_rotated_digits_are_the_digits_turned() -> None:
    x, digit, rotation = rotated_digits()
    assert x.shape == (4 * 1797, 64)
    assert x.min() >= 0
    assert x.max() == 1
    upright, turned = x[rotation == 0].view(-1, 8, 8), x[rotation == 1].view(-1, 8, 8)
    assert torch.equal(upright.rot90(1, (1, 2)), turned)
    assert torch.equal(digit[rotation == 0], digit[rotation == 3])
