"""Sources of rows: every format gives the same rows, and what is wrong is named by file and row."""

from __future__ import annotations

import hashlib
import sys
import types

import pytest

from loraforge.errors import LoraforgeError
from loraforge.tasks import TaskSpec
from loraforge.tasks.rows import read_rows
from tests.tasks.tiny import write_rows

ROWS = [{"text": 'a "quoted", one', "label": "x"}, {"text": "zwei ü", "label": "y"}]


def read(source, **keys):
    return read_rows(TaskSpec("t", train=source, **keys), "train")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = write_rows(tmp_path / f"rows.{suffix}", ROWS)
    rows = read(path)
    assert list(rows.items) == ROWS
    assert rows.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert rows.folder == tmp_path
    assert rows.place(1).startswith(str(path))


def test_rows_in_memory_and_generators():
    assert list(read(ROWS).items) == ROWS
    assert list(read(row for row in ROWS).items) == ROWS
    assert read(ROWS).sha256 == read(list(ROWS)).sha256 != read(ROWS[:1]).sha256


def test_tsv_without_a_header_keeps_quotes(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("1\tit 's \" good\r\n0\tbad\n\n", encoding="utf-8")
    rows = read(path, columns=["label", "text"])
    assert list(rows.items) == [{"label": "1", "text": "it 's \" good"}, {"label": "0", "text": "bad"}]
    assert rows.names == ["line 1", "line 2"]


def test_a_header_that_equals_columns_is_no_row(tmp_path):
    path = write_rows(tmp_path / "rows.tsv", [{"label": "1", "text": "good"}])
    assert (
        list(read(path, columns=["label", "text"]).items) == list(read(path).items) == [{"label": "1", "text": "good"}]
    )


def test_csv_counts_lines_across_quoted_line_ends(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"two\nlines",1\nshort\n', encoding="utf-8")
    with pytest.raises(LoraforgeError, match=r"another number of columns(.|\n)*line 4(.|\n)*1 columns"):
        read(path)


def test_two_files(tmp_path):
    (tmp_path / "t.txt").write_text("first\u2028line\nsecond\n", encoding="utf-8")
    (tmp_path / "l.txt").write_text("1\n0\n", encoding="utf-8")
    source = {"texts": tmp_path / "t.txt", "labels": str(tmp_path / "l.txt")}
    assert list(read(source).items) == [{"text": "first\u2028line", "label": "1"}, {"text": "second", "label": "0"}]
    (tmp_path / "l.txt").write_text("1\n", encoding="utf-8")
    with pytest.raises(LoraforgeError, match="differ in length(.|\n)*2 texts and 1 labels"):
        read(source)
    with pytest.raises(LoraforgeError, match="'texts' and 'labels'"):
        read({"text": "a"})


def test_images_by_sub_folder(tmp_path):
    from PIL import Image

    for name in ("b/0.png", "a/1.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    assert list(read(tmp_path).items) == [{"image": "a/1.png", "label": "a"}, {"image": "b/0.png", "label": "b"}]
    Image.new("RGB", (4, 4)).save(tmp_path / "loose.png")
    with pytest.raises(LoraforgeError, match="one sub-folder a class"):
        read(tmp_path)


def test_hub_rows_come_through_the_library(monkeypatch):
    calls = []

    def load_dataset(name, config, *, split, download_config):
        calls.append((name, config, split, download_config))
        return ROWS

    stand_in = types.SimpleNamespace(
        load_dataset=load_dataset, DownloadConfig=lambda local_files_only: local_files_only
    )
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    monkeypatch.delenv("LORAFORGE_ALLOW_DOWNLOAD", raising=False)
    assert list(read("hf://glue#sst2:validation").items) == ROWS
    assert calls == [("glue", "sst2", "validation", True)]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LoraforgeError, match="'datasets', which is not installed"):
        read("hf://glue")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text":\n', r"not valid JSON(.|\n)*line 2"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"must be an object(.|\n)*line 2(.|\n)*list"),
        ("a.json", '{"text": "a"}', "one list of objects"),
        ("a.jsonl", "", "'train' split of the task is empty"),
        ("a.json", "[]", "'train' split of the task is empty"),
        ("a.csv", "text,label\n", "'train' split of the task is empty"),
        ("a.csv", 'text,label\n"open,1\n', "not valid CSV"),
        ("a.txt", "x", "unknown kind of task file"),
        ("a.parquet", "x", "cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(LoraforgeError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)


def test_not_utf8_names_the_line(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"a\tb\n\xff\t1\n")
    with pytest.raises(LoraforgeError, match="not UTF-8(.|\n)*line 2"):
        read(tmp_path / "a.tsv")


def test_missing_splits_and_sources(tmp_path):
    with pytest.raises(LoraforgeError, match="has no 'test' rows(.|\n)*only train(.|\n)*test: FILE"):
        read_rows(TaskSpec("t", train=ROWS), "test")
    with pytest.raises(LoraforgeError, match="does not exist(.|\n)*gone.jsonl"):
        read(tmp_path / "gone.jsonl")
    with pytest.raises(LoraforgeError, match="nothing that can be read(.|\n)*int"):
        read(3)
    with pytest.raises(LoraforgeError, match=r"columns.*\.csv and \.tsv"):
        read(write_rows(tmp_path / "a.jsonl", ROWS), columns=["a"])
