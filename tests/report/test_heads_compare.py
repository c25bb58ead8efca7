"""The report of several runs: shared bins and axes, differences with intervals, nothing from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraforge.report import heads_compare_charts as charts
from loraforge.report.heads_compare import compare_html, compare_pictures, difference_table, statistics_table
from loraforge.report.heads_spectra_charts import has_ranks, ranks_chart
from tests.report.heads_material import make_comparison
from tests.report.test_html import HOSTILE, _Page
from tests.report.test_sortable import BROWSER, QUIET, browse


@pytest.fixture(scope="module")
def pair() -> dict[str, Any]:
    return make_comparison(layers=2)


def test_the_page_is_offline_and_complete(pair: dict[str, Any]) -> None:
    html = compare_html(pair)
    page = _Page(html)
    assert not page.open and "http" not in html and all(address.startswith("#") for address in page.addresses)
    assert html.count('<svg role="img"') == len(compare_pictures(pair)) == 5
    assert len(page.ids) == len(set(page.ids))
    assert pair["findings"][0] in page.text and "Before training the runs are the same model" in page.text
    for said in ("FFT against LoRA-r8", "L1H11", "I_post FFT", "I_post LoRA-r8", "95 % by chance", "Budhraja"):
        assert said in page.text


@pytest.mark.skipif(BROWSER is None, reason="no browser on this machine")
def test_a_browser_finds_no_fault(pair: dict[str, Any], tmp_path: Path) -> None:
    assert browse(compare_html(pair).replace("</body>", f"{QUIET}</body>"), tmp_path) == {"requests": 0}


def test_names_of_runs_stay_text(monkeypatch: pytest.MonkeyPatch) -> None:
    content = make_comparison(("FFT", HOSTILE), layers=2)
    drawn = dict.fromkeys(compare_pictures(content), "")
    monkeypatch.setattr("loraforge.report.heads_compare.write_pictures", lambda *_: ([], drawn))
    content["warnings"] = [HOSTILE]
    page = _Page(compare_html(content))
    assert page.tags.count("script") == 1 and HOSTILE in page.text


def test_histograms_share_their_bins(pair: dict[str, Any]) -> None:
    with charts.update_chart(pair) as drawn:
        for axes, column in zip(drawn.axes, ("Urel", "U"), strict=True):
            filled = [patch for patch in axes.patches if hasattr(patch, "get_width")]
            edges = [sorted({round(bar.get_x(), 12) for bar in part}) for part in (filled[:30], filled[30:60])]
            assert edges[0] == edges[1] and len(edges[0]) == 30
            heights = [sum(bar.get_height() for bar in part) for part in (filled[:30], filled[30:60])]
            assert heights == [24, 24], f"every head is in a bin of {column}"


def test_numbers_of_the_panels_do_not_run_into_each_other() -> None:
    content = make_comparison(layers=2)
    for run in content["runs"].values():
        for i, row in enumerate(run["heads"]):
            row["I_pre"] = (i - 14) * 1e-4
    with charts.panels_chart(content) as drawn:
        drawn.draw_without_rendering()
        for axes in drawn.axes[:2]:
            low, high = axes.get_xlim()
            ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
            boxes = [label.get_window_extent() for place, label in ticks if low <= place <= high]
            assert len(boxes) > 2 and all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))


def test_the_verdict_of_a_run_is_said_once(pair: dict[str, Any]) -> None:
    page = _Page(compare_html(pair | {"findings": ["FFT: no relation.", "LoRA-r8: no relation."]}))
    assert page.text.count("FFT: no relation.") == page.text.count("LoRA-r8: no relation.") == 1
    assert "between importance before training and relative update" not in page.text


def test_differences_of_counts_are_whole(pair: dict[str, Any]) -> None:
    rows = {row[0].split(":")[0]: row[1] for row in difference_table(pair).rows}
    counts = [rows[name] for name in ("important but static", "plastic but unimportant") if name in rows]
    assert counts and all("." not in count for count in counts)


def test_panels_share_their_axes(pair: dict[str, Any]) -> None:
    with charts.panels_chart(pair) as drawn:
        left, right = drawn.axes[:2]
        assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
        assert left.get_xscale() == right.get_xscale()
        every = [row["Urel"] for run in pair["runs"].values() for row in run["heads"]]
        assert left.get_ylim()[0] <= min(every) and left.get_ylim()[1] >= max(every)


@pytest.mark.parametrize("same", [True, False], ids=["same start", "other start"])
def test_importance_before_training_is_compared_only_where_the_starts_differ(pair: dict[str, Any], same: bool) -> None:
    content = pair | {"comparison": pair["comparison"] | {"same_start": same}}
    with charts.headwise_chart(content) as drawn:
        titles = [axes.get_title(loc="left").split("\n")[0] for axes in drawn.axes]
    assert titles[:2] == ["relative update Urel = ‖ΔW‖ / Σ‖W₀‖", "importance after training, I_post"]
    assert ("importance before training, I_pre" in titles) is not same


def test_statistics_show_both_signs_and_chance(pair: dict[str, Any]) -> None:
    with charts.stats_chart(pair) as drawn:
        assert drawn.axes[0].get_xlim() == drawn.axes[3].get_xlim() == (-1, 1)
        # Two statistics, two runs: a band and a bar each.
        assert len(drawn.axes[0].patches) == 8
    table = statistics_table(pair)
    assert table.headers == ("statistic", "FFT", "LoRA-r8", "95 % by chance")
    assert table.rows[0][-1] == f"±{pair['comparison']['rho95']:.2f}"


def test_differences_keep_their_sign_and_interval(pair: dict[str, Any]) -> None:
    delta = pair["comparison"]["pairs"][0]["deltas"]["spearman_rho_Ipre_Urel"]
    row = next(row for row in difference_table(pair).rows if str(row[0]).startswith("ρ(I_pre, Urel)"))
    assert row[0] == "ρ(I_pre, Urel): FFT − LoRA-r8"
    assert row[1] == f"{delta['difference']:+.3f}".replace("-", "−") and " to " in str(row[2])


def test_ranks_need_two_spectra(pair: dict[str, Any]) -> None:
    assert has_ranks(pair)
    with ranks_chart(pair) as drawn:
        assert [axes.get_title(loc="left") for axes in drawn.axes] == ["q", "k", "v", "o"]
        # Two runs, and the dotted ceiling of LoRA.
        assert len(drawn.axes[0].lines) == 3 and set(drawn.axes[0].lines[2].get_ydata()) == {8}
    runs = {name: run | {"spectrum": []} for name, run in pair["runs"].items()}
    assert not has_ranks(pair | {"runs": runs}) and "compare_ranks" not in compare_pictures(pair | {"runs": runs})


def test_three_runs_fit() -> None:
    content = make_comparison(("FFT", "LoRA-r8", "LoRA-r16"), layers=2)
    styles = charts.run_looks(content)
    assert len({colour for colour, _ in styles.values()}) == len({marker for _, marker in styles.values()}) == 3
    with charts.headwise_chart(content) as drawn:
        assert len(drawn.axes) == 4
        for axes in drawn.axes:
            assert np.allclose(axes.get_xlim(), axes.get_ylim())
