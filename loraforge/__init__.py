"""loraforge: merge LoRA adapters, train them task after task, and measure what they do to a model.

    import loraforge as lf
    merged = lf.merge(["loras/a", "loras/b"], method="svd")
    merged.save("out")

Importing this package is cheap: names are resolved on first use (PEP 562), so torch is loaded only when it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "merge": "loraforge.merging.runner",
    "MergeResult": "loraforge.merging.result",
    "METHODS": "loraforge.merging.methods",
    "inspect": "loraforge.inspection",
    "resize": "loraforge.resizing",
    "convert": "loraforge.conversion",
    "collect_stats": "loraforge.input_stats",
    "merge_stats": "loraforge.input_stats",
    "load_stats": "loraforge.input_stats",
    "open_adapter": "loraforge.adapters",
    "train_lora": "loraforge.training.single",
    "train_full": "loraforge.training.single",
    "train_ilora": "loraforge.training.sequence.run",
    "cl_eval": "loraforge.training.sequence.evaluate",
    "cl_report": "loraforge.training.sequence.report",
    "evaluate": "loraforge.evaluation.evaluate",
    "measure_run": "loraforge.measure.run",
    "measure_importance": "loraforge.measure.importance.measure",
    "measure_fisher": "loraforge.measure.importance.gradients",
    "measure_update": "loraforge.measure.updates.update",
    "measure_spectrum": "loraforge.measure.updates.spectra",
    "open_subject": "loraforge.measure.subjects.subject",
    "layout_of_model": "loraforge.measure.heads.find",
    "HeadGates": "loraforge.measure.heads.gates",
    "aggregate": "loraforge.measure.analysis.aggregate",
    "summarise": "loraforge.measure.analysis.seeds",
    "compare": "loraforge.measure.analysis.compare",
    "suggest_ranks": "loraforge.measure.analysis.suggest",
    "suggest_targets": "loraforge.measure.analysis.suggest",
    "run_pipeline": "loraforge.pipelines.run",
    "download": "loraforge.pipelines.fetching",
    "run_demo": "loraforge.demo",
    "run_bench": "loraforge.bench",
    "LowRank": "loraforge.types",
    "LoraforgeError": "loraforge.errors",
    "UsageError": "loraforge.errors",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from loraforge.adapters import open_adapter as open_adapter
    from loraforge.bench import run_bench as run_bench
    from loraforge.conversion import convert as convert
    from loraforge.demo import run_demo as run_demo
    from loraforge.errors import LoraforgeError as LoraforgeError
    from loraforge.errors import UsageError as UsageError
    from loraforge.evaluation.evaluate import evaluate as evaluate
    from loraforge.input_stats import collect_stats as collect_stats
    from loraforge.input_stats import load_stats as load_stats
    from loraforge.input_stats import merge_stats as merge_stats
    from loraforge.inspection import inspect as inspect
    from loraforge.measure.analysis.aggregate import aggregate as aggregate
    from loraforge.measure.analysis.compare import compare as compare
    from loraforge.measure.analysis.seeds import summarise as summarise
    from loraforge.measure.analysis.suggest import suggest_ranks as suggest_ranks
    from loraforge.measure.analysis.suggest import suggest_targets as suggest_targets
    from loraforge.measure.heads.find import layout_of_model as layout_of_model
    from loraforge.measure.heads.gates import HeadGates as HeadGates
    from loraforge.measure.importance.gradients import measure_fisher as measure_fisher
    from loraforge.measure.importance.measure import measure_importance as measure_importance
    from loraforge.measure.run import measure_run as measure_run
    from loraforge.measure.subjects.subject import open_subject as open_subject
    from loraforge.measure.updates.spectra import measure_spectrum as measure_spectrum
    from loraforge.measure.updates.update import measure_update as measure_update
    from loraforge.merging.methods import METHODS as METHODS
    from loraforge.merging.result import MergeResult as MergeResult
    from loraforge.merging.runner import merge as merge
    from loraforge.pipelines.fetching import download as download
    from loraforge.pipelines.run import run_pipeline as run_pipeline
    from loraforge.resizing import resize as resize
    from loraforge.training.sequence.evaluate import cl_eval as cl_eval
    from loraforge.training.sequence.report import cl_report as cl_report
    from loraforge.training.sequence.run import train_ilora as train_ilora
    from loraforge.training.single import train_full as train_full
    from loraforge.training.single import train_lora as train_lora
    from loraforge.types import LowRank as LowRank


def __getattr__(name: str) -> Any:
    """Resolves a public name on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'loraforge' has no attribute '{name}'")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
