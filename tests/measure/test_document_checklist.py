"""A comparison in the document's profile: every file of its list, with its columns and keys, read as its scripts read.

They read lines with `json.loads`, tables with `csv.DictReader` and `float`, `ckpt_init` with `from_pretrained` and
`ckpt_final` with `PeftModel.from_pretrained`. Nothing of the code under test is used to read here.
"""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel

from loraforge.pipelines import run_pipeline
from loraforge.report import heads_pictures, training
from tests.pipelines.stand_ins import stand_in

HEADS = 4
RUNS = {"FFT": "FFT/rte/seed1", "LoRA": "LoRA/rte/seed1_r2"}
FIGURES = ["fig_I_vs_U", "fig_I_vs_G", "fig_stats", "fig_Ipre_vs_Ipost", "fig_Ipost_corrs"]
COMPARED = ["compare_I_vs_U", "compare_stats", "compare_update_dist", "compare_headwise"]
LINES = {
    "importance_pre.jsonl": ["layer", "head", "I", "loss_base", "loss_ablate", "n"],
    "gradfisher_pre.jsonl": ["layer", "head", "G", "F", "Ppred", "n_batches"],
    "update.jsonl": ["layer", "head", "U", "Urel", "Uq", "Uk", "Uv", "Uo"],
    "importance_post.jsonl": ["layer", "head", "I", "loss_base", "loss_ablate", "n"],
}
COLUMNS = "layer,head,I_pre,I_post,U,Urel,G,F,Ppred,Uq,Uk,Uv,Uo"
STATS = {
    "spearman_rho_Ipre_U", "spearman_rho_Ipre_Urel", "topk_overlap_Ipre_U", "topk_overlap_Ipre_Urel", "topk", "n_heads",
    "n_heads_Ipost", "topk_overlap_Ipre_Ipost", "n_important_but_static", "n_plastic_but_unimportant",
    *(f"spearman_rho_Ipost_{name}" for name in ("U", "Urel", "G", "F", "Ppred")),
}  # fmt: skip
CASE = {"layer", "head", "I_pre", "Urel", "U", "G", "Ppred"}
METRICS = {"spearman_rho_Ipre_U", "spearman_rho_Ipre_Urel", "topk_overlap_Ipre_U", "n_important_but_static",
           "n_plastic_but_unimportant"}  # fmt: skip
# Beside the document's files: how each was made, and the report.
OURS = {"report.html", "eval_subset.meta.json", *(f"{name.removesuffix('.jsonl')}.meta.json" for name in LINES)}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preset on its stand-in: one task and seed, both methods."""
    folder = tmp_path_factory.mktemp("document")
    data, settings = stand_in("FFT_VS_LORA", folder, hidden=16, layers=2)
    settings |= {"measure.profile": "document", "seeds": [1], "measure.subset": 5}
    with pytest.MonkeyPatch.context() as patch:
        # The pages are tested elsewhere; their pictures would be drawn a second time for them.
        for module in (heads_pictures, training):
            patch.setattr(module, "svg", lambda draw, label: "")
        runs = [f"rte-seed1-{method}" for method in RUNS]
        stages = [*(f"train:{run}" for run in runs), *(f"measure:{run}" for run in runs), "compare:rte-seed1"]
        for stage in stages:
            run_pipeline("FFT_VS_LORA", out=folder / "out", data=data, settings=settings, only=stage)
    return folder / "out"


@pytest.mark.parametrize("method", RUNS)
def test_a_run_holds_the_documents_files_and_no_other(out: Path, method: str) -> None:
    folder = out / RUNS[method]
    wanted = {"ckpt_init", "ckpt_final", "run_config.json", "eval_subset.json", *LINES, "heads.csv", "stats.json",
              "cases.json", *(f"{name}.png" for name in FIGURES)}  # fmt: skip
    assert {path.name for path in folder.iterdir()} == wanted | OURS
    for name in FIGURES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", RUNS)
def test_the_lines_have_the_documents_keys(out: Path, method: str) -> None:
    for name, keys in LINES.items():
        lines = [json.loads(line) for line in (out / RUNS[method] / name).read_text().splitlines()]
        assert [list(line) for line in lines] == [keys] * HEADS
        assert [(line["layer"], line["head"]) for line in lines] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert all(isinstance(value, int | float) and math.isfinite(value) for line in lines for value in line.values())
    fisher = json.loads((out / RUNS[method] / "gradfisher_pre.jsonl").read_text().splitlines()[0])
    # Five rows are one batch of 16, of which G^2 / (F + 1e-6) is nearly 1.
    assert fisher["n_batches"] == 1 and fisher["Ppred"] == pytest.approx(fisher["G"] ** 2 / (fisher["F"] + 1e-6))
    assert fisher["F"] == pytest.approx(fisher["G"] ** 2)


@pytest.mark.parametrize("method", RUNS)
def test_the_table_is_read_with_float(out: Path, method: str) -> None:
    folder = out / RUNS[method]
    with (folder / "heads.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert (folder / "heads.csv").read_text().splitlines()[0] == COLUMNS
    values = [{key: float(value) for key, value in row.items()} for row in rows]
    importance = [json.loads(line) for line in (folder / "importance_pre.jsonl").read_text().splitlines()]
    update = [json.loads(line) for line in (folder / "update.jsonl").read_text().splitlines()]
    assert [row["I_pre"] for row in values] == [line["I"] for line in importance]
    assert [row["Urel"] for row in values] == [line["Urel"] for line in update]


@pytest.mark.parametrize("method", RUNS)
def test_statistics_and_cases_have_the_documents_keys(out: Path, method: str) -> None:
    stats = json.loads((out / RUNS[method] / "stats.json").read_text())
    assert set(stats) == STATS and stats["n_heads"] == stats["n_heads_Ipost"] == HEADS
    cases = json.loads((out / RUNS[method] / "cases.json").read_text())
    assert set(cases) == {"important_but_static", "plastic_but_unimportant", "thresholds"}
    assert set(cases["thresholds"]) == {"I_pre_p90", "I_pre_p30", "Urel_p90", "Urel_p30"}
    for kind in ("important_but_static", "plastic_but_unimportant"):
        assert stats[f"n_{kind}"] == len(cases[kind]) and all(set(case) == CASE for case in cases[kind])


@pytest.mark.parametrize("method", RUNS)
def test_record_and_rows(out: Path, method: str) -> None:
    config = json.loads((out / RUNS[method] / "run_config.json").read_text())
    assert config["method"] == method and config["task"] == "rte" and config["seed"] == 1
    assert config["r"] == (2 if method == "LoRA" else None)
    rows = json.loads((out / RUNS[method] / "eval_subset.json").read_text())
    # random.Random(999) over six rows, of which five were asked for.
    order = list(range(6))
    random.Random(999).shuffle(order)
    assert rows == order[:5]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_checkpoints_load_as_the_documents_scripts_load_them(out: Path) -> None:
    full, lora = (out / folder for folder in RUNS.values())
    models = [tf.AutoModelForSequenceClassification.from_pretrained(run / "ckpt_init") for run in (full, lora)]
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name]), name
    assert tf.AutoTokenizer.from_pretrained(lora / "ckpt_init")("sun").input_ids
    trained = tf.AutoModelForSequenceClassification.from_pretrained(full / "ckpt_final")
    merged = PeftModel.from_pretrained(models[1], lora / "ckpt_final").merge_and_unload()
    for model, run in ((trained, full), (merged, lora)):
        # U as the document takes it: two dense models, subtracted.
        lines = [json.loads(line) for line in (run / "update.jsonl").read_text().splitlines()]
        for line in lines:
            changes = norms(models[0], model, line["layer"], line["head"])
            assert [line[key] for key in ("Uq", "Uk", "Uv", "Uo")] == pytest.approx(changes[0], rel=1e-4)
            total = math.sqrt(sum(value**2 for value in changes[0]))
            assert line["U"] == pytest.approx(total, rel=1e-4)
            assert line["Urel"] == pytest.approx(total / sum(changes[1]), rel=1e-4)


def norms(start: torch.nn.Module, end: torch.nn.Module, layer: int, head: int) -> tuple[list[float], list[float]]:
    """Norms of the changes and of the start: rows of q, k and v, columns of o; 8 rows a head."""
    prefix = f"deberta.encoder.layer.{layer}.attention"
    names = [*(f"self.{part}_proj" for part in ("query", "key", "value")), "output.dense"]
    before, after = start.state_dict(), end.state_dict()
    found: Any = ([], [])
    for name in names:
        key = f"{prefix}.{name}.weight"
        span = slice(8 * head, 8 * head + 8)
        rows = (slice(None), span) if name == "output.dense" else (span,)
        found[0].append(float((after[key].double() - before[key].double())[rows].norm()))
        found[1].append(float(before[key].double()[rows].norm()))
    return found


def test_the_comparison_holds_the_documents_files(out: Path) -> None:
    folder = out / "COMPARE/rte/seed1_r2"
    names = {path.name for path in folder.iterdir()}
    assert {*(f"{name}.png" for name in COMPARED), "compare_metrics.json", "compare_summary.txt"} <= names
    for name in COMPARED:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((folder / "compare_metrics.json").read_text())
    assert set(metrics) == {"FFT", "LoRA-r2"} and all(set(values) == METRICS for values in metrics.values())
    for name, run in zip(metrics, RUNS.values(), strict=True):
        stats = json.loads((out / run / "stats.json").read_text())
        assert metrics[name] == {key: stats[key] for key in METRICS}
    summary = (folder / "compare_summary.txt").read_text(encoding="utf-8")
    assert "FFT" in summary and "LoRA-r2" in summary
