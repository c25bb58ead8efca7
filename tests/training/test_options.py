from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from loraforge.errors import InputProblems, LoraforgeError, UsageError
from loraforge.tasks import load_model
from loraforge.training.options import LoraOptions, adapt
from loraforge.training.patterns import read_patterns, split_targets
from tests.tasks.tiny import tiny_base


@pytest.fixture
def model(bert: Path) -> nn.Module:
    return load_model(bert, "classification", head_labels=("down", "up"), seed=3)[0]


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def test_defaults_and_peft_names() -> None:
    assert LoraOptions().lora_alpha == 16
    read = LoraOptions.read({"r": 4, "lora_alpha": 4, "target_modules": "query,key", "use_dora": True})
    assert (read.r, read.lora_alpha, read.targets, read.dora) == (4, 4, ["query", "key"], True)
    assert LoraOptions.read(read) is read


def test_wrong_options_come_at_once() -> None:
    with pytest.raises(InputProblems) as raised:
        LoraOptions.read({"r": 0, "dropout": 1.0, "bias": "some"})
    assert all(f"lora: {key}" in str(raised.value) for key in ("r", "dropout", "bias"))
    with pytest.raises(UsageError, match="did you mean 'dropout'"):
        LoraOptions.read({"dropot": 0.1})
    with pytest.raises(UsageError, match="given twice"):
        LoraOptions.read({"alpha": 1, "lora_alpha": 2})


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq"])
def test_starts_that_change_the_base_are_refused(init: str) -> None:
    with pytest.raises(UsageError, match="changes the base's weights"):
        LoraOptions(init=init)


def test_targets_that_match_nothing_list_what_there_is(model: nn.Module) -> None:
    with pytest.raises(LoraforgeError) as raised:
        adapt(model, LoraOptions(targets=["query", "q_proj"]), "classification", (), seed=0)
    assert raised.value.got == "q_proj"
    assert "query (2)" in str(raised.value.expected)
    with pytest.raises(LoraforgeError, match="match no module"):
        adapt(model, LoraOptions(targets=r".*no_such"), "classification", (), seed=0)


def test_patterns_that_match_no_target_are_refused(model: nn.Module) -> None:
    options = LoraOptions(targets=["query"], rank_pattern={"value": 2}, alpha_pattern={"query": 2})
    with pytest.raises(LoraforgeError, match="rank_pattern matches none of the targets"):
        adapt(model, options, "classification", (), seed=0)


def test_ranks_and_scales_by_module(model: nn.Module) -> None:
    pattern = {r"layer\.0\..*\.query": 2}
    options = LoraOptions(r=4, alpha=8, targets=["query", "value"], rank_pattern=pattern, alpha_pattern=pattern)
    found = adapted(adapt(model, options, "classification", ("classifier",), seed=0))
    for name, module in found.items():
        special = "layer.0." in name and name.endswith("query")
        assert module.r["default"] == (2 if special else 4)  # type: ignore[index]
        assert module.scaling["default"] == (1.0 if special else 2.0)  # type: ignore[index]
    assert len(found) == 4


def test_rslora_and_dora(model: nn.Module) -> None:
    options = LoraOptions(r=4, alpha=8, targets="query", rslora=True, dora=True)
    found = adapted(adapt(model, LoraOptions.read(options.record()), "classification", (), seed=0))
    assert all(module.scaling["default"] == 4.0 for module in found.values())  # type: ignore[index]
    assert all("default" in module.lora_magnitude_vector for module in found.values())  # type: ignore[operator]


def test_all_linear_leaves_what_is_trained_in_full(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "b", "deberta-v2")
    model, _, fresh = load_model(base, "classification", head_labels=("a", "b"))
    assert set(fresh) == {"classifier", "pooler"}
    peft = adapt(model, LoraOptions(r=2, targets="all-linear"), "classification", fresh, seed=0)
    names = list(adapted(peft))
    assert names and not [name for name in names if "pooler" in name or "classifier" in name]
    trainable = {name for name, p in peft.named_parameters() if p.requires_grad}
    assert any("pooler.modules_to_save.default.dense.weight" in name for name in trainable)
    assert any("classifier.modules_to_save.default.weight" in name for name in trainable)


def test_the_start_depends_on_the_seed_alone(bert: Path) -> None:
    starts = []
    for noise, seed in ((0, 5), (1, 5), (1, 6)):
        torch.manual_seed(noise)
        model, _, fresh = load_model(bert, "classification", head_labels=("a", "b"), seed=1)
        peft = adapt(model, LoraOptions(r=2), "classification", fresh, seed=seed)
        starts.append(torch.cat([p.flatten() for n, p in peft.named_parameters() if "lora_A" in n]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", '{"query": 2, "layer.0.value": 4}', {"rank_pattern": {"query": 2, "layer.0.value": 4}}),
        ("a.yaml", "- query\n- value\n", {"targets": ["query", "value"]}),
        ("a.yaml", "r: 2\nrank_pattern: {query: 3}\n", {"r": 2, "rank_pattern": {"query": 3}}),
        (
            "adapter_config.json",
            json.dumps({"peft_type": "LORA", "lora_alpha": 4, "target_modules": ["key"], "rank_pattern": {}}),
            {"alpha": 4, "targets": ["key"], "rank_pattern": {}},
        ),
    ],
)
def test_pattern_files(tmp_path: Path, name: str, text: str, expected: dict[str, object]) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_patterns(tmp_path / name) == expected


@pytest.mark.parametrize("text", ["{", "{}", "3", '{"query": "x"}'])
def test_damaged_pattern_files_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LoraforgeError, match="pattern file") as raised:
        read_patterns(path)
    assert raised.value.where == str(path)


def test_targets_as_typed() -> None:
    assert split_targets("query, value") == ["query", "value"]
    assert split_targets("all-linear") == "all-linear"
    assert split_targets(r".*layer\.[01]\..*query") == r".*layer\.[01]\..*query"
