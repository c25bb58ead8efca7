"""Reports: numbers in, tables, pictures and self-contained HTML pages out. Knows no algorithm and imports no torch."""

from __future__ import annotations

from loraforge.report.html import merge_report_html, render_html, write_merge_report, write_report

__all__ = ["merge_report_html", "render_html", "write_merge_report", "write_report"]
