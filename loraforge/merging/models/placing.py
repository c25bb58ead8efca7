"""Where an adapter's modules lie in the files of a base model."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraforge.adapters.formats.parts import ModuleInfo
from loraforge.adapters.names import flat, is_flat_name
from loraforge.checkpoints import Checkpoint
from loraforge.errors import LoraforgeError, raise_problems
from loraforge.merging.models.skeleton import Skeleton

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Place:
    """The tensor that a module's update is added to.

    Attributes:
        tensor: Its name in the base's files; of a tied weight that has no tensor of its own, the name to give it.
        source: The tensor that holds its values; another than `tensor` only for tied weights.
        transposed: The tensor (or expert) is stored (n, m).
        index: Number of the expert, None for anything else.
    """

    tensor: str
    source: str
    transposed: bool = False
    index: int | None = None

    def view(self, weight: Tensor, m: int, n: int) -> Tensor:
        """The (m, n) matrix in the whole tensor `weight` (contiguous): writing into it changes the tensor."""
        part = weight if self.index is None else weight[self.index]
        if self.transposed:
            return part.view(n, m).mT
        return part.view(m, n)


def find_places(modules: Mapping[str, ModuleInfo], base: Checkpoint, skeleton: Skeleton | None) -> dict[str, Place]:
    """The place of every module.

    Names are matched as they are, then with leading components left out or added; where that fits in several ways, the
    way that fits all modules decides. Names flattened by kohya's tools are compared flattened.

    Args:
        modules: What is known of each.
        base: The base model.
        skeleton: What its configuration says, if it could be read.

    Raises:
        LoraforgeError: Modules that are absent, ambiguous, quantised or of another shape; all at once.
    """
    tied = {} if skeleton is None else skeleton.tied
    wanted = {module: _tensor_of(module, info) for module, info in modules.items()}
    found = match_tensors(wanted.values(), base, skeleton)
    places: dict[str, Place] = {}
    problems: list[LoraforgeError] = []
    for module, name in wanted.items():
        fits = found[name]
        source = fits[0] if len(fits) == 1 else None
        own = source
        if not fits and (shared := tied.get(name)) is not None:
            fits = match_tensors([shared], base, skeleton)[shared]
            source, own = (fits[0], name) if len(fits) == 1 else (None, None)
        if source is None or own is None:
            # With another base none of thousands is found, and comparing names is slow.
            close = _close(name, base) if len(problems) < _SHOWN else ""
            problems.append(_unplaced(module, modules[module], name, fits, base, close))
            continue
        place = _oriented(module, modules[module], Place(own, source), base, skeleton)
        if isinstance(place, LoraforgeError):
            problems.append(place)
        else:
            places[module] = place
    problems += _twice(places)
    if len(problems) > _SHOWN:
        rest = f"and {len(problems) - _SHOWN} more of {len(modules)} modules"
        hint = "give the base that the adapters were trained on"
        problems = [*problems[:_SHOWN], LoraforgeError(rest, hint=hint)]
    raise_problems(problems)
    return places


def match_tensors(wanted: Iterable[str], base: Checkpoint, skeleton: Skeleton | None) -> dict[str, list[str]]:
    """The tensors of the base's files that each name can mean, names as in the model in memory or as in the files."""
    files = {} if skeleton is None else {memory: file for file, memory in skeleton.names.items()}
    found = match_names(wanted, [*files, *base.names])
    return {name: sorted({files.get(fit, fit) for fit in fits}) for name, fits in found.items()}


def match_names(wanted: Iterable[str], known: Sequence[str]) -> dict[str, list[str]]:
    """The known names that each wanted name can mean: one where it is clear, none, or several."""
    names = set(known)
    ends: dict[str, list[str]] = {}
    for name in known:
        parts = name.split(".")
        for i in range(1, len(parts)):
            ends.setdefault(".".join(parts[i:]), []).append(name)
    flats: dict[str, list[str]] = {}
    found: dict[str, dict[tuple[str, str], str]] = {}
    for name in dict.fromkeys(wanted):
        fits = {("add", ""): name} if name in names else {}
        parts = name.split(".")
        for i in range(1, len(parts)):
            if (tail := ".".join(parts[i:])) in names:
                fits["strip", ".".join(parts[:i])] = tail
        fits |= {("add", other[: -len(name)]): other for other in ends.get(name, ())}
        if not fits and is_flat_name(name):
            if not flats:
                for other in known:
                    flats.setdefault(flat(other), []).append(other)
            key = flat(name)
            bare = key.partition("_")[2]
            fits = {("flat", other): other for other in flats.get(key) or flats.get(bare) or ()}
        found[name] = fits
    # The way that fits all names decides for those that fit in several.
    shared = set.intersection(*(set(fits) for fits in found.values())) if found else set()
    way = next(iter(shared)) if len(shared) == 1 else None
    return {
        name: [name] if name in names else [fits[way]] if way in fits else sorted(set(fits.values()))
        for name, fits in found.items()
    }


class BaseMatrices:
    """The base's weights of an adapter's modules, as (m, n) matrices."""

    def __init__(self, base: Checkpoint, modules: Mapping[str, ModuleInfo], skeleton: Skeleton | None) -> None:
        """Finds every module.

        Args:
            base: The base model.
            modules: What is known of each.
            skeleton: What its configuration says, if it could be read.

        Raises:
            LoraforgeError: See `find_places`.
        """
        self._base, self._modules = base, dict(modules)
        self._places = find_places(modules, base, skeleton)

    def read(self, module: str, device: torch.device | None = None) -> Tensor:
        """W_0 of a module, (m, n), as stored, on a device (default the CPU)."""
        info, place = self._modules[module], self._places[module]
        return place.view(self._base.read_finite(place.source, device).contiguous(), info.m, info.n)


def _tensor_of(module: str, info: ModuleInfo) -> str:
    """The usual name of the tensor that a module adapts."""
    if info.kind == "expert":
        return info.parameter or module
    return f"{module}_weight" if is_flat_name(module) else f"{module}.weight"


def _oriented(
    module: str, info: ModuleInfo, place: Place, base: Checkpoint, skeleton: Skeleton | None
) -> Place | LoraforgeError:
    """The place with its orientation, or what is wrong with the base's tensor."""
    shape = base.shape(place.source)
    where = f"{base.path}: {place.source}"
    if not base.is_float(place.source):
        return LoraforgeError(
            "The base's weight is quantised",
            where=where,
            got=base.dtype(place.source),
            expected="float32, bfloat16, float16 or float64",
            hint="give the base that the quantised one was made from",
        )
    index = info.index if info.kind == "expert" and len(shape) == 3 else None
    matrix = shape[1:] if index is not None else shape
    flattened = (matrix[0], math.prod(matrix[1:])) if len(matrix) >= 2 else matrix
    fits_plain, fits_transposed = flattened == (info.m, info.n), matrix == (info.n, info.m)
    if info.kind == "embedding":
        fits_plain = False
    if index is not None and index >= shape[0]:
        fits_plain = fits_transposed = False
    if not fits_plain and not fits_transposed:
        return LoraforgeError(
            "The base's weight and the adapter's update have different shapes",
            where=f"{module} ({where})",
            got=f"{list(shape)} in the base",
            expected=f"({info.m}, {info.n}) in the adapter",
            hint="give the base that the adapter was trained on",
        )
    transposed = fits_transposed
    if fits_plain and fits_transposed:
        transposed = _square(module, info, skeleton)
    return Place(place.tensor, place.source, transposed, index)


def _square(module: str, info: ModuleInfo, skeleton: Skeleton | None) -> bool:
    """Whether a square weight is stored transposed: the model's class says it, else the adapter's configuration."""
    if skeleton is None:
        return info.fan_in_fan_out
    if info.kind == "expert":
        owner, known = (info.parameter or module).rpartition(".")[0], skeleton.transposed_experts
    else:
        owner, known = module, skeleton.conv1d
    return any(owner == name or owner.endswith(f".{name}") or name.endswith(f".{owner}") for name in known)


def _close(name: str, base: Checkpoint) -> str:
    return ", ".join(difflib.get_close_matches(name, base.names, n=3, cutoff=0.4)) or "none"


def _unplaced(
    module: str, info: ModuleInfo, name: str, fits: Sequence[str], base: Checkpoint, close: str
) -> LoraforgeError:
    if fits:
        return LoraforgeError(
            "A module of the adapter fits several tensors of the base",
            where=module,
            got=", ".join(fits[:5]),
            expected="one",
            hint="give the base with the names that the adapter was trained on",
        )
    return LoraforgeError(
        "The base has no tensor for a module of the adapter",
        where=f"{module} ({base.path})",
        got=f"close names: {close}",
        expected=name,
        hint="give the base that the adapter was trained on; stacked experts need a base that was saved with "
        "save_pretrained(..., save_original_format=False)"
        if info.kind == "expert"
        else "give the base that the adapter was trained on",
    )


def _twice(places: Mapping[str, Place]) -> list[LoraforgeError]:
    """Two modules that came out as one tensor."""
    owner: dict[tuple[str, int | None], str] = {}
    problems = []
    for module, place in places.items():
        first = owner.setdefault((place.tensor, place.index), module)
        if first != module:
            problems.append(
                LoraforgeError("Two modules mean one tensor of the base", where=place.tensor, got=f"{first}, {module}")
            )
    return problems
