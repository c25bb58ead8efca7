from __future__ import annotations

import json
import re

import pytest
import torch

from loraforge.cli.measure._subject import read_spec, read_subset_option
from loraforge.errors import UsageError
from loraforge.tasks import load_model, parse_task, write_task_card
from tests.cli.conftest import only_object
from tests.measure.tiny_subjects import LABELS, rows_of
from tests.tasks.tiny import tiny_base, write_rows

# Every head of this base is a random one, which one test looks at.
pytestmark = pytest.mark.filterwarnings("always:the head .* has random weights:UserWarning")
NOTHING = dict.fromkeys(
    ["model", "adapter", "task", "data", "text_keys", "label_key", "target_key", "train", "labels", "max_length"]
) | {"split": "test", "objective": "task"}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("fisher")
    tiny_base(place / "bert", "bert")
    write_rows(place / "rows.jsonl", rows_of(12))
    write_rows(place / "train.jsonl", rows_of(20))
    return place


@pytest.fixture
def fisher(run, folder):
    def invoke(*more):
        data = ["--data", folder / "rows.jsonl", "--labels", "no,yes"]
        return run("measure", "fisher", "--model", folder / "bert", *data, "--device", "cpu", *more)

    return invoke


def test_lines_and_json(fisher, tmp_path):
    out = tmp_path / "gradfisher_pre.jsonl"
    result = fisher("--subset", "8:3", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    found = only_object(result)
    assert found["heads"] == [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["layer"], line["head"]) for line in found["heads"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert found["subject"]["subset"] == {"size": 12, "asked": 8, "seed": 3}
    assert "random weights" in result.stderr


def test_the_table_and_the_probe(fisher, folder):
    result = fisher("--train", folder / "train.jsonl", "--objective", "probe", "--probe-steps", 3)
    assert result.exit_code == 0, result.output
    assert "Ppred" in result.stdout and result.stdout.count("enc") == 4
    assert "random" not in result.stderr


def test_the_document(fisher, tmp_path):
    out = tmp_path / "g.jsonl"
    result = fisher("--profile", "seed", "--batch-size", 5, "--out", out, "--quiet")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [list(line) for line in lines] == [["layer", "head", "G", "F", "Ppred", "n_batches"]] * 4
    assert {line["n_batches"] for line in lines} == {3}
    about = json.loads((tmp_path / "g.meta.json").read_text())
    assert (about["mode"], about["order"], about["train_mode"], about["relative"]) == ("batch", "given", True, False)


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--subset", "0"], 2, "--subset"),
        (["--task", "t.yaml"], 2, "one of --task and --data"),
        (["--subset", "nowhere.json"], 3, "cannot be read"),
        (["--objective", "probe"], 3, "training rows"),
        (["--objective", "kl"], 3, "gradient of kl is 0"),
        (["--objective", "lm"], 3, "encoder-decoder|causal"),
        (["--device", "tpu"], 2, "unknown device"),
    ],
    ids=["none", "both", "no-file", "no-train", "kl", "lm", "device"],
)
def test_what_is_refused(fisher, more, code, words):
    result = fisher(*more)
    assert result.exit_code == code, result.output
    assert re.search(words, result.stderr)


def test_a_model_is_needed(run):
    assert run("measure", "fisher", "--data", "x.jsonl").exit_code == 2


def test_an_output_is_kept(fisher, tmp_path):
    out = tmp_path / "g.jsonl"
    out.write_text("kept")
    assert fisher("--out", out).exit_code == 3
    assert out.read_text() == "kept"
    assert fisher("--out", out, "--overwrite").exit_code == 0


def test_a_model_that_broke_down_is_a_failed_check(run, folder, tmp_path):
    model, _, _ = load_model(folder / "bert", "classification", head_labels=LABELS)
    model.get_parameter("classifier.weight").data.fill_(torch.nan)
    model.save_pretrained(tmp_path / "broken")
    for file in folder.glob("bert/*token*"):
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    result = run(
        "measure", "fisher", "--model", tmp_path / "broken", "--data", folder / "rows.jsonl", "--device", "cpu"
    )
    assert result.exit_code == 4, result.output
    assert "batch 0" in result.stderr


def test_a_pair_of_texts():
    spec = read_spec(NOTHING | {"data": "dir/my rows.jsonl", "text_keys": "a, b", "label_key": "gold", "labels": "n,y"})
    assert (spec.id, spec.test, spec.text, spec.text_pair) == ("my-rows", "dir/my rows.jsonl", "a", "b")
    assert (spec.label, spec.labels) == ("gold", ["n", "y"])


def test_data_is_read_as_the_trained_task(tmp_path):
    """The task of task.json, so that its length and fields are taken over."""
    write_task_card(tmp_path, parse_task({"id": "isear"}, "test"), "classification", LABELS, None)
    assert read_spec(NOTHING | {"data": "t.jsonl", "adapter": str(tmp_path), "model": "x"}).id == "isear"


def test_a_task_file(tmp_path):
    file = tmp_path / "t.yaml"
    file.write_text("id: rte\ntest: rows.jsonl\ntext: premise\n")
    spec = read_spec(NOTHING | {"task": str(file), "max_length": 9})
    assert (spec.id, spec.test, spec.max_length) == ("rte", str(tmp_path / "rows.jsonl"), 9)
    with pytest.raises(UsageError, match="own file"):
        read_spec(NOTHING | {"task": str(file), "label_key": "gold"})


def test_lm_reads_text_alone():
    spec = read_spec(NOTHING | {"data": "t.jsonl", "objective": "lm"})
    assert (spec.kind, spec.loss_on) == ("causal", "all")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, {"subset": None}),
        ("64", {"subset": 64}),
        ("64:7", {"subset": 64, "subset_seed": 7}),
        ("rows.json", {"subset": "rows.json"}),
    ],
    ids=["all", "count", "seed", "file"],
)
def test_subsets(value, wanted):
    assert read_subset_option(value) == wanted
