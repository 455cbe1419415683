"""Task samplers: batches of tasks, whole batches at a time, from a generator whose state can be saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TaskBatch(NamedTuple):
    """T tasks, in the order in which `FOMAML` takes them: `meta(*batch)`."""

    support_x: Tensor  #: [T, S, in]
    support_y: Tensor  #: [T, S] or [T, S, out]
    query_x: Tensor  #: [T, Q, in]
    query_y: Tensor  #: [T, Q] or [T, Q, out]


class Sinusoids:
    """Regression of `amplitude * sin(x - phase)` (Finn et al. 2017, section 5.1).

    Args:
        shots, queries: samples a task.
        amplitude, phase, domain: the ranges that are drawn from, uniformly.
        seed: of the sampler's own generator.
    """

    def __init__(
        self,
        shots: int = 10,
        queries: int = 10,
        *,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        domain: tuple[float, float] = (-5.0, 5.0),
        seed: int = 0,
    ) -> None:
        self.shots, self.queries = shots, queries
        self.amplitude, self.phase, self.domain = amplitude, phase, domain
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, tasks: int) -> tuple[Tensor, Tensor]:
        """Amplitudes and phases of `tasks` tasks, [T, 1, 1] each."""
        return self._uniform(self.amplitude, tasks, 1, 1), self._uniform(self.phase, tasks, 1, 1)

    def sample(self, tasks: int) -> TaskBatch:
        """A batch of tasks; x and y have one feature."""
        amplitude, phase = self.draw(tasks)
        x = self._uniform(self.domain, tasks, self.shots + self.queries, 1)
        y = sinusoid(x, amplitude, phase)
        s = self.shots
        return TaskBatch(x[:, :s], y[:, :s], x[:, s:], y[:, s:])

    def _uniform(self, bounds: tuple[float, float], *shape: int) -> Tensor:
        low, high = bounds
        return torch.rand(*shape, generator=self.generator).mul_(high - low).add_(low)


def sinusoid(x: Tensor, amplitude: Tensor, phase: Tensor) -> Tensor:
    """Amplitude * sin(x - phase)."""
    return amplitude * torch.sin(x - phase)


class FewShot:
    """N-way K-shot classification: every task draws `ways` classes, and of each class its own samples.

    Args:
        x: features of all samples, [samples, in].
        y: their classes, [samples], any integers.
        ways: classes a task; they are named 0 to ways - 1 in random order.
        shots, queries: samples of each class in the support and the query set of a task.
        seed: of the sampler's own generator.

    Raises:
        ValueError: fewer classes than `ways`, or a class with fewer samples than a task takes.
    """

    def __init__(self, x: Tensor, y: Tensor, *, ways: int, shots: int, queries: int, seed: int = 0) -> None:
        self.x, self.ways, self.shots, self.queries = x, ways, shots, queries
        classes, counts = torch.unique(y, return_counts=True)
        if len(classes) < ways:
            raise ValueError(f"y holds {len(classes)} classes; ways takes at most that many, got {ways}")
        if int(counts.min()) < shots + queries:
            raise ValueError(
                f"a class of y has {int(counts.min())} samples; {shots} shots and {queries} queries take "
                f"{shots + queries} of each"
            )
        # The samples of each class, padded to the largest: [classes, most], and which entries are none.
        most = int(counts.max())
        self.members = torch.zeros(len(classes), most, dtype=torch.int64)
        self.absent = torch.arange(most) >= counts[:, None]
        for i, c in enumerate(classes):
            self.members[i, : counts[i]] = (y == c).nonzero().squeeze(1)
        self.generator = torch.Generator().manual_seed(seed)

    def sample(self, tasks: int) -> TaskBatch:
        """A batch of tasks; y holds class indices in int64."""
        chosen = torch.rand(tasks, len(self.members), generator=self.generator).argsort(1)[:, : self.ways]
        keys = torch.rand(tasks, self.ways, self.members.shape[1], generator=self.generator)
        keys.masked_fill_(self.absent[chosen], 2.0)  # behind every present sample
        order = keys.argsort(2)[..., : self.shots + self.queries]  # without replacement
        rows = self.members[chosen].gather(2, order)  # [T, ways, shots + queries]
        names = torch.arange(self.ways).expand(tasks, -1)

        def part(samples: Tensor) -> tuple[Tensor, Tensor]:
            return self.x[samples.flatten(1)], names.repeat_interleave(samples.shape[2], 1)

        return TaskBatch(*part(rows[..., : self.shots]), *part(rows[..., self.shots :]))


def rotated_digits() -> tuple[Tensor, Tensor, Tensor]:
    """The 1,797 handwritten digits that scikit-learn ships, each in four rotations.

    A rotated character counts as a class of its own, as on Omniglot (Santoro et al. 2016).

    Returns:
        Features [4 * 1797, 64] in [0, 1], digit and rotation (quarter turns) of each.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float() / 16  # [1797, 8, 8]
    digits = torch.from_numpy(data.target).long()
    turned = torch.cat([torch.rot90(images, turns, (1, 2)) for turns in range(4)])
    return turned.flatten(1), digits.repeat(4), torch.arange(4).repeat_interleave(len(digits))


class Crops:
    """Images as tasks: a square out of a photograph is a field, from coordinates to colours.

    Support and query set are the same, all pixels of the crop, as where an initialisation is learned for fields
    (Tancik et al. 2021).

    Args:
        images: [3, height, width] each, in [0, 1]; every crop first draws one of them.
        size: pixels along a side.
        seed: of the sampler's own generator.

    Raises:
        ValueError: there is no image, or one that is smaller than a crop.
    """

    def __init__(self, images: Sequence[Tensor], size: int = 32, *, seed: int = 0) -> None:
        if not images:
            raise ValueError("images is empty; it takes one or more, [3, height, width] each")
        for i, image in enumerate(images):
            if image.dim() != 3 or image.shape[0] != 3 or min(image.shape[1:]) < size:
                raise ValueError(
                    f"images[{i}] has shape {list(image.shape)}; it takes [3, height, width], each at least {size}"
                )
        self.images, self.size = images, size
        self.generator = torch.Generator().manual_seed(seed)

    def sample(self, tasks: int) -> TaskBatch:
        """A batch of tasks: centres of pixels (down, right) and colours, both in [-1, 1], row by row."""
        centres = (torch.arange(self.size) + 0.5) * (2.0 / self.size) - 1.0
        x = torch.cartesian_prod(centres, centres).expand(tasks, -1, -1)
        y = torch.stack([self._crop().flatten(1).T for _ in range(tasks)]) * 2.0 - 1.0
        return TaskBatch(x, y, x, y)

    def _crop(self) -> Tensor:
        image = self.images[self._below(len(self.images))]
        top, left = (self._below(length - self.size + 1) for length in image.shape[1:])
        return image[:, top : top + self.size, left : left + self.size]

    def _below(self, bound: int) -> int:
        return int(torch.randint(bound, (), generator=self.generator))


def photographs(names: Iterable[str], shrink: int = 3) -> list[Tensor]:
    """Colour photographs that scikit-image ships, [3, height, width] each, in [0, 1].

    Args:
        names: of the functions of `skimage.data` that give them; of a stereo pair, the left one is taken.
        shrink: pixels along a side that are averaged into one.

    Raises:
        ModuleNotFoundError: scikit-image is not installed.
    """
    from skimage import data

    found = []
    for name in names:
        image = getattr(data, name)()
        pixels = torch.from_numpy(image[0] if isinstance(image, tuple) else image)  # [height, width, 3], 0 to 255
        found.append(F.avg_pool2d(pixels.permute(2, 0, 1).float() / 255, shrink))
    return found
