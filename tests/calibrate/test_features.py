"""Which rows of a module's input count, which modules share them, and how large the task model's output is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraforge.calibrate.batches import Batch
from loraforge.calibrate.features import Features
from loraforge.calibrate.lockstep import Deltas, Visit
from loraforge.calibrate.trace import Call, Trace
from loraforge.calibrate.weights import Collecting, Weighting, times
from loraforge.errors import LoraforgeError
from loraforge.kernels.covariance import cov_pack

D, M = 5, 3
# Two batches: task 0, samples of 3 and 2 tokens; task 1, one sample of 4. The decoder reads two tokens of each sample.
MASKS = [torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(), torch.tensor([[1, 1, 0, 1]]).bool()]
DECODER = [torch.tensor([[1, 1], [1, 0]]).bool(), torch.tensor([[1, 1]]).bool()]
BATCHES = [Batch(i, i % 2, {}, MASKS[i], DECODER[i], tuple(range(len(MASKS[i])))) for i in range(2)]


def how(**changes: Any) -> Collecting:
    known: dict[str, Any] = {
        "coefficients": [1.0, 1.0], "folds": 2, "lambda_weight": "none", "rho": 0.0, "full_weight": False,
        "target_merged": False, "exact_cross_norm": False, "offdiag": 1.0, "weighting": None,
    }  # fmt: skip
    return Collecting(**{**known, **changes})


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Scene:
    """q and k are fed by one tensor, o by another, `deep` runs twice, `top` reads the decoder's tokens."""

    def __init__(self, both: bool = True, sample_dim: int = 0, **changes: Any) -> None:
        names = ("q", "k", "o", "deep", "top")
        self.modules = {n: nn.Linear(D, M).double() for n in names}
        self.deltas = {n: Deltas([(draw(M, 2, seed=1), draw(2, D, seed=2)), None]) for n in names}
        leaders = {n: "q" if n == "k" else n for n in names}
        axis = dict.fromkeys(names, "encoder") | {"top": "decoder", "o": "all"}
        kinds = {n: [Call(axis[n], sample_dim)] * (2 if n == "deep" else 1) for n in names}
        trace = Trace(names, kinds, leaders)
        self.features = Features(self.modules, self.deltas, trace, how(**changes))
        self.features.start(BATCHES)
        self.both = both

    def visits(self, masks: list[Tensor] = MASKS, dtype: torch.dtype = torch.float64, seed: int = 3) -> list[Visit]:
        found = []
        for i, mask in enumerate(masks):
            for merged in (False, True) if self.both else (False,):
                x = draw(len(mask), mask.shape[1], D, seed=seed + i + 100 * merged, dtype=dtype)
                found.append(Visit(i, merged, 0, x, x.new_zeros(*x.shape[:-1], M)))
        return found


def test_padding_is_taken_out_of_both_streams() -> None:
    scene = Scene()
    visits = scene.visits()
    for i, (X, Xm) in enumerate(scene.features.pack("q", visits)):
        own, merged = visits[2 * i : 2 * i + 2]
        assert torch.equal(X, own.x[MASKS[i]]) and torch.equal(Xm, merged.x[MASKS[i]])


def test_the_decoders_tokens_have_their_own_mask() -> None:
    scene = Scene()
    visits = scene.visits(DECODER)
    X, Xm = scene.features.pack("top", visits)[0]
    assert torch.equal(X, visits[0].x[DECODER[0]]) and torch.equal(Xm, visits[1].x[DECODER[0]])


def test_without_an_axis_every_row_counts() -> None:
    scene = Scene()
    visits = scene.visits([torch.ones(2, 7), torch.ones(1, 6)])
    X, Xm = scene.features.pack("o", visits)[0]
    assert torch.equal(X, visits[0].x.reshape(-1, D)) and torch.equal(Xm, visits[1].x.reshape(-1, D))


def test_sequence_first_inputs_are_turned() -> None:
    """(tokens, samples, features): the rows come out as those of the same samples-first input."""
    plain, turned = Scene(), Scene(sample_dim=1)
    visits = turned.visits()
    for visit in visits:
        visit.x = visit.x.transpose(0, 1).contiguous()
    for (X, Xm), (Y, Ym) in zip(
        plain.features.pack("q", plain.visits()), turned.features.pack("q", visits), strict=True
    ):
        assert torch.equal(X, Y) and torch.equal(Xm, Ym)


def test_the_task_stream_alone_is_one_tensor() -> None:
    """X~ = X is said by identity: the Gram is then computed once."""
    scene = Scene(both=False)
    visits = scene.visits()
    for (X, Xm), visit, mask in zip(scene.features.pack("q", visits), visits, MASKS, strict=True):
        assert Xm is X and torch.equal(X, visit.x[mask])


@pytest.mark.parametrize("rho", [0.25, 1.0])
def test_a_fixed_rho_mixes_the_streams(rho: float) -> None:
    plain, mixed = Scene(), Scene(rho=rho)
    for (X, Xm), (Y, Ym) in zip(
        plain.features.pack("q", plain.visits()), mixed.features.pack("q", mixed.visits()), strict=True
    ):
        assert torch.equal(X, Y)
        torch.testing.assert_close(Ym, (1 - rho) * Xm + rho * X)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_rows_are_float32_or_float64(dtype: torch.dtype, wide: torch.dtype) -> None:
    scene = Scene()
    visits = scene.visits(dtype=dtype)
    X, _ = scene.features.pack("q", visits)[0]
    assert X.dtype == wide and torch.equal(X, visits[0].x[MASKS[0]].to(wide))


def test_masks_are_read_once_a_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every packing is told how many rows it keeps, so that no visit of a module waits for the device."""
    told: list[tuple[int, int | None]] = []

    def pack(x: Tensor, mask: Tensor, weight: None, dtype: torch.dtype, rows: int | None = None) -> Tensor:
        told.append((len(x), rows))
        return cov_pack(x, mask, weight, dtype, rows=rows)

    monkeypatch.setattr("loraforge.calibrate.features.cov_pack", pack)
    scene = Scene()
    scene.features.pack("q", scene.visits())
    assert told == [(6, 5), (6, 5), (4, 3), (4, 3)]
    told.clear()
    X, _ = scene.features.pack("top", scene.visits(DECODER))[1]
    assert told == [(4, 3), (4, 3)] and len(X) == 2, "a mask that is set throughout packs nothing"


def test_16_bit_rows_are_multiplied_as_they_are_by_matrices_that_are_not() -> None:
    X, A = draw(50, D).bfloat16(), draw(2, D, seed=1)
    found = times(X, A)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), X.double() @ A.mT, rtol=1e-5, atol=1e-5)
    assert times(X.double(), A).dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"rho": None}, torch.bfloat16),
        ({"rho": 0.25}, torch.float32),
        ({"weighting": Weighting(1.0, 0.25, "gaussian", False)}, torch.float32),
    ],
    ids=["plain", "search", "mixed", "weighted"],
)
def test_rows_of_a_16_bit_model_on_the_gpu(changes: dict[str, Any], dtype: torch.dtype) -> None:
    scene = Scene(lambda_weight="full", **changes)
    scene.modules["q"].to("cuda", torch.bfloat16).requires_grad_(False)
    moved = [(b.to("cuda", torch.bfloat16), a.to("cuda", torch.bfloat16)) for b, a in [scene.deltas["q"].tasks[0]]]
    scene.deltas["q"].tasks = [moved[0], None]
    visits = scene.visits(dtype=torch.bfloat16)
    for visit in visits:
        visit.x = visit.x.cuda()
        visit.y = scene.modules["q"](visit.x)
    scene.features.rows("q", visits)  # moves the masks
    scene.features._leader = ""
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = scene.features.rows("q", visits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {r.X.dtype for r in found} == {r.Xm.dtype for r in found} == {dtype}
    for i, row in enumerate(found):
        assert torch.equal(row.X.cpu(), visits[2 * i].x.cpu()[MASKS[i]].to(dtype))
        W = scene.modules["q"].weight.double()
        W = W + moved[0][0].double() @ moved[0][1].double() if i == 0 else W
        assert float(row.out_sq) == pytest.approx(float((row.X.double() @ W.mT).square().sum()), rel=0.02)


def test_modules_with_one_input_share_rows_and_grams() -> None:
    scene = Scene()
    visits, other = scene.visits(), scene.visits(seed=9)
    rows, grams = scene.features.pack("q", visits), scene.features.shared("q")
    assert grams == {} and scene.features.pack("k", visits) is rows
    assert scene.features.shared("k") is grams
    assert scene.features.pack("o", other[:0]) == [] and scene.features.shared("o") is None, "o feeds no other"
    assert scene.features.pack("q", other) is not rows and scene.features.shared("q") is not grams


def test_what_is_never_shared() -> None:
    weighted = Scene(weighting=Weighting(1.0, 0.25, "gaussian", False))
    weighted.features.pack("q", weighted.visits())
    assert weighted.features.shared("q") is None, "sample weights differ by module"
    scene = Scene()
    first = scene.features.pack("deep", scene.visits())
    assert scene.features.pack("deep", scene.visits(seed=9)) is not first, "each call has inputs of its own"
    assert scene.features.shared("deep") is None


def test_nothing_is_held_after_a_walk() -> None:
    scene = Scene()
    rows = scene.features.pack("q", scene.visits())
    scene.features.stop()
    scene.features.start(BATCHES)
    assert scene.features.pack("k", scene.visits()) is not rows


def test_rows_that_cannot_be_told_from_padding() -> None:
    scene = Scene()
    with pytest.raises(LoraforgeError, match="told from padding") as caught:
        scene.features.pack("q", scene.visits([torch.ones(2, 4), torch.ones(1, 4)]))
    assert caught.value.where == "q" and "8 rows" in str(caught.value.got) and "(2, 3)" in str(caught.value.got)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_energy_of_the_task_models_output(both: bool, bias: bool) -> None:
    """||X W_i^T||^2 with W_i = W0 + delta_i: the bias is no part of it, and neither is the merged stream."""
    scene = Scene(both, lambda_weight="full")
    module = scene.modules["q"]
    module.bias = nn.Parameter(draw(M, seed=8)) if bias else None
    module.requires_grad_(False)
    visits = scene.visits()
    for visit in visits:
        visit.y = module(visit.x)
    found = scene.features.rows("q", visits)
    assert [(r.task, r.fold) for r in found] == [(0, 0), (1, 1)]
    for task, row in enumerate(found):
        pair = scene.deltas["q"].tasks[task]
        W = module.weight if pair is None else module.weight + pair[0] @ pair[1]
        assert float(row.out_sq) == pytest.approx(float((row.X @ W.mT).square().sum()), rel=1e-12)
    assert all(r.out_sq == 0.0 for r in Scene(both).features.rows("q", Scene(both).visits())), "not asked for"
