"""Scores of models on tasks: metrics with intervals, choice likelihoods, generated answers, tables of many adapters."""

from loraforge.evaluation.evaluate import evaluate
from loraforge.evaluation.intervals import bootstrap, paired_bootstrap, wilson
from loraforge.evaluation.metrics import METRICS, default_metric
from loraforge.evaluation.score import TaskScore, score_task

__all__ = [
    "METRICS",
    "TaskScore",
    "bootstrap",
    "default_metric",
    "evaluate",
    "paired_bootstrap",
    "score_task",
    "wilson",
]
