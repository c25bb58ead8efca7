"""Whatever keys and shapes a file holds, it is read whole or refused with a message."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loraforge.adapters import check_compatible, open_adapter, with_common_names
from loraforge.errors import LoraforgeError

STEMS = [
    "",
    "base_model.model.",
    "base_model.model.a.b",
    "a.b",
    "unet.a",
    "lora_unet_a",
    "lora_unet_unet_a",
    "a.experts",
]
# Shapes of a module with m = 4, n = 4, r = 2, or a stack of two experts of rank 1; none for keys that are always wrong.
FITTING: dict[str, list[list[int]]] = {
    ".lora_A.weight": [[2, 4], [2, 1, 2, 2], [2, 4, 1, 1]],
    ".lora_B.weight": [[4, 2], [4, 2, 1, 1]],
    ".lora_A.default.weight": [[2, 4]],
    ".lora_B": [[4, 2]],
    ".lora_down.weight": [[2, 4], [2, 4, 1, 1]],
    ".lora_up.weight": [[4, 2], [4, 2, 1, 1]],
    "_lora.up.weight": [[4, 2]],
    ".lora_mid.weight": [[2, 2, 3, 3]],
    ".alpha": [[], [1]],
    ".dora_scale": [[4, 1], [4]],
    ".lora_magnitude_vector": [[4], [1, 4, 1, 1]],
    ".lora_embedding_A": [[2, 4]],
    ".lora_embedding_B": [[4, 2]],
    ".lora_B.bias": [[4]],
    ".hada_w1_a": [[4, 2], [2, 4]],
    ".hada_w1_b": [[2, 4]],
    ".hada_w2_a": [[4, 2], [2, 4]],
    ".hada_w2_b": [[2, 4]],
    ".hada_t1": [[2, 2, 3, 3]],
    ".hada_t2": [[2, 2, 3, 3]],
    ".lokr_w1": [[2, 2]],
    ".lokr_w1_a": [[2, 2]],
    ".lokr_w1_b": [[2, 2]],
    ".lokr_w2": [[2, 2], [2, 2, 3]],
    ".lokr_w2_a": [[2, 2]],
    ".lokr_w2_b": [[2, 2]],
    ".lokr_t2": [[2, 2, 3, 3]],
    ".base_layer.lora_A.weight": [[2, 4]],
    ".base_layer.lora_B.weight": [[4, 2]],
    **{suffix: [] for suffix in (".diff", ".weight", ".bias", ".base_layer.weight", "odd")},
}
FAMILIES = [
    [".lora_A.weight", ".lora_B.weight"],
    [".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_magnitude_vector"],
    [".lora_A.weight", ".lora_B.weight", ".base_layer.lora_A.weight", ".base_layer.lora_B.weight"],
    [".lora_embedding_A", ".lora_embedding_B", ".base_layer.weight"],
    [".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale"],
    [".lora_down.weight", ".lora_up.weight", ".lora_mid.weight"],
    [".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2"],
    [".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".alpha"],
    [".lokr_w1", ".lokr_w2", ".dora_scale"],
    [".lokr_w1_a", ".lokr_w1_b", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2"],
]
SIZES = st.lists(st.sampled_from([0, 1, 2, 2, 2, 4]), max_size=5)


MOSTLY = st.sampled_from([True] * 15 + [False])


@st.composite
def files(draw: st.DrawFn) -> dict[str, list[int]]:
    """The keys of one module, some left out and some added, most of them of shapes that fit."""
    stem = draw(st.sampled_from(STEMS))
    found = {}
    suffixes = [suffix for suffix in draw(st.sampled_from(FAMILIES)) if draw(MOSTLY)]
    for suffix in suffixes + draw(st.lists(st.sampled_from(sorted(FITTING)), max_size=1)):
        prefix = stem if draw(MOSTLY) else draw(st.sampled_from(STEMS))
        fits = FITTING[suffix] and draw(MOSTLY)
        found[prefix + suffix] = draw(st.sampled_from(FITTING[suffix]) if fits else SIZES)
    return found


CONFIGS = st.sampled_from(
    [
        None,
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2},
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["experts.w", "experts.v"]},
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": True, "bias": "all"},
        {"peft_type": "LOHA", "r": 2, "alpha": 2},
        {"peft_type": "LOKR", "r": 2, "alpha": 2},
    ]
)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(files(), CONFIGS, st.booleans())
def test_read_or_refused(file: dict[str, list[int]], config: dict[str, object] | None, ignore: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({key or "x": torch.ones(shape) for key, shape in file.items()}, folder / "adapter_model.safetensors")
        if config is not None:
            (folder / "adapter_config.json").write_text(json.dumps(config))
        try:
            adapter = open_adapter(folder, ignore_unknown=ignore)
        except LoraforgeError:
            return
        assert adapter.modules
        for module in adapter.modules:
            info, update = adapter.info(module), adapter.load(module)
            assert update.shape == (info.m, info.n) and update.rank == info.rank and update.scaling == info.scaling
            for side in (adapter.bias(module), adapter.magnitude(module)):
                assert side is None or side.shape == (info.m,)
        check_compatible(with_common_names([adapter, adapter]))
