"""The page of a run: offline, complete, safe, plain about what is missing, the same bytes each time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from loraforge.report import heads_words as words
from loraforge.report.heads import run_html, write_run_report
from loraforge.report.heads_pictures import ALT, pictures, write_pictures
from loraforge.report.heads_tables import case_table, components_table
from tests.report.heads_material import make_run
from tests.report.test_html import HOSTILE, _Page
from tests.report.test_sortable import BROWSER, PROBE, browse

DOCUMENT = ("fig_I_vs_U", "fig_I_vs_G", "fig_stats", "fig_Ipre_vs_Ipost", "fig_Ipost_corrs", "fig_U_vs_Ppred",
            "fig_bucket_orthogonality")  # fmt: skip


@pytest.fixture(scope="module")
def html() -> str:
    return run_html(make_run(3, 8))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests about words: drawing takes most of a page's time."""
    monkeypatch.setattr("loraforge.report.heads.write_pictures", lambda *_: ([], {"fig_stats": ""}))


def bare(layers: int = 2, heads: int = 4) -> dict[str, Any]:
    """A run of importance before training and update alone, as the document's least files give it."""
    run = make_run(layers, heads)
    kept = ("layer", "head", "stack", "kind", "I_pre", "U", "Urel")
    run |= {"heads": [{key: row[key] for key in kept} for row in run["heads"]], "spectrum": [], "importance": {}}
    run |= {"config": {}, "hashes": {}, "versions": {}, "command": None, "line": {}}
    run["rho"] = {key: run["rho"][key] for key in ("Ipre_U", "Ipre_Urel")}
    run["stats"] |= {key: None for key in run["stats"] if "post" in key}
    run["missing"] = {"importance_post.jsonl": "No importance after training.", "gradfisher_pre.jsonl": "No gradient."}
    return run


def test_the_page_loads_nothing_and_is_well_formed(html: str) -> None:
    page = _Page(html)
    assert not page.open and "http" not in html and "@import" not in html
    assert all(address.startswith("#") for address in page.addresses)
    assert not {"link", "iframe", "img", "image"} & set(page.tags) and page.tags.count("script") == 1
    wanted = {address[1:] for address in page.addresses} | set(re.findall(r"url\(#([^)]*)\)", html))
    assert len(page.ids) == len(set(page.ids)) and wanted <= set(page.ids)


def test_every_picture_is_named_for_those_who_do_not_see_it(html: str) -> None:
    labels = re.findall(r'<svg role="img" aria-label="([^"]*)"', html)
    expected = {ALT[name] for name in pictures(make_run(3, 8))}
    assert set(labels) == expected and len(labels) == len(expected)


def test_the_page_holds_the_numbers_and_their_chance_levels(html: str) -> None:
    run, text = make_run(3, 8), _Page(html).text
    for row in run["heads"]:
        assert f"L{row['layer']}H{row['head']}" in text
    assert f"±{run['null']['rho95']:.2f}" in text and "expected, 95 %" in text and "ab12" * 16 in text
    for said in (
        "Budhraja",
        "classifier is still random",
        "hypothesis",
        "loraforge measure run out/RTE",
        "torch 2.13.0",
        "rows measured 277",
    ):
        assert said in text


@pytest.mark.skipif(BROWSER is None, reason="no browser on this machine")
def test_a_browser_finds_no_fault(html: str, tmp_path: Path) -> None:
    seen = browse(html.replace("</body>", f"{PROBE}</body>"), tmp_path)
    assert seen["errors"] == [] and seen["requests"] == 0
    best = max(make_run(3, 8)["heads"], key=lambda row: row["I_pre"])
    falling = seen["falling"]
    assert isinstance(falling, list) and falling[0] == f"L{best['layer']}H{best['head']}"


def test_a_run_with_the_least_files_says_what_is_missing() -> None:
    text = _Page(run_html(bare())).text
    assert "No importance after training." in text and "No gradient." in text and "L1H3" in text
    assert set(pictures(bare())) == {"fig_I_vs_U", "fig_stats", "fig_bucket_orthogonality", "fig_heatmap_I_pre",
                                     "fig_heatmap_U"}  # fmt: skip


@pytest.mark.usefixtures("no_pictures")
def test_hostile_names_stay_text() -> None:
    run = bare()
    run |= {"name": HOSTILE, "task": HOSTILE, "notes": [HOSTILE], "command": HOSTILE, "hashes": {"x": HOSTILE}}
    run["config"] = {HOSTILE: HOSTILE}
    page = _Page(run_html(run))
    assert page.tags.count("script") == 1 and page.text.count(HOSTILE) >= 6


def test_files_have_the_documents_names_and_the_same_bytes_again(tmp_path: Path) -> None:
    run = make_run(2, 4)
    assert set(DOCUMENT) <= set(pictures(run))
    few = {name: draw for name, draw in pictures(run).items() if name in ("fig_stats", "fig_heatmap_I_pre")}
    first, second = (write_pictures(tmp_path / side, few, ALT, ("png", "svg")) for side in "ab")
    names = {path.name for path in first[0]}
    assert names == {"fig_stats.png", "fig_stats.svg", "fig_heatmap_I_pre.png", "fig_heatmap_I_pre.svg"}
    assert [p.read_bytes() for p in first[0]] == [p.read_bytes() for p in second[0]] and first[1] == second[1]
    alone = (tmp_path / "a" / "fig_stats.svg").read_text(encoding="utf-8")
    assert alone.startswith('<svg xmlns="http://www.w3.org/2000/svg"') and "https" not in alone


@pytest.mark.usefixtures("no_pictures")
def test_formats_are_what_was_asked_for(tmp_path: Path) -> None:
    assert [path.name for path in write_run_report(tmp_path, bare(), ("html",))] == ["report.html"]


@pytest.mark.parametrize(
    ("rho", "said"),
    [
        (0.1, "No relation beyond chance"),
        (0.6, "changed more"),
        (-0.6, "changed less"),
        (None, "could not be compared"),
    ],
)
def test_the_verdict_speaks_of_chance(rho: float | None, said: str) -> None:
    run = bare()
    run["rho"] = {"Ipre_Urel": {"rho": rho, "n": 72, "rho95": 0.23}}
    assert said in words.verdict(run)
    assert rho is None or "±0.23 for 72 heads" in words.verdict(run)


@pytest.mark.parametrize(("count", "said"), [(0, "fewer than"), (3, "as many as"), (9, "more than")])
def test_cases_are_told_beside_chance(count: int, said: str) -> None:
    run = bare()
    run["stats"]["n_important_but_static"] = count
    run["null"]["cases"]["important_but_static"] = {"expected": 4.0, "lo": 2, "hi": 8}
    assert any(said in told and "static" in told for told in words.findings(run))


def test_tables_have_true_minuses_and_few_digits() -> None:
    line = {"layer": 0, "head": 1, "I_pre": -9.16512e-05, "Urel": 0.0760712, "U": 2.1, "G": 0.002, "Ppred": 0.5}
    content = make_run(2, 4)
    content["cases"] = content["cases"] | {"important_but_static": [line]}
    assert case_table(content, "important_but_static").rows[0][:3] == ("L0H1", "−9.17e−05", "0.0761")
    part = {"part": "q", "U": 1.0, "share": 0.3217, "relative": None, "rho_Ipre": -0.14149, "rho_Ipost": None}
    assert components_table(content | {"components": [part]}).rows == (("W_q", 1.0, "32.2%", None, "−0.141", None),)
