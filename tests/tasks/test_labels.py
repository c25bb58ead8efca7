"""Classes: names, order, rows of the head; and labels that are none."""

from __future__ import annotations

import pytest

from loraforge.errors import InputProblems, LoraforgeError
from loraforge.tasks import TaskSpec, task_labels
from loraforge.tasks.labels import class_of, head_positions, known_values, own_names
from loraforge.tasks.rows import read_rows
from tests.tasks.tiny import write_rows


def rows(*labels):
    return [{"text": "good", "label": label} for label in labels]


def classes(spec, names, split="train"):
    known = known_values(spec, names)
    return read_rows(spec, split).each(lambda item, where: class_of(item, spec, where, known))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ((10, 9, 2), ("2", "9", "10")),
        (("10", "9", "2"), ("2", "9", "10")),
        (("b", "a", "10"), ("10", "a", "b")),
        ((True, False), ("false", "true")),
        ((1.0, 0), ("0", "1")),
        ((-1, 1), ("-1", "1")),
    ],
)
def test_order_of_the_classes(values, names):
    assert task_labels(TaskSpec("t", train=rows(*values))) == names
    assert task_labels(TaskSpec("t", train=rows(*reversed(values)))) == names


def test_named_labels_take_names_indices_and_values():
    listed = TaskSpec("t", train=rows(1, "0", "neg"), labels=["neg", "pos"])
    assert task_labels(listed) == ("neg", "pos")
    assert classes(listed, ("neg", "pos")) == [1, 0, 0]
    mapped = TaskSpec("t", train=rows(4, 0, "2", "pos"), labels={4: "pos", 0: "neg", 2: "neg"})
    assert task_labels(mapped) == ("pos", "neg")
    assert classes(mapped, ("pos", "neg")) == [0, 1, 1, 0]


def test_numbers_as_names_are_no_indices():
    # Classes called 1 and 2: a 0 in the file is none of them, rather than the first.
    spec = TaskSpec("t", train=rows(1, 0), labels=["1", "2"])
    with pytest.raises(LoraforgeError, match="unknown label(.|\n)*row 2(.|\n)*'0'"):
        classes(spec, ("1", "2"))


def test_unknown_labels_are_named_with_their_rows(tmp_path):
    path = write_rows(tmp_path / "test.csv", rows("joy", "anegr", "sad"))
    spec = TaskSpec("t", train=rows("joy", "anger"), test=path)
    with pytest.raises(InputProblems) as caught:
        classes(spec, task_labels(spec), "test")
    message = str(caught.value)
    assert "the training rows have no such class" in message
    assert f"{path}, line 3" in message and "did you mean 'anger'" in message
    assert f"{path}, line 4" in message and "known: anger, joy" in message


def test_many_problems_are_counted():
    with pytest.raises(InputProblems, match="and 15 more problems"):
        task_labels(TaskSpec("t", train=[{"text": "a", "label": [i]} for i in range(25)]))


def test_rows_with_one_fault_are_told_once():
    rows = [{"text": "a"}] * 24 + [{"text": "a", "label": None}]
    with pytest.raises(InputProblems, match="2 problems") as caught:
        task_labels(TaskSpec("t", train=rows))
    absent, empty = caught.value.problems
    assert absent.where == "task 't', train (in memory), row 1, row 2, row 3, row 4, row 5 and 19 more"
    assert empty.where == "task 't', train (in memory), row 25"


def test_an_unknown_label_is_told_without_the_indices():
    spec = TaskSpec("t", train=[{"text": "a"}], labels=("good", "bad"))
    known = known_values(spec, ("good", "bad"))
    assert known["1"] == 1
    with pytest.raises(LoraforgeError, match=r"found: 'xyz'\n  next: known: good, bad$"):
        class_of({"label": "xyz"}, spec, "row 1", known)


@pytest.mark.parametrize(
    ("train", "keys", "message"),
    [
        ([{"text": "a"}], {}, "no field 'label'(.|\n)*row 1(.|\n)*fields text"),
        ([{"text": "a", "label": None}], {}, "holds nothing(.|\n)*row 1"),
        ([{"text": "a", "label": [1]}], {}, "label is no class(.|\n)*row 1, label"),
        ([{"text": "a", "label": 0.5}], {}, "label is no class(.|\n)*0.5"),
        ([{"text": "a", "output": "x"}], {"label": "label"}, "fields text, output"),
        (rows("x", "x"), {}, "two classes or more(.|\n)*x"),
    ],
)
def test_labels_that_are_none(train, keys, message):
    with pytest.raises(LoraforgeError, match=message):
        task_labels(TaskSpec("t", train=train, **keys))


def test_rows_of_a_shared_head():
    spec = TaskSpec("b", train=rows("x", "z"))
    assert head_positions(spec, ("x", "z"), None, "shared") == (0, 1)
    assert head_positions(spec, ("x", "z"), ("z", "y", "x"), "shared") == (2, 0)
    head = ("a:x", "a:z", "b:x", "b:z")
    assert head_positions(spec, ("x", "z"), head, "per-task") == (2, 3)
    with pytest.raises(LoraforgeError, match="head has no row(.|\n)*b:w"):
        head_positions(spec, ("x", "w"), head, "per-task")
    with pytest.raises(LoraforgeError, match="label space"):
        head_positions(spec, ("x",), head, "own")


def test_a_task_with_test_rows_alone_takes_the_names_of_the_head():
    spec = TaskSpec("b", test=rows("x"))
    assert own_names(spec, ("a:x", "b:x", "b:y"), "per-task") == ("x", "y")
    assert own_names(spec, ("x", "y"), "shared") == ("x", "y")
    with pytest.raises(LoraforgeError, match="has no 'train' rows"):
        own_names(spec, None, "shared")
