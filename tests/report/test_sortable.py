"""The sortable table: whole without scripts, and sorted and filtered by a real browser where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from loraforge.report.page import page
from loraforge.report.sortable import SCRIPT, STYLE, sortable
from loraforge.report.tables import Table

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = '<script>alert("x")</script>'
ROWS = (("L0H0", 0.25, None), ("L0H1", -3e-7, "static"), ("L10H2", float("nan"), None), ("L2H3", 12.5, HOSTILE))
# Clicks, then says what a reader would see; errors and loaded resources as well.
PROBE = """<script>
var seen = {errors: [], requests: performance.getEntriesByType("resource").length};
window.onerror = function (message) { seen.errors.push(String(message)); };
function order() {
  var rows = Array.prototype.slice.call(document.querySelectorAll(".sortable tbody tr"));
  return rows.filter(function (r) { return !r.hidden; }).map(function (r) { return r.cells[0].textContent; });
}
var headers = document.querySelectorAll(".sortable th"), field = document.querySelector(".sortable input");
seen.start = order();
headers[1].querySelector("button").click(); seen.falling = order(); seen.state = headers[1].getAttribute("aria-sort");
headers[1].querySelector("button").click(); seen.rising = order();
headers[0].querySelector("button").click(); seen.names = order();
field.value = "static"; field.dispatchEvent(new Event("input")); seen.filtered = order();
seen.told = document.querySelector(".sortable output").textContent;
seen.tools = document.querySelector(".tools").hidden;
document.title = JSON.stringify(seen);
</script>"""


def browse(text: str, folder: Path) -> dict[str, object]:
    """What the probe in a page found, after the page ran in a browser without a network."""
    file = folder / "page.html"
    file.write_text(text, encoding="utf-8")
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom",
             "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"]  # fmt: skip
    done = subprocess.run([BROWSER, *flags, file.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, "the console is silent"
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None
    found = json.loads(html.unescape(title[1]))
    assert isinstance(found, dict)
    return found


QUIET = '<script>document.title = JSON.stringify({requests: performance.getEntriesByType("resource").length})</script>'


@pytest.mark.skipif(BROWSER is None, reason="no browser on this machine")
def test_the_console_is_heard(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="console is silent"):
        browse("<title>{}</title><script>console.error('heard')</script>", tmp_path)


def table() -> str:
    return sortable(Table(("head", "I", "case"), ROWS, caption="a caption"), "heads")


def test_without_scripts_everything_is_there() -> None:
    text = table()
    assert text.count("<tr") == 5 and "a caption" in text and "hidden" in text.split("<table")[0]
    assert 'data-v="-3e-07"' in text and "−3e−07" in text, "sorted by the full value, shown rounded"
    assert HOSTILE not in text and html.escape(HOSTILE) in text
    assert text.count('data-v=""') == 3, "what is missing has no value to sort by"


def test_an_empty_table_is_a_table() -> None:
    assert sortable(Table(("head",), ()), "heads").count("<tr>") == 1


@pytest.mark.skipif(BROWSER is None, reason="no browser on this machine")
def test_a_browser_sorts_and_filters_it(tmp_path: Path) -> None:
    seen = browse(page("t", [STYLE, table(), SCRIPT, PROBE]), tmp_path)
    assert seen["errors"] == [] and seen["requests"] == 0
    assert seen["start"] == ["L0H0", "L0H1", "L10H2", "L2H3"]
    assert seen["falling"] == ["L2H3", "L0H0", "L0H1", "L10H2"] and seen["state"] == "descending"
    assert seen["rising"] == ["L0H1", "L0H0", "L2H3", "L10H2"], "what is missing stays last"
    assert seen["names"] == ["L0H0", "L0H1", "L2H3", "L10H2"], "numbers within names count as numbers"
    assert seen["filtered"] == ["L0H1"] and seen["told"] == "1 of 4 rows" and seen["tools"] is False
