"""I-LORA: replay, a stable adapter that follows the plastic one, and a loss that keeps their hidden states together.

Nothing is imported at this level: `config` is torch-free.
"""
