"""Parquet files of a data set's split as plain local files: `.jsonl`, or a folder of images by class."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError
from loraforge.report.page import whole_file
from loraforge.storage.atomic import new_folder

# First bytes of an image file and the suffix it gets.
_KINDS = (
    (b"\x89PNG", ".png"),
    (b"\xff\xd8", ".jpg"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II*", ".tif"),
    (b"RIFF", ".webp"),
)
_UNSAFE = re.compile(r"[^\w.-]+")


def write_split(files: Sequence[Path], place: Path) -> tuple[Path, int]:
    """Writes the rows of Parquet files below `place`; the result appears whole or not at all.

    Args:
        files: The files of one split, in order.
        place: Folder of the images, PLACE/CLASS/NUMBER.SUFFIX; rows without an image go to the file PLACE.jsonl.

    Returns:
        What was written, and the number of rows.

    Raises:
        LoraforgeError: pyarrow is not installed, a file is damaged, images without a class, or the disk refuses.
    """
    names, images = _columns(files)
    place.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    if images is None:
        target = place.with_name(f"{place.name}.jsonl")
        with whole_file(target) as draft, draft.open("w", encoding="utf-8") as out:
            for row in _rows(files):
                out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                count += 1
        return target, count
    with new_folder(place) as folder:
        for count, row in enumerate(_rows(files), 1):
            _write_image(row, images, names, folder, count, place)
    return place, count


def _columns(files: Sequence[Path]) -> tuple[list[str] | None, str | None]:
    """Names of the classes, where the file keeps them, and the column of the images."""
    parquet = _parquet(files[0])
    schema = parquet.read_schema(files[0])
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features: Mapping[str, Any] = (noted.get("info") or {}).get("features") or {}
    names = (features.get("label") or {}).get("names")
    marked = [
        name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == "Image"
    ]
    images = next((name for name in marked if name in schema.names), None)
    return (list(map(str, names)) if names else None), images


def _rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for path in files:
        parquet = _parquet(path)
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(256):
                yield from batch.to_pylist()


def _write_image(
    row: Mapping[str, Any], column: str, names: list[str] | None, folder: Path, number: int, place: Path
) -> None:
    """One image, below the folder of its class."""
    label, content = row.get("label"), (row.get(column) or {}).get("bytes")
    if label is None or content is None:
        got = "no label" if label is None else "no bytes of the image"
        raise LoraforgeError("a row is no image with a class", where=f"{place}, row {number}", got=got)
    title = names[label] if names and isinstance(label, int) and 0 <= label < len(names) else str(label)
    # The order of the classes is that of the names of their folders; numbers are padded, so that 10 follows 9.
    name = f"{label:04d}" if title == str(label) and isinstance(label, int) else _UNSAFE.sub("_", title).strip("_")
    suffix = next((suffix for start, suffix in _KINDS if content.startswith(start)), ".png")
    path = folder / name / f"{number:07d}{suffix}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise LoraforgeError(
            "data sets of the hub need the library 'pyarrow', which is not installed",
            where=path,
            hint="pip install 'loraforge[data]'",
        ) from error
    return parquet
