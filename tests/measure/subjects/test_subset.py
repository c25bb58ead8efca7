from __future__ import annotations

import json
import random

import pytest

from loraforge.errors import LoraforgeError
from loraforge.measure.files import SUBSET, SUBSET_ABOUT
from loraforge.measure.subjects.subset import choose_subset, read_subset, write_subset


def test_the_choice_is_the_documents():
    """random.Random(999), shuffle of all rows, the first n."""
    order = list(range(40))
    random.Random(999).shuffle(order)
    assert choose_subset(40, 16) == order[:16]


def test_more_rows_than_there_are_is_all_of_them():
    assert sorted(choose_subset(5, 1024)) == [0, 1, 2, 3, 4]
    assert sorted(choose_subset(5, None)) == [0, 1, 2, 3, 4]


def test_another_seed_is_another_choice():
    assert choose_subset(40, 16, 1) != choose_subset(40, 16, 2)


def test_written_and_read(tmp_path):
    path = write_subset(tmp_path, [3, 1], {"size": 5, "seed": 999, "data_sha256": "ab"})
    assert json.loads(path.read_text()) == [3, 1]
    assert json.loads((tmp_path / SUBSET_ABOUT).read_text()) == {"size": 5, "seed": 999, "data_sha256": "ab", "n": 2}
    assert read_subset(tmp_path, size=5, data_sha256="ab") == [3, 1]
    assert read_subset(path, size=5) == [3, 1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "no list"),
        ("[]", "an empty list"),
        ("[1.5]", "no list"),
        ("[true]", "no list"),
        ("[1, 1]", "rows twice"),
        ("[-1]", "does not have"),
        ("[5]", "does not have"),
        ("[1", "cannot be read"),
    ],
    ids=["object", "empty", "float", "bool", "twice", "negative", "beyond", "broken"],
)
def test_a_wrong_file_is_refused(tmp_path, content, words):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(LoraforgeError, match=words):
        read_subset(path, size=5)


def test_no_file(tmp_path):
    with pytest.raises(LoraforgeError, match="cannot be read"):
        read_subset(tmp_path / SUBSET, size=5)


@pytest.mark.parametrize(("size", "sha256"), [(6, "ab"), (5, "cd")], ids=["size", "sha"])
def test_a_subset_of_other_data_is_refused(tmp_path, size, sha256):
    write_subset(tmp_path, [3, 1], {"size": 5, "seed": 999, "data_sha256": "ab"})
    with pytest.raises(LoraforgeError, match="other data"):
        read_subset(tmp_path, size=size, data_sha256=sha256)
