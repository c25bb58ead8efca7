"""Where a run's files are, and where the previous task's adapters are looked for. Torch-free.

RUN/sequence.json                         tasks, their states, what the run depends on
RUN/ilora_task<id>/default/, ema/         the adapters after the task
RUN/ilora_task<id>/ilora_state.json       steps, digests, buffer: written last, so the folder is whole
RUN/ilora_task<id>/scores.json            scores of its adapters on every task; the base's are in RUN/base_scores.json
RUN/ilora_task<id>/buffer.safetensors     raw tokens of training rows (mode 600)
RUN/ilora_task<id>/checkpoint-N/          what a resumed run continues from
RUN/cl_matrix.json, cl_matrix.csv, cl_metrics.json, train_log.jsonl, report.html, plots/*.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError
from loraforge.storage.atomic import write_whole
from loraforge.training.ilora.config import ILoraConfig

STATE, BUFFER, LOG = "ilora_state.json", "buffer.safetensors", "train_log.jsonl"
SEQUENCE, MATRIX, TABLE, METRICS, REPORT, PLOTS = (
    "sequence.json", "cl_matrix.json", "cl_matrix.csv", "cl_metrics.json", "report.html", "plots",
)  # fmt: skip
WEIGHTS = "adapter_model.safetensors"


def task_folder(run: Path, task: str) -> Path:
    """Folder of one task."""
    return run / f"ilora_task{task}"


@dataclass(frozen=True, slots=True)
class Previous:
    """The adapters that a task starts from.

    Attributes:
        ema: Folder of the stable adapter, if there is one.
        default: Folder of the plastic adapter, if there is one.
        buffer: File of the replay buffer, if there is one.
        tried: Every place that was looked at, in order.
    """

    ema: Path | None
    default: Path | None
    buffer: Path | None
    tried: tuple[str, ...]


def find_previous(config: ILoraConfig, run: Path, previous_id: str | None) -> Previous | None:
    """The adapters of the task before; None for a first task.

    The stable adapter is looked for in (1) `ema_adapter_path`, (2) ROOT/ilora_task<previous>/ema, (3) ROOT/ema,
    (4) ROOT, if its ilora_state.json says that it is one; ROOT is `previous_task_model`, or the run. The plastic
    adapter and the buffer are those beside it.

    Args:
        config: Names the places (`ema_adapter_path`, `previous_task_model`, `prev_task_id`); they count for the first
            task of a run, the caller leaves them out for the others.
        run: Folder of the run.
        previous_id: Id of the task before in this run, None for the first.

    Raises:
        LoraforgeError: A task before is named, but the adapter that the hand-over needs is nowhere; lists the places.
    """
    previous_id = previous_id if config.prev_task_id is None else str(config.prev_task_id)
    named = config.ema_adapter_path or config.previous_task_model
    if previous_id is None and named is None:
        return None
    root = Path(config.previous_task_model) if config.previous_task_model else run
    places: list[tuple[str, Path]] = []
    if config.ema_adapter_path:
        places.append(("ema_adapter_path", Path(config.ema_adapter_path)))
    if previous_id is not None:
        places.append(("task folder", task_folder(root, previous_id) / "ema"))
    places.append(("ema beside", root / "ema"))
    tried: list[str] = []
    ema = None
    for _, place in places:
        tried.append(str(place))
        if _is_adapter(place):
            ema = place
            break
    if ema is None:
        tried.append(f"{root} (if its {STATE} says role=ema)")
        ema = root if _is_adapter(root) and read_json(root / STATE).get("role") == "ema" else None
    parent = ema.parent if ema is not None else _task_root(root, previous_id)
    default = parent / "default" if _is_adapter(parent / "default") else None
    buffer = parent / BUFFER if (parent / BUFFER).is_file() else None
    found = Previous(ema, default, buffer, tuple(tried))
    _check_found(found, config, parent)
    return found


def _check_found(found: Previous, config: ILoraConfig, parent: Path) -> None:
    needs_default = config.handover != "ema_to_both"
    needs_ema = config.handover != "default_to_both"
    if needs_ema and found.ema is None:
        raise LoraforgeError(
            "the ema adapter of the task before is nowhere",
            where=f"handover {config.handover}",
            got="tried " + "; ".join(found.tried),
            expected=f"a folder with adapter_config.json and {WEIGHTS}",
            hint="name it as ilora: {ema_adapter_path: DIR}; handover=default_to_both starts from the default adapter",
        )
    if needs_default and found.default is None:
        raise LoraforgeError(
            "the default adapter of the task before is not there",
            where=f"handover {config.handover}",
            got=f"tried {parent / 'default'}",
            expected=f"a folder with adapter_config.json and {WEIGHTS}",
        )


def _task_root(root: Path, previous_id: str | None) -> Path:
    """Where the other files of the task before are expected when its ema adapter was not found."""
    folder = root if previous_id is None else task_folder(root, previous_id)
    return folder if folder.is_dir() else root


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and (folder / WEIGHTS).is_file()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file.

    Raises:
        LoraforgeError: The file is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise LoraforgeError("a file of the run cannot be read", where=path, got=str(error).split("\n")[0]) from error
    if not isinstance(found, dict):
        raise LoraforgeError("a file of the run is not what it should be", where=path, got=type(found).__name__)
    return found


def write_json(path: Path, value: Mapping[str, Any], *, private: bool = False) -> None:
    """Writes an object so that the file is the old or the new one, whenever the process or the machine ends.

    Args:
        path: The file.
        value: Ready for JSON.
        private: Readable by its owner alone.

    Raises:
        OSError: The disk refuses.
    """
    write_whole(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n", private=private)
