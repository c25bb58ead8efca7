"""Gates on heads: forward pre-hooks on the attention output projections, there only between enter and exit.

The input x (B, T, n_q * v) of an output projection holds the heads' outputs side by side. A gate g (n_q,), or one row a
sample (B, n_q), gives x_h * g_h + fill_h * (1 - g_h): 1 leaves a head as it is, 0 takes it out (its bias and the
residual stay). This is the gate of Michel et al. 2019, section 2.2, for any model, and an adapter on the projection
sees the gated input as its base does.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loraforge.errors import LoraforgeError
from loraforge.measure.heads.find import modules_of
from loraforge.measure.heads.layout import HeadLayout


class HeadGates:
    """The gates of a model's heads; use as a context manager.

    Args:
        model: A transformers model, also with an unmerged PEFT adapter in it.
        layout: Its layout.

    Raises:
        LoraforgeError: The model lacks a projection of the layout.
    """

    def __init__(self, model: nn.Module, layout: HeadLayout) -> None:
        modules = modules_of(model)
        missing = [a.o.module for a in layout.attentions if a.o.module not in modules]
        if missing:
            raise LoraforgeError(
                "the layout is not that of the model", where=type(model).__name__, got=", ".join(missing[:5]),
                expected="output projections that the model has",
            )  # fmt: skip
        self.layout = layout
        self._modules = [modules[a.o.module] for a in layout.attentions]
        self._set: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._recorded: frozenset[int] = frozenset()
        self._inputs: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        """Sets the hooks.

        Raises:
            LoraforgeError: They are set already.
        """
        if self._handles:
            raise LoraforgeError("the gates are in use already", where=self.layout.family)
        try:
            for index, module in enumerate(self._modules):
                self._handles.append(module.register_forward_pre_hook(self._hook(index)))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes the hooks away, after an exception as well."""
        self._remove()

    def set(self, index: int, gate: Tensor, fill: Tensor | None = None) -> None:
        """Gates the heads of an attention until `set` or `clear`.

        Args:
            index: Of the attention in `layout.attentions`.
            gate: (n_q,), or (B, n_q) with a row a sample; float32, cast to the model's dtype where it acts.
            fill: What takes the place of a head that is taken out, broadcastable to (B, T, n_q * v); None is zero.

        Raises:
            LoraforgeError: The gate has another shape.
        """
        attention = self.layout.attentions[index]
        if gate.ndim not in (1, 2) or gate.shape[-1] != attention.n_q:
            expected = f"({attention.n_q},) or (batch, {attention.n_q})"
            raise LoraforgeError(
                "a gate does not fit its attention", where=attention.o.module, got=tuple(gate.shape), expected=expected
            )
        self._set[index] = gate, fill

    def clear(self) -> None:
        """Lets everything pass untouched, bit for bit."""
        self._set.clear()

    def record(self, *indices: int) -> None:
        """From now on keeps the last input of these attentions' projections; without indices, of all.

        Args:
            *indices: Of attentions in `layout.attentions`.
        """
        self._recorded = frozenset(indices or range(len(self._modules)))
        self._inputs.clear()

    def capture(self, index: int) -> Tensor:
        """The last input (B, T, n_q * v) of a projection, before its gate; detached.

        Raises:
            LoraforgeError: `record` was not called for it, or the model has not run since.
        """
        if index not in self._inputs:
            raise LoraforgeError(
                "no input of the projection was kept", where=self.layout.attentions[index].o.module,
                hint=f"call record({index}), then run the model",
            )  # fmt: skip
        return self._inputs[index]

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inputs.clear()

    def _hook(self, index: int) -> Any:
        attention = self.layout.attentions[index]
        width = attention.n_q * attention.o.size

        def gate_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            x = inputs[0]
            if x.shape[-1] != width:
                raise LoraforgeError(
                    "the input of an output projection is not that of the layout", where=attention.o.module,
                    got=tuple(x.shape), expected=f"(..., {attention.n_q} heads x {attention.o.size})",
                )  # fmt: skip
            if index in self._recorded:
                self._inputs[index] = x.detach()
            if index not in self._set:
                return None
            gate, fill = self._set[index]
            return gated(x, gate, fill, attention.o.module), *inputs[1:]

        return gate_input


def gated(x: Tensor, gate: Tensor, fill: Tensor | None, where: object) -> Tensor:
    """The input of an output projection with its heads gated.

    Args:
        x: (B, ..., n_q * v).
        gate: (n_q,) or (B, n_q).
        fill: Broadcastable to x, or None for zero.
        where: For messages.

    Raises:
        LoraforgeError: The gate has a row a sample, but not as many as x has.
    """
    if gate.ndim == 2 and gate.shape[0] != x.shape[0]:
        raise LoraforgeError(
            "the gate has not one row a sample", where=where, got=f"{gate.shape[0]} rows", expected=f"{x.shape[0]}"
        )
    n_q = gate.shape[-1]
    factor = gate.to(device=x.device, dtype=x.dtype)
    if gate.ndim == 2:
        factor = factor.reshape(gate.shape[0], *[1] * (x.ndim - 2), n_q)
    factor = factor.unsqueeze(-1)
    result = x.unflatten(-1, (n_q, -1)) * factor
    if fill is not None:
        filled = fill.to(device=x.device, dtype=x.dtype).expand_as(x)
        result = result + filled.unflatten(-1, (n_q, -1)) * (1 - factor)
    return result.flatten(-2)
