"""The pictures of a run by name, what each shows in words, and the files they become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraforge.report import heads_charts as charts
from loraforge.report import heads_figures as figures
from loraforge.report import heads_spectra_charts as spectra
from loraforge.report import heads_stats_charts as stats
from loraforge.report.heads_charts import known
from loraforge.report.page import whole_file
from loraforge.report.plots import save_png, svg
from loraforge.report.tables import present

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Content = Mapping[str, Any]
Draw = Callable[[], AbstractContextManager["Figure"]]
FORMATS = ("png", "svg", "html")
# Dots an inch of a picture file, as the document's.
DPI = 150
# Name -> what the picture shows, for those who do not see it.
ALT = {
    "fig_I_vs_U": "Scatter plot of importance before training against relative update, a point a head",
    "fig_I_vs_G": "Scatter plot of importance before training against the gradient on the gate, a point a head",
    "fig_stats": "Bars of rank correlations, overlaps and numbers of cases on grey bands of chance",
    "fig_Ipre_vs_Ipost": "Scatter plot of importance before against after training with the line of no change",
    "fig_Ipost_corrs": "Bars of the rank correlations of importance after training on grey bands of chance",
    "fig_U_vs_Ppred": "Scatter plot of update against predicted plasticity with the least-squares line",
    "fig_bucket_orthogonality": "Relative update in ten buckets of importance, and importance in ten buckets of it",
    "fig_heatmap_I_pre": "Heatmap of importance before training by layer and head",
    "fig_heatmap_I_post": "Heatmap of importance after training by layer and head",
    "fig_heatmap_U": "Heatmap of the relative update by layer and head",
    "fig_heatmap_G": "Heatmap of the gradient on the gate by layer and head",
    "fig_components": "Stacked bars of the squared update of query, key, value and output projections by layer",
    "fig_spectrum": "Singular values of the updates of the modules, and their effective rank by layer",
    "fig_path": "The update's size along the training",
}


def pictures(content: Content) -> dict[str, Draw]:
    """Name -> picture, for those that the run has numbers for.

    Args:
        content: As `measure.content.run_content` reads it.
    """
    rows = content["heads"]
    relative = "Urel_l2" if known(rows, "Urel_l2") else "Urel"
    wanted: list[tuple[str, Any, tuple[str, ...]]] = [
        ("fig_I_vs_U", charts.importance_update_chart, ("I_pre", "Urel")),
        ("fig_I_vs_G", charts.importance_gradient_chart, ("I_pre", "G")),
        ("fig_stats", stats.stats_chart, ()),
        ("fig_Ipre_vs_Ipost", charts.before_after_chart, ("I_pre", "I_post")),
        ("fig_Ipost_corrs", stats.post_correlations_chart, ("I_post",)),
        ("fig_U_vs_Ppred", charts.update_predicted_chart, ("U", "Ppred")),
        ("fig_bucket_orthogonality", figures.bucket_chart, ("I_pre", "Urel")),
        ("fig_heatmap_I_pre", partial(figures.heatmap_chart, column="I_pre"), ("I_pre",)),
        ("fig_heatmap_I_post", partial(figures.heatmap_chart, column="I_post"), ("I_post",)),
        ("fig_heatmap_U", partial(figures.heatmap_chart, column=relative), (relative,)),
        ("fig_heatmap_G", partial(figures.heatmap_chart, column="G"), ("G",)),
        ("fig_components", figures.components_chart, ("Uq", "Uk", "Uv", "Uo")),
    ]
    found: dict[str, Draw] = {
        name: partial(draw, content) for name, draw, columns in wanted if not columns or known(rows, *columns)
    }
    if any(present(line.get("sv")) for line in content["spectrum"]):
        found["fig_spectrum"] = partial(spectra.spectrum_chart, content)
    if content["path"] is not None and len(content["path"].get("steps") or ()) > 1:
        found["fig_path"] = partial(spectra.path_chart, content)
    return found


def write_pictures(
    folder: Path, found: Mapping[str, Draw], alt: Mapping[str, str], formats: Sequence[str]
) -> tuple[list[Path], dict[str, str]]:
    """Writes pictures as NAME.png and NAME.svg; each is drawn once for all formats.

    Returns:
        The files in the order written, and name -> the picture as inline SVG (empty with png alone).
    """
    written: list[Path] = []
    inline: dict[str, str] = {}
    for name, draw in found.items():
        with settled(draw) as again:
            if "png" in formats:
                with whole_file(folder / f"{name}.png") as draft:
                    save_png(again, draft, dpi=DPI)
                written.append(folder / f"{name}.png")
            if set(formats) & {"svg", "html"}:
                inline[name] = svg(again, alt[name])
        if "svg" in formats:
            with whole_file(folder / f"{name}.svg") as draft:
                draft.write_text(alone(inline[name]), encoding="utf-8")
            written.append(folder / f"{name}.svg")
    return written, inline


@contextmanager
def settled(draw: Draw) -> Iterator[Draw]:
    """A picture that is drawn and laid out once, however often it is then saved: as long as all saving takes."""
    with draw() as drawn:
        drawn.draw_without_rendering()
        drawn.set_layout_engine("none")
        yield lambda: nullcontext(drawn)


def alone(inline: str) -> str:
    """An inline picture as a file of its own: it gets back the namespace, and ink and paper of a white page."""
    style = "--grid:#d0d4da;color:#1b1f24;background:white;font-family:'DejaVu Sans',sans-serif;"
    named = inline.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return named.replace('style="', f'style="{style}', 1) + "\n"
