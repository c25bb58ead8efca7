"""The update of every module of a layout that an adapter makes.

It is s B A and stays factors, for merged weights would round: where the update is 1e-6 of W0, merging in float32 costs
1.6e-4 of it and in bfloat16 all of it. Two kinds of modules are matrices nevertheless: one with a DoRA magnitude m (Liu
et al., arXiv 2402.09353), whose update is diag(m / ||W0 + s B A||_row) (W0 + s B A) - W0, and one that the adapter
carries whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from loraforge.adapters import Adapter
from loraforge.errors import LoraforgeError
from loraforge.measure.heads.layout import HeadLayout, Projection
from loraforge.measure.updates.changes import whole_row
from loraforge.measure.updates.matching import match_names, match_projections
from loraforge.measure.updates.norms import BaseWeights
from loraforge.measure.updates.slices import Change, change_norm, tensor_norm


class AdapterChanges:
    """The updates of an adapter; see `changes.Changes`.

    Args:
        adapter: The adapter.
        layout: Where the heads are.
        weights: The base's weights, or None.

    Raises:
        LoraforgeError: It does not belong to the base, or a module needs the base and there is none.
    """

    source = "factors"

    def __init__(self, adapter: Adapter, layout: HeadLayout, weights: BaseWeights | None) -> None:
        self.adapter, self.weights = adapter, weights
        self.warnings: list[str] = []
        # The model's name of each tensor that is there as a whole -> its key.
        self._keys = {_plain(key): key for key in (*adapter.heads, *adapter.extras)}
        whole = {name.removesuffix(".weight") for name in self._keys if name.endswith(".weight")}
        # Whole modules take part, so that a model whose attention was trained in full is not passed over.
        self.names = match_projections(layout, {*adapter.modules, *whole})
        self._biases = match_projections(
            layout, [name.removesuffix(".bias") for name in self._keys if name.endswith(".bias")]
        )
        self._whole = {module for module, name in self.names.items() if name not in adapter.modules_set}
        held = [name for module, name in self.names.items() if module not in self._whole]
        self._needs_base([name for name in held if adapter.info(name).has_magnitude], "DoRA modules")
        self._needs_base([self.names[module] for module in self._whole], "modules that the adapter carries whole")
        if not self.names:
            self._check_belongs()
            self.warnings.append("the adapter changes no projection of an attention: U is 0 for every head")

    def change(self, projection: Projection) -> Change | None:
        """The update of a projection's module: factors, or a matrix (DoRA, whole modules)."""
        name = self.names.get(projection.module)
        if name is None:
            return None
        if projection.module in self._whole:
            new = self._tensor(f"{name}.weight")
            new = new.mT if projection.transposed else new
            return new.to(torch.float64) - self._base_weight(projection, tuple(new.shape))
        pair = self.adapter.load(name)
        magnitude = self.adapter.magnitude(name)
        if magnitude is None:
            self._check_shape(projection, pair.shape)
            return pair
        base = self._base_weight(projection, pair.shape)
        moved = pair.delta(torch.float64) + base
        return moved * (magnitude.to(torch.float64) / moved.norm(dim=1))[:, None] - base

    def bias(self, projection: Projection) -> Tensor | None:
        """The update of the bias: that of lora_B, and the trained bias less the base's."""
        found: list[Tensor] = []
        name = self.names.get(projection.module)
        if name is not None and projection.module not in self._whole:
            added = self.adapter.bias(name)
            if added is not None:
                found.append(added.to(torch.float64) * self.adapter.info(name).scaling)
        if projection.module in self._biases:
            trained = f"{self._biases[projection.module]}.bias"
            self._needs_base([trained], "trained biases")
            old = None if self.weights is None else self.weights.bias(projection)
            new = self._tensor(trained).to(torch.float64)
            found.append(new if old is None else new - old.to(torch.float64))
        return sum(found[1:], found[0]) if found else None

    def others(self, *, every: bool) -> Iterator[dict[str, Any]]:
        """Whole tensors (heads, biases, embeddings), and with `every` each further module of factors."""
        used = set(self.names.values())
        for name in self.adapter.modules:
            if name not in used and every:
                yield self._factor_row(name)
        carried = {f"{self.names[module]}.weight" for module in self._whole}
        base = None if self.weights is None else self.weights.checkpoint
        names = {} if base is None else match_names(self._keys, base.names)
        for name, key in self._keys.items():
            if name in carried:
                continue
            what = "head" if key in self.adapter.heads else "bias" if key.endswith(".bias") else "weight"
            old = None if base is None or name not in names else base.read(names[name])
            yield whole_row(name, self._tensor(name), old, what)

    def _tensor(self, name: str) -> Tensor:
        """A tensor that the adapter carries whole, by the model's name."""
        return self.adapter.load_head(self._keys[name])

    def _factor_row(self, name: str) -> dict[str, Any]:
        """The row of a module of factors that holds no head."""
        info = self.adapter.info(name)
        size = None
        if self.weights is not None:
            base = self.weights.checkpoint
            found = match_names([name], [n.removesuffix(".weight") for n in base.names if n.endswith(".weight")])
            size = tensor_norm(base.read(f"{found[name]}.weight")) if name in found else None
        U = None if info.has_magnitude else change_norm(self.adapter.load(name))
        return {"name": name, "U": U, "Urel": U / size if U is not None and size else None, "r": info.rank,
                "what": "DoRA" if info.has_magnitude else info.kind}  # fmt: skip

    def _needs_base(self, names: list[str], what: str) -> None:
        """Refuses what is relative to the base where none was given.

        Raises:
            LoraforgeError: Naming a module and the option.
        """
        if names and self.weights is None:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise LoraforgeError(
                f"the update of {what} depends on the base's weights", where=self.adapter.weights_path,
                got=f"{names[0]}{more}", expected="the base beside the adapter", hint="add --base MODEL (API: base)",
            )  # fmt: skip

    def _check_belongs(self) -> None:
        """Refuses an adapter none of whose modules is in the base.

        Raises:
            LoraforgeError: With an example of both sides.
        """
        if self.weights is None:
            return
        present = [name.removesuffix(".weight") for name in self.weights.checkpoint.names]
        if not match_names(self.adapter.modules, present):
            raise LoraforgeError(
                "the adapter does not belong to this base: none of its modules is in it", where=self.adapter.path,
                got=self.adapter.modules[0], expected=f"names as {present[0]}", hint="check --base",
            )  # fmt: skip

    def _base_weight(self, projection: Projection, shape: tuple[int, ...]) -> Tensor:
        """W0 (out, in) of a module whose update needs it, float64; __init__ refused to do without a base."""
        assert self.weights is not None
        self._check_shape(projection, shape)
        return self.weights.read(projection).to(torch.float64)

    def _check_shape(self, projection: Projection, shape: tuple[int, ...]) -> None:
        """Refuses an update of another size than the base's weight, where there is a base.

        Raises:
            LoraforgeError: Naming the module and both.
        """
        if self.weights is None:
            return
        held = self.weights.checkpoint.shape(f"{self.weights.names[projection.module]}.weight")
        if shape != (held[::-1] if projection.transposed else held):
            raise LoraforgeError(
                "the adapter does not belong to this base: a module has another shape", where=projection.module,
                got=list(shape), expected=f"{list(held)} as in {self.weights.checkpoint.path}",
                hint="check --base",
            )  # fmt: skip


def _plain(key: str) -> str:
    """The model's name of a tensor: PEFT keeps what belongs to a module that it wrapped below `base_layer`."""
    module, dot, tensor = key.rpartition(".")
    return f"{module.removesuffix('.base_layer')}{dot}{tensor}"
