"""Figures, written as PNG files and put into the page."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_scvi.export import html_page


def new_axes(width: float, height: float) -> Axes:
    """Axes of the given size in inches, without pyplot, which would keep the figure."""
    return Figure(figsize=(width, height), layout="constrained").subplots()


def save(ax: Axes, path: Path, caption: str, *, width: int | None = None) -> html_page.Html:
    """Write a figure to ``path``; returns it for the page, ``width`` CSS pixels wide or 100 for each inch."""
    figure = ax.get_figure()
    if not isinstance(figure, Figure):
        raise TypeError(f"expected axes of a figure, got {figure!r}")
    figure.savefig(path, dpi=200)
    width = round(100 * figure.get_figwidth()) if width is None else width
    return html_page.picture(path.read_bytes(), alt=caption, caption=caption, width=width)
