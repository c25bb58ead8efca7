"""What a recipe may say of a task."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loraforge.errors import InputProblems, LoraforgeError, UsageError
from loraforge.tasks.spec import parse_task


def test_relative_paths_count_from_the_folder(tmp_path):
    entry = {
        "id": 7,
        "train": "a.jsonl",
        "eval": {"texts": "t.txt", "labels": "/l.txt"},
        "test": "hf://glue",
        "metric": ["f1_macro", "accuracy"],
        "text": None,
    }
    spec = parse_task(entry, "seq.yaml", tmp_path)
    assert (spec.id, spec.train, spec.test) == ("7", str(tmp_path / "a.jsonl"), "hf://glue")
    assert spec.eval == {"texts": str(tmp_path / "t.txt"), "labels": "/l.txt"}
    assert spec.metrics == ("f1_macro", "accuracy") and parse_task({"id": "a"}, "x").metrics == ()
    assert spec.text is None


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"id": "a", "tset": "x"}, UsageError, "unknown key 'tset'(.|\n)*did you mean 'test'"),
        ({"train": "x"}, LoraforgeError, "no usable id"),
        ({"id": "a b"}, LoraforgeError, "no usable id(.|\n)*'a b'"),
        ({"id": "a", "kind": "clasification"}, LoraforgeError, "did you mean 'classification'"),
        ({"id": "a", "loss_on": "both"}, LoraforgeError, "unknown loss_on"),
        ({"id": "a", "rows": 0}, LoraforgeError, "'rows'(.|\n)*above 0"),
        ({"id": "a", "max_length": True}, LoraforgeError, "'max_length'"),
        ({"id": "a", "columns": "label"}, LoraforgeError, "'columns'(.|\n)*a list"),
        ({"id": "a", "labels": "yes"}, LoraforgeError, "'labels'(.|\n)*list of names"),
        ({"id": "a", "first_choice": 2}, LoraforgeError, "'first_choice'(.|\n)*0 or 1"),
        ({"id": "a", "extract": {"x": {"field": "f", "pattern": "("}}}, LoraforgeError, "'extract'"),
        ({"id": "a", "extract": {"x": "f"}}, LoraforgeError, "'extract'"),
        ([], LoraforgeError, "must be an object"),
    ],
)
def test_mistakes(entry, error, message):
    with pytest.raises(error, match=message):
        parse_task(entry, "seq.yaml")


def test_all_mistakes_at_once():
    with pytest.raises(InputProblems) as caught:
        parse_task({"kind": "x", "rows": -1}, "seq.yaml")
    assert len(caught.value.problems) == 3


def test_descriptions_need_no_torch():
    code = "import sys; from loraforge.tasks import TaskSpec, parse_task; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
