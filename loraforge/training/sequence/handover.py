"""How a task starts from the one before it: which adapter becomes which, and that they belong together.

    policy           new default       new ema
    ema_to_both      previous ema      a copy of it
    default_to_both  previous default  a copy of it
    restore_both     previous default  previous ema
    keep             as restore_both: adapters are saved as they are, so going on with them is reading them again

The first task starts with a new `default` and a copy of it. Tensors alone are copied, nothing is added to the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError, raise_problems
from loraforge.tasks.card import read_task_card
from loraforge.training.ilora.config import ILoraConfig
from loraforge.training.sequence.layout import STATE, Previous, read_json

# What two adapters must share for one to start as the other: PEFT's words and ours.
_SHARED = {
    "r": "rank", "lora_alpha": "alpha", "target_modules": "targets", "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern", "use_rslora": "rslora", "use_dora": "dora", "bias": "bias",
    "modules_to_save": "modules_to_save",
}  # fmt: skip


def sources(previous: Previous, config: ILoraConfig, stable: bool) -> dict[str, Path]:
    """The folder that each adapter of the new task is read from.

    Args:
        previous: Of `find_previous`.
        config: Its `handover`.
        stable: Whether the task has an `ema` adapter.
    """
    ema, default = previous.ema, previous.default
    policy = config.handover
    if policy in ("restore_both", "keep"):
        found = {"default": default, "ema": ema}
    else:
        one = ema if policy == "ema_to_both" else default
        found = {"default": one, "ema": one}
    return {adapter: folder for adapter, folder in found.items() if folder is not None and (stable or adapter != "ema")}


def check_previous(folder: Path, model: Any, base: Mapping[str, Any], head_labels: Sequence[str] = ()) -> None:
    """Refuses an adapter that is not of the same base and form.

    Args:
        folder: Of the previous adapter.
        model: PeftModel with a fresh adapter `default`.
        base: Of `base_identity`.
        head_labels: Names of the rows of the head; a head of as many rows may mean other classes.

    Raises:
        LoraforgeError: Everything that differs, at once.
    """
    found = read_json(folder / "adapter_config.json")
    wanted = model.peft_config["default"].to_dict()
    problems = []
    for key, word in _SHARED.items():
        before, now = _plain(found.get(key)), _plain(wanted.get(key))
        if before != now:
            problems.append(
                LoraforgeError(
                    f"the adapter of the task before has another {word}", where=folder, got=_shown(before),
                    expected=_shown(now), hint="train the sequence with one set of lora options",
                )
            )  # fmt: skip
    problems += _head_problems(folder, list(head_labels))
    told = read_json(folder / STATE).get("base") or read_json(folder.parent / STATE).get("base")
    if told:
        digests = {key: told.get(key) for key in ("files", "revision") if told.get(key) is not None}
        mine = {key: base.get(key) for key in digests}
        if digests != mine:
            problems.append(_other_base(folder, told.get("name"), base.get("name"), "its files differ"))
    elif found.get("base_model_name_or_path") not in (None, base.get("name")):
        problems.append(_other_base(folder, found["base_model_name_or_path"], base.get("name"), "another name"))
    raise_problems(problems)


def _head_problems(folder: Path, head_labels: list[str]) -> list[LoraforgeError]:
    card = read_task_card(folder)
    # An adapter of one task names its classes without the task.
    if card is None or head_labels in (card["labels"], [f"{card['id']}:{label}" for label in card["labels"]]):
        return []
    return [
        LoraforgeError(
            "the head of the task before has other classes", where=folder, got=", ".join(card["labels"]) or "none",
            expected=", ".join(head_labels) or "none", hint="list all tasks in one sequence file and train by --tasks",
        )
    ]  # fmt: skip


def _other_base(folder: Path, before: Any, now: Any, how: str) -> LoraforgeError:
    return LoraforgeError(
        "the base changed between the tasks", where=folder, got=f"{before} ({how})", expected=str(now),
        hint="an adapter belongs to the base that it was trained on",
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """Values that mean the same, written the same."""
    if isinstance(value, set | list | tuple):
        # A list may name a module twice; PEFT takes it once.
        return sorted({str(item) for item in value}) or None
    if isinstance(value, Mapping):
        return dict(value) or None
    return None if value in (None, False, "none") else value


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
