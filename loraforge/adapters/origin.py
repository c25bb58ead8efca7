"""What a written adapter takes from those it was made of: base, task, shapes and kinds of modules, expert stacks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loraforge.adapters.keys import shorten
from loraforge.adapters.layouts import Shape
from loraforge.adapters.reader import Adapter
from loraforge.errors import LoraforgeError

_WRAPPER = ".base_layer"


@dataclass(frozen=True, slots=True)
class PeftMeta:
    """What comes from the adapters.

    Attributes:
        base: base_model_name_or_path.
        task_type: PEFT's task type.
        fan_in_fan_out: The base layers are Conv1D.
        inputs: Folders that were read, which the output must not replace.
        shapes: Module -> its shape and kind; a module that is not named is a linear one of any size.
        chains: Module -> full names of its adapted parameters, innermost wrapper first.
        metadata: Metadata that all files of tensors share.
        parted: Modules whose dotted names start with a part of a pipeline (`unet.`).
    """

    base: str | None = None
    task_type: str | None = None
    fan_in_fan_out: bool = False
    inputs: tuple[Path, ...] = ()
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    chains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    parted: frozenset[str] = frozenset()

    def stacks(self, parameters: Collection[str]) -> dict[str, str]:
        """Name in a PEFT file of the stack of each of these adapted parameters, in the order of `target_parameters`.

        PEFT wraps the parameters of one module in one another, the first that the model registers innermost:
        `experts.base_layer` is the stack of the one before that of `experts`.
        """
        stacks: dict[str, str] = {}
        for parent, chain in self.chains.items():
            used = [name for name in chain if name in parameters]
            stacks |= {name: parent + _WRAPPER * (len(used) - 1 - i) for i, name in enumerate(used)}
        return stacks

    @classmethod
    def like(cls, adapters: Sequence[Adapter]) -> PeftMeta:
        """The fields of the first adapter that states each; Conv1D if any adapter says so.

        Raises:
            LoraforgeError: The order of adapted parameters in one module cannot be told.
        """
        first = adapters[0].metadata if adapters else {}
        return cls(
            base=next((a.base for a in adapters if a.base), None),
            task_type=next((a.task_type for a in adapters if a.task_type), None),
            fan_in_fan_out=any(a.settings.fan_in_fan_out for a in adapters),
            inputs=tuple(a.path for a in adapters),
            shapes=_shapes(adapters),
            chains=_chains(adapters),
            metadata={k: v for k, v in first.items() if all(a.metadata.get(k) == v for a in adapters)},
            # A name is spelled as in the first adapter; in PEFT's, `transformer.h.0` belongs to a language model.
            parted=frozenset(name for name, spelling in _spellings(adapters).items() if spelling != "peft"),
        )


def _spellings(adapters: Sequence[Adapter]) -> dict[str, str]:
    """Module -> format of the first adapter that has it."""
    found: dict[str, str] = {}
    for adapter in adapters:
        for module in adapter.modules:
            found.setdefault(module, adapter.format)
    return found


def _shapes(adapters: Sequence[Adapter]) -> dict[str, Shape]:
    """Shape and kind of every module, with the largest rank that a merge can give it.

    A result has at most the sum of the ranks, and one padded to a uniform rank at most the largest of those.
    """
    ranks: dict[str, int] = {}
    experts: dict[str, int] = {}
    for adapter in adapters:
        for module in adapter.modules:
            info = adapter.info(module)
            ranks[module] = ranks.get(module, 0) + info.rank
            if info.parameter is not None:
                experts[info.parameter] = max(experts.get(info.parameter, 0), (info.index or 0) + 1)
    top = max(ranks.values(), default=1)
    shapes: dict[str, Shape] = {}
    for adapter in adapters:
        for module in adapter.modules:
            info = adapter.info(module)
            biased = info.has_bias or (module in shapes and shapes[module].biased)
            shapes[module] = Shape(
                info.kind,
                info.m,
                info.n,
                info.kernel,
                info.parameter,
                info.index or 0,
                experts.get(info.parameter or "", 1),
                max(top, min(info.m, info.n)),
                biased,
            )
    return shapes


def _chains(adapters: Sequence[Adapter]) -> dict[str, tuple[str, ...]]:
    """Adapted parameters of each module in the order of PEFT's wrappers, innermost first.

    Raises:
        LoraforgeError: No adapter has all parameters of a module that the adapters have together.
    """
    chains: dict[str, list[tuple[str, ...]]] = {}
    for adapter in adapters:
        stems: dict[str, dict[str, str]] = {}
        for module in adapter.modules:
            info = adapter.info(module)
            if info.parameter is not None and info.group is not None:
                stems.setdefault(info.parameter.rpartition(".")[0], {})[info.parameter] = info.group
        for parent, found in stems.items():
            # The innermost is the one with the most wrappers in its key.
            order = sorted(found.items(), key=lambda pair: -len(pair[1]))
            chains.setdefault(parent, []).append(tuple(name for name, _ in order))
    whole: dict[str, tuple[str, ...]] = {}
    for parent, orders in chains.items():
        whole[parent] = max(orders, key=len)
        if {name for order in orders for name in order} != set(whole[parent]):
            raise LoraforgeError(
                "The order of adapted parameters in a module cannot be told",
                where=parent,
                got="; ".join(shorten(order) for order in orders),
                expected="one adapter that has all of them (target_parameters)",
                hint="PEFT's file names them by their order in the model only; merge adapters of the same parameters",
            )
    return whole
