"""What a pipeline reads: its base and the files of its tasks, where they lie, what is missing and what they hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError
from loraforge.pipelines.hub import cached_model, read_address
from loraforge.pipelines.recipe import Pipeline
from loraforge.storage.files import sha256_of
from loraforge.tasks.spec import SPLITS, TaskSpec

MODEL, DATASET, FILE = "model", "dataset", "file"


@dataclass(frozen=True)
class Need:
    """Something that a pipeline reads.

    Attributes:
        name: Model id, address of a data set, or path.
        kind: "model" or "dataset" (the hub has it), or "file" (only the user can bring it).
        place: Where it lies, or None where it is missing.
        known: What the recipe says of it: {from, size, licence, note}.
    """

    name: str
    kind: str
    place: Path | None
    known: Mapping[str, Any]


def needs_of(pipeline: Pipeline) -> list[Need]:
    """The base and every source of the tasks, each once, in the recipe's order."""
    found = {pipeline.base: _base(pipeline)}
    for task in pipeline.tasks:
        for split in SPLITS:
            for source in _parts(task.source(split)):
                found.setdefault(source, _source(source, pipeline))
    return list(found.values())


def base_place(pipeline: Pipeline) -> Path | None:
    """The folder of the base: as written, below the data folder, or in the hub's cache."""
    for folder in (Path(pipeline.base), pipeline.data / pipeline.base):
        if folder.is_dir():
            return folder
    # An id is OWNER/NAME; anything else is a folder that is not there.
    return cached_model(pipeline.base) if pipeline.base.count("/") == 1 and pipeline.base[0] not in "./~" else None


def local_task(task: TaskSpec, pipeline: Pipeline) -> TaskSpec:
    """The task with data sets of the hub replaced by the files that were made of them.

    Raises:
        LoraforgeError: One is missing.
    """
    return replace(task, **{split: _localised(task.source(split), pipeline) for split in SPLITS})


def digest_of(source: Any) -> str | None:
    """A digest of what a source holds: of a file's bytes, a folder's names, sizes and times, any other value's text."""
    if source is None:
        return None
    if isinstance(source, Mapping):
        return hashlib.sha256(repr([(key, digest_of(value)) for key, value in source.items()]).encode()).hexdigest()
    path = Path(source) if isinstance(source, str | Path) else None
    if path is None or not path.exists():
        return hashlib.sha256(repr(source).encode()).hexdigest()
    if path.is_file():
        return sha256_of(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        # The hub's cache is made of links: the file behind one is what counts.
        state = file.stat()
        digest.update(f"{file.relative_to(path).as_posix()} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _base(pipeline: Pipeline) -> Need:
    place = base_place(pipeline)
    is_id = pipeline.base.count("/") == 1 and pipeline.base[0] not in "./~"
    return Need(pipeline.base, MODEL if place is not None or is_id else FILE, place, _known(pipeline.base, pipeline))


def _source(source: str, pipeline: Pipeline) -> Need:
    if not source.startswith("hf://"):
        relative = source.removeprefix(f"{pipeline.data}/")
        return Need(source, FILE, Path(source) if Path(source).exists() else None, _known(relative, pipeline))
    split = read_address(source)
    return Need(source, DATASET, _split_place(split.place(pipeline.data)), _known(split.name, pipeline))


def _split_place(place: Path) -> Path | None:
    rows = place.with_name(f"{place.name}.jsonl")
    return rows if rows.is_file() else place if place.is_dir() else None


def _known(name: str, pipeline: Pipeline) -> Mapping[str, Any]:
    """What the recipe says of a source: the entry whose name is the longest beginning of its own."""
    fits = [key for key in pipeline.sources if name.startswith(key)]
    return pipeline.sources[max(fits, key=len)] if fits else {}


def _localised(source: Any, pipeline: Pipeline) -> Any:
    if not isinstance(source, str) or not source.startswith("hf://"):
        return source
    place = _split_place(read_address(source).place(pipeline.data))
    if place is None:
        raise LoraforgeError("the data set is not there", where=source, hint=f"loraforge download {pipeline.words}")
    return str(place)


def _parts(source: Any) -> Iterator[str]:
    """The files or addresses in a source; rows in memory have none."""
    if isinstance(source, str | Path):
        yield str(source)
    elif isinstance(source, Mapping):
        yield from (str(part) for part in source.values())
