from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import Result

from .conftest import only_object

Run = Callable[..., Result]


@pytest.fixture
def style(tmp_path: Path) -> Path:
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    path = tmp_path / "style.safetensors"
    factors = {f"{stem}.lora_down.weight": torch.ones(2, 4), f"{stem}.lora_up.weight": torch.ones(3, 2)}
    save_file(factors | {f"{stem}.alpha": torch.tensor(4.0)}, path)
    return path


def test_people_read_a_row_and_the_place(run: Run, style: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("convert", style, "--out", out, "--to", "peft")
    assert result.exit_code == 0 and result.stderr == ""
    header, _, row, place = result.stdout.splitlines()
    assert header.split() == ["from", "to", "modules", "rank", "bits", "kept", "size"]
    assert row.split()[:5] == ["kohya", "peft", "1", "2", "all"]
    assert place == f"written to {out}" and (out / "adapter_config.json").is_file()


def test_json_is_the_report(run: Run, style: Path, tmp_path: Path) -> None:
    found = only_object(run("convert", style, "-o", tmp_path / "out", "--to", "diffusers", "--json"))
    assert (found["out"], found["to"], found["file"]) == (
        str(tmp_path / "out"), "diffusers", "pytorch_lora_weights.safetensors",
    )  # fmt: skip
    assert found["source"]["format"] == "kohya" and found["exact"] is False and found["modules"] == 1


def test_notes_are_lines_on_stderr_and_quiet_prints_nothing(run: Run, style: Path, tmp_path: Path) -> None:
    told = run("convert", style, "-o", tmp_path / "a", "--to", "diffusers")
    assert told.stderr.startswith("note: 1 modules have a scale other than 1") and "rounding 0" in told.stdout
    quiet = run("convert", style, "-o", tmp_path / "b", "--to", "diffusers", "-q")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    verbose = run("convert", style, "-o", tmp_path / "c", "--to", "peft", "-v")
    assert "convert 1/1 lora_unet_mid_block_attentions_0_proj_in" in verbose.stderr


def test_an_existing_output_needs_overwrite(run: Run, style: Path, tmp_path: Path) -> None:
    command = ("convert", style, "-o", tmp_path / "out", "--to", "kohya")
    assert run(*command).exit_code == 0
    refused = run(*command)
    assert refused.exit_code == 3 and "--overwrite" in refused.stderr and str(tmp_path / "out") in refused.stderr
    assert run(*command, "--overwrite").exit_code == 0


def test_wrong_words_are_usage_errors_and_wrong_files_input_errors(run: Run, style: Path, tmp_path: Path) -> None:
    assert run("convert", style, "-o", tmp_path / "out", "--to", "onnx").exit_code == 2
    assert run("convert", style, "--to", "peft").exit_code == 2
    assert run("convert", style, "-o", tmp_path / "out").exit_code == 2
    missing = run("convert", tmp_path / "nothing", "-o", tmp_path / "out", "--to", "peft")
    assert missing.exit_code == 3 and "nothing" in missing.stderr
    assert not (tmp_path / "out").exists()
