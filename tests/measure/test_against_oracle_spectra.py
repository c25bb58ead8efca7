"""Spectra, intruder dimensions, alignment and circuits against full dense decompositions in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loraforge.measure.updates.intruders import alignment, amplification, base_vectors, intruder_dimensions
from loraforge.measure.updates.spectra import measure_spectrum, spectrum
from loraforge.measure.updates.update import update_from_dense, update_from_factors
from loraforge.types import LowRank
from tests.measure.oracle_bases import NAMES, Case, build
from tests.oracles import heads as parts
from tests.oracles import heads_spectra as oracle
from tests.oracles.heads import Shape

# float64 on both sides; singular values are good to 1e-15 of the largest.
CLOSE = 1e-10
MHA, GQA = Shape(4, 4, 6, 6), Shape(6, 2, 4, 4)
KS, EPS = (1, 10, 20), (0.3, 0.5, 0.6, 0.7, 0.9)


def pair(m: int, r: int, n: int, seed: int = 0, decay: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """B (m, r) with columns that fall off by `decay`, and A (r, n)."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((m, r)) * decay ** np.arange(r), rng.standard_normal((r, n))


def changes(m: int, r: int, n: int, s: float = 1.5, **options: Any) -> dict[str, tuple[Any, np.ndarray]]:
    B, A = pair(m, r, n, **options)
    whole = parts.delta(B, A, s)
    return {
        "factors": (LowRank(torch.from_numpy(B), torch.from_numpy(A), s), whole),
        "matrix": (torch.from_numpy(whole), whole),
    }


@pytest.mark.parametrize("kind", ["factors", "matrix"])
@pytest.mark.parametrize(
    ("m", "r", "n", "decay"), [(40, 5, 24, 1.0), (12, 8, 60, 0.5), (9, 1, 9, 1.0), (6, 16, 30, 0.9), (30, 4, 30, 1e-3)],
    ids=["tall", "wide", "line", "rank-above-rows", "steep"],
)  # fmt: skip
def test_numbers_of_a_spectrum(kind: str, m: int, r: int, n: int, decay: float) -> None:
    change, whole = changes(m, r, n, decay=decay)[kind]
    found, sv = spectrum(change), oracle.singular_values(whole)
    count = min(len(sv), len(found["sv"]))
    np.testing.assert_allclose(found["sv"][:count], sv[:count], atol=1e-13 * sv[0], rtol=0)
    assert (sv[count:] < 1e-13 * sv[0]).all()
    assert found["stable_rank"] == pytest.approx(oracle.stable_rank(sv), rel=CLOSE)
    # Rounding leaves 1e-16 s_1 where dW has no rank; each such value adds 1e-14 to the entropy.
    assert found["eff_rank"] == pytest.approx(oracle.effective_rank(sv[: min(m, n, r)]), rel=CLOSE)
    assert found["rank90"] == oracle.rank_holding(sv, 0.9)
    assert found["rank99"] == oracle.rank_holding(sv, 0.99)
    if kind == "factors":
        assert found["rank"] == r
        assert found["rank_use"] == pytest.approx(found["eff_rank"] / r)


def moved(name: str, m: int, n: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A base and a change with known or random intruders."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((m, n))
    B, A = pair(m, 4, n, seed=seed + 1)
    line = np.outer(B[:, 0], A[0]) / np.linalg.norm(np.outer(B[:, 0], A[0])) * np.linalg.norm(W, 2)
    return W, {
        "none": 0.0 * W, "multiple": 0.3 * W, "strong-line": 5 * line, "weak": 0.05 * B @ A, "strong": 2.0 * B @ A,
    }[name]  # fmt: skip


@pytest.mark.parametrize(("m", "n"), [(64, 48), (48, 64), (40, 40)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("name", ["none", "multiple", "strong-line", "weak", "strong"])
def test_intruder_dimensions(name: str, m: int, n: int) -> None:
    W, change = moved(name, m, n)
    found = intruder_dimensions(torch.from_numpy(W), torch.from_numpy(change), ks=KS, epsilons=EPS)
    cosines = oracle.overlaps(W, change, max(KS))
    np.testing.assert_allclose(found["cos_top"], cosines, atol=1e-9)  # gaps of the values of W1 bound it
    for k in KS:
        for eps in EPS:
            assert np.abs(cosines - eps).min() > 1e-6, "too near the threshold to say"
            assert found["n_intruder"][f"k{k}"][f"{eps}"] == oracle.intruders(W, change, k, eps), (k, eps)
    if name in ("none", "multiple"):
        assert found["n_intruder"]["k10"]["0.9"] == 0
    if name == "strong-line":
        assert found["n_intruder"]["k1"]["0.5"] == found["n_intruder"]["k10"]["0.5"] == 1


def test_intruders_of_a_weight_too_large_for_a_whole_decomposition() -> None:
    W, change = moved("strong", 420, 300)
    found = intruder_dimensions(torch.from_numpy(W), torch.from_numpy(change), ks=(20,), epsilons=(0.5,))
    cosines = oracle.overlaps(W, change, 20)
    np.testing.assert_allclose(found["cos_top"], cosines, atol=1e-9)
    assert found["n_intruder"]["k20"]["0.5"] == int((cosines < 0.5).sum()) == 4  # of rank 4, all strong


@pytest.mark.parametrize("k", [1, 5, 16])
def test_alignment(k: int) -> None:
    W, change = moved("strong", 30, 20)
    both = torch.from_numpy(W), torch.from_numpy(change)
    found = alignment(both[1], base_vectors(both[0], k), k)
    assert found["alignment"] == pytest.approx(oracle.alignment(W, change, k), rel=CLOSE)
    # The square of a single pair of directions scatters by 2.8 times its mean: 4000 draws leave 2.2 % of the root.
    assert found["alignment_random"] == pytest.approx(oracle.alignment_by_chance(change, k, draws=4000), rel=0.07)


def test_amplification() -> None:
    rng = np.random.default_rng(8)
    W = rng.standard_normal((30, 20))
    for change, whole in changes(30, 4, 20).values():
        found = amplification(torch.from_numpy(W), change, 4)
        assert found == pytest.approx(oracle.amplification(W, whole, 4), rel=1e-9)


@pytest.mark.parametrize(
    "case",
    [
        Case("bert", MHA), Case("llama", GQA), Case("gpt2", MHA), Case("gpt_neox", MHA), Case("phi3", GQA),
        Case("bert", MHA, targets=("q", "v")), Case("bert", MHA, targets=("o",)), Case("bert", MHA, rank=9),
    ],
    ids=["bert", "grouped", "conv1d", "interleaved", "stacked", "q-and-v", "output-alone", "rank-above-head"],
)  # fmt: skip
def test_circuits(tmp_path: Path, case: Case) -> None:
    built = build(tmp_path, case)
    factors = update_from_factors(built.adapter, base=built.base).lines
    dense = update_from_dense(built.base, built.final).lines
    for line, rough in zip(factors, dense, strict=True):
        layer, head = line["layer"], line["head"]
        for name, value in parts.circuits(built.change[layer], built.weights[layer], head, case.shape).items():
            assert line[name] == pytest.approx(value, rel=CLOSE, abs=1e-12), (layer, head, name)
            assert rough[name] == pytest.approx(value, rel=1e-5, abs=1e-12)  # the difference of float32 weights


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_file_of_spectra(tmp_path: Path, family: str) -> None:
    case = Case(family, MHA if family == "bert" else GQA)
    built = build(tmp_path, case)
    result = measure_spectrum(built.base, adapter=built.adapter, k=5, ks=(1, 10), epsilons=(0.5,))
    modules = {line["module"]: line for line in result["lines"]}
    for layer, change in enumerate(built.change):
        for part, whole in change.items():
            name, W = NAMES[family][part].format(i=layer), built.weights[layer][part]
            line = modules[name]
            sv = oracle.singular_values(whole)
            np.testing.assert_allclose(line["sv"], sv[: len(line["sv"])], rtol=1e-10, atol=1e-12)
            assert line["alignment"] == pytest.approx(oracle.alignment(W, whole, 5), rel=CLOSE)
            assert line["amplification"] == pytest.approx(oracle.amplification(W, whole, case.rank), rel=1e-8)
            for k in (1, 10):
                assert line["n_intruder"][f"k{k}"]["0.5"] == oracle.intruders(W, whole, k, 0.5)


def test_spectra_of_single_heads(tmp_path: Path) -> None:
    built = build(tmp_path, Case("llama", GQA))
    heads = measure_spectrum(built.base, adapter=built.adapter)["heads"]
    found = {(line["layer"], line["part"], line["head"]): line for line in heads}
    assert len(found) == len(heads) == 2 * (6 + 2 + 2 + 6)
    for (layer, part, head), line in found.items():
        query = head * GQA.group if part in ("k", "v") else head  # k and v: a line a key-value head
        sv = oracle.singular_values(parts.block(built.change[layer][part], part, query, GQA))[:3]
        np.testing.assert_allclose(line["sv"], sv[: len(line["sv"])], rtol=1e-10)
        assert line["eff_rank"] == pytest.approx(oracle.effective_rank(sv), rel=CLOSE)
        assert line["stable_rank"] == pytest.approx(oracle.stable_rank(sv), rel=CLOSE)
