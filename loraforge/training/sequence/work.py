"""What all units of a run share, and the model and starting point of one; a unit is a task, or jointly all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraforge.tasks import load_model
from loraforge.training.ilora.adapters import add_stable
from loraforge.training.ilora.config import ILoraConfig
from loraforge.training.options import adapt
from loraforge.training.sequence.layout import STATE, Previous, find_previous, task_folder
from loraforge.training.sequence.material import Material
from loraforge.training.sequence.spec import SequenceSpec
from loraforge.training.sequence.state import JOINT

Progress = Callable[[str, str, int, int], None]
Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Work:
    """What every unit of a run shares.

    Attributes:
        spec: The sequence.
        run: Folder of the run.
        material: Rows, labels, tokenizer.
        base: Of `base_identity`.
        device: Name of the device.
        progress: Called with (stage, detail, done, total).
        notify: Called with lines for people.
    """

    spec: SequenceSpec
    run: Path
    material: Material
    base: Mapping[str, Any]
    device: str
    progress: Progress | None
    notify: Notify

    @property
    def config(self) -> ILoraConfig:
        """The method's settings."""
        return self.spec.ilora_config()

    @property
    def units(self) -> tuple[str, ...]:
        """What is trained one after another."""
        return (JOINT,) if self.spec.method == "joint" else self.spec.task_ids


def build_model(work: Work) -> Any:
    """The base with a new adapter `default`, and `ema` where the method has one."""
    spec, material = work.spec, work.material
    model, _, fresh = load_model(
        spec.base_model, material.kind, head_labels=material.head_labels, dtype=spec.dtype, seed=spec.seed
    )
    adapted = adapt(model, spec.lora_options(), material.kind, fresh, seed=spec.seed)
    if work.config.keeps_stable:
        add_stable(adapted)
    return adapted


def previous_of(work: Work, index: int) -> Previous | None:
    """What a unit starts from; None for a new adapter."""
    if work.spec.method in ("joint", "single"):
        return None
    config, unit = work.config, work.units[index]
    before = work.units[index - 1] if index else None
    here = before is not None and (task_folder(work.run, before) / STATE).is_file()
    if here and config.current_task_id != unit:
        # What the settings say about a task before concerns the first one trained here.
        config = replace(config, ema_adapter_path=None, previous_task_model=None, prev_task_id=None)
    return find_previous(config, work.run, before)


def unit_arguments(spec: SequenceSpec, index: int) -> dict[str, Any]:
    """The training arguments of a unit as they were set: a task's own over the sequence's, never the seed.

    Jointly, `max_steps` counts for every task, so that all methods take equally many steps.
    """
    values = {key: value for key, value in spec.train.items() if key != "seed"}
    if spec.method == "joint":
        steps = values.get("max_steps")
        return {**values, "max_steps": steps * len(spec.tasks)} if isinstance(steps, int) and steps > 0 else values
    return {**values, **(spec.tasks[index].overrides or {})}
