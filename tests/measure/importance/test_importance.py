"""Measurements of importance: lines, files, resuming, estimates, and a head that is known to carry the label."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import BertConfig, BertForSequenceClassification

from loraforge.errors import LoraforgeError, UsageError
from loraforge.measure.files import LineLog
from loraforge.measure.importance.gradients import gate_gradients
from loraforge.measure.importance.measure import measure_importance
from loraforge.measure.importance.noise import noise_floor
from loraforge.measure.subjects.objectives import make_objective
from loraforge.measure.subjects.subject import Subject, open_subject
from loraforge.tasks import TaskSpec
from tests.measure.deep_subjects import deep, naive
from tests.tasks.tiny import CLS, SEP, SPECIAL, WORDS, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:the head .* has random weights")
KEYS = [
    "layer", "head", "I", "loss_base", "loss_ablate", "n", "se", "ci_lo", "ci_hi", "significant", "stack", "kind",
    "method", "objective", "ablate", "unit",
]  # fmt: skip
Opener = Callable[[str], Subject]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("importance")


@pytest.fixture(scope="module")
def subjects(folder: Path) -> Opener:
    """Opened once a family, in float64."""
    return cache(lambda family: deep(folder, family, dtype="float64"))


def test_a_line_is_a_mean_with_its_paired_error(subjects: Opener, tmp_path: Path) -> None:
    subject = subjects("bert")
    told: list[str] = []
    out = tmp_path / "new" / "importance_pre.jsonl"
    lines = measure_importance(subject, out=out, phase="pre", tell=told.append, tokens_per_pass=1)
    values = naive(subject, make_objective("task", subject, warn=False)).numpy()
    for line, row in zip(lines, values, strict=True):
        assert list(line) == KEYS and line["n"] == 7
        assert line["se"] == pytest.approx(stats.sem(row), rel=1e-9)
        low, high = stats.norm.interval(0.95, loc=row.mean(), scale=stats.sem(row))
        assert (line["ci_lo"], line["ci_hi"]) == pytest.approx((low, high), rel=1e-9)
        assert line["significant"] is bool(low > 0 or high < 0)
    assert [json.loads(text) for text in out.read_text().splitlines()] == lines
    about = json.loads(out.with_name("importance_pre.meta.json").read_text())
    assert about["phase"] == "pre" and about["heads"] == 6 and about["subject"]["theta0_sha256"]
    assert about["budget"]["passes"] == 18 and about["budget"]["cache_bytes"] >= about["passes"]["cache_bytes"] > 0
    # Rows of other lengths beside a row change its loss by rounding in float64 alone.
    assert 0.0 <= about["noise_floor"]["mean"] <= about["noise_floor"]["largest"] < 1e-12
    assert about["passes"]["whole_because"] is None and {"torch", "transformers"} <= about["versions"].keys()
    assert told == [text for text in told if "18 passes" in text] and len(told) == 1


def test_one_row_has_no_error(tmp_path: Path) -> None:
    lines = measure_importance(deep(tmp_path, "bert", subset=1), max_heads=1)
    assert lines[0]["se"] is None and lines[0]["ci_lo"] is None and lines[0]["significant"] is None


def test_noise_of_batches_is_seen(subjects: Opener) -> None:
    subject = subjects("bert")
    objective = make_objective("task", subject, warn=False)
    losses = {row: 0.0 for row in subject.indices}
    floor = noise_floor(subject, objective, losses)
    with torch.no_grad():
        whole = torch.cat([objective.losses(subject.model, batch) for batch in subject.batches()])
    assert floor is not None
    assert floor["mean"] == pytest.approx(float(whole.mean())) and floor["largest"] == pytest.approx(float(whole.max()))
    assert noise_floor(subject, make_objective("kl", subject), losses) is None


def test_the_document_s_lines(subjects: Opener, tmp_path: Path) -> None:
    subject = subjects("bert")
    out = tmp_path / "importance_post.jsonl"
    lines = measure_importance(subject, profile="document", out=out)
    assert [list(json.loads(text)) for text in out.read_text().splitlines()] == [KEYS[:6]] * 6
    about = json.loads(out.with_name("importance_post.meta.json").read_text())
    assert (about["batch_size"], about["order"], about["tokens_per_pass"]) == (16, "given", 1)
    one_batch = naive(replace(subject, batch_size=16, order="given"), make_objective("task", subject, warn=False))
    assert [line["I"] for line in lines] == one_batch.mean(1).tolist()
    with pytest.raises(LoraforgeError, match="do not name this model's heads"):
        measure_importance(subjects("t5"), profile="document")
    with pytest.raises(UsageError, match="each head exactly"):
        measure_importance(subject, profile="document", method="taylor")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"method": "exakt"}, "did you mean 'exact'"),
        ({"profile": "paper"}, "unknown profile"),
        ({"method": "taylor", "ablate": "mean"}, "ablation to zero"),
        ({"exact_top": 3}, "belongs to screening"),
        ({"method": "screen", "exact_top": 0}, "1 or more"),
        ({"layers": "0-9"}, "no such layer"),
        ({"layers": "one"}, "not understood"),
        ({"max_heads": 0}, "no head is left"),
        ({"unit": "k"}, "unknown unit"),
        ({"objective": "labels"}, "unknown objective"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_wrong_choices(subjects: Opener, options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        measure_importance(subjects("bert"), **options)


def test_some_layers_and_heads(subjects: Opener) -> None:
    subject = subjects("llama")
    whole = {(line["layer"], line["head"]): line for line in measure_importance(subject, tokens_per_pass=1)}
    some = measure_importance(subject, layers="0,2", tokens_per_pass=1)
    assert [(line["layer"], line["head"]) for line in some] == [(a, b) for a in (0, 2) for b in range(4)]
    assert all(line == whole[line["layer"], line["head"]] for line in some)
    drawn = measure_importance(subject, max_heads=3, seed=4, tokens_per_pass=1)
    keys = [(line["layer"], line["head"]) for line in drawn]
    assert len(keys) == 3 and keys == sorted(keys)
    assert all(line == whole[key] for line, key in zip(drawn, keys, strict=True))


def test_gradients_as_importance(subjects: Opener) -> None:
    subject = subjects("llama")
    slopes = np.asarray(gate_gradients(subject, make_objective("task", subject, warn=False)).s)
    for method, values in (("taylor", -slopes), ("michel", np.abs(slopes))):
        lines = measure_importance(subject, method=method)
        np.testing.assert_allclose([line["I"] for line in lines], values.mean(0), rtol=1e-12)
        np.testing.assert_allclose([line["se"] for line in lines], stats.sem(values, axis=0), rtol=1e-9)
        assert all(line["loss_ablate"] is None and line["loss_base"] > 0 for line in lines)
    assert all(line["significant"] is None for line in lines)
    pairs = measure_importance(subject, method="taylor", unit="kv")
    np.testing.assert_allclose([line["I"] for line in pairs], -slopes.mean(0).reshape(-1, 2).sum(1), rtol=1e-9)
    assert [line["head"] for line in pairs] == [0, 2] * 3


def test_integrated_gradients_are_exact(subjects: Opener) -> None:
    """20 Gauss points; float64, gates in float32 at the points, which are off by 3e-8."""
    exact, integrated = (measure_importance(subjects("bert"), method=m) for m in ("exact", "integrated"))
    for one, other in zip(exact, integrated, strict=True):
        assert other["I"] == pytest.approx(one["I"], abs=1e-6) and other["loss_ablate"] is None
        assert other["se"] == pytest.approx(one["se"], abs=1e-6)


def test_screening(subjects: Opener, tmp_path: Path) -> None:
    subject = subjects("llama")
    out = tmp_path / "importance_pre.jsonl"
    lines = measure_importance(subject, method="screen", exact_top=4, out=out, tokens_per_pass=1)
    exact = [line["I"] for line in measure_importance(subject, tokens_per_pass=1)]
    taylor = [line["I"] for line in measure_importance(subject, method="taylor")]
    done = [at for at, line in enumerate(lines) if line["method"] == "exact"]
    assert len(done) == 5 and len(lines) == 12  # 4 of the first, and 4 / 4 other
    assert set(np.argsort(-np.abs(taylor), kind="stable")[:4]) <= set(done)
    for at, line in enumerate(lines):
        # Heads that are ablated share no pass here, so their numbers are those of the full run.
        assert line["I"] == (exact[at] if at in done else taylor[at])
        assert (line["loss_ablate"] is None) == (at not in done)
    about = json.loads(out.with_name("importance_pre.meta.json").read_text())
    (other,) = set(done) - set(np.argsort(-np.abs(taylor), kind="stable")[:4].tolist())
    assert about["screening"]["heads"] == 1 and about["screening"]["spearman"] is None
    assert about["screening"]["largest_error"] == pytest.approx(abs(exact[other] - taylor[other]))


def test_an_output_is_not_replaced_unasked(subjects: Opener, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    measure_importance(subjects("bert"), out=out, max_heads=2)
    before = out.read_bytes()
    with pytest.raises(LoraforgeError, match="the output exists"):
        measure_importance(subjects("bert"), out=out)
    assert out.read_bytes() == before
    measure_importance(subjects("bert"), out=out, overwrite=True)
    assert len(out.read_text().splitlines()) == 6
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.jsonl", "a.meta.json"]


class Stop(Exception):
    """Ends a measurement in the middle."""


def stop_at(done: int) -> Callable[[str, str, int, int], None]:
    def progress(_stage: str, _detail: str, now: int, _total: int) -> None:
        if now >= done:
            raise Stop

    return progress


def test_a_run_goes_on_behind_its_last_layer(subjects: Opener, tmp_path: Path) -> None:
    subject = subjects("t5")
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    measure_importance(subject, out=whole)
    with pytest.raises(Stop):
        measure_importance(subject, out=broken, progress=stop_at(14))
    log = tmp_path / ".broken.jsonl.lines"
    lines = len(log.read_text().splitlines()) - 1
    assert 0 < lines < 18 and not broken.exists()
    # Other settings do not go on there.
    with pytest.raises(Stop):
        measure_importance(subject, out=tmp_path / "broken.jsonl", ablate="mean", progress=stop_at(1))
    assert len(log.read_text().splitlines()) == 1
    with pytest.raises(Stop):
        measure_importance(subject, out=broken, progress=stop_at(14))
    seen: list[int] = []
    measure_importance(subject, out=broken, progress=lambda stage, detail, done, total: seen.append(total))
    assert broken.read_bytes() == whole.read_bytes() and not log.exists()
    about = json.loads((tmp_path / "broken.meta.json").read_text())
    assert about["heads_taken_up"] == lines and max(seen) < json.loads((tmp_path / "whole.meta.json").read_text())[
        "budget"
    ]["passes"]  # fmt: skip


def test_heads_that_shared_a_pass_share_it_again(subjects: Opener, tmp_path: Path) -> None:
    """A layer of which half was written is run again whole, or its last bits would be others."""
    subject = subjects("bert")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    lines = measure_importance(subject, out=whole)
    with pytest.raises(Stop):
        measure_importance(subject, out=out, progress=stop_at(1))
    settings = json.loads((tmp_path / ".out.jsonl.lines").read_text().splitlines()[0])["settings"]
    with LineLog(out, settings) as log:
        log.add(lines[0])
    measure_importance(subject, out=out)
    assert out.read_bytes() == whole.read_bytes()


_CHILD = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from loraforge.measure.importance.measure import measure_importance
from tests.measure.deep_subjects import deep

def progress(stage, detail, done, total):
    if stage == "importance" and done * 3 >= total * 2:
        os.kill(os.getpid(), signal.SIGKILL)

folder = Path(sys.argv[1])
measure_importance(deep(folder, "bert"), out=folder / "killed.jsonl", progress=progress)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_a_killed_process_leaves_what_the_next_one_takes_up(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, str(tmp_path)]
    done = subprocess.run(command, check=False, cwd=Path(__file__).parents[3], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    part = tmp_path / ".killed.jsonl.lines"
    assert part.read_bytes().count(b"\n") > 1 and not (tmp_path / "killed.jsonl").exists()
    with part.open("ab") as file:
        file.write(b'{"layer": 2, "he')  # as if it had been killed while writing
    subject = deep(tmp_path, "bert")
    measure_importance(subject, out=tmp_path / "killed.jsonl")
    assert json.loads((tmp_path / "killed.meta.json").read_text())["heads_taken_up"] > 0
    measure_importance(subject, out=tmp_path / "whole.jsonl")
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


CARRIER = (1, 1)  # layer and head of the planted model


def planted(folder: Path) -> Subject:
    """A BERT in which head 1 of layer 1, and no other, brings the words to the class token.

    Dimension 0 of a word is 3 for "good", -3 for "bad". All attentions look everywhere alike. Only the carrier's value
    takes dimension 0, and only its columns of the output projection are not zero; the head of the model reads
    dimension 0 of the class token.
    """
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=16, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    model = BertForSequenceClassification(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm.weight" not in name:
                parameter.zero_()
        words = model.bert.embeddings.word_embeddings.weight
        words[:, 1], words[:, 2] = 1.0, -1.0  # so that no token is zero before its normalisation
        good, bad = (len(SPECIAL) + WORDS.index(word) for word in ("good", "bad"))
        words[good, 0], words[bad, 0] = 3.0, -3.0
        layer, head = CARRIER
        attention = model.bert.encoder.layer[layer].attention
        attention.self.value.weight[4 * head, 0] = 1.0
        attention.output.dense.weight[0, 4 * head] = 1.0
        model.bert.pooler.dense.weight[0, 0] = 1.0
        model.classifier.weight[:, 0] = torch.tensor([-1.0, 1.0])
    rows = [
        {"text": f"{first} {WORDS[8 + i]}", "label": label}
        for i in range(6)
        for first, label in (("good", "yes"), ("bad", "no"))
    ]
    spec = TaskSpec("planted", test=rows, kind="classification", labels=("no", "yes"))
    subject = open_subject(model, task=spec, tokenizer=tiny_tokenizer(WORDS), labels=("no", "yes"), device="cpu")
    assert subject.batches()[0].inputs["input_ids"][0].tolist()[::3] == [CLS, SEP]
    return subject


@pytest.mark.parametrize("method", ["exact", "taylor", "integrated", "screen"])
def test_the_head_that_carries_the_label_is_found(tmp_path: Path, method: str) -> None:
    lines = measure_importance(planted(tmp_path), method=method, exact_top=1 if method == "screen" else None)
    found = {(line["layer"], line["head"]): line for line in lines}
    carrier = found.pop(CARRIER)
    assert carrier["I"] > 0.1 and carrier["significant"]
    # The others write nothing: to closed or half-open gates, to the bit.
    assert all(line["I"] == 0.0 and line["significant"] is False for line in found.values())
    if method == "exact":
        assert carrier["loss_ablate"] == pytest.approx(np.log(2))  # the model then knows nothing
