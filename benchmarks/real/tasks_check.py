"""The numbers of the table from the saved adapters, by the command line: `loraforge eval` must give the same."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from tasks_data import REPOSITORY, TASKS, base_folder, task_file
from tasks_merge import read_json
from tasks_scores import accuracies
from tasks_train import adapter_folder
from tasks_variants import REFERENCE, six_variants


def command(work: Path, seed: int, folders: list[Path]) -> list[str]:
    """Arguments of `loraforge eval` for some merges of all tasks, each task read by the head of its own adapter."""
    words = ["eval", "--base", base_folder()]
    for folder in folders:
        words += ["--adapter", str(folder)]
    for name in TASKS:
        words += ["--task", str(task_file(work, name)), "--heads", f"{name}={adapter_folder(work, seed, name)}"]
    return [*words, "--json"]


def check_row(work: Path, seed: int) -> dict[str, Any]:
    """Evaluates the best merge of a seed and the reference by the command line, and compares with the stored scores.

    Raises:
        RuntimeError: An accuracy of the command differs from the table's.
    """
    scores = [read_json(f) for v in six_variants() if (f := work / f"scores/seed{seed}/{v.key}.json").is_file()]
    means = {score["name"]: sum(accuracies(score["correct"]).values()) for score in scores}
    names = [REFERENCE, max(means, key=lambda name: means[name])]
    chosen = {score["name"]: score for score in scores if score["name"] in names}
    words = command(work, seed, [work / score["folder"] for score in chosen.values()])
    done = subprocess.run(
        [sys.executable, "-m", "loraforge", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"loraforge {shlex.join(words)} ended with {done.returncode}: {done.stderr}")
    rows = json.loads(done.stdout)["rows"]
    compared = 0
    for name, score in chosen.items():
        row = next(row for row in rows if Path(row["path"] or "").name == Path(score["folder"]).name)
        for task, stored in accuracies(score["correct"]).items():
            found = row["cells"][task]["value"]
            if abs(found - stored) > 1e-6:
                raise RuntimeError(f"loraforge eval gives {found:.6f} for {name} on {task}, the table has {stored:.6f}")
            compared += 1
    print(
        f"loraforge eval gives the table's accuracies: {compared} of {compared} equal ({', '.join(chosen)})", flush=True
    )
    return {"seed": seed, "merges": list(chosen), "accuracies": compared, "equal": True}
