"""Writes an adapter whose per-module scale is exactly 1, whole or not at all, module by module.

PEFT is the format of folders that `PeftModel.from_pretrained` loads; kohya and diffusers are folders with one
.safetensors file. Factors go to disk as they come, so memory does not grow with their number, and a run that was killed
can be continued: what is there is kept, and the result has the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from loraforge.adapters.config import CONFIG_NAME, TASK_HEADS
from loraforge.adapters.heads import HeadsPlan, write_aside
from loraforge.adapters.keys import PREFIX
from loraforge.adapters.layouts import layout_of
from loraforge.adapters.origin import PeftMeta
from loraforge.adapters.reader import Adapter
from loraforge.adapters.session import Places, WriteReport, WriteSession
from loraforge.errors import LoraforgeError
from loraforge.storage.atomic import new_folder
from loraforge.storage.leftovers import RESUME
from loraforge.storage.stream import TensorStream
from loraforge.types import LowRank

__all__ = ["AdapterWriter", "PeftMeta", "WriteReport", "WriteSession", "peft_config", "write_adapter"]

ExtraFile = bytes | str | Callable[[WriteReport], bytes | str]
_JOURNAL = "journal.jsonl"


@dataclass(slots=True)
class AdapterWriter:
    """Writes one adapter.

    Attributes:
        out: The folder to make.
        like: The adapters it comes from, or the fields taken from them.
        dtype: Dtype of the written factors; None keeps each factor's own.
        heads: What becomes of heads; none by default.
        extra_files: Path inside the folder -> content, or a function of the WriteReport that gives the content.
        overwrite: Replace an earlier output.
        format: "peft", "kohya" or "diffusers".
        resume: Continue an interrupted run of the same fingerprint, and leave what is there if interrupted again.
        fingerprint: JSON-ready: everything that decides the bytes of the output. None: the run cannot be continued.
        keep_scales: Write each scale as alpha where the format has one and leave the factors' bits alone, instead of
            folding it into B. For conversions.
    """

    out: str | os.PathLike[str]
    like: Sequence[Adapter] | PeftMeta
    dtype: torch.dtype | None = torch.float32
    heads: HeadsPlan = field(default_factory=HeadsPlan)
    extra_files: Mapping[str, ExtraFile] = field(default_factory=dict)
    overwrite: bool = False
    format: str = "peft"
    resume: bool = False
    fingerprint: Mapping[str, Any] | None = None
    keep_scales: bool = False

    def write(self, modules: Iterable[tuple[str, LowRank]], biases: Mapping[str, Tensor] | None = None) -> WriteReport:
        """Writes all modules; `session` takes them one by one.

        Args:
            modules: (name, update). Scalings are folded into B.
            biases: Module -> bias of lora_B, scale included.

        Returns:
            Ranks, sizes and the rounding error.

        Raises:
            LoraforgeError: As `session`.
        """
        listed = list(modules)
        with self.session([name for name, _ in listed]) as session:
            for name, update in listed:
                if name not in session.finished:
                    session.add(name, update, bias=(biases or {}).get(name))
        return session.report

    @contextmanager
    def session(self, modules: Sequence[str]) -> Iterator[WriteSession]:
        """Takes modules one by one, in any order; the folder appears when the block ends well.

        Args:
            modules: Names of all modules that will be added. A continued run has the same ones in the same order.

        Raises:
            LoraforgeError: The output exists, replaces an input or is being written by another run; a name or factor
                does not fit the format or the dtype; or the disk refuses. Nothing is left behind then, except what an
                interrupted run may continue, and an earlier output is untouched.
            UsageError: An unknown format.
            ValueError: The block ended without all modules.
        """
        layout = layout_of(self.format)
        meta = self.like if isinstance(self.like, PeftMeta) else PeftMeta.like(self.like)
        out = Path(self.out).resolve()
        for source in meta.inputs:
            if out == source.resolve() or out in source.resolve().parents:
                raise LoraforgeError("The output would replace an input adapter", where=out, got=f"input {source}")
        if not modules:
            raise LoraforgeError("There is no module to write", where=out, expected="at least one module")
        places = Places.of(modules, list(self.heads.merged), meta, layout, self.dtype, self.keep_scales)
        whole = {PREFIX + key: tensor for key, tensor in self.heads.merged.items()}
        space = places.reserve(layout.metadata((), (), meta.metadata), whole)
        report = WriteReport(out, str(self.dtype or "as stored").removeprefix("torch."))
        with new_folder(out, self.overwrite, resume=self.resume, fingerprint=self.fingerprint) as folder:
            path = folder / layout.file_name(out.name)
            _keep_only(folder, {path.name, RESUME})
            journal = folder / RESUME / _JOURNAL if self.fingerprint is not None else None
            with TensorStream(path, space, journal) as stream:
                session = WriteSession(stream, places, report)
                yield session
                if missing := session.missing():
                    raise ValueError(f"{len(missing)} announced modules were not added, {missing[0]!r} first")
                for key, tensor in whole.items():
                    stream.append(key, tensor)
                alphas = report.file_alphas.values()
                stream.close(layout.metadata(report.file_ranks.values(), alphas, meta.metadata))
            report.bytes = path.stat().st_size
            self._write_rest(folder, report, meta, places)

    def _write_rest(self, folder: Path, report: WriteReport, meta: PeftMeta, places: Places) -> None:
        """Everything beside the file of tensors."""
        if places.layout.format == "peft":
            biased = any(shape.biased for shape in places.shapes.values())
            config = peft_config(report.file_ranks, meta, self.heads, report.file_alphas, places.parameters, biased)
            (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_aside(folder, self.heads)
        for relative, content in self.extra_files.items():
            _write_extra(folder, relative, content(report) if callable(content) else content)


def write_adapter(
    out: str | os.PathLike[str],
    modules: Iterable[tuple[str, LowRank]],
    like: Sequence[Adapter] | PeftMeta,
    dtype: torch.dtype = torch.float32,
    heads: HeadsPlan | None = None,
    extra_files: Mapping[str, ExtraFile] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a merged adapter and returns its folder; `AdapterWriter` does the same and returns the report."""
    return AdapterWriter(out, like, dtype, heads or HeadsPlan(), extra_files or {}, overwrite).write(modules).path


def peft_config(
    ranks: Mapping[str, int],
    meta: PeftMeta,
    heads: HeadsPlan,
    alphas: Mapping[str, float] | None = None,
    parameters: Sequence[str] = (),
    biased: bool = False,
) -> dict[str, Any]:
    """The adapter_config.json of a written adapter; by default alpha is the rank of every module, so each scale is 1.

    Args:
        ranks: Module, or full name of an adapted parameter -> rank.
        meta: Fields that come from the adapters.
        heads: Heads and extras that are merged in.
        alphas: Module or parameter -> alpha.
        parameters: Which of them are adapted parameters (stacks of experts).
        biased: Every module has a bias on lora_B.
    """
    alphas = alphas or ranks
    # PEFT warns of patterns that fit no module, and a parameter is none: the default is theirs where there are any.
    main = max(parameters or ranks, key=lambda name: ranks[name])
    config = {
        "peft_type": "LORA",
        "task_type": _task_type(meta, heads),
        "base_model_name_or_path": meta.base,
        "r": ranks[main],
        "lora_alpha": _number(alphas[main]),
        "rank_pattern": _pattern(ranks, ranks[main]),
        "alpha_pattern": _pattern(alphas, alphas[main]),
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(set(ranks) - set(parameters)),
        "modules_to_save": list(heads.modules_to_save) or None,
        "fan_in_fan_out": meta.fan_in_fan_out,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    # Younger fields are left out where they say nothing, so that older readers take the file.
    config |= {"target_parameters": list(parameters)} if parameters else {}
    config |= {"lora_bias": True} if biased else {}
    return {**config, **heads.config}


def _task_type(meta: PeftMeta, heads: HeadsPlan) -> str | None:
    """The task type, or None where PEFT would look for a head in the file that is not there, and fail."""
    expected = TASK_HEADS.get(meta.task_type or "", ())
    return meta.task_type if not expected or set(expected) & set(heads.modules_to_save) else None


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """PEFT's pattern of the values that are not the default.

    "^" and escaping make each key match one full name and nothing else (PEFT tries it as a suffix otherwise).
    """
    return {f"^{re.escape(name)}": _number(value) for name, value in values.items() if value != default}


def _number(value: float) -> float:
    """Whole numbers as such: PEFT writes and expects them so."""
    return int(value) if value == int(value) else value


def _keep_only(folder: Path, names: set[str]) -> None:
    """Removes what an interrupted run wrote behind the tensors; it is written anew."""
    for entry in folder.iterdir():
        if entry.name in names:
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _write_extra(folder: Path, relative: str, content: bytes | str) -> None:
    parts = PurePosixPath(relative)
    if parts.is_absolute() or ".." in parts.parts or not parts.name:
        raise LoraforgeError("An extra file lies outside the output folder", got=relative, expected="a relative path")
    path = folder / parts
    if path.exists():
        raise LoraforgeError("An extra file would replace a file of the adapter", got=relative)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
