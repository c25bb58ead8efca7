"""Opens a model for the doctor: its body is enough, in the dtype that it is stored in."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from loraforge.adapters import open_adapter
from loraforge.calibrate.base import load_base, load_config
from loraforge.errors import LoraforgeError
from loraforge.tasks import load_model

# PEFT's task types and our kinds: names in an adapter are those of the class that it was trained in.
_KINDS = {"SEQ_CLS": "classification", "SEQ_2_SEQ_LM": "text-to-text", "CAUSAL_LM": "causal"}


def open_for_doctor(model: str | Path, adapter: str | Path | None = None) -> nn.Module:
    """The model of a folder or the cache, frozen, with an unmerged adapter in it where one is given.

    An adapter's classification head is left out: it has no part in the attention.

    Raises:
        LoraforgeError: Model or adapter are not there, are damaged, or do not fit.
    """
    stored = getattr(load_config(model), "dtype", None)
    dtype = stored if isinstance(stored, torch.dtype) and stored.is_floating_point else torch.float32
    if adapter is None:
        return load_base(model, dtype=dtype)[0]
    opened = open_adapter(adapter)
    if opened.format != "peft" or not opened.config:
        raise LoraforgeError(
            "only PEFT folders are measured", where=adapter, got=opened.format,
            hint=f"loraforge convert {adapter} --to peft --out FOLDER",
        )  # fmt: skip
    kind = _KINDS.get(str(opened.config.get("task_type")))
    if kind is not None:
        # The head has no part in the attention, so two classes do as well as any number.
        base = load_model(model, kind, head_labels=("no", "yes"), dtype=dtype)[0]
    else:
        base = load_base(model, wanted=opened.modules, dtype=dtype)[0]
    return _with_adapter(base, Path(adapter))


def _with_adapter(base: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(folder))
    config.modules_to_save = None  # the head of a task, which the base's own class may not have
    config.task_type = None
    try:
        with warnings.catch_warnings():
            # transformers warns PEFT of one of its older names, PEFT of the head's tensors that stay unused.
            warnings.simplefilter("ignore")
            wrapped: nn.Module = PeftModel.from_pretrained(base, str(folder), config=config)
    except (RuntimeError, ValueError, KeyError) as error:
        got = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        expected = "the base that it was trained on"
        raise LoraforgeError("the adapter does not fit the base", where=folder, got=got, expected=expected) from error
    return wrapped.eval()
