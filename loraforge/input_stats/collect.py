"""Collects the input statistics of a model over calibration data, with resume, in parts by several processes.

The same command gives the same bytes, interrupted or not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraforge.calibrate.base import check_inputs, encoder_decoder, load_base, prefer_kwargs
from loraforge.calibrate.batches import make_batches
from loraforge.calibrate.data import CalibrationSet, load_calibration
from loraforge.calibrate.input_statistics import KINDS, InputSums, batches_digest, model_digest, trace_targets
from loraforge.calibrate.input_targets import Target, adapter_targets, choose_targets
from loraforge.calibrate.sampling import Selection
from loraforge.errors import LoraforgeError, UsageError
from loraforge.input_stats.file import account, check_out
from loraforge.input_stats.run import Progress, run_batches
from loraforge.linalg.device import choose_device, named_when_full, peak_bytes
from loraforge.provenance import versions

LESS = "a smaller --batch-tokens, --kind diag, --base-dtype bfloat16, or --device cpu"


def collect_stats(
    base: str | os.PathLike[str] | nn.Module,
    data: Any,
    out: str | os.PathLike[str],
    *,
    kind: str = "diag",
    targets: str | Sequence[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    samples: int | None = 256,
    seed: int = 42,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    template: str | None = None,
    part: str | tuple[int, int] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Collects the input statistics of a model's linear modules and writes them to a file.

    Args:
        base: Model folder, id in the local cache, or a model in memory.
        data: One source of calibration data or a list of them (see `loraforge.calibrate.data`).
        out: The .safetensors file to write.
        kind: "diag" (squared L2 a feature) or "gram" (the whole X^T X), both a token.
        targets: Modules: a regular expression over whole names, or names and last parts; default every linear module.
        adapter: Instead: the modules that this adapter changes.
        samples: Samples a source; None takes all.
        seed: Seed of their selection.
        max_length: Tokens that a text is cut to.
        batch_tokens: Most tokens in a batch, padding included.
        template: Text of a row with its fields in braces.
        part: "i/n" or (i, n), i from 1: every n-th batch only. The n files are joined by `merge_stats`. Batches and
            not samples are dealt, so that every forward is that of the one process, and so are the sums.
        resume: Go on with an interrupted run of the same command.
        overwrite: Replace an existing statistics file, or an interrupted run.
        device: "auto", "cpu", "cuda" or "cuda:i".
        dtype: Dtype of the base's weights and of the forward; sums are float64.
        progress: Called with (stage, detail, done, total).

    Returns:
        JSON-ready: out, kind, modules, tokens, samples, batches, skipped (name -> reason), seconds, device,
        peak_device_bytes, ...

    Raises:
        UsageError: An unknown kind, part, target, or two ways of naming modules.
        LoraforgeError: An output that exists, data or a base that cannot be used, modules without an input.
    """
    started = time.perf_counter()
    if kind not in KINDS:
        raise UsageError("unknown kind of statistic", where="kind", got=kind, expected=" or ".join(KINDS))
    if targets is not None and adapter is not None:
        raise UsageError("targets and an adapter both name the modules", expected="one of the two")
    place, share = Path(out), parse_part(part)
    check_out(place, overwrite=overwrite or resume)
    where = choose_device(device)
    with named_when_full(where, "loading the base", _name(base), "--base-dtype bfloat16, or --device cpu"):
        model, config, chosen, refused, task_type = _open(base, targets, adapter, dtype, where)
    sets = _read(data, base, config, model, task_type, samples, seed, max_length, template)
    every = make_batches(sets, [[0] * len(s) for s in sets], batch_tokens=batch_tokens)
    mine = every[share[0] - 1 :: share[1]]
    if not mine:
        hint = "use fewer parts, or a smaller batch_tokens"
        raise LoraforgeError("a part has no batch", got=f"{len(every)} batches in {share[1]} parts", hint=hint)
    options: dict[str, object] = dict(prefer_kwargs(model))
    named = targets is not None or adapter is not None
    with named_when_full(where, "looking at the model's targets", None, LESS):
        trace, skipped = trace_targets(model, chosen, every, options, lenient=not named)
    kept = {name: target for name, target in chosen.items() if name not in skipped}
    sums = InputSums(model, kept, trace, kind, options)
    about = {
        "kind": kind,
        "part": list(share),
        "modules": list(kept),
        "base": {"name": _name(base), "sha256": model_digest(model)},
        "data": batches_digest(every),
        "sources": [{"name": s.source, "sha256": s.sha256, "samples": len(s), "available": s.available} for s in sets],
        "samples": sum(len(batch.indices) for batch in mine),
        "batches": len(mine),
        "dtype": dtype,
        "versions": versions("torch", "transformers"),
    }
    with named_when_full(where, "collecting input statistics", sums.at, LESS):
        done = run_batches(sums, mine, place, about, resume=resume, overwrite=overwrite, progress=progress)
    return account({**about, "tokens": sums.tokens}, place) | {
        "skipped": {**refused, **skipped},
        "resumed_from": done,
        "device": str(where),
        "peak_device_bytes": peak_bytes(where),
        "seconds": time.perf_counter() - started,
    }


def parse_part(part: str | tuple[int, int] | None) -> tuple[int, int]:
    """(i, n) of a part, (1, 1) for the whole.

    Raises:
        UsageError: Not i/n with 1 <= i <= n.
    """
    if part is None:
        return 1, 1
    pieces = part.split("/") if isinstance(part, str) else [str(p) for p in part]
    if len(pieces) == 2 and all(p.strip().isdecimal() for p in pieces):
        i, n = (int(p) for p in pieces)
        if 1 <= i <= n:
            return i, n
    raise UsageError("a part is out of range", where="part", got=part, expected="i/n with 1 <= i <= n, for example 2/4")


def _open(
    base: Any, targets: str | Sequence[str] | None, adapter: Any, dtype: str, device: torch.device
) -> tuple[nn.Module, Any, dict[str, Target], dict[str, str], str | None]:
    """The model, its configuration, the targets, matrices without a statistic, and the adapter's task type."""
    if adapter is None:
        model, config = load_base(base, dtype=dtype, device=device)
        return model, config, *choose_targets(model, targets), None
    from loraforge.adapters import open_adapter

    opened = open_adapter(adapter)
    shapes = {name: (opened.info(name).m, opened.info(name).n) for name in opened.modules}
    model, config = load_base(
        base, task_type=opened.task_type, wanted=opened.modules, shapes=shapes, dtype=dtype, device=device
    )
    return model, config, adapter_targets(model, opened.modules, shapes), {}, opened.task_type


def _read(
    data: Any, base: Any, config: Any, model: nn.Module, task_type: str | None, samples: int | None, seed: int,
    max_length: int | None, template: str | None,
) -> list[CalibrationSet]:  # fmt: skip
    """All sources of data, read and checked against the model."""
    sources = [data] if isinstance(data, str | os.PathLike | Mapping) else list(data)
    if not sources:
        raise LoraforgeError("no data was given", expected="--data FILE")
    sets = []
    for i, source in enumerate(sources, 1):
        loaded = load_calibration(
            source,
            name=f"data {i}",
            model_config=config,
            base=None if isinstance(base, nn.Module) else base,
            task_type=task_type,
            max_length=max_length,
            template=template,
            selection=Selection(samples_num=samples, seed=seed),
        )
        check_inputs(model, loaded.samples[0], loaded.source)
        if encoder_decoder(config) and "decoder_input_ids" not in loaded.samples[0]:
            raise LoraforgeError(
                "an encoder-decoder model needs what its decoder reads",
                where=loaded.source,
                expected="rows with `target`, or tensors with decoder_input_ids or labels",
            )
        sets.append(loaded)
    return sets


def _name(base: Any) -> str:
    return type(base).__name__ if isinstance(base, nn.Module) else os.fspath(base)
