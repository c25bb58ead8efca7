from __future__ import annotations

import numpy as np
import pytest

from loraforge.linalg.factored import truncate
from loraforge.linalg.rank import RankRule
from loraforge.merging.methods import NoParams, find_method
from loraforge.merging.svd import merge_layer
from tests.oracles import factored as oracle

from .layers import exact, layer, product
from .sums import check_sum


def test_is_the_exact_weighted_sum_before_the_cut() -> None:
    check_sum(merge_layer)


def test_cut_at_the_default_rank_is_the_optimum() -> None:
    inputs = layer()
    k = 7  # the largest r_i
    cut = truncate(merge_layer(inputs, NoParams()), RankRule(rank=k))
    best, error = oracle.best_rank_k(exact(inputs), k)
    assert oracle.relative(product(cut.factors), best) < 1e-10 and cut.error == pytest.approx(error)


def test_one_adapter_comes_back() -> None:
    inputs = layer((5,), (1.0,))
    cut = truncate(merge_layer(inputs, NoParams()), RankRule(rank=5))
    assert np.allclose(product(cut.factors), exact(inputs), rtol=0, atol=1e-10)


def test_row() -> None:
    row = find_method("svd")
    assert (row.default_weight, row.default_rank) == ("one", "max") and row.load_function() is merge_layer
