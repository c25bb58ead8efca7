"""The embedded default: trains a small model and its adapters, merges them, measures and reports."""

from __future__ import annotations

from loraforge.demo.run import run_demo

__all__ = ["run_demo"]
