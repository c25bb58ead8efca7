"""The methods with random draws against dense float64 arithmetic.

Nothing is assumed of how masks are drawn: they are read off the result, where every entry must be a sum of kept entries
of the adapters, and then have to be what the method promises: right in number, independent of each other, and a
matter of seed, module and adapter alone.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.adapters import folders
from tests.merging.scenarios import Array, Maker, Scenario, distances, merged
from tests.oracles import elementwise

Masks = dict[str, list[Array]]
MODULES = ("block.0.wide", "block.0.tall", "block.1.long", "block.2.square")


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("scenarios"))


def read_masks(found: dict[str, Array], terms: dict[str, list[Array]], tolerance: float = 1e-9) -> Masks:
    return {m: elementwise.subset_masks(found[m], terms[m], tolerance) for m in terms}


def dare_terms(s: Scenario, density: float, weights: list[float]) -> dict[str, list[Array]]:
    return {m: [w * d / density for w, d in zip(weights, ds, strict=True)] for m, ds in s.deltas.items()}


def della_terms(s: Scenario, density: float, epsilon: float, weights: list[float]) -> dict[str, list[Array]]:
    return {
        m: [w * d / elementwise.della_probabilities(d, density, epsilon) for w, d in zip(weights, ds, strict=True)]
        for m, ds in s.deltas.items()
    }


def sigmas(mask: Array, p: float | Array) -> float:
    """How far the number of kept entries is from what is expected, in standard deviations."""
    expected = np.broadcast_to(p, mask.shape)
    return float(abs(mask.sum() - expected.sum()) / np.sqrt((expected * (1.0 - expected)).sum()))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -0.4]], ids=str)
@pytest.mark.parametrize("density", [0.2, 0.6])
def test_dare(density: float, weights: list[float], dtype: str, scenario: Maker) -> None:
    """Kept entries are rescaled exactly; as many as promised; dare-ties draws the same masks."""
    s = scenario("full", dtype)
    options: dict[str, Any] = {"params": {"density": density}, "seed": 5, "weights": weights}
    masks = read_masks(
        merged(s.paths, "dare", **options), dare_terms(s, density, weights), 1e-9 if dtype == "float64" else 1e-6
    )
    for m in MODULES:
        for mask in masks[m]:
            assert sigmas(mask, density) < 4.5, m
    want = {m: elementwise.dare_ties(s.deltas[m], weights, masks[m], density) for m in masks}
    away = distances(merged(s.paths, "dare-ties", **options), want)
    assert max(away.values()) < (1e-10 if dtype == "float64" else 2e-6), away


def test_dare_masks_belong_to_seed_module_and_adapter(scenario: Maker) -> None:
    s = scenario("full", "float64")

    def masks(order: tuple[int, int] = (0, 1), **options: Any) -> Masks:
        paths = [s.paths[i] for i in order]
        found = merged(paths, "dare", params={"density": 0.5}, **options)
        terms = dare_terms(s, 0.5, [1.0, 1.0])
        return read_masks(found, {m: [terms[m][i] for i in order] for m in terms})

    base = masks(seed=1)
    swapped = masks((1, 0), seed=1)
    other = masks(seed=2)
    for m in MODULES:
        np.testing.assert_array_equal(swapped[m], base[m][::-1])
        # Equal entries of independent masks of density 1/2: half of them, give or take.
        flat = [base[m][0], base[m][1], other[m][0]]
        for one, two in ((flat[0], flat[1]), (flat[0], flat[2])):
            assert sigmas((one == two) * 1.0, 0.5) < 4.5, m
    assert sigmas((base[MODULES[0]][0].ravel() == base[MODULES[1]][0].ravel()) * 1.0, 0.5) < 4.5
    # One adapter alone draws the same mask, where its rank lets the result show it.
    alone = merged(s.paths[:1], "dare", params={"density": 0.5}, seed=1)
    assert s.ranks("block.0.wide")[0] >= 48 and s.ranks("block.2.square")[0] >= 40
    for m in ("block.0.wide", "block.2.square"):
        np.testing.assert_allclose(alone[m], s.deltas[m][0] * base[m][0] / 0.5, rtol=0, atol=1e-9)


@pytest.mark.parametrize("names", [("task", "task-b", "other"), ("task", "task-2", "task")], ids=str)
def test_dare_does_not_depend_on_the_order_whatever_the_names(names: tuple[str, ...], tmp_path: Path) -> None:
    """One name can be the beginning of another, and a folder can be given twice."""
    paths = {}
    for index, name in enumerate(dict.fromkeys(names)):
        tensors = folders.factors({"x.q": (12, 10, 10)}, seed=index, dtype=torch.float64)
        paths[name] = folders.write_folder(tmp_path / name, tensors, folders.config(r=10))
    orders = [[paths[names[i]] for i in order] for order in itertools.permutations(range(3))]
    results = [merged(order, "dare", params={"density": 0.5})["x.q"] for order in orders]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=0, atol=1e-10)


def test_dare_masks_have_no_pattern(scenario: Maker) -> None:
    """Rows, columns and neighbours: sums over each are binomial, so their spread is."""
    s = scenario("full", "float64")
    found = merged(s.paths, "dare", params={"density": 0.5}, seed=9)
    for m, masks in read_masks(found, dare_terms(s, 0.5, [1.0, 1.0])).items():
        if m not in MODULES:
            continue
        for mask in masks:
            for axis in (0, 1):
                count = mask.shape[axis]
                chi = ((mask.sum(axis) - count / 2) ** 2 / (count / 4)).sum()
                freedom = mask.shape[1 - axis]
                assert abs(chi - freedom) < 5.0 * np.sqrt(2 * freedom), m
            flat = mask.ravel()
            for step in (1, 2, 4, 8):
                assert sigmas((flat[step:] == flat[:-step]) * 1.0, 0.5) < 4.5, (m, step)


@pytest.mark.parametrize(("density", "epsilon"), [(0.2, 0.1), (0.5, 0.3)])
def test_della(density: float, epsilon: float, scenario: Maker) -> None:
    """Each kept entry is divided by its own probability, and that is how often entries of its rank are kept."""
    s = scenario("full", "float64")
    params = {"density": density, "epsilon": epsilon}
    found = merged(s.paths, "della", params=params, seed=2, weights=[0.7, -0.4])
    masks = read_masks(found, della_terms(s, density, epsilon, [0.7, -0.4]))
    want = {m: elementwise.della(s.deltas[m], [0.7, -0.4], masks[m], density, epsilon) for m in masks}
    assert max(distances(found, want).values()) < 1e-10
    for m in MODULES:
        for mask, D in zip(masks[m], s.deltas[m], strict=True):
            p = elementwise.della_probabilities(D, density, epsilon)
            assert sigmas(mask, p) < 4.5, m
            for low, high in ((0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.01)):
                place = (p - density + epsilon) / (2 * epsilon)
                part = (place >= low) & (place < high)
                assert sigmas(mask[part], p[part]) < 4.5, m


def test_della_restores_the_l1_norm(scenario: Maker) -> None:
    """rescale=l1: the kept entries times one factor, so that their sum of magnitudes is the module's before."""
    s = scenario("full", "float64")
    found = merged(s.paths[:1], "della", params={"rescale": "l1", "density": 0.5}, seed=1)
    for m in ("block.0.wide", "block.2.square"):  # those whose rank holds every entry
        D = s.deltas[m][0]
        assert np.abs(found[m]).sum() == pytest.approx(np.abs(D).sum(), rel=1e-10)
        kept = np.abs(found[m]) > 1e-9 * np.abs(D).max()
        factors = found[m][kept] / D[kept]
        np.testing.assert_allclose(factors, factors[0], rtol=1e-6)
        assert sigmas(kept * 1.0, elementwise.della_probabilities(D, 0.5, 0.1)) < 4.5


@pytest.mark.parametrize("name", ["mixed", "twice"])
def test_core_dare(name: str, scenario: Maker) -> None:
    """In the core every entry is a sum of rescaled kept entries of the blocks."""
    s = scenario(name, "float64")
    weights = [0.7, -0.4, 1.3]
    found = merged(s.paths, "core-dare", params={"density": 0.4}, seed=3, weights=weights)
    for m in s.modules:
        sides = s.pairs(m)
        left, blocks, right = elementwise.core_blocks(
            [None if p is None else p.scaling * p.B for p in sides],
            [None if p is None else p.A for p in sides],
            weights,
        )
        inside = left.T @ found[m] @ right
        np.testing.assert_allclose(left @ inside @ right.T, found[m], rtol=0, atol=1e-11)
        masks = elementwise.subset_masks(inside, [b / 0.4 for b in blocks], 1e-9)
        for mask, block in zip(masks, blocks, strict=True):
            if np.count_nonzero(block) > 50:
                assert sigmas(mask[block != 0.0], 0.4) < 4.5, m
