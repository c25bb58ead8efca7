from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from typer.testing import Result

from tests.adapters import folders

from .conftest import only_object

Run = Callable[..., Result]
MODULES = {f"layers.{i}.q": (12, 6, 9) for i in range(10)}


def source(tmp_path: Path) -> str:
    return str(folders.simple(tmp_path / "source", modules=MODULES, r=6, lora_alpha=6))


def test_the_worst_modules_and_the_totals(run: Run, tmp_path: Path) -> None:
    given, out = source(tmp_path), tmp_path / "out"
    result = run("resize", given, "--rank", "2", "--out", str(out))
    assert result.exit_code == 0 and (out / "adapter_model.safetensors").is_file()
    assert "relative error" in result.stdout and "parameters before" in result.stdout
    assert "and 2 modules with smaller errors" in result.stdout and f"written to {out}" in result.stdout
    every = run("resize", given, "--rank", "2", "--out", str(out), "--overwrite", "-v")
    assert all(name in every.stdout for name in MODULES) and "smaller errors" not in every.stdout


def test_json_has_a_row_a_module_without_spectra(run: Run, tmp_path: Path) -> None:
    found = only_object(run("resize", source(tmp_path), "--energy", "0.8", "--out", str(tmp_path / "out"), "--json"))
    assert found["method"] == "resize" and found["modules"] == 10 and 0 < found["relative_error"] < 0.45
    keys = {"module", "shape", "rank_before", "rank", "relative_error", "kept_energy", "norm"}
    assert [set(row) for row in found["layers"]] == [keys] * 10
    assert "spectrum" in json.loads((tmp_path / "out" / "run.json").read_text())["layers"][0]


def test_every_rule_is_reached(run: Run, tmp_path: Path) -> None:
    given = source(tmp_path)
    for index, rule in enumerate(
        (["--nuclear", "0.5"], ["--ratio", "2"], ["--fro-error", "0.5"], ["--budget", "500"], ["--max-rank", "3"])
    ):
        found = only_object(run("resize", given, *rule, "--out", str(tmp_path / f"out{index}"), "--json"))
        assert found["params"][rule[0][2:].replace("-", "_")] == float(rule[1])
        assert found["parameters"] < found["parameters_before"]


def test_wrong_use(run: Run, tmp_path: Path) -> None:
    given, out = source(tmp_path), str(tmp_path / "out")
    assert run("resize", given, "--out", out).exit_code == 2
    assert run("resize", given, "--out", out, "--rank", "2", "--energy", "0.5").exit_code == 2
    assert run("resize", given, "--rank", "2").exit_code == 2
    refused = run("resize", given, "--out", out, "--budget", "5")
    assert refused.exit_code == 3 and "at least 210" in refused.stderr
    assert not Path(out).exists()
