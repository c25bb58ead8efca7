"""The page and the picture of `inspect`: they hold the numbers that they were given, whatever is missing."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from loraforge.report import agreement_charts as charts
from loraforge.report.inspection import inspection_html, save_inspection_picture, worst_table, write_inspection_report
from loraforge.report.plots import INK, svg


def module(name: str, spectrum: list[float]) -> dict[str, Any]:
    known = {"module": name, "kind": "linear", "shape": [8, 6], "rank": len(spectrum), "scaling": 2.0, "norm": 1.5}
    return known | {"spectrum": spectrum, "effective_rank": 1.5, "stable_rank": 1.25, "rank_90": 1, "rank_99": 2}


def adapter(name: str, spectrum: list[float]) -> dict[str, Any]:
    return {
        "name": name, "format": "peft", "base": "tiny", "bytes": 2048, "norm": 2.5, "heads": ["score.weight"],
        "notes": [f"a note of {name}"], "modules": [module("layers.0.q", spectrum), module("layers.1.q", spectrum)],
        "effective_rank": 1.5, "stable_rank": 1.25, "rank_90": 1.0, "rank_99": 2.0,
    }  # fmt: skip


def make(count: int) -> dict[str, Any]:
    """What `inspect` finds in `count` adapters; the last two share nothing."""
    names = [f"<adapter> $\\frac{{{i}" for i in range(count)]

    strangers = {count - 1, count - 2} if count > 2 else None

    def matrix(at: float) -> list[list[float | None]]:
        def entry(i: int, j: int) -> float | None:
            return 1.0 if i == j else None if {i, j} == strangers else at / (i + j)

        return [[entry(i, j) for j in range(count)] for i in range(count)]

    several = count > 1
    shares = {key: matrix(0.25) for key in ("sign_conflict", "overlap_out", "overlap_in")}
    return {
        "adapters": [adapter(name, [2.0, 1.0 + i, 0.5][:2]) for i, name in enumerate(names)],
        "coverage": {
            "modules": 3, "shared_by_all": 2, "kinds": {"linear": 3},
            "missing": {name: ["layers.9.q"] if i == 0 else [] for i, name in enumerate(names)},
        },
        "cosine": matrix(-0.75),
        **shares,
        "cosine_modules": {"layers.0.q": matrix(0.5), "layers.1.q": matrix(-0.5)} if several else {},
        "conflict_modules": {name: shares for name in ("layers.0.q", "layers.1.q")} if several else {},
    }  # fmt: skip


@pytest.mark.parametrize("count", [1, 3])
def test_page_of_any_number_of_adapters(count: int, tmp_path: Path) -> None:
    html = write_inspection_report(tmp_path / "r.html", make(count)).read_text(encoding="utf-8")
    assert html == inspection_html(make(count)) and not re.search(r"https?:", html)
    assert "&lt;adapter&gt; $" in html and "<adapter>" not in html and "a note of" in html
    assert "lacks 1: layers.9.q" in html and html.count("<details>") == count
    assert ("Where they agree least" in html) == (count > 1)


@pytest.mark.parametrize("count", [1, 13])
def test_picture_is_deterministic(count: int, tmp_path: Path) -> None:
    found = make(count)
    one, two = (save_inspection_picture(tmp_path / "sub" / f"{i}.png", found).read_bytes() for i in "ab")
    assert one == two and one[:4] == b"\x89PNG" and int.from_bytes(one[16:20], "big") >= 1600
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["a.png", "b.png"]


def test_matrices_hold_the_numbers_off_the_diagonal() -> None:
    found = make(3)
    with charts.conflict_chart(found) as drawn:
        for axes, panel in zip(drawn.axes, charts.PANELS, strict=False):
            shown = axes.collections[0].get_array().reshape(3, 3)
            for i in range(3):
                for j in range(3):
                    if i == j or found[panel.key][i][j] is None:
                        assert bool(shown.mask[i, j]) or shown[i, j] != shown[i, j]
                    else:
                        assert shown[i, j] == found[panel.key][i][j]
            # Names, the reading, and a number for each pair that has one.
            numbers = [t.get_text() for t in axes.texts if re.fullmatch(r"-?\d\.\d+", t.get_text())]
            assert len(numbers) == 4


def test_scales_keep_no_relation_in_the_middle() -> None:
    cosine, conflict, shared, _ = charts.PANELS
    assert charts._limits([0.01], cosine) == (-0.25, 0.25) and charts._limits([-0.75, 0.1], cosine) == (-0.75, 0.75)
    assert charts._limits([0.125], conflict) == (0.125, 0.875) and charts._limits([], shared) == (0.0, 1.0)


def test_many_adapters_have_no_numbers_in_cells() -> None:
    with charts.conflict_chart(make(charts.NUMBERED + 1)) as drawn:
        assert not [t for t in drawn.axes[0].texts if re.fullmatch(r"-?\d\.\d+", t.get_text())]


def test_energy_is_the_mean_over_modules() -> None:
    assert charts._mean_energy([[1.0, 1.0], [2.0]], 2) == pytest.approx([0.75, 1.0])
    relative = charts._mean_relative([[4.0, 1.0], [2.0, 2.0], [3.0]], 3)
    assert relative[:2] == pytest.approx([1.0, 0.5]) and relative[2] != relative[2]


def test_an_adapter_of_zeros_has_no_curve() -> None:
    found = make(2)
    found["adapters"][0]["modules"] = [module("layers.0.q", [0.0, 0.0])]
    with charts.energy_chart(found) as drawn:
        assert [len(axes.lines) for axes in drawn.axes] == [3, 1]


def test_charts_follow_the_colours_of_the_page() -> None:
    text = svg(partial(charts.energy_chart, make(2)), "x")
    assert "currentColor" in text and INK not in text


def test_the_least_agreement_comes_first() -> None:
    assert [row[:2] for row in worst_table(make(2)).rows] == [("layers.1.q", -0.5), ("layers.0.q", 0.5)]
