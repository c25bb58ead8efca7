"""What is taken from a row, and how a row that lacks it is refused."""

from __future__ import annotations

import pytest

from loraforge.errors import LoraforgeError
from loraforge.tasks import TaskSpec
from loraforge.tasks.fields import answer_of, choices_of, extend, has_field, image_field, label_name, target_of, text_of


def test_fields_templates_and_paths():
    row = {"goal": "cut", "n": 2, "deep": {"text": ["a", "b"], "x": "in"}, "a.b": "dotted"}
    assert text_of(row, "goal", "row", "text") == "cut"
    assert text_of(row, "Do {{{goal}}} {n} times", "row", "text") == "Do {cut} 2 times"
    assert text_of(row, "deep.x", "row", "text") == "in"
    assert text_of(row, "a.b", "row", "text") == "dotted"
    assert has_field(row, "deep.text") and not has_field(row, "deep.y") and not has_field(row, "goal.x")


@pytest.mark.parametrize(
    ("row", "source", "message"),
    [
        ({"question": "a"}, "text", r"no field 'text'(.|\n)*fields question(.|\n)*'text: FIELD' \(--text FIELD\)"),
        ({"text": None}, "text", r"'text' of the row holds nothing(.|\n)*found: None(.|\n)*leave the row out"),
        ({"text": " "}, "text", "text is empty(.|\n)*file, line 3, text"),
        ({"text": ["a"]}, "text", "not text(.|\n)*list"),
        ({"a": "x"}, "{a} {b}", "no field 'b'"),
        ({"a": "x"}, "{a", "not well formed"),
        ({"a": "x"}, "{a!r}", "fields only"),
    ],
)
def test_texts_that_are_none(row, source, message):
    with pytest.raises(LoraforgeError, match=message):
        text_of(row, source, "file, line 3", "text")


def test_targets_and_their_map():
    spec = TaskSpec("t", target="label", target_map={0: "no", True: "yes", "3": "maybe"})
    assert [target_of({"label": value}, spec, "row") for value in (0, "0", 0.0, True, 3)] == ["no"] * 3 + [
        "yes",
        "maybe",
    ]
    with pytest.raises(LoraforgeError, match="not in target_map(.|\n)*'7'(.|\n)*0, true, 3"):
        target_of({"label": 7}, spec, "row")
    assert target_of({"a": "x", "b": 1}, TaskSpec("t", target="{a}-{b}"), "row") == "x-1"


def test_extracted_fields():
    text = "Choose: what?\nAnswer1: red one Answer2: blue\n\nAnswer format: answer1/answer2"
    rules = {
        "goal": {"field": "instruction", "pattern": "Choose: (.*?)\n"},
        "options": {
            "field": "instruction",
            "pattern": r"Answer\d: (.*?)(?= Answer\d|\n\nAnswer format)",
            "all": True,
        },
        "whole": {"field": "goal", "pattern": "wh.t"},
    }
    row = extend({"instruction": text}, rules, "row")
    assert (row["goal"], row["options"], row["whole"]) == ("what?", ["red one", "blue"], "what")
    with pytest.raises(LoraforgeError, match=r"extract.goal matches nothing(.|\n)*line 9, instruction(.|\n)*'none'"):
        extend({"instruction": "none"}, rules, "line 9")


def test_choices():
    spec = TaskSpec("t", choices=["sol1", "{sol2}!", "a fixed text"])
    assert choices_of({"sol1": "a", "sol2": 5}, spec, "row") == ["a", "5!", "a fixed text"]
    assert choices_of({"c": {"text": ["x", "y"]}}, TaskSpec("t", choices="c.text"), "row") == ["x", "y"]
    for found, message in ((["x"], "two choices"), (["x", " "], "two choices"), ("xy", "no list")):
        with pytest.raises(LoraforgeError, match=message):
            choices_of({"choices": found}, TaskSpec("t"), "row")


@pytest.mark.parametrize(
    ("value", "first", "index"),
    [
        (0, None, 0),
        (2, None, 2),
        (2, 1, 1),
        ("2", None, 1),
        ("2", 0, 2),
        ("answer3", None, 2),
        ("solution1", None, 0),
        ("the correct answer is answer2", None, 1),
        ("B", None, 1),
        ("c", None, 2),
        ("green", None, 2),
    ],
)
def test_answers(value, first, index):
    spec = TaskSpec("t", first_choice=first)
    assert answer_of({"answer": value}, ["red", "blue", "green"], spec, "row") == index


@pytest.mark.parametrize(("value", "first"), [(3, None), (0, 1), ("0", None), ("4", None), ("E", None), ("pink", None)])
def test_answers_that_are_no_choice(value, first):
    with pytest.raises(LoraforgeError, match="none of the choices(.|\n)*line 2, answer(.|\n)*first_choice"):
        answer_of({"answer": value}, ["red", "blue", "green"], TaskSpec("t", first_choice=first), "line 2")


def test_names_of_classes_and_images():
    assert [label_name(v) for v in (1, 1.0, "1 ", True, "True", -0.0)] == ["1", "1", "1", "true", "True", "0"]
    assert image_field({"text": "a", "img": "b"}) == "img" and image_field({"image": None}) is None
