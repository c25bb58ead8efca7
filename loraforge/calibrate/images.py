"""Images into samples: by the base's image processor, or resized and normalised by the base's configuration."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loraforge.calibrate.checks import Sample, report_problems
from loraforge.errors import LoraforgeError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
PROCESSOR_FILE = "preprocessor_config.json"
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def list_images(folder: Path) -> tuple[list[Path], list[str] | None]:
    """The images below a folder by path, and their classes where they lie in sub-folders (one a class).

    Raises:
        LoraforgeError: There is no image.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise LoraforgeError(
            "the folder holds no image", where=folder, expected=f"files ending in {', '.join(SUFFIXES)}"
        )
    classes = [path.relative_to(folder).parts[0] for path in paths]
    nested = all(len(path.relative_to(folder).parts) > 1 for path in paths)
    return paths, classes if nested else None


def load_image_processor(*folders: object) -> Any:
    """The image processor of the first folder (or id in the local cache) that has one, or None; no network.

    Raises:
        LoraforgeError: It is there but cannot be read.
    """
    from transformers import AutoImageProcessor

    for folder in folders:
        if folder is None or not _has_processor(str(folder)):
            continue
        try:
            return AutoImageProcessor.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
            raise LoraforgeError(
                "the image processor cannot be loaded",
                where=Path(str(folder)) / PROCESSOR_FILE,
                got=str(error).strip().split("\n")[0],
                hint="give the calibration data as .safetensors with pixel_values",
            ) from error
    return None


def _has_processor(base: str) -> bool:
    if Path(base).exists():
        return (Path(base) / PROCESSOR_FILE).is_file()
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(base, PROCESSOR_FILE), str)
    except ValueError:  # neither a folder nor an id
        return False


def encode_images(
    paths: Sequence[Any], processor: Any, config: Any, names: Sequence[str] | None = None
) -> list[Sample]:
    """Samples of images.

    Args:
        paths: Image files, the bytes of such files, or pictures of Pillow.
        processor: The base's image processor, or None.
        config: The base's configuration; without a processor its image_size and num_channels are used, and values are
            scaled to [-1, 1] (mean and deviation 0.5).
        names: What to call each image in messages; default its path.

    Returns:
        pixel_values (C, H, W) each.

    Raises:
        LoraforgeError: Images that cannot be read; neither a processor nor sizes in the configuration.
    """
    size = None if processor is not None else _plain_size(config, paths[0])
    problems: list[LoraforgeError] = []
    samples: list[Sample] = []
    for i, path in enumerate(paths):
        where = path if names is None else names[i]
        try:
            image = _open(path, where, _MODES[size[0]] if size is not None else "RGB")
        except LoraforgeError as problem:
            problems.append(problem)
            continue
        if processor is not None:
            pixels = processor(images=[image], return_tensors="pt")["pixel_values"][0]
        elif size is not None:
            pixels = _plain(image, *size)
        samples.append({"pixel_values": pixels.to(torch.float32)})
    report_problems(problems)
    return samples


def check_images(images: Sequence[Any], names: Sequence[str]) -> None:
    """Refuses what is no image, by the beginning of the files alone.

    Args:
        images: Files, the bytes of files, or pictures of Pillow.
        names: What to call each.

    Raises:
        LoraforgeError: Images that cannot be opened.
    """
    problems: list[LoraforgeError] = []
    for image, name in zip(images, names, strict=True):
        try:
            _open(image, name, None)
        except LoraforgeError as problem:
            problems.append(problem)
    report_problems(problems)


def _open(source: Any, where: object, mode: str | None) -> Image:
    """The picture in a mode; with None it is only looked at."""
    try:
        from PIL import Image
    except ImportError as error:
        raise LoraforgeError("images need the library 'pillow'", where=where, hint="pip install pillow") from error
    try:
        if isinstance(source, Image.Image):
            return source.convert(mode) if mode else source
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert(mode) if mode else image
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow's decoders raise
        raise LoraforgeError("the image cannot be read", where=where, got=str(error)) from error


def _plain_size(config: Any, where: object) -> tuple[int, int, int]:
    """(channels, height, width) by a configuration."""
    vision = getattr(config, "vision_config", None) or config
    size, channels = (getattr(vision, name, None) for name in ("image_size", "num_channels"))
    if size is None or channels not in _MODES:
        raise LoraforgeError(
            "the base has no image processor, and its configuration does not say what images it takes",
            where=where,
            got=f"image_size {size}, num_channels {channels}",
            hint="give the calibration data as .safetensors with pixel_values",
        )
    height, width = (size, size) if isinstance(size, int) else size
    return int(channels), int(height), int(width)


def _plain(image: Image, channels: int, height: int, width: int) -> torch.Tensor:
    """(C, H, W) in [-1, 1]: resized bilinearly, mean and deviation 0.5."""
    resized = image.resize((width, height), resample=2)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).reshape(height, width, channels)
    return pixels.permute(2, 0, 1).to(torch.float32) / 127.5 - 1.0
