"""Decoder tokens for encoder-decoder models whose calibration data has none.

Both streams must see the same tokens, or rows of X and X~ are not pairs. So each task model generates once, greedily,
and its tokens are fixed for both streams from then on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from loraforge.calibrate.base import encoder_decoder
from loraforge.calibrate.batches import Batch
from loraforge.calibrate.trace import call_input
from loraforge.errors import LoraforgeError
from loraforge.types import LowRank


def complete_batches(
    model: nn.Module,
    config: Any,
    modules: Mapping[str, nn.Module],
    factors: Mapping[str, Sequence[LowRank | None]],
    batches: Sequence[Batch],
    *,
    collect: str,
    max_new_tokens: int,
) -> list[Batch]:
    """Batches that can be run with teacher forcing.

    Args:
        model: The base model.
        config: Its configuration.
        modules: Target modules by name.
        factors: Factors of each module, one entry an adapter.
        batches: Batches on the model's device.
        collect: "teacher-forced" (labels, else one generation), "prefill" (the start token alone) or "generate-last"
            (one generation, of which decoder modules count the last step only: the published code's behaviour).
        max_new_tokens: Length of the generation.

    Raises:
        LoraforgeError: "generate-last" with a model that is no encoder-decoder.
    """
    if not encoder_decoder(config):
        if collect == "generate-last":
            raise LoraforgeError(
                "collect=generate-last is for encoder-decoder models", got=type(model).__name__,
                hint="leave collect at teacher-forced",
            )  # fmt: skip
        return list(batches)
    return [_complete(model, config, modules, factors, b, collect, max_new_tokens) for b in batches]


def _complete(
    model: nn.Module,
    config: Any,
    modules: Mapping[str, nn.Module],
    factors: Mapping[str, Sequence[LowRank | None]],
    batch: Batch,
    collect: str,
    max_new_tokens: int,
) -> Batch:
    start = torch.full((len(batch.indices), 1), _start_token(config), device=next(model.parameters()).device)
    if "decoder_input_ids" in batch.inputs and collect == "teacher-forced":
        return batch
    if collect == "prefill":
        ids, mask = start, torch.ones_like(start, dtype=torch.bool)
    elif "decoder_input_ids" in batch.inputs and batch.dec_mask is not None:
        ids, mask = batch.inputs["decoder_input_ids"], batch.dec_mask
    else:
        ids = _generate(model, modules, factors, batch, max_new_tokens)
        ids, mask = _fed_tokens(ids, config)
    counted = _last_only(mask) if collect == "generate-last" else mask
    inputs = {**batch.inputs, "decoder_input_ids": ids, "decoder_attention_mask": mask.long()}
    return replace(batch, inputs=inputs, dec_mask=counted)


def _start_token(config: Any) -> int:
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise LoraforgeError("the base's configuration names no start token", expected="decoder_start_token_id")


def _generate(
    model: Any,
    modules: Mapping[str, nn.Module],
    factors: Mapping[str, Sequence[LowRank | None]],
    batch: Batch,
    max_new_tokens: int,
) -> Tensor:
    """(b, 1 + n) tokens of task model i, the start token first."""
    if not hasattr(model, "generate"):
        raise LoraforgeError(
            "the base model cannot generate, and the calibration data has no targets",
            got=type(model).__name__,
            expected="`target` in the calibration rows, or a base saved with its language-model head",
        )
    handles = []
    for name, module in modules.items():
        pair = factors[name][batch.task]
        if pair is not None:
            near = pair.to(module.weight.dtype, module.weight.device)  # type: ignore[arg-type]
            handles.append(module.register_forward_hook(_adding(near), with_kwargs=True))
    try:
        with torch.no_grad():
            found: Tensor = model.generate(
                **{k: v for k, v in batch.inputs.items() if not k.startswith("decoder_")},
                do_sample=False, num_beams=1, max_new_tokens=max_new_tokens,
            )  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    return found


def _adding(pair: LowRank) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor) -> Tensor:
        return y + (call_input(args, kwargs) @ pair.A.mT) @ pair.B.mT

    return hook


def _fed_tokens(ids: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """What the decoder was fed, (b, n), and which of it came before the end of the sequence."""
    fed = ids[:, :-1]
    end = getattr(config, "eos_token_id", None)
    ends = torch.zeros_like(fed, dtype=torch.bool)
    for token in end if isinstance(end, list | tuple) else [end]:
        if token is not None:
            ends |= fed == token
    ends[:, 0] = False  # the start token may be the end token too
    mask = ends.cumsum(1) == 0
    return fed, mask


def _last_only(mask: Tensor) -> Tensor:
    """True at the last true position of each row."""
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    only = torch.zeros_like(mask)
    only[torch.arange(mask.shape[0], device=mask.device), last] = True
    return only
