"""Reports: numbers in, tables, pictures and self-contained HTML pages out. Knows no algorithm and imports no torch."""

from __future__ import annotations

from loraforge.report.html import merge_report_html, render_html, write_merge_report, write_report
from loraforge.report.inspection import inspection_html, save_inspection_picture, write_inspection_report

__all__ = [
    "inspection_html",
    "merge_report_html",
    "render_html",
    "save_inspection_picture",
    "write_inspection_report",
    "write_merge_report",
    "write_report",
]
