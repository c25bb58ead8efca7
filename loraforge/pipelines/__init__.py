"""Pipelines: a preset or recipe from its data to the table of base, own adapters and merges, as stages that resume."""

from __future__ import annotations

from loraforge.pipelines.fetching import download
from loraforge.pipelines.recipe import open_pipeline, pipeline_presets
from loraforge.pipelines.run import run_pipeline

__all__ = ["download", "open_pipeline", "pipeline_presets", "run_pipeline"]
