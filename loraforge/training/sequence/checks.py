"""What a sequence may say, and what is wrong with one that says something else. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from loraforge.errors import LoraforgeError, UsageError, did_you_mean, raise_problems
from loraforge.training.ilora.config import ILoraConfig
from loraforge.training.options import LoraOptions

if TYPE_CHECKING:
    from loraforge.training.sequence.spec import SequenceSpec

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
EXPECTED = {
    "base_model": "the folder of a transformers model, or its id in the local cache",
    "output_dir": "the folder of the run",
    "tasks": "a list: [{id: a, train: a.jsonl, test: a.test.jsonl}, ...]",
}
# Scores in a matrix rise when they get better; these fall.
_FALLING = ("perplexity", "loss")


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
    try:
        ILoraConfig(**values)
    except LoraforgeError as found:
        problems += [_placed(problem, f"{where}: ilora") for problem in getattr(found, "problems", [found])]
    try:
        LoraOptions.read(sections["lora"], f"{where}: lora")
    except LoraforgeError as found:
        problems += getattr(found, "problems", [found])
    return problems


def _placed(problem: LoraforgeError, place: str) -> LoraforgeError:
    """A problem of a value, with the place of the value before its name."""
    where = place if problem.where is None else f"{place}: {problem.where}"
    hint, got, expected = problem.hint, problem.got, problem.expected
    return type(problem)(problem.what, where=where, got=got, expected=expected, hint=hint)


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
