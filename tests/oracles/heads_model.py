"""Oracle: an encoder with gates on its heads, in numpy float64; gradients by central differences, nothing by autograd.

Post-norm layers as BERT has them (attention, residual, LayerNorm, GELU MLP, residual, LayerNorm), mean pooling or
BERT's pooler, cross-entropy. The gate of a head multiplies its context, before the output projection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

Array = np.ndarray
_erf = np.vectorize(math.erf)


@dataclass(frozen=True)
class Encoder:
    """Weights of the model. Each layer has Wq bq Wk bk Wv bv Wo bo g1 b1 W1 c1 W2 c2 g2 b2, weights as (out, in)."""

    layers: tuple[Mapping[str, Array], ...]
    head: Mapping[str, Array]  # W, b; with P, p a tanh pooler on the first token
    heads: int
    eps: float = 1e-12

    @property
    def gates(self) -> Array:
        return np.ones((len(self.layers), self.heads))

    def logits(
        self, x: Array, mask: Array, gates: Array | None = None, fill: Mapping[int, Array] | None = None
    ) -> Array:
        """(B, classes) from x (B, T, d) and mask (B, T) of 0 and 1.

        Args:
            x: Embedded tokens.
            mask: 1 for tokens, 0 for padding.
            gates: (L, H), default ones.
            fill: layer -> (H, d/H): what a closed gate lets in instead of 0.
        """
        return self.run(x, mask, gates, fill)[0]

    def run(
        self, x: Array, mask: Array, gates: Array | None = None, fill: Mapping[int, Array] | None = None
    ) -> tuple[Array, list[Array]]:
        """The logits, and the context of every layer before its gates, (B, T, H, hd)."""
        gates = self.gates if gates is None else gates
        contexts = []
        for i, w in enumerate(self.layers):
            contexts.append(self.context(w, x, mask))
            c = contexts[-1] * gates[i][:, None]
            if fill is not None and i in fill:
                c = c + (1 - gates[i])[:, None] * fill[i]
            y = c.reshape(*x.shape) @ w["Wo"].T + w["bo"]
            x = _norm(x + y, w["g1"], w["b1"], self.eps)
            y = _gelu(x @ w["W1"].T + w["c1"]) @ w["W2"].T + w["c2"]
            x = _norm(x + y, w["g2"], w["b2"], self.eps)
        if "P" in self.head:
            pooled = np.tanh(x[:, 0] @ self.head["P"].T + self.head["p"])
        else:
            pooled = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        return pooled @ self.head["W"].T + self.head["b"], contexts

    def means(self, x: Array, mask: Array) -> dict[int, Array]:
        """layer -> (H, hd): mean context over all tokens that are no padding."""
        real = mask.astype(bool)
        return {i: c[real].mean(0) for i, c in enumerate(self.run(x, mask)[1])}

    def context(self, w: Mapping[str, Array], x: Array, mask: Array) -> Array:
        """softmax(q k / sqrt(hd)) v of every head, (B, T, H, hd)."""
        B, T, d = x.shape
        q, k, v = ((x @ w[f"W{p}"].T + w[f"b{p}"]).reshape(B, T, self.heads, d // self.heads) for p in "qkv")
        scores = np.einsum("bihe,bjhe->bhij", q, k) / math.sqrt(d // self.heads)
        scores = np.where(mask[:, None, None, :] > 0, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("bhij,bjhe->bihe", weights, v)

    def losses(
        self, x: Array, mask: Array, labels: Array, gates: Array | None = None, fill: Mapping[int, Array] | None = None
    ) -> Array:
        """Cross-entropy of each sample, (B,)."""
        z = self.logits(x, mask, gates, fill)
        top = z.max(1)
        return np.log(np.exp(z - top[:, None]).sum(1)) + top - z[np.arange(len(z)), labels]

    def without(self, layer: int, head: int) -> Encoder:
        """The model whose output projection ignores a head: those columns are 0."""
        changed = dict(self.layers[layer])
        size = changed["Wo"].shape[1] // self.heads
        changed["Wo"] = changed["Wo"].copy()
        changed["Wo"][:, head * size : (head + 1) * size] = 0.0
        layers = list(self.layers)
        layers[layer] = changed
        return replace(self, layers=tuple(layers))


def exact(model: Encoder, x: Array, mask: Array, labels: Array, fill: Mapping[int, Array] | None = None) -> Array:
    """Rise of each sample's loss when one head is taken out, (B, L, H)."""
    base = model.losses(x, mask, labels)
    found = np.zeros((len(x), *model.gates.shape))
    for layer, h in np.ndindex(*model.gates.shape):
        gates = model.gates
        gates[layer, h] = 0.0
        found[:, layer, h] = model.losses(x, mask, labels, gates, fill) - base
    return found


def gate_gradients(
    model: Encoder, x: Array, mask: Array, labels: Array, at: Array | None = None, step: float = 1e-5
) -> Array:
    """dl_i/dg of every gate by central differences, (B, L, H); error about step^2 + 1e-16/step = 1e-10."""
    at = model.gates if at is None else at
    found = np.zeros((len(x), *at.shape))
    for layer, h in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[layer, h] += step
        down[layer, h] -= step
        rise = model.losses(x, mask, labels, up) - model.losses(x, mask, labels, down)
        found[:, layer, h] = rise / (2 * step)
    return found


def integrated(model: Encoder, x: Array, mask: Array, labels: Array, *, together: bool, points: int = 20) -> Array:
    """-integral of dl_i/dg_h from gate 0 to 1 at Gauss points, (B, L, H); one gate moving, or all together."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    found = np.zeros((len(x), *model.gates.shape))
    for t, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        if together:
            found -= weight * gate_gradients(model, x, mask, labels, model.gates * t)
            continue
        for layer, h in np.ndindex(*model.gates.shape):
            gates = model.gates
            gates[layer, h] = t
            found[:, layer, h] -= weight * gate_gradients(model, x, mask, labels, gates)[:, layer, h]
    return found


def random_encoder(seed: int = 0, *, layers: int = 2, heads: int = 4, d: int = 16, classes: int = 3) -> Encoder:
    """A random one with mean pooling; weights large enough that heads differ."""
    rng = np.random.default_rng(seed)

    def matrix(out: int, into: int) -> Array:
        return rng.standard_normal((out, into)) * 1.2 / math.sqrt(into)

    def layer() -> dict[str, Array]:
        w = {f"W{p}": matrix(d, d) for p in "qkvo"} | {f"b{p}": rng.standard_normal(d) * 0.1 for p in "qkvo"}
        w |= {"W1": matrix(2 * d, d), "c1": np.zeros(2 * d), "W2": matrix(d, 2 * d), "c2": np.zeros(d)}
        return w | {"g1": np.ones(d), "b1": np.zeros(d), "g2": np.ones(d), "b2": np.zeros(d)}

    head = {"W": matrix(classes, d) * 2, "b": np.zeros(classes)}
    return Encoder(tuple(layer() for _ in range(layers)), head, heads)


def bert_encoder(state: Mapping[str, Array], heads: int, eps: float = 1e-12) -> Encoder:
    """The weights of a BertForSequenceClassification, by their names there."""
    state = {name: np.asarray(value, dtype=np.float64) for name, value in state.items()}
    count = 1 + max(int(name.split(".layer.")[1].split(".")[0]) for name in state if ".layer." in name)
    names = {
        "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
        "o": "attention.output.dense",
    }  # fmt: skip
    layers = []
    for i in range(count):
        at = f"bert.encoder.layer.{i}."
        w = {f"W{p}": state[f"{at}{name}.weight"] for p, name in names.items()}
        w |= {f"b{p}": state[f"{at}{name}.bias"] for p, name in names.items()}
        for j, name in (("1", "intermediate.dense"), ("2", "output.dense")):
            w |= {f"W{j}": state[f"{at}{name}.weight"], f"c{j}": state[f"{at}{name}.bias"]}
        for j, name in (("1", "attention.output.LayerNorm"), ("2", "output.LayerNorm")):
            w |= {f"g{j}": state[f"{at}{name}.weight"], f"b{j}": state[f"{at}{name}.bias"]}
        layers.append(w)
    head = {"W": state["classifier.weight"], "b": state["classifier.bias"]}
    head |= {"P": state["bert.pooler.dense.weight"], "p": state["bert.pooler.dense.bias"]}
    return Encoder(tuple(layers), head, heads, eps)


def bert_embedding(state: Mapping[str, Array], ids: Array, types: Array, eps: float = 1e-12) -> Array:
    """Word + position + type, normalised, (B, T, d)."""
    at = "bert.embeddings."
    tables = {
        part: np.asarray(state[f"{at}{part}_embeddings.weight"], dtype=np.float64)
        for part in ("word", "position", "token_type")
    }
    x = tables["word"][ids] + tables["position"][np.arange(ids.shape[1])] + tables["token_type"][types]
    gain, shift = (np.asarray(state[f"{at}LayerNorm.{name}"], dtype=np.float64) for name in ("weight", "bias"))
    return _norm(x, gain, shift, eps)


def _norm(x: Array, gain: Array, shift: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * gain + shift


def _gelu(x: Array) -> Array:
    return x * 0.5 * (1 + _erf(x / math.sqrt(2)))
