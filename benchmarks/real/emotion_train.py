"""Trains the adapters of the emotion benchmark: one LoRA and one head a task and seed.

`python benchmarks/real/emotion_train.py --work DIR` writes DIR/adapters/seed<S>/<task> (a PEFT folder) and
DIR/heads/seed<S>/<task>.safetensors. What is there already is skipped, so the run can be stopped and started again.
Recipe: r 8, alpha 16 on query, key, value and attention.output.dense, linear head on the mean of the tokens,
150 steps of 32 rows, AdamW with a constant learning rate of 2e-3.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from emotion_data import BASE_NAME, DEFAULT_WORK, TASKS, Task, base_folder, encode, keyed_random, load_task, pad
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel

TARGETS = ["query", "key", "value", "attention.output.dense"]
RANK, ALPHA, STEPS, BATCH, POOL, LEARNING_RATE = 8, 16, 150, 32, 15, 2e-3


def adapter_folder(work: Path, seed: int, task: str) -> Path:
    """PEFT folder of one trained adapter."""
    return work / "adapters" / f"seed{seed}" / task


def head_file(work: Path, seed: int, task: str) -> Path:
    """Classifier head of one trained adapter; kept outside the adapter, since heads are never merged here."""
    return work / "heads" / f"seed{seed}" / f"{task}.safetensors"


def mean_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """(b, d) mean of the real tokens of (b, L, d)."""
    weight = mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def draw_batches(lengths: list[int], seed_key: tuple[object, ...]) -> list[list[int]]:
    """STEPS batches of row numbers: every row once before any comes again.

    Rows are shuffled, then sorted by length inside pools of POOL batches whose order is shuffled again: half the
    padding of plain shuffling, and still another order for every seed.
    """
    generator = keyed_random("batches", *seed_key)
    batches: list[list[int]] = []
    order: list[int] = []
    while len(batches) < STEPS:
        while len(order) < POOL * BATCH:
            epoch = list(range(len(lengths)))
            generator.shuffle(epoch)
            order += epoch
        pool, order = sorted(order[: POOL * BATCH], key=lambda i: lengths[i]), order[POOL * BATCH :]
        grouped = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        generator.shuffle(grouped)
        batches += grouped
    return batches[:STEPS]


def train_one(task: Task, seed: int) -> tuple[torch.nn.Module, torch.nn.Linear]:
    """One adapter and its head. Initialisation, dropout and batches depend on (task, seed)."""
    torch.manual_seed(keyed_random("init", task.name, seed).getrandbits(31))
    config = LoraConfig(
        task_type="FEATURE_EXTRACTION", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS
    )
    model = get_peft_model(AutoModel.from_pretrained(base_folder()), config)
    head = torch.nn.Linear(model.config.hidden_size, len(task.classes))
    trained = [p for p in model.parameters() if p.requires_grad] + list(head.parameters())
    optimiser = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    tokens, labels = encode(task.train.texts), torch.tensor(task.train.labels)
    model.train()
    running, started = 0.0, time.perf_counter()
    for step, rows in enumerate(draw_batches([len(row) for row in tokens], (task.name, seed)), 1):
        ids, mask = pad([tokens[i] for i in rows])
        logits = head(mean_tokens(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask))
        loss = torch.nn.functional.cross_entropy(logits, labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        running += loss.item()
        if step % 25 == 0:
            print(f"  step {step}: loss {running / 25:.3f}, {time.perf_counter() - started:.0f} s", flush=True)
            running = 0.0
    return model, head


def save(work: Path, seed: int, task: str, model: torch.nn.Module, head: torch.nn.Linear) -> None:
    """Writes the head, then the adapter folder by a rename, so that a folder that exists is complete."""
    target = head_file(work, seed, task)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous() for k, v in head.state_dict().items()}, target)
    folder = adapter_folder(work, seed, task)
    partial = folder.with_name(f".partial-{task}")
    shutil.rmtree(partial, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = BASE_NAME  # not the folder of this machine
    model.save_pretrained(partial, save_embedding_layers=False)
    (partial / "README.md").unlink(missing_ok=True)  # an empty card that names this machine's folder
    partial.rename(folder)


def train_all(work: Path, seeds: list[int], tasks: list[str]) -> None:
    """Every missing (seed, task), seeds outermost."""
    for seed in seeds:
        for name in tasks:
            if adapter_folder(work, seed, name).is_dir():
                print(f"seed {seed} {name}: there already", flush=True)
                continue
            started = time.perf_counter()
            print(f"seed {seed} {name}: {torch.get_num_threads()} threads", flush=True)
            save(work, seed, name, *train_one(load_task(name), seed))
            print(f"seed {seed} {name}: done in {time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    options = parser.parse_args()
    train_all(options.work, options.seeds, options.tasks)


if __name__ == "__main__":
    main()
