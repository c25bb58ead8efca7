from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraforge.bench.verdicts import compare, load_result, too_slow
from loraforge.errors import LoraforgeError


def row(form: str, seconds: float, iqr: float, runs: int = 5, case: str = "a") -> dict[str, Any]:
    names = {"group": "kernels", "case": case, "form": form, "device": "cpu"}
    return names | {"seconds": seconds, "iqr": iqr, "runs": runs}


def result(*rows: dict[str, Any], **machine: Any) -> dict[str, Any]:
    where = {"machine": "m", "gpu": None, "threads": 1, "torch": "2"} | machine
    return {
        "schema": 1,
        "groups": ["kernels"],
        "machine": where,
        "clock": "processor",
        "size": "tiny",
        "rows": list(rows),
    }


def test_a_verdict_needs_a_change_beyond_both_spreads() -> None:
    old = result(row("a", 1.0, 0.1), row("b", 1.0, 0.1), row("c", 1.0, 0.1), row("d", 1.0, 0.0, runs=2))
    new = result(row("a", 1.375, 0.1), row("b", 1.25, 0.1), row("c", 0.6, 0.1), row("d", 9.0, 0.0))
    found = compare(new, old)
    assert [r["verdict"] for r in found["rows"]] == ["slower", "same", "faster", "unknown"]
    assert found["rows"][0]["ratio"] == pytest.approx(1.375) and found["rows"][0]["spread"] == pytest.approx(0.3)
    assert [r["form"] for r in too_slow(found, 1.3)] == ["a"] and too_slow(found, 1.4) == []


def test_what_only_one_side_has_and_what_differs_is_told() -> None:
    found = compare(
        result(row("a", 1.0, 0.1), row("n", 1.0, 0.1)), result(row("a", 1.0, 0.1), row("o", 1.0, 0.1), threads=2)
    )
    assert found["only_new"] == ["kernels a n cpu"] and found["only_old"] == ["kernels a o cpu"]
    assert found["notes"] == ["other threads: stored 2, now 1"]
    # Groups that were not asked for are not missing.
    other = result(row("o", 1.0, 0.1))
    other["groups"] = ["merge"]
    assert compare(other, result(row("a", 1.0, 0.1)))["only_old"] == []


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (None, "no stored results"),
        ("{", "no JSON"),
        ("[]", "holds no results"),
        ('{"schema": 99}', "schema 99"),
        ('{"schema": 1, "rows": [{"group": "a"}]}', "incomplete"),
        ('{"schema": 1}', "incomplete"),
        ('{"schema": 1, "rows": [], "machine": "m"}', "incomplete"),
    ],
)
def test_files_that_cannot_be_compared_with(tmp_path: Path, text: str | None, word: str) -> None:
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(LoraforgeError, match=word) as caught:
        load_result(path)
    assert str(path) in str(caught.value)


def test_a_stored_result_is_read_back(tmp_path: Path) -> None:
    stored = result(row("a", 1.0, 0.1))
    path = tmp_path / "old.json"
    path.write_text(json.dumps(stored), encoding="utf-8")
    assert load_result(path) == stored
