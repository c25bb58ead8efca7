"""Random inputs that a transformers model can be run on: tokens, pictures, sound, whatever its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loraforge.calibrate.base import prefer_kwargs
from loraforge.measure.heads.sections import section_of

ROWS, TOKENS = 2, 8
_SAMPLES = 4000  # a quarter of a second of sound


def random_inputs(model: nn.Module, *, seed: int = 0) -> dict[str, Any]:
    """Two rows of random inputs of the kinds that a model's forward takes, on its device.

    Args:
        model: A transformers model; its configuration says the sizes.
        seed: Of the draw.

    Returns:
        Keyword arguments of the forward; empty of tensors if it takes none of the kinds known.
    """
    generator = torch.Generator().manual_seed(seed)
    config: dict[str, Any] = model.config.to_dict()  # type: ignore[operator, union-attr]
    accepted = inspect.signature(model.forward).parameters
    first = next(model.parameters())
    found: dict[str, Any] = {}
    for name in ("input_ids", "decoder_input_ids"):
        side = section_of(config, "decoder" if name.startswith("decoder") else "encoder")
        if name in accepted and (allowed := _tokens({**config, **side})):
            drawn = torch.randint(len(allowed), (ROWS, TOKENS), generator=generator)
            found[name] = torch.tensor(allowed)[drawn].to(first.device)
    for name, shape in _shapes(config).items():
        if name in accepted:
            found[name] = torch.randn(*shape, generator=generator).to(first)
    return found | prefer_kwargs(model)


def _tokens(config: Mapping[str, Any]) -> list[int]:
    """Ids of the vocabulary without those that mean something to the model, such as padding."""
    section = section_of(config, "text")
    size = section.get("vocab_size") or config.get("vocab_size")
    if not isinstance(size, int):
        return []
    pairs = [*config.items(), *section.items()]
    special = {value for key, value in pairs if key.endswith(("_token_id", "_token_index")) and isinstance(value, int)}
    # The first thousand are enough, and are words in no special range of any vocabulary.
    return [i for i in range(min(size, 1000 + len(special))) if i not in special]


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of inputs that are no tokens, those that the configuration has the sizes of."""
    found: dict[str, tuple[int, ...]] = {"input_values": (ROWS, _SAMPLES)}
    places = (section_of(config, "vision"), section_of(config, "encoder"))
    vision = next((place for place in places if "image_size" in place), config)
    image = vision.get("image_size")
    if isinstance(image, int | list | tuple):
        sides = (image, image) if isinstance(image, int) else tuple(image)
        found["pixel_values"] = (ROWS, vision.get("num_channels") or 3, *sides)
    if "num_mel_bins" in config and "max_source_positions" in config:
        # Whisper's convolutions halve the frames.
        found["input_features"] = (ROWS, config["num_mel_bins"], 2 * config["max_source_positions"])
    return found


def words(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs without pictures and sound."""
    return {key: v for key, v in inputs.items() if not (isinstance(v, Tensor) and v.is_floating_point())}
