"""A training sequence as its YAML file says it: base, tasks in order, and the settings of a run. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError, UsageError, did_you_mean, raise_problems
from loraforge.storage.yaml_file import read_yaml
from loraforge.tasks.spec import TaskSpec, parse_task
from loraforge.training.ilora.config import ILoraConfig
from loraforge.training.options import LoraOptions
from loraforge.training.sequence.checks import (
    ADAPTERS,
    EXPECTED,
    KEYS,
    SECTIONS,
    WORDS,
    check_sequence,
    eval_problems,
    section_problems,
    word_problems,
)

# Settings that are paths.
_PATHS = ("ema_adapter_path", "previous_task_model")


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """A sequence of tasks and how it is trained.

    Attributes:
        base_model: Folder of the base, or its id in the local cache.
        output_dir: Folder of the run.
        tasks: The tasks in training order.
        method: One of METHODS.
        label_space: Of classification tasks that share one head: `per-task` gives each task rows of its own, `shared`
            one row a label name.
        dtype: Of the base's weights.
        lora: Settings of the adapters, as `training.options.LoraOptions` reads them.
        ilora: Settings of I-LORA, the fields of `training.ilora.config.ILoraConfig`.
        train: Training arguments of every task, by the names of transformers.TrainingArguments.
        eval: Which adapters are scored, and how; keys of EVAL_KEYS.
        source: The file it was read from.
    """

    base_model: str
    output_dir: Path
    tasks: tuple[TaskSpec, ...]
    method: str = "ilora"
    label_space: str = "per-task"
    dtype: str = "float32"
    lora: Mapping[str, Any] = field(default_factory=dict)
    ilora: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    eval: Mapping[str, Any] = field(default_factory=dict)
    source: Path | None = None

    @property
    def seed(self) -> int:
        """Seed of every random draw."""
        return int(self.train.get("seed", 0))

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that are scored: only I-LORA has a second one."""
        wanted = tuple(self.eval.get("adapters") or ADAPTERS)
        return wanted if self.method == "ilora" else ("default",)

    @property
    def task_ids(self) -> tuple[str, ...]:
        """Ids of the tasks, in order."""
        return tuple(task.id for task in self.tasks)

    def ilora_config(self) -> ILoraConfig:
        """The settings of the method: I-LORA as set, and for a baseline the parts that it has."""
        values = {key: value for key, value in self.ilora.items() if value is not None}
        if self.method == "ilora":
            return ILoraConfig(**{"use_ilora": True, **values})
        plain = {"consistency_weight": 0.0, "ema_every": 0, "handover": "default_to_both", "final_adapter": "default"}
        buffer = {} if self.method == "er" else {"ilora_buffer_size": 0}
        return ILoraConfig(**{**values, **plain, **buffer, "use_ilora": self.method == "er"})

    def lora_options(self) -> LoraOptions:
        """The settings of the adapters."""
        return LoraOptions.read(self.lora)

    def eval_split(self, task: TaskSpec) -> str:
        """The split that a task's scores come from: its test rows, or else its development rows."""
        return "test" if task.test is not None else "eval"


def load_sequence(path: str | Path) -> SequenceSpec:
    """Reads a sequence file; relative paths count from its folder.

    Raises:
        UsageError: Unknown keys or settings (each with the closest known one).
        LoraforgeError: An unreadable file, missing keys, values of the wrong kind. All problems come at once.
    """
    path = Path(path)
    return parse_sequence(read_yaml(path), where=path, folder=path.resolve().parent)


def parse_sequence(content: Mapping[str, Any], where: object = "sequence", folder: Path | None = None) -> SequenceSpec:
    """A sequence out of a mapping; relative paths count from `folder` (default: as they are).

    Raises:
        UsageError, LoraforgeError: As `load_sequence`.
    """
    problems: list[LoraforgeError] = [
        UsageError(f"unknown key '{key}' of a sequence", where=where, hint=did_you_mean(str(key), KEYS))
        for key in content
        if key not in KEYS
    ]
    for key in ("base_model", "output_dir", "tasks"):
        if content.get(key) in (None, "", []):
            problems.append(LoraforgeError(f"the sequence has no '{key}'", where=where, expected=EXPECTED[key]))
    for key, known in WORDS.items():
        problems += word_problems(content.get(key), known, key, where)
    sections: dict[str, Any] = {}
    for key in SECTIONS:
        sections[key] = content.get(key) or {}
        if not isinstance(sections[key], Mapping):
            got = type(sections[key]).__name__
            problems.append(LoraforgeError(f"'{key}' is a mapping of keys to values", where=where, got=got))
            sections[key] = {}
    tasks = tuple(_tasks(content.get("tasks") or (), where, folder, problems))
    problems += eval_problems(sections["eval"], where)
    raise_problems([*problems, *section_problems(sections, where)])
    words: dict[str, Any] = {key: str(content[key]) for key in WORDS if content.get(key) is not None}
    if folder is not None:
        sections["ilora"] = {
            key: str(_resolve(str(value), folder)) if key in _PATHS and value is not None else value
            for key, value in sections["ilora"].items()
        }
    spec = SequenceSpec(
        base_model=_base(str(content["base_model"]), folder),
        output_dir=_resolve(str(content["output_dir"]), folder),
        tasks=tasks,
        source=where if isinstance(where, Path) else None,
        **words,
        **sections,
    )
    check_sequence(spec)
    return spec


def _tasks(entries: Any, where: object, folder: Path | None, problems: list[LoraforgeError]) -> Iterable[TaskSpec]:
    """The tasks that can be read; what cannot be is added to `problems`."""
    if not isinstance(entries, list | tuple):
        got = type(entries).__name__
        problems.append(LoraforgeError("'tasks' is a list", where=where, got=got, expected=EXPECTED["tasks"]))
        return
    for number, entry in enumerate(entries, 1):
        place = f"{where}: task {number}"
        if isinstance(entry, TaskSpec):
            yield entry
        elif not isinstance(entry, Mapping):
            problems.append(LoraforgeError("a task is a mapping", where=place, got=repr(entry), expected="{id: ...}"))
        else:
            try:
                yield parse_task(entry, place, folder)
            except LoraforgeError as problem:
                problems += getattr(problem, "problems", [problem])


def _resolve(text: str, folder: Path | None) -> Path:
    path = Path(text).expanduser()
    return (folder / path if folder is not None else path).resolve()


def _base(text: str, folder: Path | None) -> str:
    """A folder beside the file, if there is one; else a path, or an id in the local cache."""
    beside = _resolve(text, folder)
    return str(beside) if beside.is_dir() or text.startswith((".", "~")) else text
