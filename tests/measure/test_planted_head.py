"""A head that carries the label, by construction: after training by either method exact ablation ranks it first.

Every head but one looks at the first token alone, by a margin at which the softmax and its gradient are zero in
float32, so that no training can turn it elsewhere; the one left looks at the word that the label is. No other way leads
from that word to the classifier, which reads the first token.
"""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from loraforge.measure.run import measure_run
from loraforge.training.single import train_full, train_lora
from tests.tasks.tiny import CLS, SPECIAL, WORDS, tiny_base, write_rows

HIDDEN, HEADS, SIZE = 16, 2, 8
PLANTED = (0, 1)
FILLERS = WORDS[4:]
# Dimensions of the embeddings: the first token, the words that are labels, and which of both.
FIRST, MARKED, WHICH = 0, 1, 2


def plant(folder: Path) -> Path:
    """A BERT of two layers whose heads look where the docstring above says."""
    tiny_base(folder, "bert", hidden=HIDDEN)
    model = tf.BertModel.from_pretrained(folder)
    with torch.no_grad():
        embedding = model.embeddings
        embedding.position_embeddings.weight.zero_()
        embedding.token_type_embeddings.weight.zero_()
        words = embedding.word_embeddings.weight.mul_(0.1)
        words[:, :3] = 0
        words[CLS, FIRST] = 2.0
        good, bad = (len(SPECIAL) + WORDS.index(word) for word in ("good", "bad"))
        words[[good, bad], MARKED] = 2.0
        words[good, WHICH], words[bad, WHICH] = 1.0, -1.0
        for layer, block in enumerate(model.encoder.layer):
            attention = block.attention.self
            for part in (attention.query, attention.key):
                part.weight.zero_()
                part.bias.zero_()
            for head in range(HEADS):
                first = head * SIZE
                seen = MARKED if (layer, head) == PLANTED else FIRST
                # Scores of 20 * 20 * x / sqrt(8): hundreds apart where x is of order one.
                attention.query.bias[first] = 20.0
                attention.key.weight[first, seen] = 20.0
    model.save_pretrained(folder)
    return folder


def rows(count: int, draw: random.Random) -> list[dict[str, str]]:
    found = []
    for i in range(count):
        words = draw.choices(FILLERS, k=6)
        label = ("good", "bad")[i % 2]
        words.insert(draw.randrange(7), label)
        found.append({"text": " ".join(words), "label": label})
    return found


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("planted")
    draw = random.Random(0)
    plant(folder / "base")
    train, test = write_rows(folder / "train.jsonl", rows(64, draw)), write_rows(folder / "test.jsonl", rows(48, draw))
    return {"id": "marker", "train": str(train), "test": str(test), "labels": ["good", "bad"]}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_planted_head_is_found_first(task: dict[str, Any], method: str) -> None:
    folder = Path(task["train"]).parent
    out = folder / method / "ckpt_final"
    arguments = {"max_steps": 30, "per_device_train_batch_size": 32, "learning_rate": 5e-3, "save_strategy": "no"}
    if method == "full":
        record = train_full(folder / "base", task, out, train=arguments, seed=5)
    else:
        lora = {"r": 4, "targets": ["query", "key", "value", "attention.output.dense"]}
        record = train_lora(folder / "base", task, out, lora=lora, train=arguments, seed=5)
    assert record["metrics"]["test"]["metrics"]["accuracy"] == 1.0
    found = measure_run(out.parent, plots=False, spectrum=False, topk=1)
    with (out.parent / "heads.csv").open(newline="") as file:
        heads = {(int(row["layer"]), int(row["head"])): row for row in csv.DictReader(file)}
    importance = {key: float(row["I_post"]) for key, row in heads.items()}
    others = [value for key, value in importance.items() if key != PLANTED]
    # Without it nothing is known of the label: the loss is that of a guess or worse. The others matter only as far as
    # the classifier leans on their constant.
    assert max(importance, key=lambda key: importance[key]) == PLANTED
    assert importance[PLANTED] > 0.5 and importance[PLANTED] > 3 * max(others)
    assert float(heads[PLANTED]["I_post_lo"]) > max(others)
    assert found["method"] == ("FFT" if method == "full" else "LoRA") and found["n_heads"] == 4
