"""`loraforge measure doctor` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from loraforge.cli.measure.doctor import _spans
from loraforge.measure.heads.layout import HeadLayout
from tests.evaluation.material import adapter_of, task_of
from tests.measure.tiny_heads import build
from tests.tasks.tiny import tiny_base

from .conftest import only_object

Run = Callable[..., Result]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for family in ("bert", "llama", "t5"):
        tiny_base(folder / family, family)
    return folder


def test_one_row_for_layers_that_are_alike(run: Run, bases: Path) -> None:
    result = run("measure", "doctor", bases / "t5")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split("  ")[0] == "stack"
    rows = [line.split() for line in lines if line.startswith(("enc", "dec"))]
    assert [row[:6] for row in rows] == [
        ["enc", "self", "0-1", "2", "2", "8"],
        ["dec", "self", "0-1", "2", "2", "8"],
        ["dec", "cross", "0-1", "2", "2", "8"],
    ]
    assert "layer.1.EncDecAttention.o" in rows[2]
    assert all(row[-1] == "ok" for row in rows)
    assert "12 heads in 6 attentions" in result.stdout


def test_json_holds_the_layout_and_every_check(run: Run, bases: Path) -> None:
    found = only_object(run("measure", "doctor", bases / "llama", "--json", "--all"))
    assert found["passed"] is True and found["heads"] == 8
    layout = HeadLayout.from_json(found["layout"])
    assert layout.sha256 == found["sha256"] and layout.attentions[1].n_kv == 2
    names = {check["check"] for check in found["checks"]}
    assert names == {"once", "gate", *(f"{part} of head {head}" for part in "qkv" for head in range(4))}


def test_an_adapter_is_checked_in_its_place(run: Run, bases: Path, tmp_path: Path) -> None:
    spec = task_of(tmp_path, "two", ("neg", "pos"), seed=1)
    adapter = adapter_of(tmp_path / "adapter", bases / "bert", spec)
    result = run("measure", "doctor", bases / "bert", "--adapter", adapter, "--json")
    assert result.exit_code == 0, result.stderr
    found = only_object(result)
    assert found["adapter"] == str(adapter)
    assert found["layout"]["attentions"][0]["o"]["module"] == "bert.encoder.layer.0.attention.output.dense"
    wrong = run("measure", "doctor", bases / "llama", "--adapter", adapter)
    assert wrong.exit_code == 3


@pytest.mark.parametrize("words", [[], ["--json"]], ids=["table", "json"])
def test_a_layout_that_is_not_confirmed_is_code_3(run: Run, tmp_path: Path, words: list[str]) -> None:
    import transformers as tf

    config = tf.CodeGenConfig(vocab_size=40, n_embd=16, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    tf.CodeGenModel(config).save_pretrained(tmp_path)
    result = run("measure", "doctor", tmp_path, *words)
    assert result.exit_code == 3
    assert "checks failed" in result.stderr
    if words:
        assert only_object(result)["passed"] is False
    else:
        assert "dec self 0, v of head 0: other heads changed instead" in result.stdout


def test_what_is_passed_over_is_said(run: Run, tmp_path: Path) -> None:
    build("bamba").save_pretrained(tmp_path)
    result = run("measure", "doctor", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "passed over: layers.0.mamba: linear attention" in result.stderr


def test_what_cannot_be_opened_is_told(run: Run, bases: Path, tmp_path: Path) -> None:
    assert run("measure", "doctor").exit_code == 2
    missing = run("measure", "doctor", tmp_path / "nothing")
    assert missing.exit_code == 3 and "does not exist" in missing.stderr
    broken = tmp_path / "broken"
    broken.mkdir()
    config = json.loads((bases / "bert" / "config.json").read_text()) | {"num_attention_heads": 3}
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "model.safetensors").write_bytes((bases / "bert" / "model.safetensors").read_bytes())
    assert run("measure", "doctor", broken).exit_code == 3


def test_layers_are_shown_as_spans() -> None:
    assert _spans([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert _spans([3]) == "3"
    assert _spans([]) == ""
