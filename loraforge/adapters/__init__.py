"""Adapters on disk: PEFT LoRA folders in, PEFT LoRA folders out. The only room that knows files of adapters."""

from loraforge.adapters.card import model_card
from loraforge.adapters.compat import all_modules, check_compatible, output_dtype
from loraforge.adapters.heads import HeadsPlan, resolve_heads, unique_names
from loraforge.adapters.reader import Adapter, ModuleInfo, open_adapter
from loraforge.adapters.writer import AdapterWriter, PeftMeta, WriteReport, write_adapter

__all__ = [
    "Adapter",
    "AdapterWriter",
    "HeadsPlan",
    "ModuleInfo",
    "PeftMeta",
    "WriteReport",
    "all_modules",
    "check_compatible",
    "model_card",
    "open_adapter",
    "output_dtype",
    "resolve_heads",
    "unique_names",
    "write_adapter",
]
