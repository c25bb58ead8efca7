"""`loraforge.merge`: what is refused and how it is said, heads, warnings, and the way to disk, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loraforge as lf
from loraforge.adapters import open_adapter
from loraforge.errors import InputProblems, LoraforgeError, UsageError
from tests.adapters import folders

NAN = float("nan")


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [folders.simple(tmp_path / name, seed) for seed, name in enumerate("ab")]


def refused(kind: type[LoraforgeError], match: str, *arguments: Any, **options: Any) -> str:
    with pytest.raises(kind, match=match) as caught:
        lf.merge(*arguments, **options)
    assert type(caught.value) is kind
    return str(caught.value)


# ---------------------------------------------------------------- what is refused


def test_what_is_no_list_of_adapters(two: list[Path]) -> None:
    for wrong in ([], (), str(two[0]), two[0]):
        assert "one or more" in refused(LoraforgeError, "no list of adapters", wrong, method="svd")


def test_opened_adapters_and_paths_may_be_mixed(two: list[Path]) -> None:
    found = lf.merge([open_adapter(two[0]), str(two[1])], method="task-arithmetic")
    want = lf.merge(two, method="linear")
    assert want.report["method"] == "task-arithmetic", "an alias is reported by the method's own name"
    for name, pair in want.modules.items():
        assert torch.equal(found.modules[name].delta(), pair.delta())


@pytest.mark.parametrize(
    ("options", "match", "hint"),
    [
        ({"method": "sdv"}, "unknown merge method 'sdv'", "did you mean 'svd'"),
        ({"on_missing": "zeros"}, "unknown value of on_missing", "did you mean 'zero'"),
        ({"dtype": "float8"}, "unknown value of dtype", "float16"),
        ({"device": "gpu"}, "unknown device", "cuda"),
        ({"device": "meta"}, "unsupported device", "cuda"),
        ({"params": {"density": 0.5}}, "unknown parameter 'density'", "no parameters"),
        ({"base": "models/base"}, "uses no base model", "iteris-plus"),
        ({"calibration": {"a": []}}, "uses no calibration data", "iteris-plus"),
        ({"rank": 0}, "not a positive whole number", "1 or more"),
        ({"rank": 2, "energy": 0.9}, "both a fixed rank and an energy", "--max-rank"),
        ({"energy": 1.5}, "energy is out of range", "<= 1"),
        ({"min_rank": 4, "max_rank": 2}, "below the smallest", "min_rank <= max_rank"),
    ],
    ids=str,
)
def test_usage(options: dict[str, Any], match: str, hint: str, two: list[Path]) -> None:
    assert hint in refused(UsageError, match, two, **{"method": "svd", **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(device: str, two: list[Path]) -> None:
    message = refused(LoraforgeError, "sees no GPU", two, method="svd", device=device)
    assert device in message and "doctor" in message
    assert lf.merge(two, method="svd", device="auto").report["device"] == "cpu"


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], []])
def test_another_number_of_weights_than_adapters(weights: list[float], two: list[Path]) -> None:
    message = refused(LoraforgeError, "number of weights is wrong", two, method="svd", weights=weights)
    assert f"{len(weights)} weights" in message and "2, one an adapter" in message


@pytest.mark.parametrize("weights", [[1.0, NAN], [float("inf"), 1.0], [1.0, -float("inf")]])
def test_a_weight_that_is_not_finite(weights: list[float], two: list[Path]) -> None:
    refused(LoraforgeError, "weight is not finite", two, method="svd", weights=weights)


@pytest.mark.parametrize("weights", [["a", "b"], [None, 1.0], [[1.0], 1.0]])
def test_a_weight_that_is_no_number(weights: list[Any], two: list[Path]) -> None:
    refused(UsageError, "weight is not a number", two, method="svd", weights=weights)


def test_weights_are_used_as_they_are_given(two: list[Path]) -> None:
    a, b = (open_adapter(p) for p in two)
    for method in ("task-arithmetic", "weighted-average", "concat"):
        found = lf.merge(two, method=method, weights=[-0.5, 2])
        assert found.report["weights"] == [-0.5, 2.0]
        for name, pair in found.modules.items():
            want = -0.5 * a.load(name).delta() + 2.0 * b.load(name).delta()
            torch.testing.assert_close(pair.delta(), want, rtol=0, atol=1e-5)


def test_both_names_of_the_weights_are_one_too_many(two: list[Path]) -> None:
    message = refused(
        UsageError,
        "both set the coefficients",
        two,
        method="iteris",
        weights=[1, 1],
        params={"manual_ceof": (1.0, 1.0)},
    )
    assert "manual_ceof" in message


def test_a_calibrated_method_says_what_it_lacks(two: list[Path]) -> None:
    message = refused(LoraforgeError, "needs the base model", two, method="iteris-plus")
    assert "--base" in message and "task-arithmetic" in message


def test_all_input_problems_at_once(tmp_path: Path) -> None:
    one = folders.simple(tmp_path / "one", base_model_name_or_path="models/x")
    other = folders.simple(
        tmp_path / "other",
        base_model_name_or_path="models/y",
        modules={"layers.2.q": (6, 4, 7), "layers.10.q": (6, 4, 5)},
    )
    message = refused(InputProblems, "2 problems", [one, other], method="svd")
    assert "different base models" in message and "layers.2.q" in message and "6 x 7" in message


def test_what_force_lets_through_is_in_the_report(tmp_path: Path) -> None:
    pair = [folders.simple(tmp_path / n, base_model_name_or_path=f"models/{n}") for n in "xy"]
    refused(LoraforgeError, "different base models", pair, method="svd")
    warnings = lf.merge(pair, method="svd", force=True).report["warnings"]
    assert any("different base models" in w and "models/x" in w and "models/y" in w for w in warnings)
    assert lf.merge(pair[:1] * 2, method="svd", force=True).report["warnings"] == []


# ---------------------------------------------------------------- heads


def with_head(path: Path, seed: int, value: float, **fields: Any) -> Path:
    extra = {"classifier.weight": torch.full((3, 5), value), "classifier.bias": torch.full((3,), value)}
    return folders.simple(path, seed, extra, modules_to_save=["classifier"], task_type="SEQ_CLS", **fields)


def saved(result: Any, out: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]]:
    folder = result.save(out)
    file = load_file(folder / "adapter_model.safetensors")
    return folder, file, json.loads((folder / "adapter_config.json").read_text())


def heads_of(file: dict[str, torch.Tensor]) -> dict[str, float]:
    return {k.removeprefix(folders.PREFIX): float(v.flatten()[0]) for k, v in file.items() if "classifier" in k}


def test_differing_heads_are_kept_apart(tmp_path: Path) -> None:
    pair = [with_head(tmp_path / n, i, float(i)) for i, n in enumerate("ab")]
    result = lf.merge(pair, method="svd")
    assert any("heads differ between a, b" in w and "heads_from" in w for w in result.report["warnings"])
    folder, file, config = saved(result, tmp_path / "out")
    assert heads_of(file) == {} and not config.get("modules_to_save")
    for i, name in enumerate("ab"):
        kept = load_file(folder / "heads" / name / "heads.safetensors")
        assert {key: float(t.flatten()[0]) for key, t in kept.items()} == {"classifier.weight": i, "classifier.bias": i}
        assert (folder / "heads" / name / "heads.json").is_file()


def test_equal_heads_go_into_the_adapter(tmp_path: Path) -> None:
    pair = [with_head(tmp_path / n, i, 7.0) for i, n in enumerate("ab")]
    folder, file, config = saved(lf.merge(pair, method="svd"), tmp_path / "out")
    assert heads_of(file) == {"classifier.weight": 7.0, "classifier.bias": 7.0}
    assert config["modules_to_save"] == ["classifier"] and not (folder / "heads").exists()


def test_heads_from_one_adapter(tmp_path: Path) -> None:
    pair = [with_head(tmp_path / n, i, float(i)) for i, n in enumerate("ab")]
    result = lf.merge(pair, method="svd", heads_from="b")
    folder, file, config = saved(result, tmp_path / "out")
    assert heads_of(file) == {"classifier.weight": 1.0, "classifier.bias": 1.0} and not (folder / "heads").exists()
    assert any("heads are those of b" in w for w in result.report["warnings"])
    assert "did you mean 'a'" in refused(LoraforgeError, "names no adapter", pair, method="svd", heads_from="aa")
    plain = folders.simple(tmp_path / "plain", task_type="SEQ_CLS")
    refused(LoraforgeError, "has no heads", [*pair, plain], method="svd", heads_from="plain")


# ---------------------------------------------------------------- progress and the report


def test_progress_names_every_module_in_natural_order(two: list[Path]) -> None:
    seen: list[tuple[str, str, int, int]] = []
    lf.merge(two, method="svd", progress=lambda *told: seen.append(told))
    assert seen == [("merging", "layers.2.q", 1, 2), ("merging", "layers.10.q", 2, 2)]


def test_totals_are_those_of_the_layers(two: list[Path]) -> None:
    """relative_error and kept_energy by squared norms over all modules, as dense arithmetic has them."""
    exact = lf.merge(two, method="task-arithmetic")
    cut = lf.merge(two, method="svd", rank=2)
    lost = sum(float((exact.modules[n].delta() - p.delta()).double().square().sum()) for n, p in cut.modules.items())
    size = sum(float(p.delta().double().square().sum()) for p in exact.modules.values())
    assert cut.report["relative_error"] == pytest.approx((lost / size) ** 0.5, rel=1e-5)
    assert cut.report["kept_energy"] == pytest.approx(1 - lost / size, rel=1e-5)
    assert (exact.report["relative_error"], exact.report["kept_energy"]) == (0.0, 1.0)
    assert set(cut.report["phases"]) == {"read", "merge", "rank"}


def test_a_delta_of_zero_has_a_report(tmp_path: Path) -> None:
    path = folders.simple(tmp_path / "zero")
    found = lf.merge([path], method="svd", weights=[0.0], rank=2)
    assert json.dumps(found.report, allow_nan=False)
    assert (found.report["relative_error"], found.report["kept_energy"]) == (0.0, 1.0)
    assert all(not bool(p.delta().any()) for p in found.modules.values())
    assert found.save(tmp_path / "out").is_dir()


# ---------------------------------------------------------------- the way to disk


def left(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_saving_says_where_and_what(two: list[Path], tmp_path: Path) -> None:
    result = lf.merge(two, method="svd")
    assert result.report["out"] is None and result.written is None
    folder = result.save(tmp_path / "deep" / "out")
    run = json.loads((folder / "run.json").read_text())
    assert {"adapter_model.safetensors", "adapter_config.json", "run.json", "README.md"} <= left(folder)
    assert run["out"] == str(tmp_path / "deep" / "out") and run["dtype"] == "float32"
    assert [a["sha256"] for a in run["adapters"]] == [open_adapter(p).sha256 for p in two]
    assert result.written is not None and result.written.parameters == run["parameters"]


def test_an_existing_output_is_refused_unless_asked(two: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    lf.merge(two, method="svd").save(out)
    before = (out / "adapter_model.safetensors").read_bytes()
    other = lf.merge(two, method="concat")
    with pytest.raises(LoraforgeError, match="exists already"):
        other.save(out)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    other.save(out, overwrite=True)
    assert json.loads((out / "run.json").read_text())["method"] == "concat"
    assert left(tmp_path) == {"a", "b", "out"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_input_or_a_foreign_folder_is_never_replaced(overwrite: bool, two: list[Path], tmp_path: Path) -> None:
    result = lf.merge(two, method="svd")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    for out in (two[0], tmp_path, tmp_path / "mine"):
        with pytest.raises(LoraforgeError):
            result.save(out, overwrite=overwrite)
    assert left(tmp_path) == {"a", "b", "mine"} and left(tmp_path / "mine") == {"thesis.tex"}
    assert open_adapter(two[0]).modules


def test_another_format(two: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown output format"):
        lf.merge(two, method="svd").save(tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("earlier", [False, True])
def test_a_save_that_fails_leaves_nothing_behind(earlier: bool, tmp_path: Path) -> None:
    """A factor beyond float16, in the second module: the first is written by then."""
    tensors = folders.factors(folders.MODULES)
    tensors[f"{folders.PREFIX}layers.10.q.lora_B.weight"] *= 1e6
    path = folders.write_folder(tmp_path / "a", tensors, folders.config())
    out = tmp_path / "deep" / "out"
    if earlier:
        lf.merge([path], method="concat").save(out)
    with pytest.raises(LoraforgeError, match="not finite in the dtype") as caught:
        lf.merge([path], method="concat", dtype="float16").save(out, overwrite=True)
    assert caught.value.where == "layers.10.q.lora_B"
    if not earlier:
        assert left(tmp_path) == {"a"}
        return
    assert left(out.parent) == {"out"} and open_adapter(out).info("layers.10.q").dtype == torch.float32


def test_an_interrupted_save_leaves_nothing_behind(
    two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraforge.adapters.session import WriteSession

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(WriteSession, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lf.merge(two, method="svd").save(tmp_path / "out")
    assert left(tmp_path) == {"a", "b"}
