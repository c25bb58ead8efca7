"""What is refused of model inputs before a model sees them: one place for every source of calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError, raise_problems

Sample = dict[str, Tensor]

MASKS = ("attention_mask", "decoder_attention_mask")
IDS = ("input_ids", "decoder_input_ids", "token_type_ids", "position_ids", "decoder_position_ids", *MASKS)
# Tensors with one entry a token: their first dimension is padded, everything else must have one shape in all samples.
ENCODER = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "bbox")
DECODER = ("decoder_input_ids", "decoder_attention_mask", "decoder_position_ids", "decoder_inputs_embeds")
SHOWN = 10
SHOWN_ROWS = 3
# Families whose positions are counted from the padding id + 1, so that the table's first rows are never used.
_OFFSET_FAMILIES = (
    "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "data2vec-text", "ibert", "xmod",
    "longformer", "luke", "layoutlmv3", "mpnet",
)  # fmt: skip


def text_config(config: Any, name: str) -> Any:
    """An entry of a model's configuration, or of the text part of a composite one; None where neither has it."""
    value = getattr(config, name, None)
    if value is None and hasattr(config, "get_text_config"):
        value = getattr(config.get_text_config(), name, None)
    return value


def usable_positions(config: Any) -> int | None:
    """Tokens that a model has positions for, or None where its configuration sets no bound."""
    positions = text_config(config, "max_position_embeddings")
    if not isinstance(positions, int) or positions <= 0:
        return None
    if text_config(config, "model_type") not in _OFFSET_FAMILIES:
        return positions
    return positions - int(text_config(config, "pad_token_id") or 0) - 1


def report_problems(problems: list[LoraforgeError]) -> None:
    """Raises the first problems at once and counts the others."""
    if len(problems) > SHOWN:
        rest = len(problems) - SHOWN
        problems = [*problems[:SHOWN], LoraforgeError(f"and {rest} more problems of this source")]
    raise_problems(problems)


def check_samples(samples: Sequence[Sample], where: object, config: Any, rows: Sequence[object] | None = None) -> None:
    """Refuses samples that a model cannot take or that would spoil a statistic; all of them at once.

    Args:
        samples: Trimmed samples.
        where: Source, for messages.
        config: The model's configuration, or None.
        rows: What to call each sample; default its index.

    Raises:
        LoraforgeError: Token outside the vocabulary, NaN or Inf, masks that are empty or of another length, sequences
            longer than the model has positions, inputs that differ between samples.
    """
    problems: list[LoraforgeError] = []
    if not samples:
        raise LoraforgeError("the calibration set has no samples", where=where, expected="at least one")
    fixed = {k: v.shape for k, v in samples[0].items() if k not in ENCODER + DECODER}
    for i, sample in enumerate(samples):
        row = f"{where}, {f'sample {i}' if rows is None else rows[i]}"
        if sample.keys() != samples[0].keys():
            found, wanted = (", ".join(sorted(s)) for s in (sample, samples[0]))
            problems.append(LoraforgeError("the samples have different inputs", where=row, got=found, expected=wanted))
            continue
        for key, value in sample.items():
            problems += _check_tensor(key, value, sample, f"{row}, {key}", config)
            if key in fixed and value.shape != fixed[key]:
                got, wanted = (str(tuple(shape)) for shape in (value.shape, fixed[key]))
                problems.append(
                    LoraforgeError("the samples differ in shape", where=f"{row}, {key}", got=got, expected=wanted)
                )
    report_problems(_grouped(problems, where, len(samples)))


def _grouped(problems: Sequence[LoraforgeError], where: object, count: int) -> list[LoraforgeError]:
    """One problem for all samples with the same cause: how many, and the first few of them."""
    causes: dict[tuple[object, ...], list[LoraforgeError]] = {}
    for problem in problems:
        causes.setdefault((problem.what, problem.expected, problem.hint), []).append(problem)
    found = []
    for same in causes.values():
        first = same[0]
        if len(same) == 1:
            found.append(first)
            continue
        rows = [f"{str(p.where).removeprefix(f'{where}, ')}{f': {p.got}' if p.got else ''}" for p in same[:SHOWN_ROWS]]
        more = f"; and {len(same) - SHOWN_ROWS} more" if len(same) > SHOWN_ROWS else ""
        got = f"{len(same)} times in {count} samples: {'; '.join(rows)}{more}"
        found.append(LoraforgeError(first.what, where=where, got=got, expected=first.expected, hint=first.hint))
    return found


def _check_tensor(key: str, value: Tensor, sample: Sample, where: str, config: Any) -> list[LoraforgeError]:
    """The problems of one tensor of one sample."""
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        bad = value[~torch.isfinite(value)]
        return [LoraforgeError("the input is not finite", where=where, got=f"{bad.numel()} of {value.numel()} values")]
    if key in MASKS:
        if bool(((value != 0) & (value != 1)).any()):
            got = sorted(set(value.tolist()))[:8]
            return [LoraforgeError("the mask holds other values than 0 and 1", where=where, got=got)]
        return [] if bool(value.any()) else [LoraforgeError("the mask leaves no token", where=where, expected="a 1")]
    family = ENCODER if key in ENCODER else DECODER if key in DECODER else ()
    mask = sample.get(MASKS[0] if family is ENCODER else MASKS[1]) if family else None
    if mask is not None and mask.shape[0] != value.shape[0]:
        what = "the input and its mask have different lengths"
        return [LoraforgeError(what, where=where, got=value.shape[0], expected=mask.shape[0])]
    if key == "pixel_values" and value.ndim == 3:
        return _check_channels(value, where, config)
    return _check_ids(value, where, config) if key in (ENCODER[0], DECODER[0]) else []


def _check_ids(ids: Tensor, where: str, config: Any) -> list[LoraforgeError]:
    vocabulary, positions = text_config(config, "vocab_size"), usable_positions(config)
    problems = []
    outside = ids < 0 if vocabulary is None else (ids < 0) | (ids >= vocabulary)
    if bool(outside.any()):
        problems.append(
            LoraforgeError(
                "a token is outside the model's vocabulary",
                where=f"{where}, position {int(outside.nonzero()[0])}",
                got=int(ids[outside][0]),
                expected="0 or more" if vocabulary is None else f"0 to {vocabulary - 1}",
                hint="use the tokenizer of this base",
            )
        )
    if positions is not None and ids.shape[0] > positions:
        problems.append(
            LoraforgeError(
                "the sequence is longer than the model has positions",
                where=where,
                got=f"{ids.shape[0]} tokens",
                expected=f"at most {positions}",
                hint="cut the tensors in the file",
            )
        )
    return problems


def _check_channels(pixels: Tensor, where: str, config: Any) -> list[LoraforgeError]:
    channels = getattr(getattr(config, "vision_config", None) or config, "num_channels", None)
    if channels is None or pixels.shape[0] == channels:
        return []
    got, wanted = f"{pixels.shape[0]} channels first", f"({channels}, height, width)"
    return [LoraforgeError("the images have a wrong number of channels", where=where, got=got, expected=wanted)]


def check_batch(batch: Mapping[str, Tensor], where: object) -> None:
    """What can be said of batched inputs before they are cut into samples."""
    if not batch:
        raise LoraforgeError("the calibration set has no tensors", where=where, expected="input_ids, pixel_values, ...")
    problems = []
    counts = {key: value.shape[0] if value.ndim else None for key, value in batch.items()}
    if len(set(counts.values())) > 1 or None in counts.values():
        got = ", ".join(f"{k} {tuple(batch[k].shape)}" for k in batch)
        problems.append(
            LoraforgeError(
                "the inputs disagree in the number of samples", where=where, got=got, expected="one first dim"
            )
        )
    for key, value in batch.items():
        whole = not value.is_floating_point() and not value.is_complex()
        if (key in IDS or key == "labels") and not whole:
            problems.append(
                LoraforgeError(
                    "token ids must be whole numbers", where=f"{where}, {key}", got=value.dtype, expected="int64"
                )
            )
        if (key in ("inputs_embeds", "pixel_values", "decoder_inputs_embeds")) and not value.is_floating_point():
            problems.append(
                LoraforgeError(
                    "the input must be floating point", where=f"{where}, {key}", got=value.dtype, expected="float32"
                )
            )
        if key in IDS and value.ndim != 2:
            got = f"shape {tuple(value.shape)}"
            problems.append(
                LoraforgeError("wrong dimensions", where=f"{where}, {key}", got=got, expected="(samples, tokens)")
            )
    report_problems(problems)
    if next(iter(counts.values())) == 0:
        raise LoraforgeError("the calibration set has no samples", where=where, got="first dimension 0")
