"""A merged update added to its base model: the base's tensors, shard by shard, with the adapted ones changed.

A module's update goes to the tensor of its name (`placing`): transposed for Conv1D and embeddings, reshaped for
convolutions, one slice for each expert; a bias on lora_B to the module's own bias. Merged heads replace the base's.

Tied weights are untied where an adapter changes one of them: PEFT adds its update to one use of the shared weight only,
so every use gets a tensor of its own, and config.json says tie_word_embeddings=false where the class allows that.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loraforge.adapters import Adapter, HeadsPlan
from loraforge.adapters.formats.parts import ModuleInfo
from loraforge.adapters.heads import write_aside
from loraforge.checkpoints import SHARD_BYTES, Checkpoint, ModelReport, open_checkpoint
from loraforge.errors import LoraforgeError, raise_problems
from loraforge.merging import options
from loraforge.merging.job import Progress
from loraforge.merging.models.folder import ModelFolder, Rounding, add_rows
from loraforge.merging.models.heads import head_names, label_changes
from loraforge.merging.models.placing import Place, find_places, match_tensors
from loraforge.merging.models.skeleton import Skeleton, read_skeleton
from loraforge.types import Merged


def bake(
    stream: Iterable[tuple[str, Merged, Tensor | None]],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    adapters: Sequence[Adapter],
    modules: Sequence[str],
    heads: HeadsPlan | None = None,
    dtype: str = "auto",
    device: torch.device | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    report: Callable[[], dict[str, Any]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes base + update as a model folder. Results without a low rank are added a block of rows at a time.

    Args:
        stream: (module, merged update, merged bias or None) for each of `modules`, in any order.
        base: Model folder, file of weights, or id in the local cache.
        out: Folder to make.
        adapters: Where the updates come from: shapes and kinds of modules.
        modules: All modules of the stream.
        heads: What becomes of heads.
        dtype: Dtype of the written floating point tensors; auto is the base's own, tensor by tensor.
        device: Where updates are added; default the CPU.
        shard_bytes: Largest size of one file.
        overwrite: Replace an earlier output.
        report: Makes the report of the merge, once the stream is at its end.
        progress: Called with (stage, detail, done, total) for what is copied after the merge.

    Returns:
        The report with out, base, dtype, rounding, bytes, files and parameters.

    Raises:
        LoraforgeError: The base does not fit the modules, is quantised, or lacks a bias; the output exists.
    """
    if not isinstance(base, str | os.PathLike):
        raise LoraforgeError(
            "A model is made from the base's files", got=type(base).__name__, expected="a model folder"
        )
    origin, heads = open_checkpoint(base), heads or HeadsPlan()
    infos = {module: next(a.info(module) for a in adapters if module in a.modules_set) for module in modules}
    skeleton = read_skeleton(origin)
    places = find_places(infos, origin, skeleton)
    baking = _Baking(origin, infos, places, _biases(places, adapters, origin), device)
    replaced, notes = head_names(heads, origin, skeleton)
    untied, touched = _untied({*(place.tensor for place in places.values()), *replaced}, origin, skeleton)
    layout = {name: (tuple(t.shape), t.dtype) for name, t in replaced.items()}
    layout |= {name: (origin.shape(source), origin.dtype(source)) for name, source in untied.items()}
    changes = label_changes(replaced, origin)
    if untied:
        notes.append(f"tied weights were untied, because an adapter changes one of them: {', '.join(untied)}")
    if touched and skeleton is not None and skeleton.can_untie:
        changes["tie_word_embeddings"] = False
    target = None if dtype == "auto" else options.DTYPES[dtype]
    inputs = [origin.path, *(adapter.path for adapter in adapters)]
    folder = ModelFolder(out, origin, target, shard_bytes, overwrite=overwrite, inputs=inputs)

    def account(written: ModelReport, rounding: float) -> dict[str, Any]:
        found = dict(report() if report is not None else {})
        warnings = [*found.get("warnings", ()), *notes]
        return found | {
            "out": os.fspath(out), "output_kind": "model", "base": str(origin.path), "base_sha256": origin.sha256s,
            "dtype": dtype if target is not None else "as the base", "rounding": rounding, "bytes": written.bytes,
            "files": list(written.files), "parameters": written.parameters, "warnings": warnings,
        }  # fmt: skip

    tensors = _all_tensors(baking, stream, replaced, untied, progress)
    aside = {name: dict(found) for name, found in heads.aside.items()}
    return folder.write(tensors, lambda place: write_aside(place, heads, aside), account, extra=layout, changes=changes)


class _Baking:
    """Adds updates to tensors; a tensor that several modules change is held until the last of them came."""

    def __init__(
        self,
        base: Checkpoint,
        infos: Mapping[str, ModuleInfo],
        places: Mapping[str, Place],
        biases: Mapping[str, str],
        device: torch.device | None,
    ) -> None:
        self._device = device
        self.base, self._infos, self._places, self._biases = base, infos, places, biases
        self._left = Counter(place.tensor for place in places.values())
        self._held: dict[str, Tensor] = {}

    def add(self, module: str, update: Merged, bias: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """Adds a module's update; yields tensors that are finished."""
        place, info = self._places[module], self._infos[module]
        weight = self._held.pop(place.tensor, None)
        if weight is None:
            weight = self._wide(place.source)
        if tuple(update.shape) != (info.m, info.n):
            raise LoraforgeError("A merged update has another shape than its module", where=module, got=update.shape)
        add_rows(place.view(weight, info.m, info.n), update)
        self._left[place.tensor] -= 1
        if self._left[place.tensor]:
            self._held[place.tensor] = weight
        else:
            yield place.tensor, weight
        if bias is not None:
            own = self._wide(self._biases[module])
            yield self._biases[module], own + bias.to(own)

    def unfinished(self) -> list[str]:
        """Tensors whose modules did not all come."""
        return [name for name, count in self._left.items() if count]

    def _wide(self, name: str) -> Tensor:
        """A copy of a tensor of the base in the dtype of the arithmetic."""
        tensor = self.base.read_finite(name, self._device)
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True).contiguous()


def _all_tensors(
    baking: _Baking,
    stream: Iterable[tuple[str, Merged, Tensor | None]],
    replaced: Mapping[str, Tensor],
    untied: Mapping[str, str],
    progress: Progress | None,
) -> Iterator[tuple[str, Tensor, Rounding]]:
    """Every tensor of the output: changed ones as the merge gives them, then heads, then what is copied."""
    done: set[str] = set(replaced)
    for module, update, bias in stream:
        for name, tensor in baking.add(module, update, bias):
            done.add(name)
            yield name, tensor, Rounding.COUNTED
    if missing := baking.unfinished():
        raise LoraforgeError("The merge did not give every module that was announced", where=", ".join(missing[:5]))
    for name, tensor in replaced.items():
        yield name, tensor, Rounding.COPIED
    base = baking.base
    rest = [(n, n) for n in base.names if n not in done] + [(n, s) for n, s in untied.items() if n not in done]
    for count, (name, source) in enumerate(rest):
        if progress is not None:
            progress("copying", name, count, len(rest))
        yield name, base.read(source), Rounding.COPIED


def _biases(places: Mapping[str, Place], adapters: Sequence[Adapter], base: Checkpoint) -> dict[str, str]:
    """The tensor that a module's bias is added to.

    Raises:
        LoraforgeError: The base's module has no bias.
    """
    found, problems = {}, []
    for module, place in places.items():
        if not any(module in a.modules_set and a.info(module).has_bias for a in adapters):
            continue
        name = place.source.removesuffix("weight") + "bias"
        if name in base:
            found[module] = name
        else:
            problems.append(
                LoraforgeError(
                    "An adapter has a bias on a module that has none in the base",
                    where=module,
                    expected=name,
                    hint="merge into an adapter (--output-kind adapter): PEFT keeps that bias",
                )
            )
    raise_problems(problems)
    return found


def _untied(changed: set[str], base: Checkpoint, skeleton: Skeleton | None) -> tuple[dict[str, str], bool]:
    """Which tensors to add because a weight that they share is changed (name -> tensor with their values).

    Args:
        changed: Tensors that the merge changes.
        base: The base model.
        skeleton: Which weights are tied; None where that is not known.

    Returns:
        The tensors to add, and whether any tied weight is changed at all.
    """
    if skeleton is None:
        return {}, False
    added: dict[str, str] = {}
    touched = False
    own = match_tensors([*skeleton.tied, *skeleton.tied.values()], base, skeleton)
    for shared in sorted(set(skeleton.tied.values())):
        group = [shared, *sorted(name for name, source in skeleton.tied.items() if source == shared)]
        held = {name: own[name][0] for name in group if len(own[name]) == 1}
        if held and changed & {*held.values(), *group}:
            touched = True
            added |= {name: next(iter(held.values())) for name in group if name not in held}
    return added, touched
