"""Ranks and targets: allocation by plain loops, and what PEFT makes of the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraforge.checkpoints import open_checkpoint
from loraforge.errors import LoraforgeError, UsageError
from loraforge.measure.analysis.modules import ends_with, unique_suffixes
from loraforge.measure.analysis.suggest import allocate, suggest_ranks, suggest_targets
from loraforge.measure.heads.find import layout_of_checkpoint
from loraforge.measure.heads.layout import HeadLayout
from loraforge.training.options import LoraOptions
from loraforge.training.patterns import read_patterns
from tests.measure.golden import write_run
from tests.tasks.tiny import tiny_base

Make = Callable[..., Path]
ranks_anew = partial(suggest_ranks, overwrite=True)
targets_anew = partial(suggest_targets, overwrite=True)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, made = tmp_path_factory.mktemp("bases"), {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = tiny_base(root / family, family)
        return made[family]

    return base


@pytest.fixture
def measured(tmp_path: Path, bases: Callable[[str], Path]) -> Make:
    """A run of a tiny base: head i of the layout has importance i, the first one a negative one; U differs by part."""

    def make(family: str = "bert", **config: Any) -> Path:
        base = bases(family)
        layout = layout_of_checkpoint(open_checkpoint(base))
        lines = [{**key._asdict(), "I": float(i) if i else -5.0} for i, key in enumerate(layout.heads)]
        update = [
            {**key._asdict(), "U": 1.0, "Urel": 0.1, "Uq": 4.0 * (i + 1), "Uk": 1.0, "Uv": 2.0, "Uo": 0.0}
            for i, key in enumerate(layout.heads)
        ]
        files = {
            "importance_pre.jsonl": lines,
            "importance_post.jsonl": lines,
            "update.jsonl": update,
            "gradfisher_pre.jsonl": [line | {"G": 1.0, "F": 2.0, "Ppred": 0.5} for line in lines],
        }
        folder = write_run(tmp_path / "run", files, base=str(base), method="LoRA", **config)
        (folder / "layout.json").write_text(json.dumps(layout.to_json()), encoding="utf-8")
        return folder

    return make


def layout(folder: Path) -> HeadLayout:
    return HeadLayout.from_json(json.loads((folder / "layout.json").read_text(encoding="utf-8")))


def test_equal_scores_and_costs_are_uniform() -> None:
    assert allocate([1.0] * 5, [10] * 5, 400, [1] * 5, [32] * 5) == [8] * 5
    assert allocate([0.0] * 5, [10] * 5, 400, [1] * 5, [32] * 5) == [8] * 5


def test_ranks_are_in_proportion_and_the_rest_goes_by_largest_remainder() -> None:
    # 10 units over 1 : 2 : 4 are 1.43, 2.86, 5.71: two are left over, for the remainders 0.86 and 0.71.
    assert allocate([1.0, 2.0, 4.0], [1, 1, 1], 10, [0] * 3, [10] * 3) == [1, 3, 6]
    assert allocate([1.0, 2.0, 4.0], [1, 1, 1], 9, [0] * 3, [10] * 3) == [1, 3, 5]


def test_what_a_bound_takes_away_goes_to_the_others() -> None:
    # The third is held at 3, the others share 7 as 1 : 2.
    assert allocate([1.0, 2.0, 100.0], [1, 1, 1], 10, [0] * 3, [9, 9, 3]) == [2, 5, 3]
    # The first is raised to 4, the others share 8 as 1 : 3.
    assert allocate([0.0, 1.0, 3.0], [1, 1, 1], 12, [4] * 3, [12] * 3) == [4, 4, 4]
    assert allocate([0.0, 1.0, 3.0], [1, 1, 1], 12, [4, 0, 0], [12] * 3) == [4, 2, 6]


def test_the_budget_bounds_and_is_nearly_spent() -> None:
    random = np.random.default_rng(4)
    for _ in range(50):
        n = int(random.integers(2, 12))
        scores, costs = random.random(n), random.integers(20, 60, n)
        budget = int(costs.sum() * random.uniform(2, 20))
        ranks = allocate(scores, costs, budget, [1] * n, [16] * n)
        assert all(1 <= rank <= 16 for rank in ranks) and (spent := int(np.dot(ranks, costs))) <= budget
        assert budget - spent < costs.max() or budget > 16 * costs.sum() or all(rank == 16 for rank in ranks)
        order = np.argsort(scores)
        assert all(ranks[a] <= ranks[b] + 1 for a, b in zip(order, order[1:], strict=False))


def test_a_budget_below_the_least_ranks() -> None:
    with pytest.raises(LoraforgeError, match="at least 30"):
        allocate([1.0, 1.0], [10, 5], 20, [2, 2], [4, 4])
    assert allocate([1.0, 1.0], [10, 5], 10_000, [2, 2], [4, 3]) == [4, 3]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "llama"])
def test_ranks_and_scaling_arrive_in_peft(measured: Make, bases: Callable[[str], Path], family: str) -> None:
    from peft import get_peft_model
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    folder = measured(family, rank=4, alpha=6)
    found = suggest_ranks(folder)
    wanted = {row["module"]: (row["rank"], row["alpha"]) for row in found["modules"]}
    classes = {"bert": (AutoModel, "classification"), "t5": (AutoModelForSeq2SeqLM, "text-to-text")}
    loader, kind = classes.get(family, (AutoModelForCausalLM, "causal"))
    model = loader.from_pretrained(bases(family))
    options = LoraOptions.read(read_patterns(found["out"]))
    config = options.peft_config(kind, [], model)
    # The tiny encoder has no head for PEFT's class of models with one.
    config.task_type = None
    adapted = get_peft_model(model, config).base_model.model
    layers = {name: module for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert {name: module.r["default"] for name, module in layers.items()} == {n: r for n, (r, _) in wanted.items()}
    assert all(module.scaling["default"] == pytest.approx(1.5) for module in layers.values())
    trained = sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    assert trained == found["parameters"] <= found["budget"]
    assert len({rank for rank, _ in wanted.values()}) > 1


def test_the_default_budget_is_the_runs_own_rank(measured: Make) -> None:
    found = suggest_ranks(measured(rank=4, alpha=8))
    # Eight projections of 16 x 16: 32 parameters a rank.
    assert found["budget"] == 4 * 8 * 32 and found["uniform"] == {"r": 4, "parameters": 4 * 8 * 32}
    assert found["scaling"] == 2.0 and "claims nothing without a run" in found["note"]
    # Heads -5 (which counts nothing) and 1 against 2 and 3: one to five.
    scores = [row["score"] for row in found["modules"]]
    assert scores == [1.0] * 4 + [5.0] * 4
    assert ranks_anew(measured(rank=4), mean_rank=2.5)["budget"] == 20 * 32
    nested = ranks_anew(measured(rank=4, lora={"alpha": 12, "rslora": False}), budget=90, r_min=0)
    assert nested["scaling"] == 3.0 and nested["uniform"] == {"r": 0, "parameters": 0} and nested["parameters"] <= 90
    full = ranks_anew(measured(rank=None))
    assert full["uniform"]["r"] == 8 and full["scaling"] == 2.0


def test_scores_of_update_and_fisher_and_energy(measured: Make) -> None:
    folder = measured(rank=4)
    by_update = {(row["layer"], row["parts"]): row["score"] for row in ranks_anew(folder, by="U")["modules"]}
    assert by_update[0, "q"] == 4.0 + 8.0 and by_update[1, "k"] == 2.0 and by_update[0, "o"] == 0.0
    assert {row["score"] for row in ranks_anew(folder, by="F")["modules"]} == {4.0}
    with pytest.raises(LoraforgeError, match="spectra cannot be read"):
        ranks_anew(folder, by="energy")
    names = [attention.q.module for attention in layout(folder).attentions if attention.q]
    (folder / "spectrum.jsonl").write_text(
        "".join(json.dumps({"module": name, "rank90": 1 + 2 * i}) + "\n" for i, name in enumerate(names)),
        encoding="utf-8",
    )
    found = ranks_anew(folder, by="energy")
    assert [(row["module"], row["score"], row["rank"]) for row in found["modules"]] == [
        (names[0], 1.0, 2), (names[1], 3.0, 6),
    ]  # fmt: skip


def test_a_fused_projection_counts_its_heads_once_and_its_parts_updates_all(measured: Make) -> None:
    folder = measured("gpt2", rank=4)
    by_importance = {row["parts"]: row["score"] for row in ranks_anew(folder)["modules"] if row["layer"] == 1}
    assert by_importance == {"qkv": 5.0, "o": 5.0}
    by_update = {row["parts"]: row["score"] for row in ranks_anew(folder, by="U")["modules"] if row["layer"] == 0}
    assert by_update == {"qkv": 12.0 + 2.0 + 4.0, "o": 0.0}


def test_rank_stabilisation_keeps_its_own_scaling(measured: Make) -> None:
    folder = measured(rank=4)
    (folder / "ckpt_final").mkdir()
    config = {"r": 4, "lora_alpha": 8, "use_rslora": True}
    (folder / "ckpt_final" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    found = suggest_ranks(folder)
    assert found["scaling"] == 4.0 and found["rslora"] is True
    assert all(row["alpha"] / row["rank"] ** 0.5 == pytest.approx(4.0) for row in found["modules"])


def test_a_least_rank_of_zero_leaves_projections_out(measured: Make) -> None:
    found = suggest_ranks(measured(rank=4), by="U", r_min=0, parts="qo")
    ranks = {(row["layer"], row["parts"]): row["rank"] for row in found["modules"]}
    assert ranks[0, "o"] == ranks[1, "o"] == 0
    assert found["patterns"]["targets"] == ["layer.0.attention.self.query", "layer.1.attention.self.query"]
    assert list(found["patterns"]["rank_pattern"]) == [
        r"layer\.0\.attention\.self\.query",
        r"layer\.1\.attention\.self\.query",
    ]


def test_targets_by_score_per_parameter(measured: Make) -> None:
    folder = measured(rank=4, alpha=8)
    found = suggest_targets(folder, by="U")
    assert found["budget"] == 4 * 8 * 32 // 2 and found["parameters"] == 4 * 4 * 32
    chosen = [(row["layer"], row["parts"]) for row in found["modules"] if row["chosen"]]
    # q of both layers (12, 28), v of both (4, 4); k (2, 2) does not fit any more and o scored nothing.
    assert chosen == [(0, "q"), (0, "v"), (1, "q"), (1, "v")]
    assert found["score_share"] == pytest.approx(48 / 52) and found["uniform"] == {"r": 2, "parameters": 2 * 8 * 32}
    patterns = read_patterns(found["out"])
    assert patterns["r"] == 4 and patterns["alpha"] == 8 and len(patterns["targets"]) == 4
    assert targets_anew(folder, by="U", r=2)["patterns"]["alpha"] == 4  # the scaling stays
    with pytest.raises(LoraforgeError, match="pays no projection"):
        targets_anew(folder, budget=10)


def test_cheaper_projections_come_first_at_equal_scores(measured: Make) -> None:
    # Key and value projections of grouped heads are smaller.
    found = suggest_targets(measured("llama", rank=4), budget=4 * (16 + 8) * 2)
    assert {row["parts"] for row in found["modules"] if row["chosen"]} == {"k", "v"}


def test_ends_of_names_are_unique() -> None:
    names = ["encoder.block.0.q", "decoder.block.0.q", "decoder.block.1.q", "decoder.block.11.q"]
    found = unique_suffixes(names)
    assert found["encoder.block.0.q"] == "encoder.block.0.q" and found["decoder.block.1.q"] == "block.1.q"
    assert all([other for other in names if ends_with(other, found[name])] == [name] for name in names)
    assert unique_suffixes(["q"], ["a.q"]) == {"q": "q"}


def test_shapes_come_from_a_model_that_is_named(measured: Make, bases: Callable[[str], Path]) -> None:
    folder = measured(rank=4)
    config = json.loads((folder / "run_config.json").read_text(encoding="utf-8"))
    (folder / "run_config.json").write_text(json.dumps(config | {"base": "/nowhere/model"}), encoding="utf-8")
    with pytest.raises(LoraforgeError, match="--base MODEL"):
        suggest_ranks(folder)
    assert suggest_ranks(folder, base=bases("bert"))["uniform"]["r"] == 4
    with pytest.raises(LoraforgeError, match="no such model"):
        suggest_ranks(folder, base="/nowhere/model")


def test_what_cannot_be_suggested(measured: Make) -> None:
    folder = measured(rank=4)
    for arguments, words in (
        ({"by": "luck"}, "unknown score"),
        ({"parts": "qx"}, "unknown part"),
        ({"budget": 9000, "mean_rank": 2}, "same thing"),
        ({"r_min": 9, "r_max": 4}, "r_min <= r_max"),
    ):
        with pytest.raises(UsageError, match=words):
            suggest_ranks(folder, **arguments)
    with pytest.raises(UsageError, match="(?s)larger than a side of a projection.*9999.*at most 16"):
        suggest_targets(folder, r=9999)
    with pytest.raises(LoraforgeError, match="does not pay the least rank"):
        suggest_ranks(folder, budget=100)
    (folder / "gradfisher_pre.jsonl").unlink()
    with pytest.raises(LoraforgeError, match="no head has a value of F"):
        suggest_ranks(folder, by="F")
    (folder / "layout.json").unlink()
    with pytest.raises(LoraforgeError, match="layout of the heads"):
        suggest_ranks(folder)


@pytest.mark.parametrize("suggest", [suggest_ranks, suggest_targets], ids=["ranks", "targets"])
def test_an_earlier_suggestion_is_not_replaced_unasked(suggest: Any, measured: Make, tmp_path: Path) -> None:
    run = measured()
    (tmp_path / "out.json").write_text("{}")
    with pytest.raises(LoraforgeError, match="the output exists"):
        suggest(run, out=tmp_path / "out.json")
    assert (tmp_path / "out.json").read_text() == "{}"
    suggest(run, out=tmp_path / "out.json", overwrite=True)
    assert "targets" in json.loads((tmp_path / "out.json").read_text())
