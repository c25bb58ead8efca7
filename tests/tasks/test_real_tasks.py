"""The real tasks, read as their recipes name them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest

from loraforge.tasks import TaskSpec, load_task, task_labels
from loraforge.tasks.fields import answer_of
from loraforge.tasks.rows import read_rows
from tests.tasks.tiny import tiny_base

EMOTIONS = {
    "emoint": (5681, ("anger", "fear", "joy", "sadness")),
    "emotion-cause": (1814, ("anger", "disgust", "fear", "joy", "sadness", "surprise")),
    "isear": (6061, ("anger", "disgust", "fear", "guilt", "joy", "sadness", "shame")),
}
CHOICES = {
    "piqa": (1838, {"solution1": 910, "solution2": 928}),
    "social_i_qa": (1954, {"answer1": 643, "answer2": 654, "answer3": 657}),
    "arc-easy": (2376, None),
}
GOAL = {"field": "instruction", "pattern": "question: (.*?)\n\n"}
OPTIONS = {
    "field": "instruction",
    "pattern": r"(?:Solution|Answer)\d: (.*?)(?=\s+(?:Solution|Answer)\d: |\n\nAnswer format)",
    "all": True,
}


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """Tiny bases that know the words of some texts."""

    def make(family, texts):
        words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)})
        return tiny_base(tmp_path_factory.mktemp("bases") / family, family, vocab_words=words)

    return make


@pytest.mark.parametrize("name", EMOTIONS)
def test_emotions_as_classes(data_dir, name):
    source, (count, labels) = data_dir / f"text/emotion/{name}/train.json", EMOTIONS[name]
    extract = {"text": {"field": "instruction", "pattern": r"^[^:]*:[^:]*:(.*)\?$"}}
    spec = TaskSpec("t", train=source, label="output", extract=extract)
    rows = read_rows(spec, "train")
    assert len(rows) == count and task_labels(spec) == labels
    assert not any(row["text"].startswith("Classify") or row["text"] not in row["instruction"] for row in rows.items)


def test_emotions_as_answers(data_dir, readers):
    source, labels = data_dir / "text/emotion/emotion-cause/train.json", EMOTIONS["emotion-cause"][1]
    spec = TaskSpec("t", train=source, text="{instruction}", target="output", max_length=400)
    texts = [row["instruction"] for row in read_rows(spec, "train").items]
    data = load_task(spec, "train", base=readers("t5", [*texts, *labels]), limit=20)
    assert data.kind == "text-to-text" and set(data.references) <= set(labels) and data.available == 1814


def test_tables_and_parallel_files(data_dir):
    spec = TaskSpec("t", train=data_dir / "text/SST2/train.tsv", columns=["label", "text"])
    rows = read_rows(spec, "train")
    assert Counter(row["label"] for row in rows.items) == {"1": 3610, "0": 3310}
    assert rows.items[0]["text"].startswith("a stirring , funny") and task_labels(spec) == ("0", "1")
    assert len(read_rows(TaskSpec("t", train=data_dir / "text/SUBJ/train.tsv", columns=["a", "b"]), "train")) == 8000
    folder = data_dir / "text/tweeteval-irony"
    files = {
        name: {"texts": folder / f"{name}_text.txt", "labels": folder / f"{name}_labels.txt"}
        for name in ("train", "val")
    }
    spec = TaskSpec("t", train=files["train"], test=files["val"], labels=["non_irony", "irony"])
    assert [len(read_rows(spec, split)) for split in ("train", "test")] == [2862, 955]
    assert read_rows(spec, "train").items[0]["text"].startswith("seeing ppl walking w/ crutches")


@pytest.mark.parametrize("name", CHOICES)
def test_choices(data_dir, name, readers):
    source, (count, answers) = data_dir / f"text/{name}/test.json", CHOICES[name]
    spec = TaskSpec(
        "t",
        test=source,
        text="Question: {goal}\nAnswer:",
        choices="options",
        extract={"goal": GOAL, "options": OPTIONS},
        max_length=600,
    )
    rows = read_rows(spec, "test")
    assert len(rows) == count
    assert {len(row["options"]) for row in rows.items} == {"piqa": {2}, "social_i_qa": {3}, "arc-easy": {3, 4, 5}}[name]
    if answers is not None:
        found = rows.each(lambda item, where: answer_of(item, item["options"], spec, where))
        assert Counter(found) == {int(key[-1]) - 1: value for key, value in answers.items()}
    few = rows.items[:20]
    base = readers("t5", [row["instruction"] for row in few] + ["Question: Answer:"])
    data = load_task(replace(spec, test=few), "test", base=base)
    assert data.kind == "choice" and [len(choices) for choices in data.choices] == [len(row["options"]) for row in few]
    assert data.texts[0] == f"Question: {few[0]['goal']}\nAnswer:"
