"""Anderson mixing against the recorded steps and the oracle; what the guard and the history do."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.kernels import anderson as kernels
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


def exact_step(W: list[torch.Tensor], G: list[torch.Tensor], reg: float) -> np.ndarray:
    """The step in rational numbers, but for the solve of the small system in extended precision."""
    R = [[Fraction(g) - Fraction(w) for w, g in zip(*pair, strict=True)] for pair in zip(*both(W, G), strict=True)]
    dR = [[y - x for x, y in zip(*pair, strict=True)] for pair in itertools.pairwise(R)]
    dG = [[Fraction(y) - Fraction(x) for x, y in zip(*pair, strict=True)] for pair in itertools.pairwise(both(W, G)[1])]

    def dot(a: list[Fraction], b: list[Fraction]) -> Fraction:
        return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))

    m = len(dR)
    normal, right = [[dot(a, b) for b in dR] for a in dR], [dot(a, R[-1]) for a in dR]
    shift = Fraction(reg) * sum(normal[j][j] for j in range(m)) / m
    gamma = solve([[normal[i][j] + (shift if i == j else 0) for j in range(m)] for i in range(m)], right)
    last = both(W, G)[1][-1]
    moved = [sum(gamma[j] * dG[j][p] for j in range(m)) for p in range(len(last))]
    return np.array([float(Fraction(g) - d) for g, d in zip(last, moved, strict=True)])


def both(W: list[torch.Tensor], G: list[torch.Tensor]) -> tuple[list[list[float]], list[list[float]]]:
    return [w.tolist() for w in W], [g.tolist() for g in G]


def solve(A: list[list[Fraction]], b: list[Fraction]) -> list[Fraction]:
    """Gauss without pivots, for a positive definite system."""
    rows = [[*row, right] for row, right in zip(A, b, strict=True)]
    for k in range(len(rows)):
        for i in range(len(rows)):
            if i != k:
                factor = rows[i][k] / rows[k][k]
                rows[i] = [x - factor * y for x, y in zip(rows[i], rows[k], strict=True)]
    return [row[-1] / row[k] for k, row in enumerate(rows)]


@pytest.mark.parametrize("moves", [1e-1, 1e-5, 1e-8])
def test_a_history_that_stands_still_keeps_its_digits(moves: float) -> None:
    """Differences of the residuals' dot products would be lost here; differences of the residuals are not."""
    g = np.random.default_rng(0)
    W0, R0 = g.normal(size=40), g.normal(size=40)
    mixer, W, G = AndersonMixer(4, 1e-6, "relative", 0.0), [], []
    for _ in range(5):
        W.append(torch.from_numpy(W0 + moves * g.normal(size=40)))
        G.append(torch.from_numpy(W0 + R0 + moves * g.normal(size=40)))
        got = mixer.step(W[-1], G[-1])
    want = exact_step(W, G, 1e-6)
    # A difference carries the rounding of what it was taken from: eps / moves, times the condition of the system.
    assert np.abs(got.numpy() - want).max() <= 100 * np.finfo(float).eps / moves * np.abs(want).max()


def test_residuals_that_shrink_fast_keep_their_digits() -> None:
    """dR_j . R_new is carried from step to step; what is left of the old, large residuals must not show."""
    g = np.random.default_rng(1)
    fixed, size = g.normal(size=40), 1.0
    mixer, W, G = AndersonMixer(4, 1e-6, "relative", 0.0), [], []
    for _ in range(9):
        W.append(torch.from_numpy(fixed + size * g.normal(size=40)))
        G.append(torch.from_numpy(fixed + 0.5 * size * g.normal(size=40)))
        got, size = mixer.step(W[-1], G[-1]), size * 0.03
    want = exact_step(W[-5:], G[-5:], 1e-6)
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=8 * np.finfo(float).eps * np.abs(want).max())


@pytest.mark.parametrize(("growth", "dots"), [(0.0, 1), (2.0, 2)])
def test_a_step_launches_the_same_few_operators_whatever_the_history(monkeypatch, growth: float, dots: int) -> None:
    calls: list[str] = []
    for name in ("anderson_dots", "anderson_mix"):
        operator = getattr(kernels, name)
        monkeypatch.setattr(
            f"loraforge.linalg.anderson.{name}", lambda *a, name=name, op=operator: (calls.append(name), op(*a))[1]
        )
    G, _ = contraction(6)
    mixer, w, rings = AndersonMixer(3, 1e-6, "relative", growth), torch.ones(12, dtype=torch.float64), set()
    for _ in range(8):
        calls.clear()
        w = mixer.step(w, torch.from_numpy(G(w.numpy())))
        rings.add((mixer._rings.images.data_ptr(), mixer._rings.residuals.data_ptr()))
    assert calls == ["anderson_dots"] * dots + ["anderson_mix"]
    assert len(rings) == 1, "the rings are allocated once"


def test_the_caller_may_reuse_its_states() -> None:
    G, _ = contraction(7)
    kept, reused = AndersonMixer(3), AndersonMixer(3)
    w, state, image = torch.ones(12, dtype=torch.float64), torch.empty(12).double(), torch.empty(12).double()
    for _ in range(5):
        g = torch.from_numpy(G(w.numpy()))
        state.copy_(w)
        image.copy_(g)
        found = reused.step(state, image).clone()
        w = kept.step(w, g)
        assert torch.equal(found, w)


def test_an_iterate_that_is_not_finite_is_handed_back() -> None:
    mixer, one = AndersonMixer(), torch.ones(4, dtype=torch.float64)
    mixer.step(0 * one, one)
    bad = torch.tensor([1.0, float("nan"), 0.0, 0.0], dtype=torch.float64)
    assert mixer.step(one, bad) is bad
    assert mixer.step(one, 2 * one).tolist() == [2.0] * 4, "and the history with it is forgotten"


def test_no_history_is_plain_iteration() -> None:
    mixer, one = AndersonMixer(0), torch.ones(4, dtype=torch.float64)
    for k in range(3):
        image = k * one
        assert mixer.step(one, image) is image


def test_states_of_another_length_or_dtype_are_refused() -> None:
    mixer, one = AndersonMixer(), torch.ones(4, dtype=torch.float64)
    mixer.step(one, one)
    with pytest.raises(LoraforgeError, match=r"state has the wrong shape(.|\n)*\(3,\)(.|\n)*\(4,\)"):
        mixer.step(one[:3], one[:3])
    with pytest.raises(LoraforgeError, match=r"image has the wrong dtype(.|\n)*float32(.|\n)*float64"):
        mixer.step(one, one.float())
    mixer.reset()
    mixer.step(one[:3].float(), one[:3].float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_same_steps_on_the_gpu(dtype: torch.dtype, tolerance: float) -> None:
    G, _ = contraction(8, size=129)
    here, there = AndersonMixer(3), AndersonMixer(3)
    w = torch.ones(129, dtype=dtype)
    for _ in range(7):
        image = torch.from_numpy(G(w.double().numpy())).to(dtype)
        moved, found = here.step(w, image), there.step(w.cuda(), image.cuda())
        torch.testing.assert_close(found.cpu(), moved, rtol=tolerance, atol=tolerance * float(moved.abs().max()))
        w = moved
