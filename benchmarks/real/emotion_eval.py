"""Evaluation of merged adapters on the emotion tasks: correct or not for every test row, scores and paired intervals.

Five lines from Python (with benchmarks/real on the path):

    from emotion_eval import Harness, normalised_average, paired_interval
    harness = Harness(work)                                  # loads the base once; DIR of emotion_train.py
    correct = harness.evaluate(seed=0, modules=res.modules)  # {task: (450,) bool}; also (B, A), dense
    score = normalised_average([correct], [harness.own(0)])
    low, high = paired_interval([correct], [other], [harness.own(0)])
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from emotion_data import TASKS, base_folder, encode, keyed_random, length_batches, load_task, pad
from safetensors.torch import load_file
from torch import Tensor, nn

BATCH_TOKENS = 1024
Correct = dict[str, np.ndarray]  # task -> (450,) bool


@dataclass(frozen=True, eq=False)
class EvalTask:
    """Test rows of one task with the head that reads them: weight (classes, d), bias (classes,)."""

    name: str
    tokens: list[list[int]]
    labels: np.ndarray
    weight: Tensor
    bias: Tensor


def as_delta(update: Any) -> Tensor:
    """Dense float32 (m, n) delta of a LowRank, of a pair (B, A), or of a dense delta."""
    if isinstance(update, Tensor):
        return update.float()
    if isinstance(update, tuple):
        return (update[0].double() @ update[1].double()).float()
    return (update.B.double() @ update.A.double() * update.scaling).float()


@contextlib.contextmanager
def installed(model: nn.Module, modules: Mapping[str, Any]) -> Iterator[nn.Module]:
    """The model with every delta added to its weight; the exact old weights come back, also after an error."""
    weights = {name: model.get_submodule(name).weight for name in modules}
    old = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        with torch.no_grad():
            for name, update in modules.items():
                weights[name].add_(as_delta(update))
        yield model
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(old[name])


@torch.inference_mode()
def embed(model: nn.Module, tokens: list[list[int]], batch_tokens: int = BATCH_TOKENS) -> Tensor:
    """(rows, d) mean of the last hidden states; batches of similar length, so that almost nothing is padded."""
    out: Tensor | None = None
    for rows in length_batches(tokens, batch_tokens):
        ids, mask = pad([tokens[i] for i in rows])
        padded = not bool(mask.all())
        hidden = model(input_ids=ids, attention_mask=mask if padded else None).last_hidden_state
        weight = mask[..., None].to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1)
        out = mean.new_empty(len(tokens), mean.shape[1]) if out is None else out
        out[rows] = mean
    if out is None:
        raise ValueError("no rows to embed")
    return out


def load_merged_and_eval(model: nn.Module, modules: Mapping[str, Any], tasks: Sequence[EvalTask]) -> Correct:
    """Correctness of every row of every task under the model plus `modules`, each task read by its own head."""
    with installed(model, modules):
        features = embed(model, [row for task in tasks for row in task.tokens])
    parts = features.split([len(task.tokens) for task in tasks])
    correct = {}
    for task, part in zip(tasks, parts, strict=True):
        logits = part @ task.weight.T + task.bias
        if not torch.isfinite(logits).all():
            raise FloatingPointError(f"the merged model gives NaN or infinity on {task.name}")
        correct[task.name] = logits.argmax(1).numpy() == task.labels
    return correct


class Harness:
    """The base encoder, the test rows, and the trained heads and adapters of a work folder.

    Args:
        work: Folder that emotion_train.py wrote.
    """

    def __init__(self, work: str | Path) -> None:
        from transformers import AutoModel

        self.work = Path(work)
        self.base = base_folder()
        self.model = AutoModel.from_pretrained(self.base, dtype=torch.float32).eval().requires_grad_(False)
        self.model.pooler = None  # the heads read the mean of the tokens

    def adapter_paths(self, seed: int) -> list[Path]:
        """Folders of the seed's adapters, in the order of TASKS."""
        paths = [self.work / "adapters" / f"seed{seed}" / task for task in TASKS]
        missing = [str(path) for path in paths if not path.is_dir()]
        if missing:
            raise SystemExit(f"not trained yet: {', '.join(missing)}; run benchmarks/real/emotion_train.py first")
        return paths

    @functools.cache  # noqa: B019 - lives as long as the process, like the harness
    def tasks(self, seed: int) -> tuple[EvalTask, ...]:
        """Every task with the seed's head."""
        out = []
        for name in TASKS:
            rows = load_task(name).test
            head = load_file(self.work / "heads" / f"seed{seed}" / f"{name}.safetensors")
            out.append(EvalTask(name, encode(rows.texts), np.array(rows.labels), head["weight"], head["bias"]))
        return tuple(out)

    @functools.cache  # noqa: B019
    def deltas(self, seed: int, task: str) -> dict[str, Tensor]:
        """Float64 dense delta (m, n) of every module of one trained adapter, read from the file without the library."""
        folder = self.work / "adapters" / f"seed{seed}" / task
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        scaling = config["lora_alpha"] / config["r"]
        start, end = "base_model.model.", ".lora_A.weight"
        names = [key.removeprefix(start).removesuffix(end) for key in tensors if key.endswith(end)]
        factors = {n: (tensors[f"{start}{n}.lora_B.weight"], tensors[f"{start}{n}{end}"]) for n in sorted(names)}
        return {name: scaling * (b.double() @ a.double()) for name, (b, a) in factors.items()}

    def weighted_sum(self, seed: int, weights: Sequence[float]) -> dict[str, Tensor]:
        """By hand: float64 sum_i w_i delta_i of every module, the check of the library's plain merges."""
        parts = [self.deltas(seed, task) for task in TASKS]
        return {n: sum(w * p[n] for w, p in zip(weights, parts, strict=True)) for n in parts[0]}

    def evaluate(self, seed: int, modules: Mapping[str, Any], tasks: Sequence[str] = TASKS) -> Correct:
        """Correctness per row and task of base + modules with the seed's heads; the model is unchanged afterwards."""
        return load_merged_and_eval(self.model, modules, [t for t in self.tasks(seed) if t.name in tasks])

    @functools.cache  # noqa: B019
    def own(self, seed: int) -> Correct:
        """Correctness of each task under its own adapter alone; kept in the work folder, since every score needs it."""
        file = self.work / "cache" / f"seed{seed}" / f"own-{self.fingerprint(seed)}.npz"
        if not file.is_file():
            save_correct(file, {t: self.evaluate(seed, self.deltas(seed, t), (t,))[t] for t in TASKS})
        return read_correct(file)

    @functools.cache  # noqa: B019
    def fingerprint(self, seed: int) -> str:
        """Short hash of the seed's adapters, heads and the test splits: results of other ones are never reused."""
        digest = hashlib.sha256()
        for path in self.adapter_paths(seed):
            digest.update((path / "adapter_model.safetensors").read_bytes())
            digest.update((self.work / "heads" / f"seed{seed}" / f"{path.name}.safetensors").read_bytes())
            digest.update(load_task(path.name).split_hash.encode())
        return digest.hexdigest()[:8]


def save_correct(file: Path, correct: Correct) -> None:
    """Writes the arrays by a rename, so that a file that exists is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{os.getpid()}-{file.name}")
    np.savez(partial, **correct)
    partial.rename(file)


def read_correct(file: Path) -> Correct:
    """The arrays of save_correct."""
    with np.load(file) as stored:
        return {task: stored[task] for task in TASKS}


def accuracies(correct: Correct) -> dict[str, float]:
    """Share of correct rows per task."""
    return {task: float(rows.mean()) for task, rows in correct.items()}


def normalised_average(merges: Sequence[Correct], owns: Sequence[Correct]) -> float:
    """Mean over seeds and tasks of accuracy / own adapter's accuracy; one entry a seed in both lists."""
    ratios = [m[t].mean() / o[t].mean() for m, o in zip(merges, owns, strict=True) for t in TASKS]
    return float(np.mean(ratios))


@functools.cache
def row_counts(task: str, rows: int, draws: int) -> np.ndarray:
    """(draws, rows) how often a row enters a draw; the same for all merges, so differences are paired."""
    generator = np.random.default_rng(keyed_random("bootstrap", task).getrandbits(63))
    return generator.multinomial(rows, np.full(rows, 1 / rows), size=draws).astype(np.float32)


def bootstrap(merges: Sequence[Correct], owns: Sequence[Correct], draws: int = 4000) -> np.ndarray:
    """(draws,) normalised averages over resampled test rows.

    Rows are drawn within each task (stratified). All seeds share the test rows, hence the draws (pooled over seeds):
    the spread says what other test rows would have given, with these adapters. Own accuracies are redrawn too.
    """
    total = np.zeros(draws)
    for task in TASKS:
        counts = row_counts(task, len(owns[0][task]), draws)
        hits = np.stack([m[task] for m in merges], axis=1).astype(np.float32)
        own = np.stack([o[task] for o in owns], axis=1).astype(np.float32)
        total += ((counts @ hits) / (counts @ own)).mean(axis=1) / len(TASKS)
    return total


def paired_interval(
    merges: Sequence[Correct],
    others: Sequence[Correct],
    owns: Sequence[Correct],
    draws: int = 4000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Bootstrap interval of normalised_average(merges) - normalised_average(others) on the same test rows."""
    difference = bootstrap(merges, owns, draws) - bootstrap(others, owns, draws)
    low, high = np.quantile(difference, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
