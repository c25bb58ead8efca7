"""Rows and columns of the heads in the projections of one attention, from their shapes. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraforge.errors import LoraforgeError
from loraforge.measure.heads.layout import Projection
from loraforge.measure.heads.sections import Heads

Shape = tuple[int, int]
# q, k and v in one module, head by head; elsewhere they are stacked.
_INTERLEAVED = frozenset({"gpt_neox", "gpt_neox_japanese", "bloom", "deberta", "persimmon"})


@dataclass(frozen=True, slots=True)
class Cutter:
    """Cuts the projections of one attention into heads.

    Attributes:
        modules: Part (`q`, `k`, `v`, `o`, `qkv`) -> module.
        shapes: (out, in) by module.
        heads: What the configuration says.
        section: The configuration that describes the attention.
        transposed: Modules whose weight is stored as (in, out).
        where: For messages.
    """

    modules: Mapping[str, str]
    shapes: Mapping[str, Shape]
    heads: Heads
    section: Mapping[str, Any]
    transposed: frozenset[str] = frozenset()
    where: object = None

    def attention(self) -> dict[str, Any]:
        """Fields `n_q`, `n_kv`, `q`, `k`, `v`, `o` of the attention; parts without rows a head are None.

        Raises:
            LoraforgeError: The number of heads is unknown or contradicts the shapes.
        """
        if self.heads.n_q is None:
            expected = "num_attention_heads, n_head or num_heads in config.json"
            got = f"configuration of '{self.section.get('model_type', '')}'"
            raise LoraforgeError("the number of heads is not known", where=self._at("o"), got=got, expected=expected)
        n_q = self.heads.n_q
        size = self._value_size(n_q)
        fields: dict[str, Any] = {"n_q": n_q, "n_kv": n_q, "q": None, "k": None, "v": None}
        if "qkv" in self.modules:
            fields |= self._fused(n_q, size)
        else:
            fields |= self._apart(n_q, size)
        if "q" in self.modules:
            fields["q"] = self._rows("q", n_q)
        name = self.modules.get("o", "")
        fields["o"] = Projection(name, n_q, size, transposed=name in self.transposed)
        if n_q % fields["n_kv"]:
            raise self._misfit("o", f"{n_q} query heads and {fields['n_kv']} key-value heads", "groups of equal size")
        return fields

    def _value_size(self, n_q: int) -> int:
        """Columns of the output projection a head; of an adapter without one, what else says the size."""
        if "o" in self.modules:
            columns = self.shapes[self.modules["o"]][1]
            if columns % n_q:
                raise self._misfit("o", f"{columns} columns", f"a multiple of {n_q} heads")
            return columns // n_q
        if head_dim := self.section.get("head_dim") or self.section.get("d_kv"):
            return int(head_dim)
        for part, count in (("q", n_q), ("v", self.heads.n_kv or n_q), ("k", self.heads.n_kv or n_q)):
            if part in self.modules:
                return self._rows(part, count).size
        total = self.shapes[self.modules["qkv"]][0]
        return total // (n_q + 2 * (self.heads.n_kv or n_q))

    def _apart(self, n_q: int, size: int) -> dict[str, Any]:
        """Key and value projections of their own; latent attention has none with rows a head."""
        if "v" in self.modules:
            rows = self.shapes[self.modules["v"]][0]
            if rows % size:
                raise self._misfit("v", f"{rows} rows", f"a multiple of {size}, the columns of o a head")
            n_kv = rows // size
            self._agree("v", n_kv)
        elif "k" in self.modules:
            n_kv = self.heads.n_kv or n_q
        else:
            return {}
        return {"n_kv": n_kv} | {part: self._rows(part, n_kv) for part in ("k", "v") if part in self.modules}

    def _fused(self, n_q: int, size: int) -> dict[str, Any]:
        """One module for several parts: stacked, head by head, or group by group."""
        name = self.modules["qkv"]
        total = self.shapes[name][0]
        own = 0 if "q" in self.modules else n_q  # GPT-2's cross-attention fuses k and v alone
        if total % size or (total // size - own) % 2 or total // size <= own:
            raise self._misfit("qkv", f"{total} rows", f"{n_q} heads of q and some of k and v, {size} rows each")
        n_kv = (total // size - own) // 2
        self._agree("qkv", n_kv)

        def block(heads: int, offset: int, stride: int = 0) -> Projection:
            return Projection(name, heads, size, offset, stride, name in self.transposed)

        found: dict[str, Any] = {"n_kv": n_kv}
        if self._grouped():
            # Each group: its query heads, then one key and one value head. Rows of q are evenly spaced only in
            # groups of one.
            group = n_q // n_kv
            stride = (group + 2) * size
            found |= {part: block(n_kv, (group + i) * size, stride) for i, part in enumerate("kv")}
            return found | ({"q": block(n_q, 0, stride)} if group == 1 else {})
        found |= {"k": block(n_kv, own * size), "v": block(n_kv, (own + n_kv) * size)}
        return found | ({"q": block(n_q, 0)} if own else {})

    def _grouped(self) -> bool:
        """Whether q, k and v alternate, group by group (of one query head in most families)."""
        family = self.section.get("model_type")
        if family == "falcon":
            return bool(self.section.get("new_decoder_architecture")) or not self.section.get("multi_query", True)
        if family == "gpt_bigcode":
            return not self.section.get("multi_query", True)
        return family in _INTERLEAVED

    def _rows(self, part: str, heads: int) -> Projection:
        rows = self.shapes[self.modules[part]][0]
        if rows % heads:
            raise self._misfit(part, f"{rows} rows", f"a multiple of {heads} heads")
        return Projection(self.modules[part], heads, rows // heads, transposed=self.modules[part] in self.transposed)

    def _agree(self, part: str, n_kv: int) -> None:
        """The shapes say how many key-value heads there are; a configuration that says otherwise is wrong."""
        if n_kv < 1 or self.heads.n_kv not in (None, n_kv):
            got = f"{n_kv} key-value heads by the shapes"
            raise self._misfit(part, got, f"{self.heads.n_kv}, as the configuration says")

    def _at(self, part: str) -> str:
        module = self.modules.get(part) or next(iter(self.modules.values()))
        return module if self.where is None else f"{self.where}, {module}"

    def _misfit(self, part: str, got: str, expected: str) -> LoraforgeError:
        return LoraforgeError("heads and shapes contradict", where=self._at(part), got=got, expected=expected)
