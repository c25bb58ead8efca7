"""Three of the tasks one after the other: I-LORA beside plain sequential training, replay, and joint training.

A finished run is a folder WORK/sequence/<run>/seed<S> as `loraforge train-ilora` leaves it, with `summary.json` in it;
an unfinished one is resumed by the library. The command line of one of them:

    loraforge train-ilora WORK/sequence/ilora-0.25.yaml --method ilora --out WORK/sequence/ilora-0.25/seed0 --seed 0
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks_data import base_folder, load_task, prepare
from tasks_merge import read_json, write_json

SEQUENCE = ("emotion-cause", "subj", "sst2")
STEPS, BATCH, LEARNING_RATE, TOKENS = 100, 8, 2e-3, 32
BUFFER = 500
# Name of a run -> (method of the library, settings of I-LORA that differ from its defaults).
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "seq": ("seq", {}),
    "er": ("er", {}),
    "ilora-0.25": ("ilora", {"ema_alpha": 0.25}),
    "ilora-0.02": ("ilora", {"ema_alpha": 0.02}),
    "joint": ("joint", {}),
}


def sequence_file(work: Path, run: str) -> Path:
    """The sequence as `loraforge train-ilora` reads it."""
    return work / "sequence" / f"{run}.yaml"


def summary_file(work: Path, run: str, seed: int) -> Path:
    """Scores of a finished run."""
    return work / "sequence" / run / f"seed{seed}" / "summary.json"


def settings_of(run: str) -> dict[str, Any]:
    """What was set for a run."""
    method, settings = RUNS[run]
    return {"method": method, **settings}


def write_sequence(work: Path, run: str, settings: Mapping[str, Any]) -> Path:
    """Writes the sequence of a run; relative paths count from its folder."""
    tasks = []
    for name in SEQUENCE:
        rows = {split: f"../data/{name}/{split}.jsonl" for split in ("train", "test")}
        tasks.append({"id": name, **rows, "text": "text", "label": "label", "max_length": TOKENS})
        tasks[-1] |= {"kind": "classification", "labels": list(load_task(name).classes)}
        if RUNS[run][0] == "joint":
            tasks[-1]["rows"] = STEPS * BATCH  # as many of each task as a sequence sees; else the largest task rules
    content = {
        "base_model": base_folder(),
        "output_dir": run,
        "lora": {"r": 8, "alpha": 16, "targets": ["query", "key", "value", "attention.output.dense"]},
        "ilora": {"ilora_buffer_size": BUFFER, **settings},
        "train": {
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "linear",
        },
        "tasks": tasks,
    }
    path = sequence_file(work, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")  # JSON is YAML
    return path


def run_sequence(work: Path, run: str, seed: int) -> dict[str, Any]:
    """One run, or what an earlier one left: `{method, settings, seconds, matrix, metrics: {adapter: {acc, ...}}}`."""
    from loraforge.training.sequence.run import train_ilora

    file = summary_file(work, run, seed)
    out = file.parent
    if file.is_file():
        return read_json(file)
    prepare(work)
    method, settings = RUNS[run]
    path = write_sequence(work, run, settings)
    started, cpu = time.perf_counter(), time.process_time()
    found = train_ilora(path, method=method, out=out, seed=seed, device="cpu")
    spent = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - cpu}
    kept = {key: found[key] for key in ("tasks", "matrix", "metrics")}
    write_json(file, {"method": method, "settings": settings, "seed": seed, **spent, **kept})
    return read_json(file)
