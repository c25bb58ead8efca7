"""Hostile and damaged files of tensors: refused with a LoraforgeError that names the file, whatever they hold."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from loraforge.errors import LoraforgeError
from loraforge.storage.files import FLOATING, STORED, open_tensors

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def raw(header: Any, data: int = 32, length: int | None = None) -> bytes:
    """A file of this header (text, bytes or JSON) and `data` bytes of zeros."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(data)


def changed(key: str, **fields: Any) -> dict[str, Any]:
    return {**GOOD, key: {**GOOD[key], **fields}}


def refusal(path: Path) -> LoraforgeError:
    with pytest.raises(LoraforgeError) as caught:
        open_tensors(path)
    assert str(path) in str(caught.value)
    assert all(letter.isprintable() or letter == "\n" for letter in str(caught.value))
    return caught.value


def test_a_whole_file_opens(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({"__metadata__": {"format": "pt"}, **GOOD}))
    found = open_tensors(path)
    assert found.shapes == {"a": (2, 3), "b": (4,)} and found.metadata == {"format": "pt"}
    assert found.dtypes == {"a": torch.float32, "b": torch.bfloat16}
    assert [t.shape for t in found.read(("b", "a"))] == [(4,), (2, 3)]


DEEP = '{"a":' + "[" * 200_000 + "]" * 200_000 + "}"
HEADERS: dict[str, tuple[Any, int]] = {
    "not JSON": ("{,}", 32),
    "no object": ("[1]", 32),
    "text before": (" " + json.dumps(GOOD), 32),
    "text behind": (json.dumps(GOOD) + "x", 32),
    "not UTF-8": (b'{"\xff": 1}', 32),
    "deep nesting": (DEEP, 32),
    "endless number": ('{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 32]}}', 32),
    "NaN": ('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 32]}}', 32),
    "key twice": (json.dumps(GOOD)[:-1] + ', "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}', 32),
    "field twice": (json.dumps(GOOD).replace('"shape": [4]', '"shape": [1], "shape": [4]'), 32),
    "metadata of numbers": ({"__metadata__": {"a": 1}, **GOOD}, 32),
    "metadata no object": ({"__metadata__": "a", **GOOD}, 32),
    "entry no object": ({**GOOD, "c": 3}, 32),
    "field missing": ({"a": {"dtype": "F32", "shape": [2, 3]}}, 24),
    "field too many": (changed("a", code="x"), 32),
    "dtype unknown": (changed("a", dtype="F33"), 32),
    "dtype no text": (changed("a", dtype=["F32"]), 32),
    "dtype of integers": (changed("a", dtype="I32"), 32),
    "size against shape": (changed("a", shape=[2, 4]), 32),
    "size against dtype": (changed("a", dtype="F64"), 32),
    "negative shape": (changed("a", shape=[-2, -3]), 32),
    "shape of fractions": (changed("a", shape=[2.0, 3.0]), 32),
    "shape of flags": (changed("a", shape=[True, 6]), 32),
    "shape no list": (changed("a", shape=6), 32),
    "huge shape": (changed("a", shape=[1 << 40, 1 << 40]), 32),
    "shape that overflows": (changed("a", shape=[1 << 32, 1 << 32, 6]), 32),
    "huge but empty": ({"a": {"dtype": "F32", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}}, 0),
    "a thousand dimensions": (changed("a", shape=[1] * 1000 + [6]), 32),
    "overlap": (changed("b", data_offsets=[20, 28]), 32),
    "hole": (changed("b", data_offsets=[25, 33]), 33),
    "beyond the end": (changed("b", data_offsets=[24, 32]), 31),
    "far beyond the end": (changed("b", data_offsets=[1 << 62, (1 << 62) + 8]), 32),
    "negative offsets": (changed("a", data_offsets=[-24, 0]), 32),
    "offsets swapped": (changed("a", data_offsets=[24, 0]), 32),
    "three offsets": (changed("a", data_offsets=[0, 12, 24]), 32),
    "data that nobody describes": (GOOD, 40),
    "control character": ({"a\nb": GOOD["a"], "b": GOOD["b"]}, 32),
    "escape sequence": ({"\x1b[2Ja": GOOD["a"], "b": GOOD["b"]}, 32),
    "zero byte": ({"a\0": GOOD["a"], "b": GOOD["b"]}, 32),
    "surrogate": ('{"\\ud800": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}', 32),
    "empty name": ({"": GOOD["a"], "b": GOOD["b"]}, 32),
    "path upwards": ({"../../etc/passwd": GOOD["a"], "b": GOOD["b"]}, 32),
    "absolute path": ({"/etc/passwd": GOOD["a"], "b": GOOD["b"]}, 32),
    "drive": ({"C:\\x": GOOD["a"], "b": GOOD["b"]}, 32),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_wrong_header_is_refused(tmp_path: Path, what: str) -> None:
    header, data = HEADERS[what]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(header, data))
    refusal(path)


@pytest.mark.parametrize("length", [0, 1, 1000, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_a_header_length_beyond_the_file_allocates_nothing(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(GOOD, length=length))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "header of" in str(refusal(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


def test_a_header_beyond_the_format_s_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:  # a sparse file: large without taking room
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)
    assert "header of 100000001 bytes" in str(refusal(path))


@pytest.mark.parametrize("content", [b"", b"\x01", bytes(8), b"version https://git-lfs.github.com/spec/v1\noid x\n"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_stubs_are_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content)
    pointer = content.startswith(b"version")
    assert ("a git-lfs pointer, not the file itself" in str(refusal(path))) == pointer


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_only_regular_files_are_opened(tmp_path: Path, suffix: str) -> None:
    folder, pipe, link = tmp_path / f"folder.{suffix}", tmp_path / f"pipe.{suffix}", tmp_path / f"link.{suffix}"
    folder.mkdir()
    os.mkfifo(pipe)
    link.symlink_to(link)
    assert "a folder" in str(refusal(folder)) and "a pipe" in str(refusal(pipe))
    refusal(link)
    refusal(tmp_path / f"nothing.{suffix}")


def test_integers_only_where_they_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"n": torch.arange(3), "f": torch.tensor([True])}, path)
    assert "int64" in str(refusal(path)).lower() or "I64" in str(refusal(path))
    assert open_tensors(path, STORED).dtypes == {"n": torch.int64, "f": torch.bool}
    torch.save({"n": torch.arange(3)}, tmp_path / "x.bin")
    refusal(tmp_path / "x.bin")
    assert torch.equal(open_tensors(tmp_path / "x.bin", STORED).read(("n",))[0], torch.arange(3))
    assert torch.int64 in STORED and torch.int64 not in FLOATING


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(1), "b": Evil(tmp_path / "ran")}, path, _use_new_zipfile_serialization=zipped)
    assert "run code" in str(refusal(path))
    path.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    refusal(path)
    assert not (tmp_path / "ran").exists()


def test_an_archive_that_unpacks_to_much_is_refused(tmp_path: Path) -> None:
    good = io.BytesIO()
    torch.save({"a": torch.zeros(1 << 20)}, good)
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in source.infolist():
            bomb.writestr(entry.filename, source.read(entry))
    assert path.stat().st_size < 1 << 16
    assert "unpacks to more" in str(refusal(path))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(1 << 20, 1 << 20),
        torch.eye(3).to_sparse(),
        torch.empty(1 << 20, 1 << 20, device="meta"),
    ],
    ids=["expanded", "sparse", "meta"],
)
def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"a": tensor}, tmp_path / "x.bin")
    refusal(tmp_path / "x.bin")


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}, {1: torch.ones(1)}, {"a\nb": torch.ones(1)}, {}])
def test_other_content_of_a_bin(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.bin")
    if content == {}:
        assert open_tensors(tmp_path / "x.bin").shapes == {}
    else:
        refusal(tmp_path / "x.bin")


def attempt(path: Path) -> None:
    """Opens and reads everything, or is refused; anything else fails the test."""
    try:
        found = open_tensors(path, STORED)
        found.read(tuple(found.shapes))
    except LoraforgeError:
        return


QUIET = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "X"]) | VALUES,
        "shape": st.lists(st.integers(-1, 1 << 40), max_size=4) | VALUES,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | VALUES,
    }
)


@QUIET
@given(header=st.dictionaries(st.text(max_size=8), ENTRY | VALUES, max_size=4), data=st.integers(0, 64))
def test_any_header_opens_or_is_refused(tmp_path: Path, header: dict[str, Any], data: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(header, data))
    attempt(path)


@QUIET
@given(at=st.integers(0, 150), flips=st.binary(min_size=1, max_size=6), cut=st.integers(0, 400), which=st.booleans())
def test_any_damage_opens_or_is_refused(tmp_path: Path, at: int, flips: bytes, cut: int, which: bool) -> None:
    """Bytes of a good file overwritten, and its end cut off. What opens here, the format's own library opens too."""
    content = raw({"__metadata__": {"format": "pt"}, **GOOD})
    content = (content[:at] + flips + content[at + len(flips) :])[: len(content) - (cut if which else 0)]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    try:
        open_tensors(path, STORED)
    except LoraforgeError:
        return
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:  # pragma: no cover - a header that only we accept
        raise AssertionError(content) from error


@QUIET
@given(
    zipped=st.booleans(), at=st.floats(0, 1), flips=st.binary(min_size=1, max_size=8), cut=st.floats(0, 1) | st.none()
)
def test_any_damage_of_a_bin_opens_or_is_refused(
    tmp_path: Path, zipped: bool, at: float, flips: bytes, cut: float | None
) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2, 3), "b": torch.ones(4)}, buffer, _use_new_zipfile_serialization=zipped)
    content = bytearray(buffer.getvalue())
    place = int(at * (len(content) - 1))
    content[place : place + len(flips)] = flips
    path = tmp_path / "x.bin"
    path.write_bytes(content if cut is None else content[: int(cut * len(content))])
    attempt(path)
