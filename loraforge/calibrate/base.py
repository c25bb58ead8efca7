"""The base model of a calibrated merge, loaded from a folder or the local cache and checked against the adapters."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from loraforge.calibrate.modules import resolve_modules, weight_view
from loraforge.calibrate.rows import DOWNLOAD_ENV, local_only
from loraforge.errors import LoraforgeError, raise_problems

# PEFT's task types and the classes that carry their heads.
_TASK_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError)


def load_base(
    base: str | Path | nn.Module,
    *,
    task_type: str | None = None,
    wanted: Iterable[str] = (),
    shapes: Mapping[str, tuple[int, int]] | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, Any]:
    """The base model, frozen and in evaluation mode, and its configuration.

    The class is the one that the configuration names; where that lacks the wanted modules, the task type's, AutoModel.

    Args:
        base: Folder, id in the local cache, or a model in memory (which is moved and frozen in place).
        task_type: The adapters' task type (PEFT's word), or None.
        wanted: Module names of the adapters.
        shapes: (m, n) of the delta of each.
        dtype: Dtype of weights and forward.
        device: Where to put it.

    Raises:
        LoraforgeError: Not there (nothing is fetched unless LORAFORGE_ALLOW_DOWNLOAD=1), damaged, without the wanted
            modules, or with weights that are missing in its file or not finite.
    """
    dtype = dtype_of(dtype)
    names = list(wanted)
    if isinstance(base, nn.Module):
        resolve_modules(base, names, shapes)
        return _frozen(base, dtype, device), getattr(base, "config", None)
    config = load_config(base)
    first: LoraforgeError | None = None
    for cls in _candidates(config, task_type):
        try:
            model, missing = load_weights(cls, base, config, dtype)
            modules = resolve_modules(model, names, shapes)
        except LoraforgeError as problem:
            # The class of the configuration says best what is wrong; the others are second guesses.
            first = first or problem
            continue
        _check_weights(model, modules, missing, base)
        return _frozen(model, dtype, device), config
    raise first or LoraforgeError("no class of transformers fits the base", where=base, got=type(config).__name__)


def prefer_kwargs(model: nn.Module) -> dict[str, bool]:
    """Options of a calibration forward (no cache, named outputs), those that the model's forward declares."""
    accepted = inspect.signature(model.forward).parameters
    return {name: value for name, value in (("use_cache", False), ("return_dict", True)) if name in accepted}


def encoder_decoder(config: Any) -> bool:
    """Whether a model (by its configuration) reads decoder_input_ids beside its input_ids."""
    return bool(getattr(config, "is_encoder_decoder", False))


def check_inputs(model: nn.Module, keys: Iterable[str], where: object) -> None:
    """Refuses model inputs that the forward does not take; a forward that names none (only **kwargs) may take any.

    Raises:
        LoraforgeError: Names them, and those that it takes.
    """
    parameters = inspect.signature(model.forward).parameters
    named = [n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if not named and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return  # a wrapper that passes everything on
    # A forward takes **kwargs for its attention kernels; a tensor that lands there is read by nobody.
    raise_problems(
        [
            LoraforgeError(
                f"the model does not take '{key}'",
                where=where,
                got=key,
                expected=", ".join(named),
                hint="name the tensors as the model's forward does, or leave this one out",
            )
            for key in keys
            if key not in named
        ]
    )


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """The floating dtype of a name.

    Raises:
        LoraforgeError: There is none.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise LoraforgeError("unknown dtype of the base", got=dtype, expected="float32, float64, bfloat16 or float16")
    return found


def load_config(base: str | Path) -> Any:
    """The configuration of a base in a folder or the local cache.

    Raises:
        LoraforgeError: Not there (nothing is fetched unless LORAFORGE_ALLOW_DOWNLOAD=1), or unreadable.
    """
    from transformers import AutoConfig

    path = Path(base)
    if path.is_dir() and not (path / "config.json").is_file():
        got = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty folder"
        raise LoraforgeError("the base folder has no config.json", where=path, got=got, expected="a transformers model")
    if not path.exists() and (path.is_absolute() or path.parts[:1] == ("..",) or str(base).startswith(".")):
        raise LoraforgeError("the base folder does not exist", where=base, hint="check the path of --base")
    try:
        return AutoConfig.from_pretrained(str(base), local_files_only=local_only())
    except _LOAD_ERRORS as error:
        if path.is_dir():
            got = _first_line(error)
            raise LoraforgeError(
                "the base's config.json cannot be read", where=path / "config.json", got=got
            ) from error
        raise LoraforgeError(
            "the base model is not on this machine",
            where=base,
            got=_first_line(error),
            expected="a folder with config.json and weights, or an id in the Hugging Face cache",
            hint=f"--base FOLDER; or fetch it once: hf download {base} (or set {DOWNLOAD_ENV}=1)",
        ) from error


def _candidates(config: Any, task_type: str | None) -> list[Any]:
    """Classes to load the base with, best first."""
    import transformers

    names = [*(getattr(config, "architectures", None) or [])[:1], _TASK_CLASSES.get(task_type or ""), "AutoModel"]
    classes = [getattr(transformers, name, None) for name in dict.fromkeys(names) if name]
    return [cls for cls in classes if cls is not None]


def load_weights(
    cls: Any, base: str | Path, config: Any, dtype: torch.dtype, **options: Any
) -> tuple[nn.Module, set[str]]:
    """The model, and the names of weights that its file does not have, or has in another shape.

    Args:
        cls: Class of transformers.
        base: Folder or id in the local cache.
        config: The base's configuration.
        dtype: Of the weights.
        **options: Further options of `from_pretrained`.

    Raises:
        LoraforgeError: They cannot be loaded.
    """
    try:
        with _quiet():
            model, info = cls.from_pretrained(
                str(base),
                config=config,
                dtype=dtype,
                local_files_only=local_only(),
                output_loading_info=True,
                **options,
            )
    except _LOAD_ERRORS as error:
        raise LoraforgeError(
            "the base's weights cannot be loaded",
            where=base,
            got=f"{cls.__name__}: {_first_line(error)}",
            expected="a complete model.safetensors (or its shards) beside config.json",
            hint="copy or download the base again",
        ) from error
    other = {key if isinstance(key, str) else key[0] for key in info.get("mismatched_keys") or ()}
    return model, set(info["missing_keys"]) | other


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """No progress bars of transformers: who wants to see progress has a callback for it."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no report of unused heads from transformers: what matters of it is checked here."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_bars():
            yield
    finally:
        logging.set_verbosity(verbosity)


def _check_weights(model: nn.Module, modules: Mapping[str, nn.Module], missing: set[str], base: object) -> None:
    """Refuses wanted modules whose weights were made up by the loader, or are not finite."""
    names = {id(module): name for name, module in model.named_modules()}
    problems = []
    for name, module in modules.items():
        if f"{names[id(module)]}.weight" in missing:
            problems.append(
                LoraforgeError("the base's file has no weight for a module of the adapters", where=f"{base}, {name}")
            )
        elif not bool(torch.isfinite(weight_view(module)).all()):
            problems.append(LoraforgeError("the base's weight is not finite", where=f"{base}, {name}"))
    raise_problems(problems)


def _frozen(model: nn.Module, dtype: torch.dtype, device: str | torch.device) -> nn.Module:
    """The model in a dtype on a device, without a loss of precision in the tables that it computes for itself.

    Rotary frequencies in bfloat16 would be off by half a radian at position 256. Such tables are buffers that are not
    saved. A model whose weights have the dtype already knows what it keeps wider; where weights are narrowed here, the
    one-dimensional ones stay (what is made of them is widened and narrowed by the model), and larger ones follow.
    """
    there = all(p.dtype == dtype for p in model.parameters())
    wide = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set and buffer.is_floating_point() and (there or buffer.ndim == 1)
    ]
    model = model.to(device=device, dtype=dtype)
    for module, name, buffer in wide:
        if buffer.dtype.itemsize > dtype.itemsize:
            setattr(module, name, buffer.to(device))
    return model.eval().requires_grad_(False)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
