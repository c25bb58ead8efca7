"""An adapter's module names found in a model: exactly, or after one leading prefix is stripped or added."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from loraforge.errors import LoraforgeError, raise_problems

_REFUSED = (nn.Embedding, nn.EmbeddingBag, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def resolve_modules(
    model: nn.Module, names: Iterable[str], shapes: Mapping[str, tuple[int, int]] | None = None
) -> dict[str, nn.Module]:
    """The modules that an adapter's names mean, in the order of the names.

    A name that the model does not have is tried with a leading prefix stripped ("bert.encoder..." in a model whose
    names start at "encoder...") or added; if one name fits in several ways, the prefix that fits all names decides.

    Args:
        model: The base model.
        names: Dotted names as the adapter has them.
        shapes: (m, n) of each name's delta; checked where given.

    Raises:
        LoraforgeError: Modules that are absent (with close names), ambiguous, of a kind that LoRA's delta cannot be
            added to, or whose weight has another shape; all at once.
    """
    known = dict(model.named_modules())
    wanted = list(names)
    fits = {name: _fits(name, known) for name in wanted}
    shared = set.intersection(*(set(fit) for fit in fits.values())) if fits else set()
    problems: list[LoraforgeError] = []
    resolved: dict[str, nn.Module] = {}
    for name, fit in fits.items():
        found = sorted({fit[key] for key in (shared if len(shared) == 1 else fit)})
        if name in known:
            found = [name]
        if len(found) != 1:
            problems.append(_absent(name, known) if not found else _ambiguous(name, found))
            continue
        problem = _refusal(name, known[found[0]], None if shapes is None else shapes.get(name))
        if problem is not None:
            problems.append(problem)
        resolved[name] = known[found[0]]
    problems += _twice(resolved)
    raise_problems(_fold_absent(problems, len(wanted)))
    return resolved


def is_transposed(module: nn.Module) -> bool:
    """Whether the module computes x W + b with W (n, m), as transformers' Conv1D does, instead of x W^T + b."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear | Conv1D):
        return isinstance(module, Conv1D)
    return _orientation(module) == "transposed"


def weight_view(module: nn.Module) -> Tensor:
    """(m, n) view of the module's weight: writing into it changes the module."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise LoraforgeError("the module has no weight", got=type(module).__name__)
    return weight.detach().mT if is_transposed(module) else weight.detach()


def _fits(name: str, known: Mapping[str, nn.Module]) -> dict[tuple[str, str], str]:
    """Ways in which a name is a module's: ("strip" or "add", prefix) -> the module's name."""
    fits = {("add", ""): name} if name in known else {}
    parts = name.split(".")
    for i in range(1, len(parts)):
        if (tail := ".".join(parts[i:])) in known:
            fits["strip", ".".join(parts[:i])] = tail
    fits |= {("add", k[: -len(name) - 1]): k for k in known if k.endswith(f".{name}")}
    return fits


def _refusal(name: str, module: nn.Module, shape: tuple[int, int] | None) -> LoraforgeError | None:
    """Why a delta cannot be added to this module, if so."""
    kind = type(module).__name__
    weight = getattr(module, "weight", None)
    if hasattr(module, "base_layer"):
        hint = "give the plain base model, without PEFT"
        return LoraforgeError("the module is wrapped by an adapter already", where=name, got=kind, hint=hint)
    if isinstance(module, _REFUSED) or not isinstance(weight, Tensor) or weight.ndim != 2:
        what = "this kind of module cannot be calibrated"
        if not isinstance(weight, Tensor) and any(p.ndim == 3 for p in module.parameters(recurse=False)):
            what = "a module of routed experts cannot be calibrated"
        hint = "leave it out of the adapters' targets, or use a method without calibration, such as svd"
        return LoraforgeError(what, where=name, got=kind, expected="Linear or Conv1D with a 2-D weight", hint=hint)
    if not weight.is_floating_point():
        hint = "load the base in float32, bfloat16 or float16"
        return LoraforgeError("the weight is quantised", where=name, got=f"{kind}, {weight.dtype}", hint=hint)
    if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D" and _orientation(module) is None:
        return LoraforgeError("the module is not linear", where=name, got=kind, expected="Linear or Conv1D")
    rows, columns = weight.shape
    found = (columns, rows) if is_transposed(module) else (rows, columns)
    if shape is not None and tuple(shape) != found:
        return LoraforgeError(
            "the base's weight and the adapter's delta have different shapes",
            where=name,
            got=f"{found} in the base",
            expected=f"{tuple(shape)} in the adapter",
            hint="give the base that the adapter was trained on",
        )
    return None


def _orientation(module: nn.Module) -> str | None:
    """'plain' or 'transposed' for a module that computes x W^T + b or x W + b, found by running it; None otherwise."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    for orientation, matrix in (("plain", weight.mT), ("transposed", weight)):
        x = torch.randn(3, matrix.shape[0], generator=torch.Generator().manual_seed(0)).to(weight)
        try:
            with torch.no_grad():
                found, offset = module(x), module(torch.zeros_like(x))
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue  # this input is not what the module takes
        expected = x @ matrix.detach()
        if isinstance(found, Tensor) and found.shape == expected.shape:
            scale = float(expected.abs().max()) + float(offset.abs().max())
            tolerance = min(1e3 * torch.finfo(weight.dtype).eps, 0.05) * scale
            if float((found - offset - expected).abs().max()) <= tolerance:
                return orientation
    return None


def _absent(name: str, known: Mapping[str, nn.Module]) -> LoraforgeError:
    close = difflib.get_close_matches(name, [k for k in known if k], n=3, cutoff=0.4)
    return LoraforgeError("the model has no such module", where=name, got=f"close names: {', '.join(close) or 'none'}")


def _ambiguous(name: str, found: Sequence[str]) -> LoraforgeError:
    return LoraforgeError("the name fits several modules", where=name, got=", ".join(found), expected="one")


def _twice(resolved: Mapping[str, nn.Module]) -> list[LoraforgeError]:
    """Two names that came out as one module."""
    owner: dict[int, str] = {}
    problems = []
    for name, module in resolved.items():
        if owner.setdefault(id(module), name) != name:
            problems.append(LoraforgeError("two names mean one module", where=name, got=owner[id(module)]))
    return problems


def _fold_absent(problems: list[LoraforgeError], wanted: int, shown: int = 10) -> list[LoraforgeError]:
    """The first problems, the others counted."""
    if len(problems) <= shown:
        return problems
    rest = f"and {len(problems) - shown} more of {wanted} modules"
    return [*problems[:shown], LoraforgeError(rest, hint="give the base that the adapters were trained on")]
