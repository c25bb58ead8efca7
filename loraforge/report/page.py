"""The shell of every HTML page: one file, no script, no external resource, readable in light and dark."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path

from loraforge.report.tables import Table, format_cell

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --page: #ffffff; --card: #f6f8fa;
  --grid: #d0d4da; --best: #d7ebff; --link: #0072b2; --warn: #fff4d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #9aa4af; --page: #14171b; --card: #1d2126;
  --grid: #3a4149; --best: #123f63; --link: #6cc0f5; --warn: #44380f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.2rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--grid); }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem; }
p, ul { margin: .4rem 0 .8rem; max-width: 46rem; }
.lead { font-size: 1.08rem; color: var(--soft); }
.note { color: var(--soft); font-size: .92rem; }
.warn { background: var(--warn); padding: .5rem .9rem; border-radius: 6px; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1.1rem 0;
  padding: 0; }
.facts div { background: var(--card); border-radius: 8px; padding: .6rem .9rem; overflow-wrap: anywhere; }
.facts dt { color: var(--soft); font-size: .85rem; } .facts dd { margin: 0; font-size: 1.15rem; font-weight: 600; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.text { text-align: left; white-space: normal; }
th { font-weight: 600; color: var(--soft); } td.best { background: var(--best); font-weight: 700; }
pre { background: var(--card); padding: .8rem 1rem; border-radius: 8px; overflow-x: auto; font-size: .88rem; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .92em; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; color: var(--ink); margin: .5rem 0; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--link); }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole HTML document; `parts` are trusted HTML, `title` is text."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def table(data: Table) -> str:
    """A table as HTML: best cells marked, every cell escaped, scrolling sideways where it is wide."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in data.headers)
    rows = []
    for i, row in enumerate(data.rows):
        cells = []
        for column, value in enumerate(row):
            best = (i, column) in data.best
            cells.append(f"<td{' class=best' if best else ''}>{escape(format_cell(value))}</td>")
        rows.append("<tr>" + "".join(cells) + "</tr>")
    caption = f'<p class="note">{escape(data.caption)}</p>' if data.caption else ""
    body = "\n".join(rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>{caption}'


def facts(values: Mapping[str, object]) -> str:
    """A row of small cards: what, and its value."""
    cards = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(format_cell(v))}</dd></div>" for k, v in values.items())
    return f'<dl class="facts">{cards}</dl>'


def text(sentence: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{f' class={kind}' if kind else ''}>{escape(sentence)}</p>"


def points(sentences: Iterable[str]) -> str:
    """A list of plain sentences."""
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def code(lines: str) -> str:
    """A block of code."""
    return f"<pre><code>{escape(lines)}</code></pre>"


def section(title: str, *parts: str) -> str:
    """A section with a heading of plain text around trusted parts."""
    return f"<section><h2>{escape(title)}</h2>" + "\n".join(parts) + "</section>"


def fold(summary: str, *parts: str) -> str:
    """Parts that open on a click (no script)."""
    return f"<details><summary>{escape(summary)}</summary>" + "\n".join(parts) + "</details>"


def write_page(path: Path, html: str) -> Path:
    """Writes a page so that it appears whole or not at all."""
    with whole_file(path) as draft:
        draft.write_text(html, encoding="utf-8")
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to; the file takes its place when the block ends well, else it is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
