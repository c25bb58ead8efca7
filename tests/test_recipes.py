from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from loraforge.errors import InputProblems, LoraforgeError, UsageError
from loraforge.merging.iteris_params import IterisParams
from loraforge.recipe_keys import PARAMS
from loraforge.recipes import load_recipe, merge_arguments, merge_recipe, preset_names

# The published configuration, value by value.
PUBLISHED = {
    "GLUE_t5": {
        "base": "google/flan-t5-base", "tasks": ["mnli", "cola"], "max_iter": 10, "samples_num": 50, "max_length": 256,
        "alpha": 1e-7, "rank": 8, "if_balance": True, "if_divide": False, "inner_num": 4, "outer_num": 5, "eval": 16,
    },
    "EMOTION_t5_large": {
        "base": "google/flan-t5-large", "tasks": ["emoint", "emotion-cause", "tec", "isear"], "max_iter": 24,
        "samples_num": 60, "max_length": 100, "alpha": 8e-5, "rank": 8, "if_balance": True, "if_divide": True,
        "inner_num": 6, "outer_num": 10, "eval": 8,
    },
    "TASKS_blip_base": {
        "base": "Salesforce/blip-image-captioning-base", "tasks": ["positive", "negative"], "max_iter": 6,
        "samples_num": 50, "max_length": 168, "alpha": 8e-7, "rank": 32, "if_balance": False, "if_divide": False,
        "inner_num": 2, "outer_num": 4, "eval": 24,
    },
    "GLUE_bart": {
        "base": "facebook/bart-base", "tasks": ["qqp", "mrpc"], "max_iter": 10, "samples_num": 50, "max_length": 256,
        "alpha": 1e-4, "rank": 8, "if_balance": True, "if_divide": False, "inner_num": 2, "outer_num": 5, "eval": 32,
    },
}  # fmt: skip

DOCUMENT_FILE = """
seed: 42
GLUE_t5:
  max_iter: 10
  per_device_eval_batch_size: 16
  task_targets: ['mnli', 'cola']
  with_pretrain_matrix: 0
  model_name: "google/flan-t5-base"
  max_length: 256
  lora_alpha: [32, 32]
  manual_ceof: [1, 0.5]
  alpha_1: 0.0000001
  alpha_2: 1e-7
  reg_ceof: 0.0
  rank: 8
  select_long: 40
  samples_num: 50
  if_divide: False
  if_balance: True
  shuffle: True
  inner_num: 4
  outer_num: 5
  save: 0
  use_mats: True
  mats_history_size: 3
  mats_regularization: 1e-5
  use_camr: 0
  camr_alpha: 0.0000001
  camr_beta: 1e-6
  use_dcs: True
  dcs_sigma: 0.5
  convergence_threshold: 1e-5
  use_fp16: True
TASKS_blip_base:
  task_targets: ['positive', 'negative']
  model_name: "Salesforce/blip-image-captioning-base"
  manual_ceof: [1, 1]
  max_new_tokens: 42
  save: 1
"""


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "iteris-plus-config.yaml"
    path.write_text(DOCUMENT_FILE, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_values(name: str) -> None:
    recipe, wanted = load_recipe(name), PUBLISHED[name]
    params = recipe["params"]
    count = len(wanted["tasks"])
    assert recipe["method"] == "iteris-plus" and recipe["seed"] == 42
    assert recipe["base"] == wanted["base"] and recipe["tasks"] == wanted["tasks"]
    assert recipe["weights"] == [1] * count and recipe["adapter_alpha"] == [32] * count
    assert recipe["adapter_rank"] == wanted["rank"] and recipe["eval_batch_size"] == wanted["eval"]
    assert params["alpha_1"] == params["alpha_2"] == params["camr_alpha"] == wanted["alpha"]
    assert params["reg_ceof"] == 0 and params["with_pretrain_matrix"] == 0
    assert params["select_long"] is True and params["shuffle"] is True
    for key in ("max_iter", "samples_num", "max_length", "if_balance", "if_divide", "inner_num", "outer_num"):
        assert params[key] == wanted[key], key
    assert params["use_mats"] and params["use_camr"] and params["use_dcs"]
    numbers = [params[k] for k in ("mats_history_size", "mats_regularization", "camr_beta", "dcs_sigma")]
    assert [*numbers, params["convergence_threshold"]] == [5, 1e-6, 1e-8, 1.0, 1e-6]
    assert ("max_new_tokens" in params) == (name == "TASKS_blip_base")


@pytest.mark.parametrize("name", [*PUBLISHED, "document"])
def test_preset_parameters_are_the_methods(name: str) -> None:
    params = load_recipe(name)["params"]
    made = IterisParams(**params)
    assert made.max_iter == params["max_iter"]


def test_presets_of_the_other_documents() -> None:
    """Qwen3 with the energy rule of the randomized SVD; eight image tasks with the settings of Iso-IASAD."""
    qwen = load_recipe("PIQA_SIQA_qwen3")
    assert qwen["base"] == "Qwen/Qwen3-0.6B" and qwen["method"] == "rsvd" and qwen["tasks"] == ["piqa", "siqa"]
    assert (qwen["energy"], qwen["min_rank"], qwen["max_rank"]) == (0.99, 4, 32)
    assert (qwen["adapter_rank"], qwen["adapter_alpha"]) == (32, [16, 16])
    lora, train = qwen["pipeline"]["lora"], qwen["pipeline"]["train"]
    assert lora == {"r": 32, "alpha": 16, "dropout": 0.05, "targets": ["q_proj", "v_proj"]}
    assert train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] == 16
    assert (train["learning_rate"], train["num_train_epochs"], train["bf16"]) == (5e-5, 2, True)
    assert [task["loss_on"] for task in qwen["pipeline"]["tasks"]] == ["all", "all"]
    assert qwen["pipeline"]["eval"] == {"choice_mode": "document"}
    vit = load_recipe("VIT_B_16_8")
    assert len(vit["tasks"]) == len(vit["pipeline"]["tasks"]) == 8 and vit["method"] == "iso-c"
    methods = {merge["method"]: merge.get("params") for merge in vit["pipeline"]["merges"]}
    assert methods["iso-iasad"] == {"iters": 10, "sparsity": 0.1, "rank_ratio": 0.75, "prune_level": "row"}
    assert methods["iso-cts"] == {"common_fraction": 0.8}


def test_a_pipeline_is_no_argument_of_a_merge() -> None:
    recipe = load_recipe("VIT_B_16_8")
    assert "pipeline" in recipe and set(merge_arguments(recipe)) == {"method", "base", "seed"}
    own = merge_recipe(recipe, {"adapters": ["a", "b"], "rank": 3})
    assert own["adapters"] == ["a", "b"] and "tasks" not in own and own["pipeline"] == recipe["pipeline"]


def test_document_preset_is_literal() -> None:
    params = load_recipe("document")["params"]
    assert params["init"] == "adapters" and params["mats_reg_mode"] == "absolute" and params["dcs_min_ess"] == 0
    assert (params["camr_normalize"], params["camr_scale"], params["lambda_weight"]) == ("sum", "abs", "full")
    assert params["max_iter"] == 10 and params["alpha_1"] == params["alpha_2"] == 1e-7 and params["reg_ceof"] == 0


def test_every_parameter_of_the_method_may_stand_in_a_recipe() -> None:
    names = {f.name for f in dataclasses.fields(IterisParams)} - {"manual_ceof", "seed"}
    assert names <= PARAMS.keys()


def test_unknown_preset_names_the_closest() -> None:
    with pytest.raises(UsageError, match="did you mean 'GLUE_t5'"):
        load_recipe("GLUE_t6")
    assert set(PUBLISHED) < set(preset_names())


def test_document_file_is_read_by_section(document: Path) -> None:
    recipe = load_recipe(document, "GLUE_t5")
    assert recipe["method"] == "iteris-plus" and recipe["seed"] == 42
    assert recipe["weights"] == [1, 0.5] and recipe["base"] == "google/flan-t5-base"
    assert "rank" not in recipe and recipe["adapter_rank"] == 8  # there, rank is the adapters' own
    params = recipe["params"]
    assert params["alpha_2"] == 1e-7 and params["convergence_threshold"] == 1e-5  # text for PyYAML
    assert params["use_camr"] is False and params["select_long"] is True
    assert len(recipe["notes"]) == 1 and "use_fp16" in recipe["notes"][0]
    assert IterisParams(**params).mats_history_size == 3


def test_document_file_section_by_fragment_and_save(document: Path) -> None:
    recipe = load_recipe(f"{document}#TASKS_blip_base")
    assert recipe["method"] == "iteris" and recipe["output_kind"] == "model"
    assert recipe["params"] == {"max_new_tokens": 42}


def test_document_file_needs_a_known_section(document: Path) -> None:
    with pytest.raises(UsageError, match="several sections"):
        load_recipe(document)
    with pytest.raises(UsageError, match="did you mean 'GLUE_t5'"):
        load_recipe(document, "GLUE_t55")


def test_document_keys_are_checked(document: Path) -> None:
    document.write_text(DOCUMENT_FILE.replace("manual_ceof: [1, 0.5]", "manual_ceof: [1]"), encoding="utf-8")
    with pytest.raises(LoraforgeError, match="manual_ceof.*wrong number of entries"):
        load_recipe(document, "GLUE_t5")
    document.write_text(DOCUMENT_FILE.replace("manual_ceof", "manual_coef"), encoding="utf-8")
    with pytest.raises(UsageError, match="did you mean 'manual_ceof'"):
        load_recipe(document, "GLUE_t5")


def test_own_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "method: ties\nadapters: [a, b]\nrank: 4\nalpha_1: 1e-5\nparams: {density: 2e-1, mode: x, n: [1e2]}\n"
    )
    recipe = load_recipe(path)
    assert recipe["rank"] == 4 and recipe["name"] == "mine"
    assert recipe["params"] == {"alpha_1": 1e-5, "density": 0.2, "mode": "x", "n": [100.0]}


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("metod: ties\n", UsageError, "did you mean 'method'"),
        ("method: [a\n", LoraforgeError, "not valid YAML"),
        ("- a\n", LoraforgeError, "mapping of keys"),
        ("", LoraforgeError, "mapping of keys"),
        ("rank: many\n", LoraforgeError, "'rank' has a wrong value"),
        ("rank: 1.5\n", LoraforgeError, "a whole number"),
        ("weights: [1, .nan]\n", LoraforgeError, "a finite number"),
        ("adapters: [a, b]\nweights: [1]\n", LoraforgeError, "1 for 2 adapters"),
        ("adapters: [a, b]\ncalibration: {a: f}\n", LoraforgeError, "1 for 2 adapters"),
        ("calibration: {a: {template: x}}\n", LoraforgeError, "source"),
        ("use_mats: maybe\n", LoraforgeError, "true or false"),
        ("method: !!python/object/apply:os.getcwd []\n", LoraforgeError, "not valid YAML"),
    ],
)
def test_bad_recipes_are_refused(tmp_path: Path, text: str, kind: type[LoraforgeError], message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(kind) as caught:
        load_recipe(path)
    assert message in str(caught.value) and "bad.yaml" in str(caught.value)


def test_all_problems_at_once_and_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("metod: x\nrank: many\n", encoding="utf-8")
    with pytest.raises(InputProblems, match="(?s)metod.*rank"):
        load_recipe(path)
    path.write_bytes(b"method: \xff\xfe\n")
    with pytest.raises(LoraforgeError, match="not UTF-8"):
        load_recipe(path)
    with pytest.raises(LoraforgeError, match="cannot be read"):
        load_recipe(tmp_path / "absent.yaml")


def test_options_override_the_recipe() -> None:
    recipe = load_recipe("GLUE_t5")
    merged = merge_recipe(recipe, {"base": "mine", "rank": None, "samples": 20, "params": {"use_dcs": False}})
    assert merged["base"] == "mine" and "rank" not in merged
    assert merged["params"]["use_dcs"] is False and merged["params"]["use_mats"] is True
    assert merged["samples"] == merged["params"]["samples_num"] == 20
    assert (
        recipe["base"] == "google/flan-t5-base" and recipe["params"]["samples_num"] == 50
    )  # the recipe is not changed


def test_own_adapters_replace_the_presets() -> None:
    recipe = load_recipe("GLUE_t5")
    two = merge_recipe(recipe, {"adapters": ["a", "b"]})
    assert list(two["calibration"]) == ["mnli", "cola"] and "adapter_rank" not in two
    three = merge_recipe(recipe, {"adapters": ["a", "b", "c"]})
    assert three["weights"] == [1, 1, 1] and "tasks" not in three and "calibration" not in three
    with pytest.raises(LoraforgeError, match="2 for 3 adapters"):
        merge_recipe({**recipe, "weights": [1, 2]}, {"adapters": ["a", "b", "c"]})
    with pytest.raises(UsageError, match="did you mean 'samples'"):
        merge_recipe(recipe, {"sample": 3})


def test_merge_arguments_leaves_what_merge_takes() -> None:
    arguments = merge_arguments(load_recipe("GLUE_t5"))
    assert set(arguments) == {"method", "base", "adapters", "weights", "seed", "calibration", "params"}


def test_recipes_do_not_load_torch() -> None:
    code = "import sys, loraforge.recipes as r; r.load_recipe('document'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
