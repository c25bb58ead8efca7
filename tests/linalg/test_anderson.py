"""Anderson mixing against the recorded steps and the oracle; what the guard and the history do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from loraforge.linalg.anderson import AndersonMixer
from tests.oracles import iteris as oracle

VECTORS = json.loads((Path(__file__).parent.parent / "oracles" / "iteris_vectors.json").read_text())
SETTINGS = VECTORS["settings"]


def states(name: str, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.tensor(v, dtype=dtype).flatten() for v in VECTORS[name]]


def contraction(seed: int, size: int = 12, rho: float = 0.9):
    """An affine map w -> M w + b with spectral radius rho, and its fixed point."""
    g = np.random.default_rng(seed)
    M = g.normal(size=(size, size))
    M *= rho / np.abs(np.linalg.eigvals(M)).max()
    b = g.normal(size=size)
    return lambda w: M @ w + b, np.linalg.solve(np.eye(size) - M, b)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_recorded_steps(dtype: torch.dtype, tolerance: float) -> None:
    mixer = AndersonMixer(SETTINGS["anderson_history"], SETTINGS["anderson_reg"], SETTINGS["anderson_reg_mode"], 0.0)
    steps = zip(
        states("anderson_w", dtype), states("anderson_g", dtype), states("anderson_next_m5_abs1e_6"), strict=True
    )
    for w, g, want in steps:
        got = mixer.step(w, g)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", ["relative", "absolute"])
@pytest.mark.parametrize("history", [1, 2, 5])
def test_steps_equal_the_oracle(mode: str, history: int) -> None:
    G, _ = contraction(2)
    mixer = AndersonMixer(history, 1e-4, mode, 0.0)
    rule = oracle.Anderson(history, 1e-4, mode)
    w, W, images = np.ones(12), [], []
    for _ in range(9):
        W.append(w)
        images.append(G(w))
        want = oracle.anderson_next(W, images, rule)
        got = mixer.step(torch.from_numpy(w), torch.from_numpy(images[-1])).numpy()
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * abs(want).max())
        w = want


def test_the_two_regularisations_differ() -> None:
    """Scaling states leaves relative steps as they are (scaled); absolute ones move."""
    G, _ = contraction(3)

    def second(mode: str, scale: float) -> np.ndarray:
        mixer, w = AndersonMixer(5, 1e-1, mode, 0.0), np.ones(12)
        for _ in range(3):
            w = mixer.step(torch.from_numpy(scale * w), torch.from_numpy(scale * G(w))).numpy() / scale
        return w

    np.testing.assert_allclose(second("relative", 1e-3), second("relative", 1.0), rtol=1e-9)
    assert np.abs(second("absolute", 1e-3) - second("absolute", 1.0)).max() > 1e-3


def test_it_reaches_the_fixed_point_of_a_slow_contraction_sooner() -> None:
    G, fixed = contraction(4, rho=0.95)
    mixer, w, plain = AndersonMixer(12, 1e-14, "relative"), np.zeros(12), np.zeros(12)
    for _ in range(25):
        w = mixer.step(torch.from_numpy(w), torch.from_numpy(G(w))).numpy()
        plain = G(plain)
    assert np.linalg.norm(w - fixed) < 1e-6 * np.linalg.norm(plain - fixed)


def test_one_unknown_is_the_secant() -> None:
    mixer = AndersonMixer(5, 0.0)
    w = torch.tensor([10.0], dtype=torch.float64)
    w = mixer.step(w, 0.5 * w + 1.0)
    assert float(mixer.step(w, 0.5 * w + 1.0)) == pytest.approx(2.0, abs=1e-12)


def test_without_history_the_image_is_handed_back() -> None:
    mixer = AndersonMixer()
    w, image = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    assert mixer.step(w, image) is image
    assert mixer.step(image, 2 * image) is not image
    mixer.reset()
    assert mixer.step(w, image) is image


def runaway(growth: float) -> tuple[AndersonMixer, torch.Tensor, torch.Tensor]:
    """Two nearly equal residuals ask for a step about 1e6 long."""
    mixer = AndersonMixer(5, 0.0, "relative", growth)
    one = torch.ones(1, dtype=torch.float64)
    mixer.step(0 * one, one)
    image = (2.0 + 1e-6) * one
    return mixer, image, mixer.step(one, image)


def test_the_guard_drops_a_step_that_runs_away() -> None:
    assert abs(float(runaway(0.0)[2])) > 1e5
    mixer, image, guarded = runaway(2.0)
    assert guarded is image
    later = image + 1.0
    assert mixer.step(image, later) is later, "the guard forgets the history that misled it"
    rule = oracle.Anderson(5, 0.0, growth_guard=2.0)
    W, G = [np.zeros(1), np.ones(1)], [np.ones(1), np.array([2.0 + 1e-6])]
    np.testing.assert_allclose(oracle.anderson_next(W, G, rule), image.numpy())


def test_equal_iterates_without_regularisation_give_the_image() -> None:
    mixer = AndersonMixer(5, 0.0)
    w, image = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    mixer.step(w, image)
    torch.testing.assert_close(mixer.step(w, image), image)


def test_only_the_last_iterates_count() -> None:
    """A history of 2 forgets what came before: the same step follows from another past."""
    G, _ = contraction(5)
    tail = [np.random.default_rng(k).normal(size=12) for k in range(3)]
    found = []
    for past in (7, 8):
        mixer = AndersonMixer(2, 1e-8, "relative", 0.0)
        for w in [np.random.default_rng(past).normal(size=12), *tail]:
            step = mixer.step(torch.from_numpy(w), torch.from_numpy(G(w)))
        found.append(step)
    assert torch.equal(found[0], found[1])
