"""Adapted parameters (PEFT's target_parameters): stacks of experts whose factors lie interleaved in two matrices.

For E experts of rank r, A is (E r, in) with the expert as the outer index of its rows, and B is (out, r E) with the
expert as the inner index of its columns: delta_e = scaling * B[:, e::E] A[e r:(e + 1) r]. Several parameters of one
module are wrapped in one another, the first of them innermost: `experts.base_layer.lora_A.weight` belongs to the one
before that of `experts.lora_A.weight`. No key names the parameter; only the order of target_parameters does, and PEFT
itself wraps in the order in which the model registers them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from loraforge.adapters.config import PeftSettings
from loraforge.adapters.formats.parts import ModuleInfo, Part, Slots
from loraforge.adapters.keys import shorten
from loraforge.errors import LoraforgeError
from loraforge.storage.files import TensorFile

_WRAPPER = ".base_layer"


def parameter_stacks(
    groups: Mapping[str, Slots], targets: Sequence[str], file: TensorFile, problems: list[LoraforgeError]
) -> dict[str, str]:
    """Which groups of keys are stacks of experts.

    Args:
        groups: Module name in the file -> its slots.
        targets: target_parameters in their order.
        file: The file, for messages.
        problems: Gets one problem for each module whose stacks and targets do not pair off.

    Returns:
        Module name in the file -> full name of the parameter.
    """
    wrapped: dict[str, list[str]] = {}
    for stem in groups:
        module = stem
        while module.endswith(_WRAPPER):
            module = module.removesuffix(_WRAPPER)
        wrapped.setdefault(module, []).append(stem)
    stacks: dict[str, str] = {}
    for module, stems in wrapped.items():
        names = [name for name in targets if f".{module}.{name.rpartition('.')[2]}".endswith(f".{name}")]
        if not names and all(stem == module for stem in stems):
            continue
        # The longest chain of wrappers is the innermost one, and that is the first parameter.
        stems.sort(key=len, reverse=True)
        if len(names) != len(stems):
            problems.append(
                LoraforgeError(
                    f"The factors of module '{module}' and target_parameters do not pair off",
                    where=file.path,
                    got=f"factors {shorten(stems)}; parameters {shorten(names) or 'none'}",
                    expected="one pair of factors for each parameter",
                    hint="the keys do not name the parameter; the adapter_config.json of the same run is needed",
                )
            )
            names = []
        stacks.update((stem, f"{module}.{name.rpartition('.')[2]}") for stem, name in zip(stems, names, strict=False))
    return stacks


def expert_parts(
    stem: str, parameter: str, slots: Mapping[str, str], file: TensorFile, settings: PeftSettings
) -> dict[str, Part]:
    """One part an expert, named `<parameter>.<number>`.

    Raises:
        LoraforgeError: The shapes do not fit the rank of the configuration, or there is more than two factors.
    """
    if slots.keys() != {"A", "B"}:
        raise LoraforgeError(
            f"Adapted parameter '{parameter}' does not have just lora_A and lora_B",
            where=file.path,
            got=shorten(slots.values()),
            expected="both factors and nothing else",
        )
    keys = (slots["A"], slots["B"])
    A, B = (file.shapes[key] for key in keys)
    rank = settings.rank_of(parameter)
    if len(A) != 2 or len(B) != 2 or 0 in A + B or A[0] % rank or B[1] != A[0]:
        raise LoraforgeError(
            f"The stacked factors of parameter '{parameter}' do not fit",
            where=f"{file.path}: {keys[0]}",
            got=f"A {list(A)}, B {list(B)}",
            expected=f"A [experts * {rank}, in] and B [out, {rank} * experts] (r, rank_pattern)",
        )
    experts = A[0] // rank
    scaling = settings.scaling_of(parameter, rank)
    return {
        f"{parameter}.{index}": Part(
            ModuleInfo(
                rank, scaling, B[0], A[1], file.dtypes[keys[0]], kind="expert", group=stem, index=index,
                parameter=parameter,
            ),
            keys,
            partial(_one_expert, index=index, experts=experts),
        )
        for index in range(experts)
    }  # fmt: skip


def _one_expert(tensors: Sequence[Tensor], index: int, experts: int) -> tuple[Tensor, Tensor]:
    """Factors of one expert out of the stacks A (E r, in) and B (out, r E)."""
    A, B = tensors
    rank = A.shape[0] // experts
    return B[:, index::experts], A[index * rank : (index + 1) * rank]
