from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from loraforge.cli._places import check_output, input_paths
from loraforge.cli._request import pair_weights, read_files, read_weights
from loraforge.errors import LoraforgeError, UsageError

from .conftest import FakeMerge

Run = Callable[..., Result]


def arguments_of(run: Run, fake: FakeMerge, *words: object) -> dict[str, Any]:
    result = run("merge", *words, "--dry-run")
    assert result.exit_code == 0, result.stderr
    return fake.arguments


def test_what_was_not_typed_is_left_to_the_api(run: Run, fake_merge: FakeMerge) -> None:
    found = arguments_of(run, fake_merge, "a", "b", "-m", "svd")
    assert found == {"adapters": ["a", "b"], "method": "svd", "params": {}, "dry_run": True}


def test_every_option_reaches_the_api(run: Run, fake_merge: FakeMerge) -> None:
    words = (
        "a b -m iteris-plus --weights -1,2.5 --rank 4 --min-rank 2 --max-rank 6 --uniform-rank --dtype bfloat16 "
        "--device cpu --seed 7 --format peft --base B --calibration a=a.jsonl --calibration b=b.jsonl --samples 9 "
        "--max-length 11 --batch-tokens 13 --template {text} --set camr_beta=1e-9 --no-mats --camr --no-dcs "
        "--max-iter 3 --init adapters --no-verify --on-missing present --from a --force"
    )
    assert arguments_of(run, fake_merge, *words.split()) == {
        "adapters": ["a", "b"],
        "method": "iteris-plus",
        "weights": [-1.0, 2.5],
        "rank": 4,
        "min_rank": 2,
        "max_rank": 6,
        "uniform_rank": True,
        "dtype": "bfloat16",
        "device": "cpu",
        "seed": 7,
        "format": "peft",
        "base": "B",
        "calibration": {"a": "a.jsonl", "b": "b.jsonl"},
        "samples": 9,
        "max_length": 11,
        "batch_tokens": 13,
        "template": "{text}",
        "on_missing": "present",
        "heads_from": "a",
        "force": True,
        "dry_run": True,
        "params": {
            "camr_beta": 1e-9,
            "use_mats": False,
            "use_camr": True,
            "use_dcs": False,
            "max_iter": 3,
            "init": "adapters",
            "verify": False,
        },
    }


def test_an_energy_and_the_weight_of_a_pair(run: Run, fake_merge: FakeMerge) -> None:
    found = arguments_of(run, fake_merge, "a", "b", "-m", "weighted-average", "--energy", "0.9", "--weight", "0.25")
    assert (found["energy"], found["weights"]) == (0.9, [0.25, 0.75])


def test_an_alias_becomes_the_method(run: Run, fake_merge: FakeMerge) -> None:
    assert arguments_of(run, fake_merge, "a", "-m", "linear")["method"] == "task-arithmetic"


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["a", "-o", "out"], 2, ["no merge method", "loraforge methods"]),
        (["-m", "svd", "-o", "out"], 2, ["no adapter"]),
        (["a", "-m", "svd"], 2, ["--out DIR"]),
        (["a", "-m", "sdv", "-o", "out"], 2, ["unknown merge method 'sdv'", "did you mean 'svd'"]),
        (["a", "-m", "svd", "-o", "out", "--max-iter", "3"], 2, ["max_iter", "--max-iter"]),
        (["a", "-m", "iteris", "-o", "out", "--set", "use_mat=1"], 2, ["did you mean 'use_mats'"]),
        (["a", "-m", "iteris", "-o", "out", "--set", "init=middle"], 2, ["init", "sweep | adapters"]),
        (["a", "-m", "iteris", "-o", "out", "--no-mats", "--set", "use_mats=1"], 2, ["--no-mats"]),
        (["a", "b", "-m", "svd", "-o", "out", "--weights", "1;2"], 2, ["--weights", "1;2"]),
        (["a", "b", "-m", "svd", "-o", "out", "--weights", "1,2", "--weight", "1"], 2, ["--weight"]),
        (["a", "b", "c", "-m", "svd", "-o", "out", "--weight", "0.5"], 3, ["3 adapters"]),
        (["a", "-m", "svd", "-o", "out", "--format", "pfet"], 2, ["did you mean 'peft'"]),
        (["a", "-m", "svd", "-o", "out", "--recipe", "missing.yaml"], 3, ["missing.yaml"]),
        (["a", "-m", "svd", "-o", "out", "--preset", "GLUE_t6"], 2, ["did you mean 'GLUE_t5'"]),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    words: Sequence[str],
    code: int,
    expected: Sequence[str],
    run: Run,
    fake_merge: FakeMerge,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("merge", *words)
    assert result.exit_code == code
    assert all(word in result.stderr for word in expected), result.stderr
    assert fake_merge.calls == [] and list(tmp_path.iterdir()) == []


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_options_go_over_the_recipe(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    text = (
        "method: iteris-plus\nadapters: [a, b]\nrank: 4\nseed: 3\nalpha_1: 1e-5\nalpha_2: 1e-5\nparams: {max_iter: 9}\n"
    )
    recipe = write(tmp_path / "r.yaml", text)
    found = arguments_of(run, fake_merge, "--recipe", recipe, "--rank", 8, "--max-iter", 2, "--weight", 0.5)
    assert (found["adapters"], found["rank"], found["seed"]) == (["a", "b"], 8, 3)
    assert found["weights"] == [0.5, 0.5]
    assert found["params"] == {"alpha_1": 1e-5, "alpha_2": 1e-5, "max_iter": 2}


def test_a_recipe_goes_over_the_preset(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", "adapters: [x, y]\nmax_iter: 2\n")
    found = arguments_of(run, fake_merge, "--preset", "GLUE_t5", "--recipe", recipe, "--base", "tiny")
    assert (found["adapters"], found["base"], found["method"]) == (["x", "y"], "tiny", "iteris-plus")
    assert (found["params"]["max_iter"], found["params"]["samples_num"]) == (2, 50)


def test_a_recipe_may_name_the_output(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", f"method: svd\nadapters: [a]\nout: {tmp_path / 'merged'}\n")
    assert run("merge", "--recipe", recipe).exit_code == 0
    assert (tmp_path / "merged" / "adapter_config.json").is_file()
    again = run("merge", "--recipe", recipe)
    assert again.exit_code == 3 and "--overwrite" in again.stderr


def test_a_recipe_may_want_a_whole_model(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", "method: svd\nadapters: [a]\noutput_kind: model\nbase: b\n")
    result = run("merge", "--recipe", recipe, "-o", tmp_path / "out")
    assert result.exit_code == 0 and fake_merge.arguments["output_kind"] == "model"


def test_weights_are_numbers_of_any_sign() -> None:
    assert read_weights("-1,2e-1, 3", None) == [-1.0, 0.2, 3.0]
    assert read_weights(None, 0.5) is None
    assert pair_weights(1.5, ["a", "b"]) == [1.5, -0.5]


def test_calibration_is_by_name_or_in_order(tmp_path: Path) -> None:
    assert read_files([], "--calibration") is None
    assert read_files(["a=x=1.jsonl", "b=y.jsonl"], "--calibration") == {"a": "x=1.jsonl", "b": "y.jsonl"}
    assert read_files(["x.jsonl", "data/lr=1/y.jsonl"], "--calibration") == ["x.jsonl", "data/lr=1/y.jsonl"]
    odd = write(tmp_path / "a=b.jsonl", "{}")
    assert read_files([str(odd)], "--calibration") == [str(odd)]
    with pytest.raises(UsageError, match="by name and in order"):
        read_files(["a=x.jsonl", "y.jsonl"], "--calibration")
    with pytest.raises(UsageError, match="two files of --calibration"):
        read_files(["a=x.jsonl", "a=y.jsonl"], "--calibration")


def test_an_output_never_touches_an_input(tmp_path: Path) -> None:
    adapter = tmp_path / "loras" / "a"
    adapter.mkdir(parents=True)
    for out in (adapter, tmp_path / "loras", adapter / "merged"):
        with pytest.raises(LoraforgeError, match="inputs are never changed"):
            check_output(out, overwrite=True, inputs=[str(adapter)])
    check_output(tmp_path / "loras" / "b", overwrite=False, inputs=[str(adapter)])


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "file", "")
    with pytest.raises(LoraforgeError, match="cannot be written there"):
        check_output(tmp_path / "file" / "out", overwrite=False, inputs=[])


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with `base/`, `a.jsonl`, `pictures/` and `r.yaml`, each of which a merge may read."""
    for name in ("base", "pictures"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "adapter_config.json").write_text("{}")
    write(tmp_path / "a.jsonl", "{}")
    write(tmp_path / "r.yaml", "method: iteris\nadapters: [x, y]\n")
    return tmp_path


@pytest.mark.parametrize("option", ["--report", "--out"])
@pytest.mark.parametrize("place", ["base", "base/new", "a.jsonl", "pictures/new", "r.yaml"])
def test_no_output_replaces_what_the_merge_reads(
    option: str, place: str, run: Run, fake_merge: FakeMerge, inputs: Path
) -> None:
    words = ["--base", inputs / "base", "--calibration", inputs / "a.jsonl", "--calibration", inputs / "pictures"]
    outputs = {"--out": inputs / "out", option: inputs / place}
    given = [word for pair in outputs.items() for word in pair]
    result = run("merge", "--recipe", inputs / "r.yaml", *words, *given, "--overwrite")
    assert result.exit_code == 3 and "inputs are never changed" in result.stderr, result.stderr
    assert fake_merge.calls == []


def test_inputs_are_local_paths(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs)
    assert input_paths(["x"], "google/some-model", ["hf://set", "absent.jsonl"], None) == [Path("x")]
    spec = {"x": {"source": "a.jsonl", "template": "{text}"}, "y": "pictures"}
    found = input_paths([], "base", spec, "r.yaml#section")
    assert found == [Path("base"), Path("a.jsonl"), Path("pictures"), Path("r.yaml")]
    assert input_paths([], None, None, "GLUE_t5") == []


def test_only_a_page_is_replaced_by_a_report(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    words = ["merge", "x", "-m", "svd", "-o", tmp_path / "out", "--report", tmp_path / "r.html", "--overwrite"]
    for content in ("", "notes", "<html></html>"):
        write(tmp_path / "r.html", content)
        result = run(*words)
        assert result.exit_code == 3 and "no report" in result.stderr and fake_merge.calls == []
    (tmp_path / "r.html").unlink()
    (tmp_path / "r.html").mkdir()
    assert "no report" in run(*words).stderr
    (tmp_path / "r.html").rmdir()
    write(tmp_path / "r.html", "<!DOCTYPE HTML><html></html>")
    run(*words, "--dry-run")
    fake_merge.before = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    assert run(*words).exit_code == 130 and len(fake_merge.calls) == 2, "the checks let it through"


def test_a_foreign_output_is_refused_before_any_work(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    write(tmp_path / "file", "precious")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "thesis.tex", "precious")
    for name, reason in (("file", "a file, not a folder"), ("folder", "holds something else")):
        result = run("merge", "x", "-m", "svd", "-o", tmp_path / name, "--overwrite")
        assert result.exit_code == 3 and reason in result.stderr and fake_merge.calls == []


def test_options_of_the_data_free_methods(run: Run, fake_merge: FakeMerge) -> None:
    words = "a b -m ties --density 0.3 --scope module --nuclear 0.9 --max-rank 8 --post iso --format kohya --resume"
    found = arguments_of(run, fake_merge, *words.split())
    assert found["params"] == {"density": 0.3, "scope": "module"}
    assert (found["nuclear"], found["max_rank"], found["post"], found["format"]) == (0.9, 8, "iso", "kohya")
    assert found["resume"] is True


def test_a_preset_may_belong_to_a_method(run: Run, fake_merge: FakeMerge) -> None:
    found = arguments_of(
        run, fake_merge, "a", "b", "-m", "iso-iasad", "--preset", "published-code", "--stats", "s", "--stats", "t"
    )
    assert found["params"] == {"preset": "published-code"} and found["stats"] == ["s", "t"]
