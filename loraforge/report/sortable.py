"""A table that can be sorted and filtered in the page itself: plain HTML that gains buttons where scripts run."""

from __future__ import annotations

import math
from html import escape

from loraforge.report.tables import Table, format_cell

STYLE = """<style>
.sortable th button { all: unset; cursor: pointer; font-weight: 600; } .sortable th button:focus-visible {
  outline: 2px solid var(--link); outline-offset: 2px; }
.sortable th[aria-sort] button { color: var(--link); } .sortable th button::after { content: " \\2195"; opacity: .45; }
.sortable th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
.sortable th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
.sortable tbody tr:hover td { background: var(--card); } .sortable .high { max-height: 36rem; overflow: auto; }
.sortable thead th { position: sticky; top: 0; background: var(--page); }
.sortable input { font: inherit; padding: .25rem .5rem; border: 1px solid var(--grid); border-radius: 6px;
  background: var(--page); color: var(--ink); width: 12rem; }
</style>"""

# Without scripts the table is as it is written. Values come from data-v at full precision; empty ones stay last.
SCRIPT = """<script>
"use strict";
(function () {
  function compare(a, b, sign) {
    if (a === "" || b === "") { return (a === "") - (b === ""); }
    var x = Number(a), y = Number(b);
    if (isNaN(x) || isNaN(y)) { return sign * a.localeCompare(b, "en", { numeric: true }); }
    return sign * (x - y);
  }
  function value(row, column) {
    var cell = row.cells[column];
    return cell.hasAttribute("data-v") ? cell.getAttribute("data-v") : cell.textContent;
  }
  function sort(table, header, column) {
    var falling = header.getAttribute("aria-sort");
    // Numbers start with the largest, words with A; the second click turns round.
    var words = isNaN(Number(value(table.tBodies[0].rows[0], column)));
    var next = falling ? (falling === "descending" ? "ascending" : "descending") : (words ? "ascending" : "descending");
    Array.prototype.forEach.call(table.tHead.rows[0].cells, function (cell) { cell.removeAttribute("aria-sort"); });
    header.setAttribute("aria-sort", next);
    var rows = Array.prototype.slice.call(table.tBodies[0].rows);
    rows.sort(function (a, b) {
      var order = compare(value(a, column), value(b, column), next === "ascending" ? 1 : -1);
      return order || Number(a.getAttribute("data-i")) - Number(b.getAttribute("data-i"));
    });
    rows.forEach(function (row) { table.tBodies[0].appendChild(row); });
  }
  function filter(table, input, status) {
    var wanted = input.value.trim().toLowerCase(), shown = 0, all = table.tBodies[0].rows;
    Array.prototype.forEach.call(all, function (row) {
      var fits = row.textContent.toLowerCase().indexOf(wanted) >= 0;
      row.hidden = !fits;
      shown += fits;
    });
    status.textContent = shown + " of " + all.length + " rows";
  }
  Array.prototype.forEach.call(document.querySelectorAll(".sortable"), function (box) {
    var table = box.querySelector("table"), input = box.querySelector("input");
    if (!table || !table.tBodies[0].rows.length) { return; }
    Array.prototype.forEach.call(table.tHead.rows[0].cells, function (header, column) {
      var button = document.createElement("button");
      button.type = "button";
      button.textContent = header.textContent;
      header.textContent = "";
      header.appendChild(button);
      button.addEventListener("click", function () { sort(table, header, column); });
    });
    box.querySelector(".tools").hidden = false;
    input.addEventListener("input", function () { filter(table, input, box.querySelector("output")); });
  });
})();
</script>"""


def sortable(data: Table, name: str) -> str:
    """A table as HTML; where scripts run, its headers sort it and a field filters it.

    `STYLE` and `SCRIPT` are added once a page, the script behind the last table.

    Args:
        data: The table; numbers keep their full precision for sorting.
        name: What the rows are, for the filter's label.
    """
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in data.headers)
    rows = "\n".join(
        f'<tr data-i="{i}">{"".join(_cell(value) for value in row)}</tr>' for i, row in enumerate(data.rows)
    )
    tools = (
        f'<p class="tools note" hidden><label>Show only {escape(name)} with <input type="search" '
        'placeholder="L3, static, ..."/></label> <output aria-live="polite"></output></p>'
    )
    caption = f'<p class="note">{escape(data.caption)}</p>' if data.caption else ""
    return (
        f'<div class="sortable">{tools}<div class="scroll high"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n'
        f"</tbody></table></div>{caption}</div>"
    )


def _cell(value: object) -> str:
    """A cell with its raw value beside the rounded one."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        known = not (isinstance(value, float) and not math.isfinite(value))
        raw = f' data-v="{value!r}"' if known else ' data-v=""'
        return f"<td{raw}>{escape(format_cell(value)).replace('-', '−') if known else '–'}</td>"
    if value is None:
        return '<td data-v="">–</td>'
    return f'<td class="text">{escape(str(value))}</td>'
