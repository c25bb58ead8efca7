"""What a run's folder says of its training: base, final weights, task, seed; checked against what lies there now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loraforge.adapters import open_adapter
from loraforge.checkpoints import open_checkpoint
from loraforge.errors import LoraforgeError, raise_problems
from loraforge.measure.files import FINAL
from loraforge.measure.subjects.task_rows import HEADED
from loraforge.storage.yaml_file import read_yaml
from loraforge.tasks import TaskSpec, parse_task, read_task_card, resolve_kind, task_labels
from loraforge.tasks.rows import read_rows

FFT, LORA = "FFT", "LoRA"
RECORD = "run.json"
# Splits that a measurement takes, the first that the task has.
_SPLITS = ("test", "eval")


@dataclass(frozen=True)
class Trained:
    """A finished training, and on which rows it is measured.

    Attributes:
        out: Folder of the measurements.
        final: Adapter, or model of full fine-tuning.
        base: Folder or id of what it started from.
        method: FFT or LORA.
        rank: Of the adapter; None for full fine-tuning.
        seed: Of the training, which also made the head up.
        labels: Names of the head's rows.
        kind: Of the task.
        task: The task, with the sources of the splits that were not trained on.
        split: The split that is measured.
        size: Its rows.
        data: {split, source, sha256, rows}.
        base_sha256: Digest of the base's weights.
        final_sha256: Digest of the adapter's or the model's.
        record: The content of run.json; empty where the folder was left by another program.
    """

    out: Path
    final: Path
    base: str
    method: str
    rank: int | None
    seed: int
    labels: tuple[str, ...]
    kind: str
    task: TaskSpec
    split: str
    size: int
    data: Mapping[str, Any]
    base_sha256: str
    final_sha256: str
    record: Mapping[str, Any] = field(repr=False)

    @property
    def snapshots(self) -> Path | None:
        """The folder of the copies that were kept along the way, or None."""
        folder = self.final / "snapshots"
        return folder if folder.is_dir() and any(folder.iterdir()) else None


def open_trained(
    run_dir: str | Path,
    *,
    out: str | Path | None = None,
    base: str | Path | None = None,
    final: str | Path | None = None,
    task: TaskSpec | str | Path | None = None,
    data: Any = None,
    split: str | None = None,
    seed: int | None = None,
) -> Trained:
    """Reads what a training left and checks that base and rows are still those.

    Args:
        run_dir: Folder with `ckpt_final`, or itself what train-lora or train-full wrote.
        out: Folder of the measurements; default `run_dir`, or its folder `measure` where it is a training's output.
        base: The base, where it is no longer at its recorded place.
        final: Adapter or model, instead of the folder's own.
        task: Task, or file of one, instead of the recorded one.
        data: Rows to measure on, instead of the task's.
        split: `test`, `eval` or `train`; default the first of test and eval that the task has.
        seed: Of the head; for folders without a record.

    Raises:
        LoraforgeError: No training there, another base than the one it started from, rows that have changed.
    """
    folder = Path(run_dir)
    place = Path(final) if final is not None else _final(folder)
    record = _read_record(place)
    card = read_task_card(place) or {}
    start = str(base) if base is not None else record.get("base") or card.get("base")
    if start is None and (folder / "ckpt_init" / "config.json").is_file():
        start = str(folder / "ckpt_init")
    spec = _task(task, record, card, place)
    problems = [
        LoraforgeError(f"the folder does not say {what}", where=place, expected=f"{RECORD} of train-lora or train-full",
                       hint=hint)
        for what, hint, known in (("what it started from", "--base MODEL", start), ("its task", "--task FILE", spec))
        if known is None
    ]  # fmt: skip
    raise_problems(problems)
    if start is None or spec is None:  # told above
        raise LoraforgeError("the training is not known", where=place)
    spec, rows_split, about = _rows(spec, record if task is None else {}, data, split)
    adapter = _read_json(place / "adapter_config.json")
    kind = str(record.get("task", {}).get("kind") or card.get("kind") or _kind(spec, start, rows_split))
    labels = tuple(record.get("labels") or card.get("labels") or (task_labels(spec) if kind in HEADED else ()))
    return Trained(
        out=Path(out) if out is not None else folder if place != folder else folder / "measure",
        final=place,
        base=start,
        method=FFT if adapter is None else LORA,
        rank=None if adapter is None else int(adapter["r"]),
        seed=int(record.get("seed", 0) if seed is None else seed),
        labels=labels,
        kind=kind,
        task=spec,
        split=rows_split,
        size=int(about["rows"]),
        data=about,
        base_sha256=_base_sha256(start, record),
        final_sha256=(open_checkpoint(place) if adapter is None else open_adapter(place)).sha256,
        record=record,
    )


def _final(folder: Path) -> Path:
    """Where the trained weights lie."""
    if (folder / FINAL).is_dir():
        return folder / FINAL
    if (folder / RECORD).is_file() or (folder / "adapter_config.json").is_file():
        return folder
    got = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) if folder.is_dir() else "no folder"
    raise LoraforgeError(
        "no training to measure", where=folder, got=got or "an empty folder",
        expected=f"{FINAL}/, or what train-lora or train-full wrote",
        hint=f"loraforge train-lora ... --out {folder / FINAL}",
    )  # fmt: skip


def _read_record(place: Path) -> dict[str, Any]:
    if not place.is_dir():
        raise LoraforgeError("the trained weights are not there", where=place, expected="a folder")
    return _read_json(place / RECORD) or {}


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no file."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoraforgeError("the file is no JSON", where=path, got=str(error)) from error
    if not isinstance(found, dict):
        raise LoraforgeError("the file holds no object", where=path, got=type(found).__name__)
    return found


def _task(
    given: TaskSpec | str | Path | None, record: Mapping[str, Any], card: Mapping[str, Any], place: Path
) -> TaskSpec | None:
    """The task asked for, else the recorded one with the sources of its splits."""
    if isinstance(given, TaskSpec):
        return given
    if given is not None:
        path = Path(given)
        return parse_task(read_yaml(path, "task file"), path, path.parent)
    if record.get("task"):
        sources = {name: part["source"] for name, part in record.get("data", {}).items()}
        return parse_task({**record["task"], **sources}, place / RECORD)
    if not card:
        return None
    known = {key: card[key] for key in ("id", "kind", "text", "text_pair", "target", "max_length") if card.get(key)}
    return parse_task(known, place / "task.json")


def _rows(
    spec: TaskSpec, record: Mapping[str, Any], data: Any, split: str | None
) -> tuple[TaskSpec, str, dict[str, Any]]:
    """The split that is measured, and what its rows are.

    Raises:
        LoraforgeError: The task has none, or they are not those of the training any more.
    """
    chosen = split or next((name for name in _SPLITS if spec.source(name) is not None), "test")
    recorded = record.get("data", {}).get(chosen) if data is None else None
    if data is not None:
        spec = replace(spec, **{chosen: data})
    if spec.source(chosen) is None:
        raise LoraforgeError(f"the task has no '{chosen}' rows to measure on", where=f"task '{spec.id}'",
                             hint="--data FILE, or --task FILE")  # fmt: skip
    source = spec.source(chosen)
    if recorded and isinstance(source, str) and not source.startswith("hf://") and not Path(source).exists():
        raise LoraforgeError("the rows of the training are not at their place any more", where=source,
                             hint="--data FILE names where they are now")  # fmt: skip
    rows = read_rows(spec, chosen)
    if recorded and recorded["sha256"] != rows.sha256:
        raise LoraforgeError(
            "the rows are not those of the training any more", where=rows.where, got=f"sha256 {rows.sha256[:12]}",
            expected=recorded["sha256"][:12], hint="--data FILE measures on other rows on purpose",
        )  # fmt: skip
    return spec, chosen, {"split": chosen, "source": rows.where, "sha256": rows.sha256, "rows": len(rows)}


def _kind(spec: TaskSpec, base: str, split: str) -> str:
    """What the task is, where no record says it."""
    return resolve_kind(spec, base=base, item=read_rows(spec, split).items[0])


def _base_sha256(base: str, record: Mapping[str, Any]) -> str:
    """Digest of the base's weights, which are those that the training started from.

    Raises:
        LoraforgeError: They are others.
    """
    checkpoint = open_checkpoint(base)
    changed = checkpoint.changed(record.get("base_sha256") or {})
    if changed:
        raise LoraforgeError(
            "the base is not the one of the training", where=base, got=f"another {', '.join(changed)}",
            expected=f"the weights that {RECORD} names", hint="--base MODEL names where they are now",
        )  # fmt: skip
    return checkpoint.sha256
