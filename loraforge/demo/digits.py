"""Eight domains of handwritten digits, made from scikit-learn's bundled images (no download).

The images are 1797 real 8x8 scans of the digits 0 to 9. A domain is one fixed change of every image: the label stays,
what the model sees does not. Random domains (occluded, noisy) draw from a generator keyed by (seed, domain, split), so
that the same seed gives the same pixels on every machine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from loraforge.errors import UsageError, did_you_mean

SIZE = 8
TRAIN = 1200


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Images and labels of one domain, one half.

    Attributes:
        images: (S, 1, 8, 8) float32 in [-1, 1], the `pixel_values` of the model.
        labels: (S,) int64 in 0..9.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Number of images S."""
        return int(self.labels.shape[0])

    def head(self, count: int) -> Split:
        """The first `count` images (all of a smaller split)."""
        return Split(self.images[:count], self.labels[:count])


@dataclass(frozen=True, slots=True)
class Domain:
    """One task: a name, a sentence for the report and the change of the images.

    Attributes:
        name: Folder name of the adapter.
        what: What happens to the image.
        change: (S, 8, 8) in [0, 1] and a generator -> (S, 8, 8) in [0, 1].
    """

    name: str
    what: str
    change: Callable[[Tensor, torch.Generator], Tensor]


def _warp(x: Tensor, matrix: list[list[float]]) -> Tensor:
    """Bilinear resampling of (S, 8, 8) by a 2x2 matrix that maps output to input positions; black outside."""
    theta = torch.tensor([[row[0], row[1], 0.0] for row in matrix], dtype=x.dtype).expand(len(x), 2, 3)
    grid = functional.affine_grid(theta.contiguous(), [len(x), 1, SIZE, SIZE], align_corners=False)
    return functional.grid_sample(x.unsqueeze(1), grid, align_corners=False).squeeze(1).clamp(0.0, 1.0)


def _rotated(x: Tensor, _: torch.Generator) -> Tensor:
    half = math.sqrt(0.5)
    return _warp(x, [[half, half], [-half, half]])


def _mirrored(x: Tensor, _: torch.Generator) -> Tensor:
    return x.flip(2)


def _inverted(x: Tensor, _: torch.Generator) -> Tensor:
    return 1.0 - x


def _sheared(x: Tensor, _: torch.Generator) -> Tensor:
    return _warp(x, [[1.0, 0.9], [0.0, 1.0]])


def _occluded(x: Tensor, generator: torch.Generator) -> Tensor:
    top = torch.randint(0, SIZE - 2, (len(x), 1, 1), generator=generator)
    left = torch.randint(0, SIZE - 2, (len(x), 1, 1), generator=generator)
    row, column = torch.arange(SIZE).view(1, -1, 1), torch.arange(SIZE).view(1, 1, -1)
    covered = (row >= top) & (row < top + 3) & (column >= left) & (column < left + 3)
    return x.masked_fill(covered, 1.0)


def _noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    return (x + 0.4 * torch.randn(x.shape, generator=generator)).clamp(0.0, 1.0)


def _striped(x: Tensor, _: torch.Generator) -> Tensor:
    stripes = (torch.arange(SIZE) % 2).to(x.dtype).view(1, 1, -1)
    return (x + 0.6 * stripes).clamp(max=1.0)


def _shifted(x: Tensor, _: torch.Generator) -> Tensor:
    return x.roll(-3, dims=1)


DOMAINS: tuple[Domain, ...] = (
    Domain("rotated", "turned by 45 degrees", _rotated),
    Domain("mirrored", "left and right exchanged", _mirrored),
    Domain("inverted", "black and white exchanged", _inverted),
    Domain("sheared", "slanted: the top edge moved almost half a width against the bottom edge", _sheared),
    Domain("occluded", "a white 3x3 patch at a random place", _occluded),
    Domain("noisy", "Gaussian pixel noise of deviation 0.4", _noisy),
    Domain("striped", "bright stripes over every second column", _striped),
    Domain("shifted", "moved up by three of eight rows, wrapping around", _shifted),
)


def domain(name: str) -> Domain:
    """The domain of that name.

    Raises:
        UsageError: The name is not one of DOMAINS.
    """
    for row in DOMAINS:
        if row.name == name:
            return row
    raise UsageError(f"unknown domain '{name}'", hint=did_you_mean(name, [row.name for row in DOMAINS]))


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def load_splits(seed: int = 0) -> tuple[Split, Split]:
    """The plain digits as (train, test): 1200 and 597 images, shuffled once by `seed`; values in [0, 1], (S, 8, 8)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).to(torch.float32) / 16.0
    labels = torch.from_numpy(data.target).to(torch.int64)
    order = torch.randperm(len(labels), generator=_generator(seed, "split"))
    train, test = order[:TRAIN], order[TRAIN:]
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def as_pixels(split: Split, change: Domain | None = None, *, seed: int = 0, part: str = "train") -> Split:
    """The model's input for one domain.

    Args:
        split: Plain images (S, 8, 8) in [0, 1].
        change: The domain, or None for the plain digits.
        seed: Seed of the random domains.
        part: "train" or "test"; part of the key of the random draws.

    Returns:
        Split with images (S, 1, 8, 8) in [-1, 1].
    """
    images = split.images
    if change is not None:
        images = change.change(images, _generator(seed, change.name, part))
    return Split((images * 2.0 - 1.0).unsqueeze(1).contiguous(), split.labels)
