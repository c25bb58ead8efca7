"""Where the heads of a model are: attention by attention, which rows and columns of which projections. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

from loraforge.provenance import digest_of

PARTS = ("q", "k", "v", "o")
STACKS = ("enc", "dec")
KINDS = ("self", "cross")


class HeadKey(NamedTuple):
    """One head: `layer` and `head` count from 0 within their stack; encoder-only models are all `enc`, others `dec`."""

    stack: str
    kind: str
    layer: int
    head: int


@dataclass(frozen=True, slots=True)
class Projection:
    """One projection of an attention, and where each head is in its (out, in) weight.

    Heads of q, k and v are rows, those of o are columns; in GPT-2's Conv1D the weight is stored as (in, out).

    Attributes:
        module: Dotted name in the transformers model, without any wrapper's prefix.
        heads: How many blocks it has: query heads, or key-value heads.
        size: Rows (o: columns) a head.
        offset: First row of head 0; not 0 where q, k and v share one module.
        stride: Rows from a head to the next; larger than `size` where q, k and v alternate head by head.
        transposed: Whether the weight is stored as (in, out).
    """

    module: str
    heads: int
    size: int
    offset: int = 0
    stride: int = 0
    transposed: bool = False

    def span(self, head: int) -> slice:
        """Rows (o: columns) of a head in the (out, in) orientation."""
        start = self.offset + head * (self.stride or self.size)
        return slice(start, start + self.size)


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention: `n_q` query heads in groups that share a key-value head.

    Attributes:
        stack: `enc` or `dec`.
        kind: `self` or `cross`.
        layer: Number within its stack.
        n_q: Query heads.
        n_kv: Key-value heads; divides n_q.
        o: Output projection; the gates sit before it.
        q: Query projection; None where it has no rows a head (as in latent attention).
        k: Key projection, likewise.
        v: Value projection, likewise.
        block: Dotted name of the transformer layer that it is in.
    """

    stack: str
    kind: str
    layer: int
    n_q: int
    n_kv: int
    o: Projection
    q: Projection | None = None
    k: Projection | None = None
    v: Projection | None = None
    block: str = ""

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.n_q // self.n_kv

    def part(self, name: str) -> Projection | None:
        """The projection of a part: q, k, v or o."""
        return {"q": self.q, "k": self.k, "v": self.v, "o": self.o}[name]

    def span(self, name: str, head: int) -> slice | None:
        """Rows (o: columns) that query head `head` uses of a part; of k and v those of its group's head."""
        projection = self.part(name)
        if projection is None:
            return None
        return projection.span(head // self.group if name in ("k", "v") else head)


@dataclass(frozen=True)
class HeadLayout:
    """The attentions of a model, and what was passed over.

    Attributes:
        family: `model_type` of the configuration.
        attentions: In the order of the heads: encoder before decoder, layer by layer, self before cross.
        skipped: Module -> why it is no attention whose heads can be told apart.
    """

    family: str
    attentions: tuple[Attention, ...]
    skipped: Mapping[str, str]

    @cached_property
    def heads(self) -> tuple[HeadKey, ...]:
        """All heads, attention by attention."""
        return tuple(HeadKey(a.stack, a.kind, a.layer, h) for a in self.attentions for h in range(a.n_q))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Index in `heads` of the first head of each attention."""
        found = [0]
        for attention in self.attentions:
            found.append(found[-1] + attention.n_q)
        return tuple(found[:-1])

    @property
    def is_plain(self) -> bool:
        """Whether (layer, head) alone names a head: one stack, self-attention only."""
        return len({(a.stack, a.kind) for a in self.attentions}) == 1

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        attentions = [asdict(attention) for attention in self.attentions]
        return {"family": self.family, "attentions": attentions, "skipped": dict(self.skipped)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> HeadLayout:
        """The layout that `to_json` wrote."""
        attentions = []
        for entry in content["attentions"]:
            parts = {name: None if entry[name] is None else Projection(**entry[name]) for name in PARTS}
            attentions.append(Attention(**{**entry, **parts}))
        return cls(content["family"], tuple(attentions), dict(content["skipped"]))

    @property
    def sha256(self) -> str:
        """Digest of its content."""
        return digest_of(self.to_json())
