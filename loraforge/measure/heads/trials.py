"""The passes that confirm a layout, and what each of them says of the heads."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from loraforge.measure.heads.find import layer_of, unwrapped
from loraforge.measure.heads.layout import Attention, HeadLayout
from loraforge.measure.heads.specimens import random_inputs, words
from loraforge.measure.heads.watch import Watch

# A slice has changed where every column has, by this share of the largest change; the rest may change by as much.
LEAK, LEAST = 0.01, 0.001
# What the forward of a model raises that cannot be run on the inputs.
FAILURES = (ValueError, RuntimeError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError)


class Trials:
    """Runs a model on two rows, once as it is and then with heads disturbed, all attentions at once.

    Args:
        model: In evaluation mode.
        modules: The model's, by name.
        layout: To confirm.
        seed: Of inputs, noise and the heads that are tried.
        inputs: Of the forward; None for random ones.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        layout: HeadLayout,
        *,
        seed: int,
        inputs: Mapping[str, Any] | None,
    ) -> None:
        self.layout, self.seed = layout, seed
        self._modules = modules
        self._watch = Watch(modules, layout, seed)
        self._body = unwrapped(model)
        self._inputs = random_inputs(self._body, seed=seed) if inputs is None else dict(inputs)
        inner = getattr(self._body, "base_model", self._body)
        # Heads of models ask for more than their bodies do: a padding token, an end in every row.
        if inputs is None and isinstance(inner, nn.Module) and self._watch.within(inner):
            plainer = random_inputs(inner, seed=seed)
            if any(isinstance(value, Tensor) for value in plainer.values()):  # a mere wrapper names no inputs
                self._body, self._inputs = inner, plainer
        self._random = inputs is None
        self._before: dict[int, Tensor] = {}

    def first_pass(self) -> list[int]:
        """The undisturbed pass; gives the attentions that only pictures or sound reach, where these could not be made.

        Raises:
            ValueError, RuntimeError, ...: What the model's forward raises that cannot be run on the inputs.
        """
        plain = words(self._inputs)
        try:
            self._before = self._run({})
        except FAILURES:
            # A model of text and pictures wants places for the pictures in the text.
            if not self._random or len(plain) == len(self._inputs) or "input_ids" not in plain:
                raise
            self._inputs = plain
            self._before = self._run({})
        unreached = [i for i in range(len(self.layout.attentions)) if i not in self._before]
        return unreached if self._random and len(self._inputs) == len(plain) and self._before else []

    def checks(self, every: bool) -> list[dict[str, Any]]:
        """All checks; `every` tries every head, not only the first, the last and a random one of each attention."""
        found = []
        for index, attention in enumerate(self.layout.attentions):
            calls = self._watch.calls.get(index, 0)
            why = f"its projection ran {calls} times a pass"
            found.append(check(attention, "once", calls == 1, calls, why))
            if self._watch.part(index, "q") is None and attention.k is None:
                why = "no projection has rows a head, so the number of heads cannot be confirmed"
                found.append(check(attention, "rows", False, None, why))
        for part in ("q", "k", "v"):
            for heads in self._heads(every):
                found += self._disturb(part, heads)
        for index, attention in enumerate(self.layout.attentions):
            if index in self._before:
                found.append(_gate_check(attention, self._modules[attention.o.module], self._before[index]))
        return found

    def _heads(self, every: bool) -> list[dict[int, int]]:
        """Attention -> head, one mapping a pass."""
        chosen: dict[int, Sequence[int]] = {}
        for index, attention in enumerate(self.layout.attentions):
            draw = random.Random(f"{self.seed}:{index}")
            some = dict.fromkeys((0, attention.n_q - 1, draw.randrange(attention.n_q)))
            chosen[index] = range(attention.n_q) if every else [*some]
        longest = max(len(heads) for heads in chosen.values())
        return [{i: heads[n] for i, heads in chosen.items() if n < len(heads)} for n in range(longest)]

    def _disturb(self, part: str, heads: Mapping[int, int]) -> list[dict[str, Any]]:
        """One pass with a head's rows of a part negated in every attention: all rows of v, the first of q and k."""
        negated: dict[tuple[int, str], slice] = {}
        for index, head in heads.items():
            projection = self._watch.part(index, part)
            if projection is not None:
                span = projection.span(head if part == "q" else head // self.layout.attentions[index].group)
                negated[index, part] = span if part == "v" else slice(span.start, span.start + 1)
        after = self._run(negated) if negated else {}
        return [
            _slice_check(self.layout.attentions[index], part, heads[index], self._before.get(index), after.get(index))
            for index, _ in negated
        ]

    def _run(self, negated: Mapping[tuple[int, str], slice]) -> dict[int, Tensor]:
        """Inputs of the output projections by attention."""
        with self._watch.session(negated):
            self._body(**self._inputs)
        return self._watch.inputs


def check(attention: Attention | str, name: str, passed: bool, value: float | None, why: str) -> dict[str, Any]:
    """One line of the doctor's report; `why` is empty where it passed."""
    if isinstance(attention, Attention):
        attention = f"{attention.stack} {attention.kind} {attention.layer}"
    return {"attention": attention, "check": name, "passed": passed, "value": value, "why": "" if passed else why}


def _slice_check(
    attention: Attention, part: str, head: int, before: Tensor | None, after: Tensor | None
) -> dict[str, Any]:
    """Whether a disturbed head changed its slice (or its group's), all of it, and nothing else."""
    name = f"{part} of head {head}"
    if before is None or after is None or before.shape[-1] != attention.n_q * attention.o.size:
        got = "was not seen" if before is None else f"is {tuple(before.shape)}"
        return check(attention, name, False, None, f"the input of {attention.o.module} {got}")
    change = (after.double() - before.double()).abs().reshape(-1, attention.n_q, attention.o.size).amax(0)
    first, count = (head, 1) if part == "q" else (head // attention.group * attention.group, attention.group)
    inside = change[first : first + count]
    outside = torch.cat([change[:first], change[first + count :]])
    largest, least = float(inside.max()), float(inside.min())
    leak = float(outside.max()) if outside.numel() else 0.0
    if largest == 0:
        return check(attention, name, False, None, "other heads changed instead" if leak else "nothing changed")
    value = leak / largest
    if value > LEAK:
        return check(attention, name, False, value, "other heads changed as well")
    return check(attention, name, least > LEAST * largest, value, "only a part of the head changed")


def _gate_check(attention: Attention, module: nn.Module, x: Tensor) -> dict[str, Any]:
    """Whether taking the last head from the input equals its zeroed columns in the output projection, exactly."""
    layer = layer_of(module)
    weight = getattr(layer, "weight", None)
    width = attention.n_q * attention.o.size
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        return check(attention, "gate", True, None, "")  # packed weights have no columns to zero
    axis = 0 if attention.o.transposed else 1
    if weight.shape[axis] != width or x.shape[-1] != width:
        why = f"its weight is {tuple(weight.shape)}, its input {tuple(x.shape)}, its heads take {width}"
        return check(attention, "gate", False, None, why)
    index = torch.arange(width, device=weight.device)[attention.o.span(attention.n_q - 1)]
    zeroed = weight.detach().index_fill(axis, index, 0)
    gated = layer(x.index_fill(-1, index.to(x.device), 0))
    difference = float((gated - functional_call(layer, {"weight": zeroed}, (x,))).abs().max())
    return check(attention, "gate", difference == 0, difference, "gating is not zeroing columns")
