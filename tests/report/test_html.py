"""The HTML reports: self-contained, complete, safe with hostile names, plain about what is missing."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from loraforge.report import merge_report_html, render_html, sections, write_merge_report, write_report
from tests.report.conftest import make_report, make_results

HOSTILE = '<script>alert("x")</script>&$\\frac{1}{0}$'


class _Page(HTMLParser):
    """Collects what a page loads, its ids and the words a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in {"meta", "br", "path", "use", "line"}:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "data"}]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {
        "demo": render_html(make_results()),
        "calibrated": merge_report_html(make_report()),
        "data-free": merge_report_html(make_report("weighted-average", calibrated=False)),
    }


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests about words: drawing takes most of a page's time."""
    monkeypatch.setattr(sections, "svg", lambda draw, label: f"<p>chart: {label}</p>")


@pytest.mark.parametrize("name", ["demo", "calibrated", "data-free"])
def test_page_loads_nothing_from_outside(pages: dict[str, str], name: str) -> None:
    page = _Page(pages[name])
    assert "<svg" in pages[name]
    assert all(address.startswith("#") for address in page.addresses)
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert "@import" not in pages[name] and "http" not in pages[name]
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", pages[name]))


@pytest.mark.parametrize("name", ["demo", "calibrated", "data-free"])
def test_ids_are_unique_and_references_resolve(pages: dict[str, str], name: str) -> None:
    page = _Page(pages[name])
    assert len(page.ids) == len(set(page.ids))
    wanted = {address[1:] for address in page.addresses} | set(re.findall(r"url\(#([^)]*)\)", pages[name]))
    assert wanted <= set(page.ids)


def test_demo_page_names_every_row_and_number(results: dict[str, Any], pages: dict[str, str]) -> None:
    text = _Page(pages["demo"]).text
    for row in results["rows"]:
        assert row["name"] in text
        for value in (*row["accuracies"], row["mean"]):
            assert f"{value:.1f}" in text
    for task, what in results["notes"].items():
        assert f"{task}: {what}" in text
    assert "loraforge demo --seed 7" in text and "597 images" in text and "torch 2.11.0" in text


@pytest.mark.usefixtures("no_charts")
def test_demo_page_marks_the_winner_whoever_it_is(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        if row["name"] == "weighted-average":
            row["mean"], row["accuracies"] = 77.25, [77.25] * 8
    html = render_html(results)
    assert "weighted-average has the highest mean accuracy: 77.2 %" in html
    assert html.count("<td class=best>77.2</td>") == 9


@pytest.mark.usefixtures("no_charts")
def test_demo_page_of_full_models_says_how_its_setting_was_chosen(results: dict[str, Any]) -> None:
    text = _Page(render_html(results | {"inputs": "models"})).text
    assert "One model for all tasks" in text
    for said in ("three pilots", "these same test images", "150 of each", "learning rate", "one seed", "scaled by 0.3",
                 "Differences of one or two points mean little"):  # fmt: skip
        assert said in text


def test_merge_page_shows_every_module_and_input(report: dict[str, Any], pages: dict[str, str]) -> None:
    text = _Page(pages["calibrated"]).text
    for layer in report["layers"]:
        assert layer["module"] in text
    for adapter in report["adapters"]:
        assert adapter["path"] in text and adapter["sha256"][:16] in text
    for title in ("Residual by module", "Effective sample size", "Spectra", "Iterations", "Module by module"):
        assert title in text
    assert "The iteration converged. One more ordinary iteration on the result changes it by 1e-12" in text
    assert "rotated.safetensors" in text and "blocks" in text and "share of all" in text
    assert "3 modules have fewer than 8 tokens" in text and "196,608" in text and "512.0 MiB" in text


def test_data_free_merge_says_why_sections_are_missing(pages: dict[str, str]) -> None:
    text = _Page(pages["data-free"]).text
    for what in ("residuals", "sample weights", "iterations"):
        assert f"weighted-average uses no calibration data, so it has no {what} to report." in text


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize(
    ("key", "what"),
    [("residual_after", "residuals"), ("ess", "sample weights")],
)
@pytest.mark.parametrize("how", ["absent", "none", "nan"])
def test_option_that_was_off_is_said(report: dict[str, Any], key: str, what: str, how: str) -> None:
    for layer in report["iteris"]["layers"]:
        layer[key] = float("nan") if how == "nan" else None
        if how == "absent":
            del layer[key]
    assert f"This run reported no {what}: the option that makes them was off." in merge_report_html(report)


@pytest.mark.usefixtures("no_charts")
def test_every_optional_key_may_be_absent(report: dict[str, Any]) -> None:
    layer_keys = [key for key in report["iteris"]["layers"][0] if key != "module"]
    for key in layer_keys:
        fewer = copy.deepcopy(report)
        for layer in fewer["iteris"]["layers"]:
            del layer[key]
        assert "vit.layers.1.mlp.fc2" in merge_report_html(fewer), key
    for key in [key for key in report if key != "method"]:
        fewer = {name: value for name, value in report.items() if name != key}
        assert "Merge by iteris-plus" in merge_report_html(fewer), key


def test_charts_are_drawn_without_the_residual_before(report: dict[str, Any]) -> None:
    for layer in report["iteris"]["layers"]:
        del layer["residual_before"]
    report["iteris"]["iterations"][1]["residual"] = None
    text = _Page(merge_report_html(report)).text
    assert "Residual by module" in text and " after " in text


def test_nearly_empty_report_is_still_a_page() -> None:
    text = _Page(merge_report_html({"method": "svd"})).text
    assert "This run kept no singular values" in text and "no numbers by module" in text


def test_hostile_names_stay_text(results: dict[str, Any], report: dict[str, Any]) -> None:
    report["method"] = report["layers"][0]["module"] = report["iteris"]["layers"][0]["module"] = HOSTILE
    report["adapters"][0]["path"] = report["warnings"][0] = report["device"] = HOSTILE
    results["tasks"] = [HOSTILE, *results["tasks"][1:]]
    results["rows"][2]["name"] = results["command"] = HOSTILE
    results["notes"] = {HOSTILE: HOSTILE}
    results["reports"] = {HOSTILE: report}
    for html in (render_html(results), merge_report_html(report)):
        page = _Page(html)
        assert "script" not in page.tags
        assert HOSTILE in page.text, "shown as it is, not dropped"


def test_lists_of_sample_sizes_and_many_modules_are_drawn(report: dict[str, Any]) -> None:
    layers = report["iteris"]["layers"]
    report["iteris"]["layers"] = [
        layer | {"module": f"blocks.{i}.{layer['module']}", "ess": [10.0 * k + i for k in range(1, 9)]}
        for i in range(5)
        for layer in layers
    ]
    text = _Page(merge_report_html(report)).text
    assert "a dot a task" in text and "60 modules in running order" in text


def test_same_numbers_give_the_same_bytes(pages: dict[str, str], results: dict[str, Any]) -> None:
    assert render_html(results) == pages["demo"]


def test_files_appear_whole(tmp_path: Path, pages: dict[str, str], report: dict[str, Any]) -> None:
    merge = write_merge_report(tmp_path / "new" / "merge.html", report)
    assert merge.read_text(encoding="utf-8") == pages["calibrated"]
    assert [p.name for p in merge.parent.iterdir()] == ["merge.html"] and merge.stat().st_mode & 0o444


def test_failed_write_leaves_nothing(tmp_path: Path, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraforge.report.html.render_html", lambda results: "\udcff")
    with pytest.raises(UnicodeEncodeError):
        write_report(tmp_path / "demo.html", results)
    assert list(tmp_path.iterdir()) == []
