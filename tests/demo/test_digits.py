"""The domains: deterministic, distinct, in range, the same labels; train and test never share an image."""

from __future__ import annotations

import pytest
import torch

from loraforge.demo.digits import DOMAINS, SIZE, as_pixels, domain, load_splits
from loraforge.errors import UsageError

NAMES = [row.name for row in DOMAINS]


def test_split_is_fixed_complete_and_disjoint() -> None:
    train, test = load_splits(0)
    again, _ = load_splits(0)
    other, _ = load_splits(1)
    assert (len(train), len(test)) == (1200, 597)
    assert torch.equal(train.images, again.images) and torch.equal(train.labels, again.labels)
    assert not torch.equal(train.labels, other.labels)
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(10))
    from sklearn.datasets import load_digits

    data = torch.from_numpy(load_digits().data).float() / 16
    found = torch.cat([train.images, test.images]).flatten(1)
    # The two halves together are the data set, each image as often as it is there.
    assert torch.equal(torch.sort(found @ torch.arange(64.0))[0], torch.sort(data @ torch.arange(64.0))[0])


@pytest.mark.parametrize("name", NAMES)
def test_domain_is_deterministic_and_in_range(name: str) -> None:
    _, test = load_splits(0)
    first, second = as_pixels(test, domain(name), part="test"), as_pixels(test, domain(name), part="test")
    assert torch.equal(first.images, second.images) and torch.equal(first.labels, test.labels)
    assert first.images.shape == (597, 1, SIZE, SIZE) and first.images.dtype == torch.float32
    assert first.images.min() >= -1 and first.images.max() <= 1


def test_domains_are_distinct_and_differ_from_the_plain_digits() -> None:
    _, test = load_splits(0)
    sets = [as_pixels(test, row, part="test").images for row in (None, *DOMAINS)]
    for i, a in enumerate(sets):
        for b in sets[i + 1 :]:
            # Most images of any two domains differ clearly, not by rounding.
            changed = (a - b).abs().amax(dim=(1, 2, 3)) > 0.1
            assert changed.float().mean() > 0.9


@pytest.mark.parametrize("name", ["occluded", "noisy"])
def test_random_domains_draw_by_seed_and_part(name: str) -> None:
    _, test = load_splits(0)
    drawn = [as_pixels(test, domain(name), seed=s, part=p).images for s, p in ((0, "test"), (1, "test"), (0, "train"))]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_hand_sized_images() -> None:
    image = torch.zeros(1, SIZE, SIZE)
    image[0, 2, 1] = 1.0
    generator = torch.Generator().manual_seed(0)
    assert domain("mirrored").change(image, generator)[0, 2, 6] == 1.0
    assert domain("inverted").change(image, generator)[0, 2, 1] == 0.0
    # Three rows up from row 2 wraps around to row 7.
    assert domain("shifted").change(image, generator)[0, 7, 1] == 1.0
    covered = domain("occluded").change(torch.zeros(5, SIZE, SIZE), generator)
    assert covered.sum(dim=(1, 2)).tolist() == [9.0] * 5


def test_rotation_and_shear_keep_the_middle_of_the_image() -> None:
    image = torch.zeros(1, SIZE, SIZE)
    image[0, 3:5, 3:5] = 1.0
    for name in ("rotated", "sheared"):
        moved = domain(name).change(image, torch.Generator())
        # Half of the mass stays in the middle four pixels; the rest is spread by the resampling.
        assert moved[0, 3:5, 3:5].sum() > 2.0 and moved.sum() < 6.0


def test_unknown_domain_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="did you mean 'rotated'"):
        domain("rotatd")
