"""Padding, by hand."""

from __future__ import annotations

import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.tasks import Collator


def example(length, labels):
    ids = torch.arange(1, length + 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.tensor(labels),
        "task": torch.tensor(3),
    }


def test_right_and_left():
    rows = [example(2, [-100, 2]), example(3, [1, 2, 3])]
    batch = Collator("causal", 9)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 9], [1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 2, -100], [1, 2, 3]]
    assert batch["task"].tolist() == [3, 3]
    batch = Collator("causal", 9, "left")(rows)
    assert batch["input_ids"].tolist() == [[9, 1, 2], [1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, -100, 2], [1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


def test_labels_of_decoders_stay_on_the_right():
    batch = Collator("text-to-text", 0, "left")([example(2, [5]), example(3, [6, 7])])
    assert batch["input_ids"].tolist() == [[0, 1, 2], [1, 2, 3]]
    assert batch["labels"].tolist() == [[5, -100], [6, 7]]


def test_classes_and_images_are_stacked_and_lengths_rounded():
    rows = [{**example(2, 1), "pixel_values": torch.full((3, 2, 2), float(i))} for i in range(2)]
    batch = Collator("classification", None, pad_to_multiple_of=4)(rows)
    assert batch["labels"].tolist() == [1, 1]
    assert batch["pixel_values"].shape == (2, 3, 2, 2) and batch["pixel_values"][1].eq(1).all()
    assert batch["input_ids"].tolist() == [[1, 2, 0, 0]] * 2
    assert batch["attention_mask"].dtype == torch.int64


def test_sides_are_two():
    with pytest.raises(LoraforgeError, match="padding side(.|\n)*'middle'"):
        Collator("causal", 0, "middle")
