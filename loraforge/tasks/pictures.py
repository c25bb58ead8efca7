"""Examples with images: decoded when they are asked for, and kept as long as they fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from torch import Tensor

from loraforge.calibrate.checks import check_samples
from loraforge.calibrate.images import check_images, encode_images
from loraforge.tasks.encode import Example

# An image of 224 x 224 pixels takes 0.6 MB: about 1700 of them are kept.
KEPT_BYTES = 1 << 30


class Pixels(Sequence[Tensor]):
    """pixel_values (C, H, W) of images.

    Args:
        images: Files, bytes or pictures.
        processor: The base's image processor, or None.
        config: The base's configuration.
        names: What to call each, for messages.
        keep: Bytes of decoded images that are kept; default KEPT_BYTES.

    Raises:
        LoraforgeError: Images that are no images, all of them named; those that are kept are decoded at once.
    """

    def __init__(
        self, images: Sequence[Any], processor: Any, config: Any, names: Sequence[str], keep: int | None = None
    ) -> None:
        self._images, self._processor, self._config, self._names = images, processor, config, names
        check_images(images, names)
        first = self._decode(range(1))
        room = KEPT_BYTES if keep is None else keep
        count = min(len(images), max(1, room // max(1, first[0].nbytes)))
        self._kept = [*first, *self._decode(range(1, count))]

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        """One image, decoded now if it is not kept."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self._kept[place] if place < len(self._kept) else self._decode([place])[0]

    def _decode(self, chosen: Sequence[int]) -> list[Tensor]:
        if not chosen:
            return []
        images, names = ([part[i] for i in chosen] for part in (self._images, self._names))
        samples = encode_images(images, self._processor, self._config, names)
        check_samples(samples, "images", self._config, names)
        return [sample["pixel_values"] for sample in samples]


class Pictures(Sequence[Example]):
    """Examples of images and the other tensors of their rows.

    Args:
        pixels: The images.
        fields: What else each example holds.
    """

    def __init__(self, pixels: Pixels, fields: Sequence[Example]) -> None:
        self.pixels = pixels
        self.fields = fields

    def __len__(self) -> int:
        return len(self.fields)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """One example, its image decoded now if it is not kept."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return {"pixel_values": self.pixels[index], **self.fields[index]}
