"""Names, defaults and allowed values of the parameters."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from loraforge.errors import InputProblems, LoraforgeError, UsageError
from loraforge.training.ilora.config import ILoraConfig, ilora_config


def test_names_and_defaults_are_the_documents():
    config = ILoraConfig()
    table = {
        "use_ilora": False,
        "ema_alpha": 0.25,
        "consistency_weight": 1.0,
        "save_ema_adapter": True,
        "ema_adapter_path": None,
        "selective_update": True,
        "min_update_threshold": 0.1,
        "hidden_state_layers": (-1, -2, -3),
        "ilora_buffer_size": 500,
        "previous_task_model": None,
        "current_task_id": None,
        "prev_task_id": None,
    }
    assert {name: getattr(config, name) for name in table} == table


def test_the_document_itself_names_these_defaults(data_dir):
    documents = sorted((data_dir.parent / "seeds").glob("002_*.txt"))
    if not documents:
        pytest.skip("the design document is not beside the data")
    text = documents[0].read_text(encoding="utf-8")
    config = ILoraConfig()
    found = re.findall(r"(\w+): (?:bool|float|int|str) = field\(\s*default=([^,]+),", text)
    assert len(found) == 8
    for name, default in found:
        assert str(getattr(config, name)) == default


def test_it_needs_no_torch():
    code = "import sys; import loraforge.training.ilora.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ema_alpha", 1.01),
        ("ema_alpha", -0.1),
        ("ema_alpha", float("nan")),
        ("consistency_weight", -1),
        ("consistency_weight", float("inf")),
        ("min_update_threshold", -0.1),
        ("ilora_buffer_size", -1),
        ("ilora_buffer_size", 2.5),
        ("hidden_state_layers", ()),
        ("hidden_state_layers", [1, "last"]),
        ("hidden_state_layers", "some"),
        ("ema_every", True),
        ("replay_every", 0),
        ("replay_batch_size", 0),
        ("current_task_id", "a b"),
        ("selective_rule", "elementwize"),
        ("handover", "ema"),
        ("use_ilora", "yes"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(name, value):
    with pytest.raises(LoraforgeError) as error:
        ILoraConfig(**{name: value})
    assert error.value.where == name
    assert error.value.got == repr(tuple(value) if isinstance(value, list) else value)
    assert error.value.expected


def test_all_problems_come_at_once_and_unknown_names_are_close_to_known_ones():
    with pytest.raises(InputProblems) as problems:
        ILoraConfig(ema_alpha=2.0, replay_every=0)
    assert [problem.where for problem in problems.value.problems] == ["ema_alpha", "replay_every"]
    with pytest.raises(UsageError, match="did you mean 'ema_alpha'"):
        ilora_config({"ema_aplha": 0.5})
    assert ilora_config({"ema_alpha": 0.5}).ema_alpha == 0.5


def test_a_stable_adapter_that_would_never_move_is_refused_where_it_pulls():
    with pytest.raises(LoraforgeError, match="ema_every"):
        ILoraConfig(ema_every=0)
    assert not ILoraConfig(use_ilora=True, ema_every=0, consistency_weight=0).keeps_stable


def test_what_is_said_once():
    assert ILoraConfig(use_ilora=True).notices() == []
    said = ILoraConfig(use_ilora=True, min_update_threshold=0.2, save_ema_adapter=False, persist_buffer=False).notices()
    assert [line.split()[0].split("=")[0] for line in said] == [
        "min_update_threshold",
        "save_ema_adapter=false:".split("=")[0],
        "persist_buffer",
    ]
    assert ILoraConfig(use_ilora=True, min_update_threshold=0.2, selective_rule="margin").notices() == []
    assert "never moves" in ILoraConfig(use_ilora=True, ema_alpha=1.0, ema_convention="decay").notices()[0]


def test_what_acts():
    assert ILoraConfig(selective_update=False, selective_rule="margin").rule == "none"
    assert ILoraConfig(ema_alpha=0.2, ema_convention="decay").new_weight == 0.8
    off = ILoraConfig()
    assert not off.replays and not off.keeps_stable and not off.pulls
    on = ILoraConfig(use_ilora=True)
    assert on.replays and on.keeps_stable and on.pulls
    assert not ILoraConfig(use_ilora=True, ilora_buffer_size=0).pulls
    assert not ILoraConfig(use_ilora=True, consistency_weight=0).pulls
    assert ILoraConfig(previous_task_model=Path("runs/a")).previous_task_model == "runs/a"
    assert ILoraConfig(current_task_id=2).as_dict()["current_task_id"] == "2"
