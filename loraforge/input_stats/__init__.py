"""Input statistics of a model: collected over real data, in parts if need be, kept in one file, read back."""

from __future__ import annotations

from loraforge.input_stats.collect import collect_stats
from loraforge.input_stats.file import load_stats, stats_for
from loraforge.input_stats.parts import merge_stats

__all__ = ["collect_stats", "load_stats", "merge_stats", "stats_for"]
