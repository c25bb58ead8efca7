"""How a picture looks and leaves the program: one style, PNG for files, inline SVG that follows the page's colours."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with every common colour vision, on white and on dark grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A7FD1", "#999999")
# Ink and grid of a figure; in SVG they become the page's own colours, so that one picture serves light and dark.
INK, GRID = "#1b1f24", "#d0d4da"
WIDTH = 11.0


@contextmanager
def figure(height: float, columns: int = 1, rows: int = 1, **subplots: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure `WIDTH` x `height` inches with rows x columns axes, in the style of the reports; closed afterwards."""
    import matplotlib

    with matplotlib.rc_context(_style()):
        # The object interface: no pyplot state, no window, safe in threads.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        drawn = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn, drawn.subplots(rows, columns, **subplots)
        drawn.clear()


def svg(draw: Callable[[], AbstractContextManager[Figure]], label: str) -> str:
    """The figure of a context manager `draw()` as inline SVG: scalable, theme-following, no external reference."""
    buffer = io.StringIO()
    with draw() as drawn:
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        drawn.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return _inline(buffer.getvalue(), label)


def save_png(draw: Callable[[], AbstractContextManager[Figure]], path: Path, dpi: int = 160) -> Path:
    """Writes the figure of a context manager `draw()` as PNG on white."""
    with draw() as drawn:
        drawn.savefig(path, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return path


def _style() -> Any:  # matplotlib types its settings as a dictionary of literal keys
    return {
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "axes.titlesize": 13,
        "axes.titlelocation": "left",
        "axes.titlecolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "loraforge",
        # Names come from files: a dollar sign in one is a dollar sign, not a formula.
        "text.parse_math": False,
        "text.usetex": False,
    }


def _inline(text: str, label: str) -> str:
    """The <svg> element alone, with ids of its own, the page's colours and font, and no namespace addresses."""
    from html import escape

    prefix = "f" + hashlib.sha256(f"{label}{text}".encode()).hexdigest()[:8] + "-"
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{prefix}', text).replace("url(#", f"url(#{prefix}")
    text = text.replace('href="#', f'href="#{prefix}').replace(INK, "currentColor").replace(GRID, "var(--grid)")
    text = re.sub(r"font:\s*(\d+(?:\.\d+)?)px [^;\"]*", r"font-size: \1px; font-family: inherit", text)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    if size is not None:
        # Width and height by style: the picture shrinks with the page and never grows past its own size.
        text = re.sub(r'^<svg[^>]*>', f'<svg role="img" aria-label="{escape(label, quote=True)}" '
                      f'viewBox="0 0 {size[1]} {size[2]}" style="max-width:{size[1]}pt">', text, count=1)  # fmt: skip
    return text.strip()
