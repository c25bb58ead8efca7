"""The order of tensor names."""

from __future__ import annotations

from loraforge.storage.names import natural_key


def test_layer_2_comes_before_layer_10() -> None:
    names = ["layers.10.q", "layers.2.q", "b", "layers.2.k"]
    assert sorted(names, key=natural_key) == ["b", "layers.2.k", "layers.2.q", "layers.10.q"]


def test_digits_that_are_no_numbers_are_text() -> None:
    """A superscript two is a digit to Unicode and none to int()."""
    assert sorted(["²", "1", "a"], key=natural_key) == ["1", "a", "²"]
