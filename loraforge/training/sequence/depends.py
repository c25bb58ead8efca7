"""What a run depends on: everything that, changed, would make its finished part another run's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraforge.errors import LoraforgeError
from loraforge.storage.files import sha256_of
from loraforge.training.sequence.spec import SequenceSpec

if TYPE_CHECKING:
    from loraforge.tasks import TaskData

# Files of a base that decide what a model built on it computes.
_BASE_FILES = (
    "config.json", "*.safetensors", "*.bin", "*.index.json", "tokenizer*", "vocab*", "merges*", "*.model",
    "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json",
)  # fmt: skip
# Training arguments that change what is written down or how fast, never the weights.
_WITHOUT_EFFECT = (
    "logging_steps", "logging_strategy", "logging_first_step", "save_steps", "save_strategy", "save_total_limit",
    "eval_steps", "eval_strategy", "evaluation_strategy", "per_device_eval_batch_size", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers", "log_level", "run_name",
)  # fmt: skip
# Settings of I-LORA that say where to look or what to call the result.
_PLACES = ("ema_adapter_path", "previous_task_model", "prev_task_id", "current_task_id", "final_adapter")
# What a task's rows are read and scored with; where they come from is known by their digest.
_READ = (
    "kind", "text", "text_pair", "target", "target_map", "label", "choices", "answer", "first_choice", "max_length",
    "max_target_length", "loss_on", "rows", "extract", "metric", "max_new_tokens",
)  # fmt: skip
_SHOWN = 6


def depends_on(
    spec: SequenceSpec,
    base: Mapping[str, Any],
    kind: str,
    head_labels: Sequence[str],
    train: Sequence[TaskData],
    scored: Sequence[TaskData],
) -> dict[str, Any]:
    """Everything that decides the bytes of a run, ready for JSON.

    Args:
        spec: The sequence.
        base: Of `base_identity`.
        kind: Kind of its tasks.
        head_labels: Names of the rows of the head.
        train: Training rows of each task.
        scored: The rows that each task is scored on.
    """
    ilora = spec.ilora_config().as_dict()
    scoring = {key: spec.eval[key] for key in ("choice_mode", "max_new_tokens") if spec.eval.get(key) is not None}
    found = {
        "method": spec.method,
        "base": {key: value for key, value in base.items() if key != "name"},
        "kind": kind,
        "label_space": spec.label_space if head_labels else None,
        "head_labels": list(head_labels),
        "dtype": spec.dtype,
        "seed": spec.seed,
        "lora": spec.lora_options().record(),
        "ilora": {key: value for key, value in ilora.items() if key not in _PLACES},
        "train": _deciding(spec.train),
        "eval": scoring,
        "tasks": [
            {
                "id": task.id,
                **{key: getattr(task, key) for key in _READ if getattr(task, key, None) is not None},
                "overrides": _deciding(task.overrides or {}),
                "train_sha256": rows.sha256,
                "train_rows": len(rows),
                "scored_sha256": test.sha256,
                "scored_rows": len(test),
            }
            for task, rows, test in zip(spec.tasks, train, scored, strict=True)
        ],
    }
    # Through JSON once, so that what is compared is what is stored.
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def _deciding(values: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in values.items() if key not in (*_WITHOUT_EFFECT, "seed")}


def base_identity(base: str, config: Any) -> dict[str, Any]:
    """What a base is: the digest of each of its files, or the revision of an id in the local cache."""
    folder = Path(base)
    if not folder.is_dir():
        return {"name": base, "revision": getattr(config, "_commit_hash", None)}
    paths = sorted({path for pattern in _BASE_FILES for path in folder.glob(pattern) if path.is_file()})
    return {"name": base, "files": {path.name: sha256_of(path) for path in paths}}


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], run: Path) -> None:
    """Refuses to continue a run as another one; tasks may be added behind the old ones.

    Raises:
        LoraforgeError: Names what differs; a changed base is said in words of its own.
    """
    told = before.get("tasks", [])
    first = {**now, "tasks": now["tasks"][: len(told)]}
    changed = list(differences(before, first))
    if not changed:
        return
    base = [line for line in changed if line.startswith("base")]
    what = "the base changed since this run began" if base else "this run was begun with other settings or data"
    shown = (base or changed)[:_SHOWN]
    more = f"; and {len(changed) - len(shown)} more" if len(changed) > len(shown) else ""
    raise LoraforgeError(
        what,
        where=run,
        got="; ".join(shown) + more,
        expected="the base, settings and data that its finished tasks were trained with",
        hint="put them back, or train into another folder (--out DIR), or start anew (--resume never --overwrite)",
    )


def differences(before: Any, now: Any, place: str = "") -> Iterator[str]:
    """Each value that differs between two JSON values, as `place was ..., now ...`."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            yield from differences(before.get(key), now.get(key), f"{place}.{key}" if place else key)
    elif isinstance(before, list) and isinstance(now, list) and any(isinstance(x, Mapping) for x in (*before, *now)):
        for i in range(max(len(before), len(now))):
            old, new = (side[i] if i < len(side) else None for side in (before, now))
            name = (old or new or {}).get("id", i + 1)
            yield from differences(old, new, f"{place}[{name}]")
    elif before != now:
        yield f"{place} was {_brief(before)}, now {_brief(now)}"


def _brief(value: Any) -> str:
    if value is None:
        return "not there"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
