"""Calibration data of one task, from whatever source, as a list of samples that a model can take.

Text (.jsonl, .json, hf://, Python lists), model inputs (.safetensors, dicts of tensors) and folders of images all end
as the same thing: dicts of tensors without a batch dimension, checked, unpadded, selected before the costly step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loraforge.calibrate.checks import Sample, check_batch, check_samples
from loraforge.calibrate.encode import encode_rows, length_limit, load_tokenizer, model_kind, own_folder, warn_cut
from loraforge.calibrate.images import encode_images, list_images, load_image_processor
from loraforge.calibrate.rows import Row, RowFormat, parse_rows, read_hub_rows, read_json_rows
from loraforge.calibrate.sampling import Selection, choose, content_hash
from loraforge.calibrate.tensors import read_safetensors, samples_from_tensors, trim_padding
from loraforge.errors import LoraforgeError, UsageError, did_you_mean

SUFFIXES = (".jsonl", ".json", ".safetensors")
_SPEC_KEYS = ("source", "template", "target", "target_map", "label_field", "max_length")


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationSet:
    """Samples of one task.

    Attributes:
        name: The adapter they belong to.
        samples: Dicts of tensors without a batch dimension, named as the model's forward takes them, unpadded.
        texts: The text of each sample, where there was one.
        labels: The class of each sample, where there was one.
        source: Where they came from.
        sha256: Of the source's content (file bytes; of a folder, all files; of data in memory, the samples).
        available: Samples that the source had.
    """

    name: str
    samples: list[Sample]
    texts: list[str] | None
    labels: list[Any] | None
    source: str
    sha256: str
    available: int

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True, slots=True)
class _Reading:
    """How a source is to be read; the tokenizer and the image processor are looked up when they are needed."""

    tokenizer: Any
    config: Any
    processor: Any
    base: object
    max_length: int | None
    fmt: RowFormat
    kind: str
    selection: Selection | None


def load_calibration(
    source: Any,
    *,
    name: str,
    tokenizer: Any = None,
    model_config: Any = None,
    image_processor: Any = None,
    base: object = None,
    task_type: str | None = None,
    max_length: int | None = None,
    template: str | None = None,
    target: str | None = None,
    target_map: Mapping[Any, str] | None = None,
    label_field: str | None = None,
    selection: Selection | None = None,
) -> CalibrationSet:
    """Reads the calibration data of one adapter.

    Args:
        source: .jsonl/.json/.safetensors file, folder of images, `hf://NAME[#CONFIG][:SPLIT]`, dict of batched tensors,
            list of texts, row objects or samples, a CalibrationSet, or a recipe's {source: ..., template: ...}.
        name: The adapter it belongs to.
        tokenizer: The base's tokenizer; default: looked up in `base` when there is text.
        model_config: The base's configuration.
        image_processor: The base's image processor; default: of `base` or of the image folder, if there is one.
        base: Folder or id of the base, for tokenizer and image processor; never fetched. Default: the folder that the
            configuration was loaded from, which serves a base in memory.
        task_type: The adapters' task type; says whether a target continues the text.
        max_length: Tokens that a text is cut to; default 512. Never more than the model has positions for (a warning
            says so); tensors are never cut.
        template: Text with row fields in braces; default the field `text`.
        target: Field or template of the target; default `target` where a row has it.
        target_map: What the values of `target` stand for.
        label_field: Field of the class; default `label`, else the target.
        selection: Which samples to use; default all.

    Raises:
        UsageError: An unknown key in {source: ...}.
        LoraforgeError: Naming file, row or key, what was found, what was expected and what to do next.
    """
    fields: dict[str, Any] = {
        "template": template,
        "target": target,
        "target_map": target_map,
        "label_field": label_field,
        "max_length": max_length,
    }
    if isinstance(source, Mapping) and isinstance(source.get("source"), str | Path):
        fields |= _read_spec(source)
        source = fields.pop("source")
    limit = fields.pop("max_length")
    kind = model_kind(model_config, task_type)
    fmt = RowFormat(**fields)
    base = own_folder(model_config) if base is None else base
    return _read(source, _Reading(tokenizer, model_config, image_processor, base, limit, fmt, kind, selection), name)


def _read_spec(source: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's {source: ..., template: ...}, its keys checked."""
    for key in source:
        if key not in _SPEC_KEYS:
            hint = did_you_mean(str(key), _SPEC_KEYS)
            raise UsageError(f"unknown key '{key}' of a calibration source", where=source["source"], hint=hint)
    return dict(source)


def _read(source: Any, reading: _Reading, name: str) -> CalibrationSet:
    """Reads a source by its kind."""
    if isinstance(source, CalibrationSet):
        return _selected(source, reading.selection)
    if isinstance(source, str) and source.startswith("hf://"):
        rows = parse_rows(read_hub_rows(source), reading.fmt, source)
        return _from_rows(rows, reading, name, source, _rows_digest(rows), None)
    if isinstance(source, str | Path):
        return _from_path(Path(source), reading, name)
    if isinstance(source, Mapping):
        samples, labels = samples_from_tensors(source, name, reading.config)
        return _from_samples(samples, labels, reading, name, f"{name} (in memory)", None)
    if isinstance(source, Sequence) and source:
        return _from_list(source, reading, name)
    raise LoraforgeError(
        "the calibration data is nothing that can be read",
        where=name,
        got=f"{type(source).__name__}{' without entries' if isinstance(source, Sequence) else ''}",
        expected="a path, a dict of tensors, a list of texts or rows",
    )


def _from_path(path: Path, reading: _Reading, name: str) -> CalibrationSet:
    if path.is_dir():
        return _from_folder(path, reading, name)
    if not path.is_file():
        raise LoraforgeError("the calibration file does not exist", where=path, hint="check the path of --calibration")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise LoraforgeError(
            "unknown kind of calibration file", where=path, got=suffix or "no suffix", expected=", ".join(SUFFIXES)
        )
    if path.stat().st_size == 0:
        raise LoraforgeError("the calibration file is empty", where=path, got="0 bytes", expected="at least one sample")
    digest = file_digest(path)
    if suffix == ".safetensors":
        samples, labels = samples_from_tensors(read_safetensors(path), path, reading.config)
        return _from_samples(samples, labels, reading, name, str(path), digest)
    rows = parse_rows(read_json_rows(path), reading.fmt, path)
    return _from_rows(rows, reading, name, str(path), digest, path.parent)


def _from_list(source: Sequence[Any], reading: _Reading, name: str) -> CalibrationSet:
    """Texts, row objects or samples (dicts of tensors) in memory."""
    label = f"{name} (in memory)"
    if isinstance(source[0], Mapping) and any(isinstance(value, Tensor) for value in source[0].values()):
        for i, sample in enumerate(source):
            check_batch({key: value.unsqueeze(0) for key, value in sample.items()}, f"{label}, sample {i}")
        return _from_samples([trim_padding(dict(s)) for s in source], None, reading, name, label, None)
    rows = parse_rows(((f"row {i}", item) for i, item in enumerate(source, 1)), reading.fmt, label)
    return _from_rows(rows, reading, name, label, _rows_digest(rows), None)


def _from_folder(folder: Path, reading: _Reading, name: str) -> CalibrationSet:
    paths, classes = list_images(folder)
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(folder).as_posix()} {file_digest(path)}\n".encode())
    chosen = _choose(reading.selection, [path.stat().st_size for path in paths], classes, folder)
    processor = reading.processor or load_image_processor(reading.base, folder)
    samples = encode_images([paths[i] for i in chosen], processor, reading.config)
    names = [paths[i].relative_to(folder).as_posix() for i in chosen]
    check_samples(samples, folder, reading.config, names)
    labels = None if classes is None else [classes[i] for i in chosen]
    return CalibrationSet(name, samples, None, labels, str(folder), digest.hexdigest(), len(paths))


def _from_rows(
    rows: list[Row], reading: _Reading, name: str, source: str, digest: str, folder: Path | None
) -> CalibrationSet:
    """Selects rows, then tokenises their texts and reads their images."""
    available = len(rows)
    labels = [row.label for row in rows]
    rows = [rows[i] for i in _choose(reading.selection, [len(row.text or "") for row in rows], labels, source)]
    samples: list[Sample] = [{} for _ in rows]
    if rows[0].text is not None:
        tokenizer = reading.tokenizer or load_tokenizer(reading.base, source)
        limit = length_limit(reading.max_length, tokenizer, reading.config)
        samples = encode_rows(rows, tokenizer, reading.config, reading.kind, limit, source)
        warn_cut(samples, limit, reading.max_length, source)
    if rows[0].image is not None:
        paths = [(folder or Path()) / str(row.image) for row in rows]
        processor = reading.processor or load_image_processor(reading.base)
        pixels = encode_images(paths, processor, reading.config, [f"{source}, {r.where}, {r.image}" for r in rows])
        samples = [{**image, **sample} for image, sample in zip(pixels, samples, strict=True)]
    check_samples(samples, source, reading.config, [row.where for row in rows])
    texts = [row.text for row in rows if row.text is not None] or None
    classes = [row.label for row in rows]
    return CalibrationSet(name, samples, texts, None if None in classes else classes, source, digest, available)


def _from_samples(
    samples: list[Sample], labels: list[Any] | None, reading: _Reading, name: str, source: str, digest: str | None
) -> CalibrationSet:
    check_samples(samples, source, reading.config)
    if digest is None:
        digest = hashlib.sha256(b"".join(content_hash(sample) for sample in samples)).hexdigest()
    cset = CalibrationSet(name, samples, None, labels, source, digest, len(samples))
    return _selected(cset, reading.selection)


def _selected(cset: CalibrationSet, selection: Selection | None) -> CalibrationSet:
    """The chosen samples of a set, by their number of tokens where there is no text."""
    if cset.texts is not None:
        lengths = [len(text) for text in cset.texts]
    else:
        lengths = [s["input_ids"].shape[0] if "input_ids" in s else 0 for s in cset.samples]
    chosen = _choose(selection, lengths, cset.labels, cset.source)
    texts, labels = (None if part is None else [part[i] for i in chosen] for part in (cset.texts, cset.labels))
    samples = [cset.samples[i] for i in chosen]
    return CalibrationSet(cset.name, samples, texts, labels, cset.source, cset.sha256, cset.available)


def _choose(
    selection: Selection | None, lengths: Sequence[int], labels: Sequence[Any] | None, where: object
) -> list[int]:
    return list(range(len(lengths))) if selection is None else choose(selection, lengths, labels, where)


def _rows_digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(repr([(row.text, row.target, row.label) for row in rows]).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
