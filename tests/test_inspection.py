from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import loraforge
from loraforge.adapters import open_adapter
from loraforge.errors import LoraforgeError
from loraforge.inspection import inspect
from tests.adapters.folders import config, factors, simple, write_folder
from tests.oracles import factored as oracle


def dense(path: Path, module: str) -> np.ndarray:
    lr = open_adapter(path).load(module)
    return oracle.dense_sum([(1.0, lr.scaling, lr.B.double().numpy(), lr.A.double().numpy())])


def test_numbers_are_those_of_the_dense_deltas(tmp_path: Path) -> None:
    a = simple(tmp_path / "a", 1, {"score.weight": torch.ones(2, 5)}, modules_to_save=["score"])
    b = simple(tmp_path / "b", 2, modules={"layers.10.q": (6, 4, 5), "layers.11.q": (6, 4, 5)}, lora_alpha=2)
    found = inspect([a, str(b)])
    json.dumps(found, allow_nan=False)
    one, two = found["adapters"]
    assert (one["name"], one["format"], one["base"], one["task_type"]) == ("a", "peft", "tiny", "CAUSAL_LM")
    assert one["heads"] == ["score.weight"] and one["parameters"] == 2 * 4 * 11
    assert one["bytes"] == (a / "adapter_model.safetensors").stat().st_size
    assert [m["module"] for m in one["modules"]] == ["layers.2.q", "layers.10.q"]
    for entry in one["modules"]:
        exact = dense(a, entry["module"])
        S = oracle.spectrum(exact)[:4]
        assert entry["shape"] == [6, 5] and entry["rank"] == 4 and entry["scaling"] == 2.0
        assert entry["norm"] == pytest.approx(np.linalg.norm(exact)) and entry["spectrum"] == pytest.approx(list(S))
        assert entry["effective_rank"] == pytest.approx(oracle.effective_rank(S))
        assert entry["stable_rank"] == pytest.approx((S**2).sum() / S[0] ** 2)
    assert one["norm"] == pytest.approx(np.sqrt(sum(m["norm"] ** 2 for m in one["modules"])))
    # Only layers.10.q is shared.
    cosine = oracle.cosine(dense(a, "layers.10.q"), dense(b, "layers.10.q"))
    assert found["cosine"] == [[pytest.approx(1), pytest.approx(cosine)], [pytest.approx(cosine), pytest.approx(1)]]
    assert found["cosine_modules"]["layers.10.q"][0][1] == pytest.approx(cosine)
    assert found["cosine_modules"]["layers.2.q"] == [[1.0, None], [None, None]]
    assert two["modules"][0]["scaling"] == 0.5


def test_total_cosine_weighs_modules_by_size(tmp_path: Path) -> None:
    a, b = simple(tmp_path / "a", 1), simple(tmp_path / "b", 2)
    joined = [np.concatenate([dense(p, m).ravel() for m in open_adapter(p).modules]) for p in (a, b)]
    assert inspect([a, b])["cosine"][0][1] == pytest.approx(oracle.cosine(*joined))


def test_scale_does_not_change_a_cosine_and_sign_does(tmp_path: Path) -> None:
    a = simple(tmp_path / "a", 1)
    negative = simple(tmp_path / "n", 1, lora_alpha=-1)
    assert inspect([a, negative])["cosine"][0][1] == pytest.approx(-1.0)


def test_zero_and_unrelated_adapters_have_no_cosine(tmp_path: Path) -> None:
    a = simple(tmp_path / "a", 1)
    tensors = {k: torch.zeros_like(v) for k, v in factors({"layers.2.q": (6, 4, 5)}).items()}
    zero = write_folder(tmp_path / "zero", tensors, config())
    shape = simple(tmp_path / "shape", 1, modules={"layers.2.q": (9, 4, 5)})
    found = inspect([a, zero, shape])
    assert found["cosine"][0][1:] == [None, None] and found["cosine"][1][1] is None
    module = found["adapters"][1]["modules"][0]
    assert (module["norm"], module["effective_rank"], module["stable_rank"]) == (0.0, 0.0, 0.0)


def test_conflicts_are_those_of_the_dense_deltas(tmp_path: Path) -> None:
    a, b = simple(tmp_path / "a", 1), simple(tmp_path / "b", 2, lora_alpha=-3)
    found = inspect([a, b])
    differing, overlaps, dims = 0, np.zeros(2), np.zeros(2)
    for module in open_adapter(a).modules:
        D, E = dense(a, module), dense(b, module)
        differs = np.sign(D) != np.sign(E)
        assert found["conflict_modules"][module]["sign_conflict"][0][1] == pytest.approx(differs.mean())
        differing += differs.sum()
        for side, (X, Y) in enumerate(((D, E), (D.T, E.T))):
            Q, P = np.linalg.svd(X)[0][:, :4], np.linalg.svd(Y)[0][:, :4]
            overlaps[side] += ((Q.T @ P) ** 2).sum()
            dims[side] += 4
    assert found["sign_conflict"][0][1] == pytest.approx(differing / 60)
    assert [found[key][0][1] for key in ("overlap_out", "overlap_in")] == pytest.approx(list(overlaps / dims))
    assert found["sign_conflict"][0][0] == 0.0 and found["overlap_out"][0][0] == pytest.approx(1.0)


def test_coverage_kinds_and_energy_ranks(tmp_path: Path) -> None:
    a = simple(tmp_path / "a", 1)
    b = simple(tmp_path / "b", 2, modules={"layers.10.q": (6, 4, 5), "layers.11.q": (6, 4, 5)})
    found = inspect([a, b])
    assert found["coverage"] == {
        "modules": 3,
        "shared_by_all": 1,
        "kinds": {"linear": 3},
        "missing": {"a": ["layers.11.q"], "b": ["layers.2.q"]},
    }
    entry = found["adapters"][0]
    assert entry["kinds"] == {"linear": 2} and entry["notes"] == []
    for module in entry["modules"]:
        energy = np.cumsum(np.square(module["spectrum"])) / np.square(module["spectrum"]).sum()
        assert [module["rank_90"], module["rank_99"]] == [int((energy < t).sum()) + 1 for t in (0.9, 0.99)]
    for key in ("effective_rank", "stable_rank", "rank_90", "rank_99"):
        assert entry[key] == pytest.approx(np.mean([module[key] for module in entry["modules"]]))


def test_names_of_two_formats_meet(data_dir: Path) -> None:
    """One adapter under the names of two formats is one adapter."""
    folder = data_dir / "adapters"
    names = ["sd15-2100-diffusers", "sd15-2100-kohya-noalpha"]
    if not all((folder / name).exists() for name in names):
        pytest.skip(f"no such adapters at {folder}")
    found = inspect([folder / name for name in names])
    assert [a["format"] for a in found["adapters"]] == ["diffusers", "kohya"]
    assert found["coverage"]["modules"] == found["coverage"]["shared_by_all"] == 128
    assert found["cosine"][0][1] == pytest.approx(1.0) and found["sign_conflict"][0][1] == 0.0
    assert found["adapters"][0]["notes"], "an alpha that is not there is said"


def test_a_full_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LoraforgeError, match="full model") as caught:
        inspect(tmp_path)
    assert "--base" in str(caught.value.hint)


def test_one_path_and_no_path(tmp_path: Path) -> None:
    found = inspect(str(simple(tmp_path / "a")))
    assert len(found["adapters"]) == 1 and found["cosine_modules"] == {}
    with pytest.raises(LoraforgeError, match="No adapter"):
        inspect([])
    with pytest.raises(LoraforgeError, match="no such adapter folder"):
        inspect(tmp_path / "nothing")


def test_is_public() -> None:
    assert loraforge.inspect is inspect


def test_real_adapters(data_dir: Path) -> None:
    folder = data_dir / "adapters"
    names = ["flan-t5-base-r16-final", "flan-t5-base-r16-step1000", "distilbert-imdb"]
    found = inspect([folder / name for name in names])
    assert found["cosine"][0][1] > 0.95, "two steps of one training run"
    assert found["cosine"][0][2] is None
    assert all(1 <= m["effective_rank"] <= 16 for m in found["adapters"][0]["modules"])
