"""`loraforge merge --method iteris-plus` from the command line: base, adapters and data are made here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertModel
from typer.testing import Result

from .conftest import only_object

# PEFT asks transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Run = Callable[..., Result]
VOCABULARY = 30


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, the adapters `a` and `b` and their data `a.safetensors` and `b.safetensors`."""
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **sizes))
    base.save_pretrained(str(folder / "base"))
    for name in ("a", "b"):
        fresh = BertModel.from_pretrained(str(folder / "base"), local_files_only=True)
        fresh.name_or_path = str(folder / "base")
        model = peft.get_peft_model(fresh, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"]))
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(str(folder / name))
        ids = torch.randint(0, VOCABULARY, (24, 10))
        mask = (torch.arange(10) < torch.randint(4, 11, (24, 1))).long()
        save_file({"input_ids": ids, "attention_mask": mask}, folder / f"{name}.safetensors")
    return folder


def merge_words(bench: Path, out: Path, *words: object) -> list[object]:
    return ["merge", bench / "a", bench / "b", "-m", "iteris-plus", "--base", bench / "base", "-o", out, *words]


def calibration(bench: Path, *names: str) -> list[str]:
    return [word for name in names for word in ("--calibration", f"{name}={bench / name}.safetensors")]


def test_the_merge_loads_in_peft(run: Run, bench: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = merge_words(
        bench, out, *calibration(bench, "b", "a"), "--samples", 16, "--no-mats", "--set", "alpha_1=1e-4"
    )
    result = run(*words, "--set", "alpha_2=1e-4", "--json")
    assert result.exit_code == 0, result.stderr
    found = only_object(result)
    assert (found["method"], found["modules"]) == ("iteris-plus", 4)
    assert (found["params"]["use_mats"], found["params"]["alpha_1"], found["params"]["samples_num"]) == (
        False,
        1e-4,
        16,
    )
    base = BertModel.from_pretrained(str(bench / "base"), local_files_only=True)
    merged = peft.PeftModel.from_pretrained(base, str(out))
    assert torch.isfinite(merged(torch.tensor([[1, 2, 3]])).last_hidden_state).all()


def test_people_see_which_modules_are_solved(run: Run, bench: Path, tmp_path: Path) -> None:
    result = run(*merge_words(bench, tmp_path / "out", *calibration(bench, "a", "b"), "-v"))
    assert result.exit_code == 0, result.stderr
    assert "encoder.layer.1.attention.self.value" in result.stdout


def test_a_dry_run_plans_tokens_and_writes_nothing(run: Run, bench: Path, tmp_path: Path) -> None:
    result = run(*merge_words(bench, tmp_path / "out", *calibration(bench, "a", "b"), "--dry-run", "--json"))
    assert result.exit_code == 0, result.stderr
    plan = only_object(result)["plan"]
    assert plan["tokens"] > 0 and plan["peak_bytes"] > 0 and len(plan["modules"]) == 4
    assert list(tmp_path.iterdir()) == []


def empty(path: Path) -> str:
    path.write_text("", encoding="utf-8")
    return f"b={path}"


def alien(path: Path) -> str:
    save_file({"input_ids": torch.full((4, 5), VOCABULARY)}, path)
    return f"b={path}"


@pytest.mark.parametrize(
    ("second", "code", "expected"),
    [
        (lambda folder: None, 3, "b"),
        (lambda folder: f"c={folder / 'c.safetensors'}", 2, "names no adapter"),
        (lambda folder: f"b={folder / 'missing.jsonl'}", 3, "missing.jsonl"),
        (lambda folder: empty(folder / "empty.jsonl"), 3, "empty.jsonl"),
        (lambda folder: alien(folder / "alien.safetensors"), 3, "alien.safetensors"),
    ],
    ids=["too few", "unknown name", "missing", "empty", "token out of vocabulary"],
)
def test_wrong_data_is_refused(
    second: Callable[[Path], str | None], code: int, expected: str, run: Run, bench: Path, tmp_path: Path
) -> None:
    entry = second(tmp_path)
    words = [*calibration(bench, "a"), *(("--calibration", entry) if entry else ())]
    result = run(*merge_words(bench, tmp_path / "out", *words))
    assert result.exit_code == code, result.stderr
    assert expected in result.stderr and "internal" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_no_base_is_an_input_error(run: Run, bench: Path, tmp_path: Path) -> None:
    words = ["merge", bench / "a", bench / "b", "-m", "iteris", *calibration(bench, "a", "b"), "-o", tmp_path / "out"]
    result = run(*words)
    assert result.exit_code == 3 and "--base" in result.stderr
