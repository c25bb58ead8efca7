"""The card of a merged model."""

from __future__ import annotations

from loraforge.checkpoints import full_model_card


def test_facts_and_inputs():
    text = full_model_card(
        {
            "method": "iso-c",
            "base": 'models/"vit"',
            "params": {"alpha": 1.5},
            "adapters": [{"name": "a|b", "format": "model", "sha256": "0123456789abcdef0123"}],
            "weights": [0.5],
            "warnings": ["two\nlines"],
        }
    )
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert 'base_model: "models/\\"vit\\""' in text
    assert "| alpha | 1.5 |" in text
    assert "| a\\|b | model | 0.5 | `0123456789abcdef` |" in text
    assert "- two lines" in text
