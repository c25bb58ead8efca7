"""Merges of the six-task adapters: made by the library, written as adapter folders, scored with the tasks' own heads.

A finished case is a folder WORK/merged/seed<S>/<key> and a file WORK/scores/seed<S>/<key>.json with the correctness of
every test row; both are made by a rename, so what exists is complete.
"""

from __future__ import annotations

import functools
import json
import os
import time
from pathlib import Path
from typing import Any

from tasks_data import MAX_TOKENS, TASKS, base_folder, task_file, write_calibration
from tasks_train import adapter_folder, read_yaml
from tasks_variants import SAMPLES, Variant, code_fingerprint, hash_files

BATCH_TOKENS = 2048
Score = dict[str, Any]


def fingerprint(work: Path, seed: int) -> str:
    """Short hash of the seed's adapters and the test rows: results of other ones are never reused."""
    files = [adapter_folder(work, seed, name) / "adapter_model.safetensors" for name in TASKS]
    return hash_files(files + [work / "data" / name / "test.jsonl" for name in TASKS])


def run_case(work: Path, variant: Variant, seed: int, keep: bool) -> Score:
    """One cached case: from the work folder if it is of these adapters and this code, else computed."""
    file = work / "scores" / f"seed{seed}" / f"{variant.key}.json"
    mark = {"adapters": fingerprint(work, seed), "code": code_fingerprint()}
    if file.is_file():
        found: Score = json.loads(file.read_text(encoding="utf-8"))
        if found["adapters"] == mark["adapters"] and (keep or found["code"] == mark["code"]):
            return found
    folder = work / "merged" / f"seed{seed}" / variant.key
    seconds = merge(work, variant, seed, folder)
    started = time.perf_counter()
    rows = score(work, seed, folder, variant.tasks)
    seconds["eval"] = time.perf_counter() - started
    result = {"name": variant.name, "seed": seed, "settings": variant.settings(), **mark, "seconds": seconds}
    write_json(file, result | {"folder": str(folder.relative_to(work)), "correct": rows})
    return read_json(file)


def merge(work: Path, variant: Variant, seed: int, folder: Path) -> dict[str, float]:
    """Merges to a folder; seconds by the clock of the wall and of the processor."""
    import loraforge as lf

    extra: dict[str, Any] = {}
    if variant.calibrated:
        files = {name: str(write_calibration(work, name, SAMPLES, seed)) for name in variant.tasks}
        extra = {"base": base_folder(), "calibration": files, "samples": SAMPLES, "max_length": MAX_TOKENS}
    elif variant.with_stats:
        extra["stats"] = {name: str(statistics(work, name, seed)) for name in variant.tasks}
    if variant.weight is not None:
        extra["weights"] = [variant.weight] * len(variant.tasks)
    paths = [str(adapter_folder(work, seed, name)) for name in variant.tasks]
    load_library(paths[0])
    started, cpu = time.perf_counter(), time.process_time()
    result = lf.merge(
        paths, method=variant.method, seed=seed, params=dict(variant.params), device="cpu", out=folder, overwrite=True,
        **extra,
    )  # fmt: skip
    spent = {"call": time.perf_counter() - started, "processor": time.process_time() - cpu}
    return {"merge": float(result.report.get("seconds", spent["call"])), **spent}


@functools.cache
def load_library(path: str) -> None:
    """A merge that nobody times: what the library loads at its first call is not the first method's time."""
    import loraforge as lf

    lf.merge([path], method="weighted-average", device="cpu")


def statistics(work: Path, name: str, seed: int) -> Path:
    """Input statistics of the base on a task's calibration texts."""
    import loraforge as lf

    path = work / "stats" / f"seed{seed}" / f"{name}-{SAMPLES}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        data = str(write_calibration(work, name, SAMPLES, seed))
        adapter = adapter_folder(work, seed, name)
        lf.collect_stats(base_folder(), data, path, adapter=adapter, max_length=MAX_TOKENS, device="cpu")
    return path


def own_scores(work: Path, seed: int) -> Score:
    """Each task under its own adapter, and under the base alone with the same head."""
    file = work / "scores" / f"seed{seed}" / "own.json"
    mark = fingerprint(work, seed)
    if file.is_file():
        found = read_json(file)
        if found["adapters"] == mark:
            return found
    own = {t: score(work, seed, adapter_folder(work, seed, t), (t,))[t] for t in TASKS}
    write_json(file, {"adapters": mark, "own": own, "base": score(work, seed, None, TASKS)})
    return read_json(file)


def score(work: Path, seed: int, folder: Path | None, tasks: tuple[str, ...]) -> dict[str, str]:
    """Correctness of every test row, "1" or "0", of each task under an adapter (or none) with the task's own head."""
    from peft import PeftModel

    from loraforge.evaluation.score import score_task

    model = base_model()
    model.classifier = head_of(work, seed, tasks[0])  # of the size that an adapter with a head of its own expects
    adapted = model
    if folder is not None:
        adapted = PeftModel.from_pretrained(model, str(folder))
    found = {}
    try:
        for name in tasks:
            model.classifier = head_of(work, seed, name)
            outcome = score_task(adapted, test_rows(work, name), batch_tokens=BATCH_TOKENS)
            found[name] = "".join("1" if value else "0" for value in outcome.outcomes)
    finally:
        if folder is not None:
            adapted.unload()
    return found


def head_of(work: Path, seed: int, name: str) -> Any:
    """The linear layer that was trained with a task's adapter."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(adapter_folder(work, seed, name) / "adapter_model.safetensors")
    head = {key.rsplit(".", 1)[-1]: tensor for key, tensor in tensors.items() if ".classifier." in key}
    layer = torch.nn.Linear(head["weight"].shape[1], head["weight"].shape[0])
    layer.load_state_dict(head)
    return layer


@functools.cache
def base_model() -> Any:
    """The base with a head that is exchanged, once a process."""
    from loraforge.tasks import load_model

    model, _, _ = load_model(base_folder(), "classification", head_labels=("a", "b"))
    return model.eval().requires_grad_(False)


@functools.cache
def test_rows(work: Path, name: str) -> Any:
    """Test rows of a task, as the library reads them."""
    from transformers import AutoTokenizer

    from loraforge.tasks import load_task, parse_task

    file = task_file(work, name)
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    return load_task(parse_task(read_yaml(file), file, file.parent), "test", tokenizer=tokenizer)


def write_json(file: Path, content: Any) -> None:
    """Writes by a rename, so that a file that exists is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{os.getpid()}-{file.name}")
    partial.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    partial.rename(file)


def read_json(file: Path) -> Any:
    """What write_json wrote."""
    return json.loads(file.read_text(encoding="utf-8"))
