"""Learning curves: held-out bound (ELBO) or evidence against CPU seconds, a panel for every data set."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAMES = {
    "bound": "held-out ELBO",
    "evidence": "held-out evidence",
    "evidence of few": "held-out evidence",
}
COLOURS = "C0", "C1", "C2", "C3"


def save(folder: Path, details: Mapping[str, dict[str, Any]]) -> list[Path]:
    """Draw what the rows of time to quality kept, one PNG for the bound and one for the evidence.

    ``details`` are those of all rows, by name; rows without curves are passed over. Returns the files.
    """
    by_judge = defaultdict(list)
    for kept in details.values():
        if "curves" in kept:
            by_judge[NAMES[kept["judge"]]].append(kept)
    folder.mkdir(parents=True, exist_ok=True)
    return [_drawn(folder, judged_by, panels) for judged_by, panels in by_judge.items()]


def _drawn(folder: Path, judged_by: str, panels: list[dict[str, Any]]) -> Path:
    # Only where a picture is asked for: this process stays small for those that measure memory.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, panel)
        axes.set(title=panel["file"].removesuffix(".h5ad"), xscale="log", xlabel="CPU seconds")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel(f"{judged_by}, nats per cell")
    path = folder / f"{judged_by.replace(' ', '_')}.png"
    figure.savefig(path, dpi=150)
    return path


def _panel(axes: Any, panel: dict[str, Any]) -> None:
    colours: dict[str, str] = {}
    for curves in panel["curves"].values():
        for label in sorted(curves, key=lambda label: label != "ours"):
            points = curves[label]
            colour = colours.setdefault(label, COLOURS[len(colours)])
            shown = {"label": label} if sum(line.get_color() == colour for line in axes.lines) == 0 else {}
            _, seconds, values, _ = zip(*points, strict=True)
            marker = "o" if label == "ours" or len(points) == 1 else None
            axes.plot(seconds, values, color=colour, linewidth=0.8, marker=marker, markersize=3, **shown)
    finals = [points[-1][2] for curves in panel["curves"].values() for points in curves.values()]
    best, worst = max(finals), min(finals)
    axes.set_ylim(worst - 1.0 * (best - worst) - 1, best + 0.1 * (best - worst) + 1)  # first epochs lie far below
    axes.legend(fontsize="small", frameon=False)
