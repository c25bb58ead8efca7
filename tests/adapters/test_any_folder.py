"""Whatever an adapter_config.json says and whatever happened to the files, opening works or is refused."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from loraforge.adapters import open_adapter
from loraforge.errors import LoraforgeError

from . import folders

TENSORS = save(folders.factors(folders.MODULES), {"format": "pt"})
CONFIG = folders.config(
    rank_pattern={"layers.2": 4}, alpha_pattern={}, use_rslora=False, fan_in_fan_out=False, modules_to_save=None,
    use_dora=False, lora_bias=False, target_parameters=None, init_lora_weights=True, layer_replication=None,
)  # fmt: skip

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 65), 1 << 65) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
LIKELY = st.sampled_from(
    [0, 1, 4, 1e308, float("nan"), "4", "(", ".*", "layers", "LOHA", "LORA", "all", "pissa", [4]]
    + [{"layers.2.q": 0}, {"(": 4}, ["experts.w"], ["q"]]
)  # fmt: skip


def attempt(path: Path) -> None:
    """Opens and loads everything, or is refused; anything else fails the test."""
    try:
        adapter = open_adapter(path)
        for module in adapter.modules:
            adapter.load(module)
    except LoraforgeError as error:
        assert str(error)


def folder(config: bytes, tensors: bytes = TENSORS) -> None:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "adapter_config.json").write_bytes(config)
        (Path(place) / "adapter_model.safetensors").write_bytes(tensors)
        attempt(Path(place))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    changes=st.dictionaries(st.sampled_from([*CONFIG, "unknown"]), JSON | LIKELY, max_size=3),
    lost=st.sets(st.sampled_from([*CONFIG]), max_size=2),
)
def test_any_configuration_is_read_or_refused(changes: dict[str, Any], lost: set[str]) -> None:
    config = {key: value for key, value in {**CONFIG, **changes}.items() if key not in lost}
    folder(json.dumps(config).encode("utf-8", "surrogatepass"))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(at=st.integers(0, 600), flips=st.binary(min_size=1, max_size=6), cut=st.integers(0, 600) | st.none())
def test_any_damage_of_the_configuration_is_read_or_refused(at: int, flips: bytes, cut: int | None) -> None:
    text = json.dumps(CONFIG).encode()
    folder((text[:at] + flips + text[at + len(flips) :])[:cut])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(at=st.integers(0, 700), flips=st.binary(min_size=1, max_size=6), cut=st.integers(0, 1200) | st.none())
def test_any_damage_of_the_tensors_is_read_or_refused(at: int, flips: bytes, cut: int | None) -> None:
    folder(json.dumps(CONFIG).encode(), (TENSORS[:at] + flips + TENSORS[at + len(flips) :])[:cut])


def test_documents_that_are_no_configuration(tmp_path: Path) -> None:
    for text in ("", "null", "[]", "{" * 100_000, "[" * 100_000, '{"r": ' + "9" * 5000 + "}", "\ufeff{}", "{}{}"):
        folder(text.encode())
    folder(b"\xff\xfe")
