from __future__ import annotations

import yaml

from loraforge.adapters import model_card

REPORT = {
    "method": "svd",
    "base": 'odd: "name" #1',
    "params": {"k": "a|b"},
    "weights": [0.5, -1.0],
    "adapters": [{"path": "loras/one/", "sha256": "ab" * 32}, {"name": "two", "sha256": "cd" * 32}],
    "modules": 12,
    "relative_error": 0.25,
    "warnings": ["rank 64\nclamped"],
}


def test_front_matter_is_yaml_and_tables_hold() -> None:
    text = model_card(REPORT)
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == REPORT["base"] and "lora" in front["tags"] and front["library_name"] == "peft"
    assert "| one | 0.5 | `abababababababab` |" in text and "| two | -1 |" in text
    assert "| modules | 12 |" in text and "`a\\|b`" in text and "- rank 64 clamped" in text
    assert model_card(REPORT) == text


def test_an_empty_report_makes_a_card() -> None:
    text = model_card({})
    assert "base_model:" not in text and "PeftModel.from_pretrained" in text
