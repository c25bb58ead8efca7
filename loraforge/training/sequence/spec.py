"""A training sequence as its YAML file says it: base, tasks in order, and the settings of a run. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError, UsageError, did_you_mean, raise_problems
from loraforge.tasks.spec import TaskSpec, parse_task
from loraforge.training.ilora.config import ILoraConfig
from loraforge.training.options import LoraOptions
from loraforge.training.sequence.yaml_file import read_yaml

METHODS = ("ilora", "seq", "er", "joint", "single")
LABEL_SPACES = ("per-task", "shared")
DTYPES = ("float32", "bfloat16", "float16")
ADAPTERS = ("default", "ema")
WORDS = {"method": METHODS, "label_space": LABEL_SPACES, "dtype": DTYPES}
SECTIONS = ("lora", "ilora", "train", "eval")
KEYS = ("base_model", "output_dir", "method", "label_space", "dtype", "tasks", *SECTIONS)
EVAL_KEYS: dict[str, tuple[type, ...]] = {
    "adapters": (list,), "batch_tokens": (int,), "max_new_tokens": (int,), "choice_mode": (str,), "limit": (int,),
}  # fmt: skip
CHOICE_MODES = ("answer-mean", "answer-sum", "document")
# Scores in a matrix rise when they get better; these fall.
_FALLING = ("perplexity", "loss")


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
            problems.append(LoraforgeError(f"the sequence has no '{key}'", where=where, expected=_EXPECTED[key]))
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


_EXPECTED = {
    "base_model": "the folder of a transformers model, or its id in the local cache",
    "output_dir": "the folder of the run",
    "tasks": "a list: [{id: a, train: a.jsonl, test: a.test.jsonl}, ...]",
}


def check_sequence(spec: SequenceSpec) -> None:
    """Refuses settings that contradict each other.

    Raises:
        LoraforgeError: All contradictions at once.
    """
    where = spec.source
    problems = [
        LoraforgeError("two tasks have the same id", where=where, got=name, expected="an id a task")
        for name, count in Counter(spec.task_ids).items()
        if count > 1
    ]
    for task in spec.tasks:
        place = f"task '{task.id}'"
        if task.train is None:
            problems.append(LoraforgeError("the task has no training rows", where=place, expected="train: FILE"))
        if task.test is None and task.eval is None:
            what, hint = "the task has nothing to be scored on", "name held-out rows as test (or eval)"
            problems.append(LoraforgeError(what, where=place, expected="test: FILE", hint=hint))
        if task.metrics and task.metrics[0] in _FALLING:
            what, hint = "the score of a sequence must rise when it gets better", "name another metric first"
            problems.append(LoraforgeError(what, where=place, got=task.metrics[0], hint=hint))
        if "seed" in (task.overrides or {}):
            problems.append(UsageError("a sequence has one seed", where=f"{place}: overrides", hint="train: {seed: N}"))
    seed = spec.train.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        expected = "a whole number from 0"
        problems.append(
            LoraforgeError("the seed cannot be used", where="train: seed", got=repr(seed), expected=expected)
        )
    problems += _handover_problems(spec)
    raise_problems(problems)


def _handover_problems(spec: SequenceSpec) -> Iterable[LoraforgeError]:
    """A hand-over that is bound to fail after the first task is refused before it."""
    config = spec.ilora_config()
    needs_ema = spec.method == "ilora" and config.handover != "default_to_both"
    if needs_ema and not config.save_ema_adapter and len(spec.tasks) > 1:
        yield LoraforgeError(
            "the next task starts from the ema adapter, which is not saved",
            where="ilora: save_ema_adapter",
            got=f"save_ema_adapter false, handover {config.handover}, {len(spec.tasks)} tasks",
            expected="save_ema_adapter true, or handover default_to_both",
        )
    if config.current_task_id is not None and config.current_task_id not in spec.task_ids:
        hint = did_you_mean(config.current_task_id, spec.task_ids)
        yield LoraforgeError(
            "no task has this id", where="ilora: current_task_id", got=config.current_task_id, hint=hint
        )


def ilora_fields() -> tuple[str, ...]:
    """Names of the settings of I-LORA."""
    return tuple(item.name for item in fields(ILoraConfig))


def section_problems(sections: Mapping[str, Mapping[str, Any]], where: object) -> list[LoraforgeError]:
    """What I-LORA's and LoRA's own settings refuse; training arguments are checked by transformers' names later."""
    known = ilora_fields()
    problems: list[LoraforgeError] = [
        UsageError(f"unknown I-LORA setting '{key}'", where=f"{where}: ilora", hint=did_you_mean(str(key), known))
        for key in sections["ilora"]
        if key not in known
    ]
    values = {key: value for key, value in sections["ilora"].items() if key in known and value is not None}
    for read in (lambda: ILoraConfig(**values), lambda: LoraOptions.read(sections["lora"], f"{where}: lora")):
        try:
            read()
        except LoraforgeError as problem:
            problems += getattr(problem, "problems", [problem])
    return problems


def _tasks(entries: Any, where: object, folder: Path | None, problems: list[LoraforgeError]) -> Iterable[TaskSpec]:
    """The tasks that can be read; what cannot be is added to `problems`."""
    if not isinstance(entries, list | tuple):
        got = type(entries).__name__
        problems.append(LoraforgeError("'tasks' is a list", where=where, got=got, expected=_EXPECTED["tasks"]))
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


def eval_problems(section: Mapping[str, Any], where: object) -> Iterable[LoraforgeError]:
    """What is wrong in the section `eval`."""
    place = f"{where}: eval"
    for key, value in section.items():
        if key not in EVAL_KEYS:
            yield UsageError(f"unknown key '{key}'", where=place, hint=did_you_mean(str(key), EVAL_KEYS))
        elif value is None:
            continue
        elif key == "adapters":
            names = value if isinstance(value, list | tuple) else [value]
            wrong = [name for name in names if name not in ADAPTERS] or ([] if names else ["nothing"])
            if wrong:
                got, expected = ", ".join(map(str, wrong)), "a list of default and ema"
                yield LoraforgeError("unknown adapters to be scored", where=place, got=got, expected=expected)
        elif key == "choice_mode":
            yield from word_problems(value, CHOICE_MODES, key, place)
        elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
            yield LoraforgeError(f"'{key}' cannot be used", where=place, got=repr(value), expected="a number above 0")


def word_problems(value: Any, known: tuple[str, ...], key: str, where: object) -> list[LoraforgeError]:
    """A word that is none of the known ones, as a list of at most one problem."""
    if value is None or value in known:
        return []
    return [UsageError(f"unknown {key} '{value}'", where=where, hint=did_you_mean(str(value), known))]


def _resolve(text: str, folder: Path | None) -> Path:
    path = Path(text).expanduser()
    return (folder / path if folder is not None else path).resolve()


def _base(text: str, folder: Path | None) -> str:
    """A folder beside the file, if there is one; else a path, or an id in the local cache."""
    beside = _resolve(text, folder)
    return str(beside) if beside.is_dir() or text.startswith((".", "~")) else text
