"""What is evaluated: the base, adapters, full models; their names, their cards and the heads that they carry."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from loraforge.adapters import Adapter, open_adapter
from loraforge.adapters.keys import shorten
from loraforge.errors import LoraforgeError, raise_problems
from loraforge.evaluation.swapping import swapped
from loraforge.tasks import read_task_card

BASE, OWN = "base", "own adapters"
# Rows that the table adds itself.
RESERVED = (BASE, OWN)
HEAD_FILES = ("heads.safetensors", "model.safetensors")
Places = Sequence[str | Path] | Mapping[str, str | Path]


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """One row of the table.

    Attributes:
        name: Its name there.
        kind: "base", "adapter" or "model".
        path: Its folder; None for the base.
        adapter: The opened adapter, or None.
        card: Its task.json, or None.
        heads: Its own head, tensors by name; empty where it has none.
        aside: Name of a merged adapter -> folder of the head that was kept for it.
    """

    name: str
    kind: str
    path: Path | None = None
    adapter: Adapter | None = None
    card: Mapping[str, Any] | None = None
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    aside: Mapping[str, Path] = field(default_factory=dict)


def open_subjects(adapters: Places, models: Places) -> list[Subject]:
    """Adapters, then full models, each in the order given.

    Raises:
        LoraforgeError: Not there, damaged, or no PEFT folder; a name twice. All problems at once.
    """
    found: list[Subject] = []
    problems: list[LoraforgeError] = []
    for kind, places in (("adapter", adapters), ("model", models)):
        for name, place in _named(places).items():
            try:
                found.append(_open(name, kind, Path(place)))
            except LoraforgeError as problem:
                problems.append(problem)
    counts = Counter([*RESERVED, *(subject.name for subject in found)])
    problems += [
        LoraforgeError("two rows have the same name", got=name, hint="name it otherwise: NAME=FOLDER")
        for name, count in counts.items()
        if count > 1
    ]
    raise_problems(problems)
    return found


def _named(places: Places) -> dict[str, str | Path]:
    """Folders by name: the folder's, with its parent's before it where two are alike."""
    if isinstance(places, Mapping):
        return dict(places)
    names = [Path(place).resolve().name for place in places]
    found: dict[str, str | Path] = {}
    for place, name in zip(places, names, strict=True):
        whole = Path(place).resolve()
        unique = name if names.count(name) == 1 else f"{whole.parent.name}/{name}"
        number = 2
        while unique in found:
            unique, number = f"{whole.parent.name}/{name}-{number}", number + 1
        found[unique] = place
    return found


def _open(name: str, kind: str, path: Path) -> Subject:
    if not path.is_dir():
        raise LoraforgeError(f"the {kind} is not there", where=path, expected="a folder", hint="check the path")
    card, aside = read_task_card(path), _aside(path)
    if kind == "model":
        return Subject(name, kind, path, card=card, aside=aside)
    adapter = open_adapter(path)
    if adapter.format != "peft" or not adapter.config:
        raise LoraforgeError(
            "only PEFT folders are evaluated", where=path, got=adapter.format,
            hint=f"loraforge convert {path} --to peft --out FOLDER",
        )  # fmt: skip
    heads = {key: adapter.load_head(key) for key in adapter.heads}
    return Subject(name, kind, path, adapter, card, heads, aside)


def _aside(path: Path) -> dict[str, Path]:
    """Folders of the heads that a merge kept apart, by the adapter or model that each was of."""
    found = {}
    for folder in sorted(place for place in (path / "heads").glob("*") if place.is_dir()):
        index = folder / "heads.json"
        content = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
        found[str(content.get("adapter", folder.name))] = folder
    return found


def read_heads(folder: Path) -> tuple[dict[str, Tensor], Mapping[str, Any] | None]:
    """A head that was kept apart: its tensors, and a card with the names of its rows, where the folder says them.

    Raises:
        LoraforgeError: Its file is not there.
    """
    # A merge of adapters writes the first, one of full models the second.
    file = next((folder / name for name in HEAD_FILES if (folder / name).is_file()), None)
    if file is None:
        expected = " or ".join(HEAD_FILES)
        raise LoraforgeError("the head that was kept apart is not there", where=folder, expected=expected)
    tensors: dict[str, Tensor] = load_file(file)
    return tensors, read_task_card(folder) or _card_of_config(folder / "config.json")


def _card_of_config(path: Path) -> Mapping[str, Any] | None:
    """The names of a head's rows by its model's configuration; None where they are made up."""
    names = json.loads(path.read_text(encoding="utf-8")).get("id2label", {}) if path.is_file() else {}
    labels = [str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    made_up = labels == [f"LABEL_{i}" for i in range(len(labels))]
    return None if made_up else {"labels": labels, "label_space": "shared"}


@contextmanager
def adapted(model: nn.Module, subject: Subject) -> Iterator[nn.Module]:
    """The base with an adapter in it, loaded by PEFT; afterwards the base is what it was.

    Raises:
        LoraforgeError: The base lacks modules of the adapter, or they have other shapes.
    """
    if subject.adapter is None:
        yield model
        return
    from peft import PeftModel

    # PEFT copies the base's head and loads the adapter's into the copy: the sizes have to agree first.
    with swapped(model, subject.heads, subject.name):
        parts = dict(model.named_modules())
        try:
            with _quiet():
                wrapped = PeftModel.from_pretrained(model, str(subject.path))
        except (RuntimeError, ValueError, KeyError) as error:
            got = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            raise LoraforgeError(
                "the adapter does not fit the base", where=subject.path, got=got,
                expected="the base that it was trained on",
            ) from error  # fmt: skip
        try:
            _check_loaded(wrapped, subject.adapter)
            yield wrapped.eval()
        finally:
            wrapped.unload()
            _put_back(model, parts)


def _put_back(model: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    """Makes every module the one that it was: PEFT's unload leaves the adapter's copy of a head in the base."""
    for name, module in parts.items():
        parent, _, child = name.rpartition(".")
        if name and getattr(model.get_submodule(parent), child) is not module:
            setattr(model.get_submodule(parent), child, module)


def _check_loaded(wrapped: Any, adapter: Adapter) -> None:
    """PEFT passes over modules that the base does not have; the scores would be those of another adapter."""
    from peft import get_peft_model_state_dict

    there = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    wanted = {key for module in adapter.modules for key in adapter.keys_of(module)}
    lost = sorted(wanted - there)
    if lost:
        raise LoraforgeError(
            "the base lacks modules of the adapter", where=adapter.path, got=shorten(lost, 3),
            expected="the base that it was trained on",
        )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """No warning of transformers that PEFT uses one of its older names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield
