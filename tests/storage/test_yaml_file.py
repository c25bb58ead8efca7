"""YAML as people write it."""

from __future__ import annotations

import pytest

from loraforge.errors import LoraforgeError
from loraforge.storage.yaml_file import read_value, read_yaml


def test_yes_and_no_are_words_and_numbers_have_exponents(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text("labels: [yes, no, on]\nrate: 1e-4\nflag: true\n", encoding="utf-8")
    assert read_yaml(path) == {"labels": ["yes", "no", "on"], "rate": 1e-4, "flag": True}
    assert read_value("[yes, no]") == ["yes", "no"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\na: 2\n", "task file is not valid YAML(.|\n)*line 2(.|\n)*'a' stands twice"),
        (b"a: [1\n", "task file is not valid YAML"),
        (b"- a\n", "task file is no mapping(.|\n)*list"),
        (b"a: \xe9\n", "task file is not UTF-8"),
    ],
)
def test_what_is_no_mapping_is_refused(tmp_path, content, message):
    path = tmp_path / "t.yaml"
    path.write_bytes(content)
    with pytest.raises(LoraforgeError, match=message):
        read_yaml(path, "task file")
