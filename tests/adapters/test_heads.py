from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loraforge.adapters import open_adapter, resolve_heads, unique_names
from loraforge.adapters.heads import write_aside
from loraforge.errors import LoraforgeError

from .folders import simple


def head(value: float, classes: int = 2) -> dict[str, torch.Tensor]:
    return {
        "pre_classifier.weight": torch.ones(3, 3),
        "classifier.weight": torch.full((classes, 3), float(value)),
        "classifier.bias": torch.zeros(classes),
    }


def adapter(path: Path, extra: dict[str, torch.Tensor], **fields: Any):
    return open_adapter(simple(path, extra=extra, **{"modules_to_save": ["classifier"], **fields}))


def test_equal_heads_pass_through(tmp_path: Path) -> None:
    plan = resolve_heads([adapter(tmp_path / "a", head(1)), adapter(tmp_path / "b", head(1))])
    assert sorted(plan.merged) == ["classifier.bias", "classifier.weight", "pre_classifier.weight"]
    assert plan.modules_to_save == ("classifier", "pre_classifier") and not plan.aside and not plan.notes


@pytest.mark.parametrize("other", [head(2), head(1, classes=3), {"classifier.weight": torch.ones(2, 3)}])
def test_differing_heads_are_kept_apart_as_whole_modules(tmp_path: Path, other: dict[str, torch.Tensor]) -> None:
    plan = resolve_heads([adapter(tmp_path / "a", head(1)), adapter(tmp_path / "b", other)])
    assert list(plan.merged) == ["pre_classifier.weight"] and plan.modules_to_save == ("pre_classifier",)
    assert sorted(plan.aside["a"]) == ["classifier.bias", "classifier.weight"], "weight and bias stay together"
    assert torch.equal(plan.aside["b"]["classifier.weight"], other["classifier.weight"])
    assert "`--from NAME` (API: heads_from) puts one" in plan.notes[0] and "a, b" in plan.notes[0]


def test_a_head_that_is_kept_apart_keeps_its_task(tmp_path: Path) -> None:
    a, b = adapter(tmp_path / "a", head(1)), adapter(tmp_path / "b", head(2))
    (a.path / "task.json").write_text('{"id": "mood"}')
    write_aside(tmp_path / "out", resolve_heads([a, b]))
    assert (tmp_path / "out" / "heads" / "a" / "task.json").read_text() == '{"id": "mood"}'
    assert sorted(p.name for p in (tmp_path / "out" / "heads" / "b").iterdir()) == ["heads.json", "heads.safetensors"]


def test_another_dtype_is_another_head(tmp_path: Path) -> None:
    other = {key: value.to(torch.bfloat16) for key, value in head(1).items()}
    assert resolve_heads([adapter(tmp_path / "a", head(1)), adapter(tmp_path / "b", other)]).aside


def test_one_adapter_and_no_heads(tmp_path: Path) -> None:
    a, b = adapter(tmp_path / "a", head(1)), open_adapter(simple(tmp_path / "b"))
    assert len(resolve_heads([a]).merged) == 3 and len(resolve_heads([b, a]).merged) == 3
    empty = resolve_heads([b])
    assert not empty.merged and not empty.aside and empty.modules_to_save == ()


def test_heads_from_names_the_adapter(tmp_path: Path) -> None:
    a, b = adapter(tmp_path / "a", head(1)), adapter(tmp_path / "b", head(2, 5))
    plain = open_adapter(simple(tmp_path / "c"))
    for name in ("b", str(tmp_path / "b")):
        plan = resolve_heads([a, b, plain], name)
        assert plan.merged["classifier.weight"].shape == (5, 3) and not plan.aside
        assert plan.modules_to_save == ("classifier", "pre_classifier")
        assert plan.notes == ("heads are those of b; left out: a",)
    with pytest.raises(LoraforgeError, match="no adapter of this merge") as caught:
        resolve_heads([a, b], "bb")
    assert "did you mean 'b'" in str(caught.value) and caught.value.where == "--from"
    with pytest.raises(LoraforgeError, match="`--from NAME`.*has no heads") as none:
        resolve_heads([a, plain], "c")
    assert (none.value.where, none.value.got, none.value.expected) == ("--from", "c", "one of a")


def test_equal_folder_names_are_told_apart(tmp_path: Path) -> None:
    a, b = adapter(tmp_path / "x" / "run", head(1)), adapter(tmp_path / "y" / "run", head(2))
    assert unique_names([a, b, a]) == ["run", "run-2", "run-3"]
    assert list(resolve_heads([a, b]).aside) == ["run", "run-2"]
    with pytest.raises(LoraforgeError, match="`--from NAME`.*several adapters"):
        resolve_heads([a, b], "run")
    assert resolve_heads([a, b], str(b.path)).merged["classifier.weight"][0, 0] == 2


BIAS = "layers.2.q.base_layer.bias"


def test_extras_pass_when_equal_and_are_refused_when_not(tmp_path: Path) -> None:
    def make(name: str, value: float):
        return open_adapter(simple(tmp_path / name, extra={BIAS: torch.full((6,), float(value))}, bias="all"))

    a, same, other, plain = make("a", 1), make("same", 1), make("other", 2), open_adapter(simple(tmp_path / "plain"))
    plan = resolve_heads([plain, a, same])
    assert list(plan.merged) == [BIAS] and plan.config == {"bias": "all"} and plan.modules_to_save == ()
    with pytest.raises(LoraforgeError, match="cannot be summed") as caught:
        resolve_heads([a, other])
    assert BIAS in str(caught.value) and "`--from a` (API: heads_from)" in str(caught.value)
    assert resolve_heads([a, other], "other").merged[BIAS][0] == 2


def test_token_rows_need_the_same_rows(tmp_path: Path) -> None:
    key = "embed_tokens.token_adapter.trainable_tokens_delta"
    a, b = (
        open_adapter(
            simple(tmp_path / str(i), extra={key: torch.ones(2, 5)}, trainable_token_indices={"embed_tokens": [0, i]})
        )
        for i in (1, 2)
    )
    with pytest.raises(LoraforgeError, match="trainable_token_indices"):
        resolve_heads([a, b])
    assert resolve_heads([a]).config == {"trainable_token_indices": {"embed_tokens": [0, 1]}}


def test_nan_in_a_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraforgeError, match="NaN or Inf"):
        resolve_heads([adapter(tmp_path / "a", head(float("nan")))])


def test_real_heads_of_different_classes(data_dir: Path) -> None:
    folder = data_dir / "adapters"
    names = ["distilbert-imdb", "distilbert-emotion6", "distilbert-hate"]
    adapters = [open_adapter(folder / name) for name in names]
    plan = resolve_heads(adapters)
    assert list(plan.aside) == names and not plan.merged
    assert [plan.aside[name]["classifier.weight"].shape[0] for name in names] == [2, 6, 2]
    chosen = resolve_heads(adapters, "distilbert-emotion6")
    assert chosen.modules_to_save == ("classifier", "pre_classifier")
