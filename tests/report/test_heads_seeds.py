"""The report over seeds: every seed a mark, spreads, differences against noise, and one seed said to be one."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraforge.report.heads_seeds import seeds_html, seeds_pictures, spread_table, stability_table, verdict
from loraforge.report.heads_seeds_charts import statistics_chart
from tests.report.heads_material import make_seeds
from tests.report.test_html import _Page
from tests.report.test_sortable import BROWSER, QUIET, browse


def test_the_page_is_offline_and_complete() -> None:
    content = make_seeds()
    html = seeds_html(content)
    page = _Page(html)
    assert not page.open and "http" not in html and html.count('<svg role="img"') == len(seeds_pictures(content)) == 3
    assert all(str(run["folder"]) in page.text for run in content["runs"])
    entry = content["statistics"]["FFT"]["rte"]["spearman_rho_Ipre_Urel"]
    assert f"{entry['mean']:.3f} ± {entry['sd']:.3f}".replace("-", "−") in page.text


@pytest.mark.skipif(BROWSER is None, reason="no browser on this machine")
def test_a_browser_finds_no_fault(tmp_path: Path) -> None:
    assert browse(seeds_html(make_seeds()).replace("</body>", f"{QUIET}</body>"), tmp_path) == {"requests": 0}


def test_the_verdict_counts_what_is_larger_than_noise() -> None:
    content = make_seeds()
    assert verdict(content).startswith("3 of 6 differences") and "on rte (FFT − LoRA-r8)" in verdict(content)
    for row in content["differences"]:
        row["larger"] = False
    assert verdict(content).startswith("None of 6 differences")


def test_one_seed_has_no_spread_and_says_so() -> None:
    content = make_seeds(seeds=1)
    assert verdict(content).startswith("Not enough seeds") and not stability_table(content).rows
    assert "seeds_stability" not in seeds_pictures(content)
    assert "One seed alone has no spread" in _Page(seeds_html(content)).text
    assert all("±" not in str(row[3]) for row in spread_table(content).rows)


def test_every_seed_is_a_mark() -> None:
    content = make_seeds()
    with statistics_chart(content) as drawn:
        marks = [line for line in drawn.axes[0].lines if line.get_marker() in ("o", "D")]
        assert [len(line.get_xdata()) for line in marks] == [3, 3, 3, 3]
        assert drawn.axes[0].get_xlim() == (-1, 1)
        means = [line.get_xdata()[0] for line in drawn.axes[0].lines if line.get_linewidth() == 2.2]
    found = content["statistics"]
    expected = [found[m][t]["spearman_rho_Ipre_Urel"]["mean"] for t in ("mrpc", "rte") for m in ("FFT", "LoRA-r8")]
    assert means == pytest.approx(expected)
