"""Adapters on disk: PEFT folders, kohya and diffusers files in and out. The only room that knows files of adapters."""

from loraforge.adapters.card import model_card
from loraforge.adapters.compat import all_modules, check_compatible, check_dora, output_dtype
from loraforge.adapters.heads import HeadsPlan, resolve_heads, unique_names
from loraforge.adapters.names import with_common_names
from loraforge.adapters.opening import open_adapter
from loraforge.adapters.reader import Adapter, ModuleInfo
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
    "check_dora",
    "model_card",
    "open_adapter",
    "output_dtype",
    "resolve_heads",
    "unique_names",
    "with_common_names",
    "write_adapter",
]
