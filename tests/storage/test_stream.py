"""Files written tensor by tensor: the library's own reader reads them, and continued ones equal uninterrupted ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraforge.storage.stream import TensorStream, header_space, save_tensors

METADATA = {"format": "pt", "note": "ä"}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        f"layers.{i}.{dtype}": torch.randn(3 + i, 5, generator=generator).to(dtype)
        for i, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32, torch.float64))
    }
    found |= {"scalar": torch.tensor(4.0), "empty": torch.empty(0, 3), "transposed": torch.arange(6.0).reshape(2, 3).T}
    return found | {"counts": torch.arange(7), "flags": torch.tensor([True, False])}


def room(given: dict[str, Tensor]) -> int:
    return header_space({key: (value.dtype, value.shape) for key, value in given.items()}, METADATA)


def write(path: Path, given: dict[str, Tensor], journal: Path | None = None, stop: int | None = None) -> TensorStream:
    """Writes (the rest of) the tensors, one mark each; a run that is told to stop ends without a header."""
    with TensorStream(path, room(given), journal) as stream:
        for i, (key, value) in enumerate(given.items()):
            if i == stop:
                return stream
            if key not in stream.entries:
                stream.append(key, value)
                stream.mark({"key": key})
        stream.close(METADATA)
    return stream


def test_the_library_reads_it(tmp_path: Path) -> None:
    given = tensors()
    write(tmp_path / "a.safetensors", given)
    with safe_open(tmp_path / "a.safetensors", "pt") as handle:
        assert handle.metadata() == METADATA and set(handle.keys()) == set(given)
        for key, value in given.items():
            found = handle.get_tensor(key)
            assert found.dtype == value.dtype and found.shape == value.shape and torch.equal(found, value)
    raw = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length == room(given) and length % 8 == 0
    assert len(raw) == 8 + length + sum(value.numel() * value.itemsize for value in given.values())


def test_the_room_is_enough_for_smaller_shapes_and_no_more_is_used(tmp_path: Path) -> None:
    space = header_space({"a": (torch.float32, (10_000, 10_000))}, METADATA)
    with TensorStream(tmp_path / "a.safetensors", space) as stream:
        stream.append("a", torch.ones(1, 2))
        stream.close(METADATA)
    with safe_open(tmp_path / "a.safetensors", "pt") as handle:
        assert handle.get_slice("a").get_shape() == [1, 2]
    with TensorStream(tmp_path / "b.safetensors", 8) as stream:
        stream.append("a", torch.ones(1, 2))
        with pytest.raises(ValueError, match="8 were kept"):
            stream.close()


def test_before_the_end_no_reader_takes_it(tmp_path: Path) -> None:
    given = tensors()
    for stop in range(len(given)):
        path = tmp_path / f"{stop}.safetensors"
        write(path, given, stop=stop)
        with pytest.raises(SafetensorError), safe_open(path, "pt"):
            pass


def test_a_key_comes_once(tmp_path: Path) -> None:
    with TensorStream(tmp_path / "a.safetensors", 256) as stream:
        stream.append("a", torch.ones(1))
        with pytest.raises(ValueError, match="written already"):
            stream.append("a", torch.ones(1))


@pytest.mark.parametrize("stop", range(len(tensors())))
def test_a_continued_file_has_the_same_bytes(tmp_path: Path, stop: int) -> None:
    given = tensors()
    write(tmp_path / "whole.safetensors", given)
    path, journal = tmp_path / "a.safetensors", tmp_path / "journal"
    write(path, given, journal, stop)
    with path.open("ab") as file:
        file.write(b"half of a tensor")
    stream = write(path, given, journal)
    assert stream.records == [{"key": key} for key in list(given)[:stop]]
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert {"offset", "crc", "record"} <= lines[-1].keys() and lines[-1]["record"] == {"key": "flags"}


def spoil_data(path: Path, journal: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[room(tensors()) + 8 + 40] ^= 1
    path.write_bytes(raw)


def cut_data(path: Path, journal: Path) -> None:
    path.write_bytes(path.read_bytes()[: room(tensors()) + 8 + 40])


def cut_journal(path: Path, journal: Path) -> None:
    journal.write_bytes(journal.read_bytes()[:-3])


def zero_journal(path: Path, journal: Path) -> None:
    journal.write_bytes(journal.read_bytes() + b"\0" * 64 + b"\n")


def empty_journal(path: Path, journal: Path) -> None:
    journal.write_bytes(b"")


def foreign_journal(path: Path, journal: Path) -> None:
    journal.write_text(json.dumps({"version": 1, "reserve": 16}) + "\n")


def lost_data(path: Path, journal: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("harm", "kept"),
    [
        (spoil_data, 1), (cut_data, 1), (cut_journal, 4), (zero_journal, 5), (empty_journal, 0), (foreign_journal, 0),
        (lost_data, 0),
    ],
)  # fmt: skip
def test_only_what_is_there_is_taken_up(tmp_path: Path, harm: object, kept: int) -> None:
    """The first tensor has 30 bytes; byte 40 belongs to the second."""
    given = tensors()
    assert math.prod(given["layers.0.torch.bfloat16"].shape) * 2 == 30
    write(tmp_path / "whole.safetensors", given)
    path, journal = tmp_path / "a.safetensors", tmp_path / "journal"
    write(path, given, journal, 5)
    harm(path, journal)  # type: ignore[operator]
    stream = write(path, given, journal)
    assert len(stream.records) == kept
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_small_files_at_once(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {"x": torch.arange(4.0)}, {"who": "me"})
    with safe_open(tmp_path / "a.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt", "who": "me"}
        assert torch.equal(handle.get_tensor("x"), torch.arange(4.0))


def test_memory_is_one_tensor(tmp_path: Path) -> None:
    """64 tensors of 1 MiB are written while at most a few are held: the peak grows by far less than the file."""
    import resource

    value = torch.ones(1 << 18)
    space = header_space({f"t{i}": (value.dtype, value.shape) for i in range(64)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with TensorStream(tmp_path / "a.safetensors", space, tmp_path / "journal") as stream:
        for i in range(64):
            stream.append(f"t{i}", value * i)
            stream.mark(i)
        stream.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024
