r"""The adapters of the six-task benchmark: one LoRA with its own head a task and seed, by the library's `train_lora`.

WORK/adapters/seed<S>/<task> is a folder as `loraforge train-lora` leaves it. A folder that is there is complete, so it
is skipped; an interrupted one is trained again. The command line of one of them:

    loraforge train-lora --base BASE --task WORK/tasks/sst2.yaml --out WORK/adapters/seed0/sst2 --seed 0 \
        --r 8 --alpha 16 --targets query,key,value,attention.output.dense \
        --max-steps 150 --batch-size 16 --lr 2e-3 --set group_by_length=true
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tasks_data import TASKS, base_folder, prepare, task_file

TARGETS = ["query", "key", "value", "attention.output.dense"]
LORA = {"r": 8, "alpha": 16, "targets": TARGETS}
STEPS, BATCH, LEARNING_RATE = 150, 16, 2e-3
TRAIN = {
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "learning_rate": LEARNING_RATE,
    "group_by_length": True,
}


def adapter_folder(work: Path, seed: int, name: str) -> Path:
    """Folder of one trained adapter."""
    return work / "adapters" / f"seed{seed}" / name


def missing(work: Path, seeds: list[int]) -> list[str]:
    """The adapters that are not trained yet."""
    folders = [adapter_folder(work, seed, name) for seed in seeds for name in TASKS]
    return [str(folder) for folder in folders if not (folder / "adapter_config.json").is_file()]


def train_all(work: Path, seeds: list[int]) -> None:
    """Every missing adapter, seeds outermost."""
    from loraforge.tasks import parse_task
    from loraforge.training.single import train_lora

    prepare(work)
    for seed in seeds:
        for name in TASKS:
            folder = adapter_folder(work, seed, name)
            if (folder / "adapter_config.json").is_file():
                continue
            started, cpu = time.perf_counter(), time.process_time()
            file = task_file(work, name)
            task = parse_task(read_yaml(file), file, file.parent)
            train_lora(base_folder(), task, folder, lora=LORA, train=TRAIN, seed=seed, device="cpu", overwrite=True)
            spent = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - cpu}
            times = work / "times" / f"train-seed{seed}-{name}.json"
            times.parent.mkdir(parents=True, exist_ok=True)
            times.write_text(json.dumps(spent) + "\n", encoding="utf-8")
            print(f"seed {seed} {name}: trained in {spent['seconds']:.0f} s", flush=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    import yaml

    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found
