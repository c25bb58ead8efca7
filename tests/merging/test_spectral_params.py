from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from loraforge.errors import UsageError
from loraforge.merging.spectral_params import (
    IASAD_PRESETS,
    IasadParams,
    IsoCtsParams,
    IsoParams,
    SvcParams,
    TsvParams,
    WudiParams,
)

CLASSES = (IsoParams, IsoCtsParams, IasadParams, TsvParams, WudiParams, SvcParams)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_explains_itself(cls: Any) -> None:
    for f in dataclasses.fields(cls):
        assert f.metadata["help"] and (f.metadata.get("choices") is None or f.default in f.metadata["choices"])


@pytest.mark.parametrize(
    ("cls", "field", "value", "expected"),
    [
        (IsoParams, "mean_over", "all", "support | full"),
        (IsoParams, "power", 1.5, ">= 0 and <= 1"),
        (IsoParams, "power", "1", "a finite number"),
        (IsoParams, "alpha", 0, "> 0"),
        (IsoParams, "alpha", float("nan"), "a finite number"),
        (IsoParams, "target_norm", "l2", "none | nuclear | fro | mean-adapter"),
        (IsoCtsParams, "common_fraction", -0.1, ">= 0 and <= 1"),
        (IasadParams, "iters", 0, ">= 1"),
        (IasadParams, "iters", 2.5, "a whole number"),
        (IasadParams, "iters", True, "a whole number"),
        (IasadParams, "sparsity", 1.0, "< 1"),
        (IasadParams, "compression", -0.5, ">= 0"),
        (IasadParams, "keep", "both", "auto | largest | smallest"),
        (IasadParams, "preset", "code", "none | document | published-code"),
        (TsvParams, "k", 0, ">= 1"),
        (TsvParams, "k", 1.0, "a whole number"),
        (WudiParams, "ridge", -1e-9, ">= 0"),
        (SvcParams, "alpha", 0.0, "> 0"),
    ],
)
def test_a_wrong_value_names_field_and_allowed_ones(cls: Any, field: str, value: object, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        cls(**{field: value})
    assert caught.value.where == field and expected in str(caught.value.expected)
    assert str(value) in str(caught.value.got)


def test_geometric_mean_of_zeros_is_refused() -> None:
    with pytest.raises(UsageError, match="geometric mean"):
        IsoParams(average="geo", mean_over="full")


def test_sparsity_and_compression_are_one() -> None:
    assert IasadParams(compression=0.3).sparsity == 0.3 and IasadParams(sparsity=0.3).sparsity == 0.3
    assert IasadParams(sparsity=0.3, compression=0.3).sparsity == 0.3
    with pytest.raises(UsageError, match="two names of one parameter"):
        IasadParams(sparsity=0.2, compression=0.3)


@pytest.mark.parametrize("preset", IASAD_PRESETS)
def test_presets_say_what_auto_is_and_nothing_more(preset: str) -> None:
    params = IasadParams(preset=preset)
    assert {name: getattr(params, name) for name in IASAD_PRESETS[preset]} == IASAD_PRESETS[preset]
    assert IasadParams(preset=preset, keep="largest", mean_over="support").keep == "largest"
    assert IasadParams(preset=preset, keep="smallest").keep == "smallest"
    assert dataclasses.replace(params) == params
    assert "auto" not in dataclasses.asdict(params).values()
