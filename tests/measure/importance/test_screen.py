"""Which heads are chosen, and how estimates are judged."""

from __future__ import annotations

import pytest
from scipy import stats

from loraforge.errors import UsageError
from loraforge.measure.heads.layout import Attention, HeadKey, HeadLayout, Projection
from loraforge.measure.importance.choice import by_block, read_layers, units_of
from loraforge.measure.importance.screen import chosen_for_exact, reliability


def layout(layers: int = 3, n_q: int = 4, n_kv: int = 2, cross: bool = False) -> HeadLayout:
    kinds = ("self", "cross") if cross else ("self",)
    attentions = tuple(
        Attention(
            "dec", kind, layer, n_q, n_kv, Projection(f"layers.{layer}.{kind}.o", n_q, 2), block=f"layers.{layer}"
        )
        for layer in range(layers)
        for kind in kinds
    )
    return HeadLayout("made", attentions, {})


def test_units_are_heads_or_groups() -> None:
    heads = units_of(layout())
    assert [unit.key for unit in heads] == list(layout().heads)
    assert all(unit.heads == (unit.key.head,) for unit in heads)
    groups = units_of(layout(), "kv")
    assert [(unit.key.layer, unit.heads) for unit in groups] == [
        (at, two) for at in range(3) for two in ((0, 1), (2, 3))
    ]
    assert {unit.attention for unit in units_of(layout(), layers=[1])} == {1}
    assert str(units_of(layout(cross=True))[5]) == "dec layer 0, head 1, cross-attention"


def test_a_limit_draws_heads_by_the_seed() -> None:
    drawn = [units_of(layout(), max_heads=5, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(some)) == 5 and some == sorted(some, key=lambda unit: unit.key) for some in drawn)
    assert units_of(layout(), max_heads=99) == units_of(layout())


@pytest.mark.parametrize(
    ("text", "layers"), [(None, None), ("0", [0]), ("0-2,5", [0, 1, 2, 5]), (" 4 , 1-1 ", [1, 4])],
    ids=["none", "one", "range", "spaces"],
)  # fmt: skip
def test_layers_as_text(text: str | None, layers: list[int] | None) -> None:
    assert read_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-2", "1,,2", "1.5"])
def test_text_that_is_no_list_of_layers(text: str) -> None:
    with pytest.raises(UsageError, match="not understood"):
        read_layers(text)


def test_layers_in_the_order_of_a_pass() -> None:
    units = units_of(layout(cross=True))
    order = ["layers.2", "layers.0", "layers.1"]
    groups = by_block(layout(cross=True), units, order)
    assert [name for name, _ in groups] == order
    assert all(len(group) == 8 for _, group in groups)


def estimates(values: list[float]) -> dict[HeadKey, float]:
    return dict(zip(layout().heads, values, strict=True))


def test_the_largest_and_some_others_are_ablated() -> None:
    units = units_of(layout())
    values = [0.0, -9.0, 1.0, 2.0, 8.0, 3.0, 3.0, -3.0, 0.5, 0.1, 0.2, 7.0]
    top, others = chosen_for_exact(units, estimates(values), 4, seed=2)
    assert [units.index(unit) for unit in top] == [1, 4, 5, 11]  # 5 before 6 and 7, which are as large
    assert len(others) == 1 and not set(others) & set(top)
    top, others = chosen_for_exact(units, estimates(values), 8, seed=2)
    assert len(others) == 2 and chosen_for_exact(units, estimates(values), 8, seed=2) == (top, others)
    seen = {chosen_for_exact(units, estimates(values), 4, seed=seed)[1][0] for seed in range(40)}
    assert len(seen) == 8  # every other head can be drawn
    assert chosen_for_exact(units, estimates(values), 12) == (units, [])
    assert chosen_for_exact(units, estimates(values), 99) == (units, [])


def test_reliability_is_the_rank_correlation_on_the_others() -> None:
    units = units_of(layout())
    values = [0.3, 0.1, 0.4, 0.1, 0.5, 0.9, 0.2, 0.6, 0.5, 0.3, 0.5, 0.8]
    other = [0.2, 0.7, 0.1, 0.8, 0.2, 0.8, 0.1, 0.8, 0.2, 0.8, 0.4, 0.5]
    found = reliability(units, estimates(values), estimates(other))
    assert found["heads"] == 12 and found["spearman"] == pytest.approx(stats.spearmanr(values, other).statistic)
    assert found["largest_error"] == pytest.approx(0.7)
    assert reliability(units[:2], estimates(values), estimates(other))["spearman"] is None
    assert reliability(units, estimates([1.0] * 12), estimates(other))["spearman"] is None
    assert reliability([], {}, {}) == {"heads": 0, "spearman": None, "largest_error": None}
