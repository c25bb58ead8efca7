"""`loraforge eval` as a user types it."""

from __future__ import annotations

import json

import pytest

import loraforge as lf
from tests.evaluation.material import adapter_of, task_of
from tests.tasks.tiny import tiny_base

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    base = tiny_base(folder / "base-model", "bert")
    specs = [task_of(folder, "two", ("neg", "pos"), seed=1), task_of(folder, "three", ("x", "y", "z"), seed=2)]
    adapters = [adapter_of(folder / spec.id, base, spec, seed=i) for i, spec in enumerate(specs)]
    lf.merge(adapters, method="weighted-average").save(folder / "merged")
    return folder


@pytest.fixture
def run_cli(run):
    """Exit code, stdout, stderr."""

    def invoke(*arguments):
        result = run(*arguments)
        return result.exit_code, result.stdout, result.stderr

    return invoke


@pytest.fixture
def arguments(place):
    rows = [f"--task={name}={place / name}.jsonl" for name in ("two", "three")]
    adapters = [f"--adapter={place / name}" for name in ("two", "three", "merged")]
    return ["eval", f"--base={place / 'base-model'}", *adapters, *rows]


def test_one_table_with_intervals_and_averages(run_cli, arguments):
    code, out, err = run_cli(*arguments)
    assert code == 0, err
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert lines["row"].split() == ["row", "two,", "accuracy", "three,", "accuracy", "average", "normalised"]
    assert lines["merged"].count("±") == 4
    # Single adapters are the one row of own adapters.
    assert "own adapters" in lines and "two" not in lines
    assert "100.0" in lines["own adapters"]


def test_json_is_one_object_and_the_folder_holds_the_same(run_cli, arguments, tmp_path):
    code, out, _ = run_cli(*arguments, "--json", "--out", str(tmp_path / "result"), "--predictions")
    assert code == 0
    found = json.loads(out)
    kept = json.loads((tmp_path / "result" / "results.json").read_text())
    assert kept["rows"] == found["rows"] and kept["differences"] == found["differences"]
    assert [row["name"] for row in found["rows"]] == ["base", "own adapters", "two", "three", "merged"]
    assert len(found["rows"][4]["cells"]["two"]["predictions"]) == 24
    run = json.loads((tmp_path / "result" / "run.json").read_text())
    assert {entry["name"]: bool(entry["sha256"]) for entry in run["inputs"]}["merged"]
    assert all(len(task["sha256"]) == 64 for task in run["tasks"])


def test_the_report_is_one_file_without_a_network(run_cli, arguments, tmp_path):
    code, _, err = run_cli(*arguments, "-q", "--out", str(tmp_path / "result"))
    assert code == 0, err
    page = (tmp_path / "result" / "report.html").read_text()
    assert "http" not in page and "<script" not in page and "<svg" in page
    assert "merged answers three with the head kept for three" in page


def test_an_output_that_exists_is_refused_before_the_work_and_replaced_on_demand(run_cli, arguments, tmp_path):
    out = ["--out", str(tmp_path / "result"), "-q"]
    assert run_cli(*arguments, *out)[0] == 0
    code, _, err = run_cli(*arguments, *out)
    assert code == 3 and "exists already" in err
    assert run_cli(*arguments, *out, "--overwrite")[0] == 0


def test_task_files_and_lists_of_tasks(run_cli, place, tmp_path):
    (tmp_path / "two.yaml").write_text(f"test: {place / 'two.jsonl'}\nlabels: [neg, pos]\nmetric: [mcc, accuracy]\n")
    both = f"tasks:\n  - {{id: three, test: {place / 'three.jsonl'}}}\n"
    (tmp_path / "tasks.yaml").write_text(both)
    base = ["eval", f"--base={place / 'base-model'}", f"--adapter=a={place / 'merged'}", "--json"]
    more = [f"--task=two={tmp_path / 'two.yaml'}", f"--tasks={tmp_path / 'tasks.yaml'}"]
    code, out, err = run_cli(*base, *more)
    assert code == 3 and "the classes of the task are not known" in err and "three" in err
    # The card of the adapter that lends the head names the classes.
    code, out, err = run_cli(*base, *more, f"--heads=three={place / 'three'}")
    assert code == 0, err
    assert [(task["id"], task["metric"]) for task in json.loads(out)["tasks"]] == [
        ("two", "mcc"),
        ("three", "accuracy"),
    ]


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        (["--metric", "acuracy"], 2, "did you mean 'accuracy'"),
        (["--metric", "rougeL"], 3, "no metric 'rougeL'"),
        (["--split", "eval"], 0, None),
        (["--task", "rows.jsonl"], 2, "needs a name for its task"),
        (["--task", "two=again.jsonl"], 3, "two tasks have the same name"),
        (["--heads", "two"], 2, "--heads takes NAME=VALUE"),
        (["--heads", "four=two"], 3, "names a task that is not evaluated"),
        (["--adapter", "nowhere"], 3, "the adapter is not there"),
        (["--labels", "a,b"], 3, "classes"),
        (["--against", "nobody"], 3, "--against names no row"),
    ],
)
def test_bad_input_ends_with_its_code_and_what_is_wrong(run_cli, arguments, change, code, told):
    found, _, err = run_cli(*arguments, *change)
    assert found == code, err
    assert told is None or told in err


def test_nothing_to_do_is_a_usage_error(run_cli, place):
    assert run_cli("eval")[0] == 2
    code, _, err = run_cli("eval", f"--base={place / 'base-model'}")
    assert code == 2 and "no task was named" in err
