"""The figure of docs/default.md: evidence against accuracy of neighbours, of variants of the default and of scvi-tools.

    python -m benchmarks.choice.figure --fits defaults.jsonl --peer peer.jsonl --out docs/_static/default.png

The files are those of ``benchmarks.choice.defaults`` and ``benchmarks.choice.beside_peer``. Both score the same cells.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.choice import beside_peer, defaults
from benchmarks.harness.commands import parser_of

MODULE = "benchmarks.choice.figure"
NOW, EARLIER = "shrunk_default", "default"
MARKERS = "oDs^v<>phX"
NAMES = {
    NOW: "the default",
    EARLIER: "the earlier default",
    "shrunk_shallow_encoder": "one layer in the encoder",
    "shrunk_one_layer": "one layer in both",
    "shrunk_two_layers": "dropout in the encoder",
    "one_layer": "one layer in both, no prior",
    "two_layers_both_dropout": "dropout in both, no prior",
    "recipe": "r per gene, dropout, no prior",
    beside_peer.PEER: "scvi-tools 1.4.2",
}
COLOURS = 255  # of the palette: the file stays small


def points(lines: Sequence[dict[str, Any]], peer_lines: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Evidence minus the earlier default's, with its standard error, and accuracy of 15 neighbours with its sd.

    A row for each data set with labels and variant. scvi-tools is placed by its distance from the default, and scored
    in its z; the variants are scored in the space of expression.
    """
    nats = defaults.paired(lines).set_index(["data", "variant"])[["nats", "se"]]
    rows = [_row(data, variant, *nats.loc[(data, variant)], lines, "expression") for data, variant in nats.index]
    scored = [line for line in peer_lines if "evidence" in line]
    gaps = defaults.paired(scored, against=beside_peer.OURS).set_index(["data", "variant"])
    for data, variant in gaps.index:
        if variant == beside_peer.PEER and (data, NOW) in nats.index:
            x = nats.nats[data, NOW] + gaps.nats[data, variant]
            rows.append(_row(data, variant, x, gaps.se[data, variant], peer_lines, "z"))
    return pd.DataFrame([row for row in rows if row is not None])


def _row(
    data: str, variant: str, nats: float, se: float, lines: Sequence[dict[str, Any]], space: str
) -> dict[str, Any] | None:
    of = [line[space] for line in lines if (line["data"], line["variant"]) == (data, variant)]
    if variant not in NAMES or "accuracy" not in of[0]:
        return None
    accuracy = [scores["accuracy"] for scores in of]
    spread = np.std(accuracy, ddof=1) if len(accuracy) > 1 else np.nan
    return {
        "data": data,
        "variant": variant,
        "nats": nats,
        "se": se,
        "accuracy": np.mean(accuracy),
        "accuracy_sd": spread,
    }


def drawn(table: pd.DataFrame) -> Figure:
    """A panel for each data set, a marker for each variant; bars are one standard error across and one sd up."""
    names = list(dict.fromkeys(table.data))
    figure = Figure(figsize=(11.0, 6.6), layout="constrained")
    panels = np.ravel(figure.subplots(-(-len(names) // 3), 3, squeeze=False))
    for name, panel in zip(names, panels, strict=False):
        for number, (variant, label) in enumerate(NAMES.items()):
            for row in table[(table.data == name) & (table.variant == variant)].itertuples():
                panel.errorbar(
                    row.nats,
                    row.accuracy,
                    xerr=row.se,
                    yerr=row.accuracy_sd,
                    fmt="*" if variant == beside_peer.PEER else MARKERS[number],
                    color="black" if variant == beside_peer.PEER else f"C{number}",
                    markersize=9 if variant in (NOW, beside_peer.PEER) else 6,
                    elinewidth=0.8,
                    label=label,
                )
        panel.set_title(name, fontsize=11)
        panel.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    figure.supxlabel("held-out evidence minus the earlier default's, nats per cell")
    figure.supylabel("accuracy of 15 neighbours")
    entries = dict(reversed(pair) for panel in panels for pair in zip(*panel.get_legend_handles_labels(), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=5, fontsize=9, frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the figure."""
    options = parse(arguments)
    made = io.BytesIO()
    drawn(points(defaults.read(options.fits), defaults.read(options.peer))).savefig(made, dpi=100)
    small = Image.open(made).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(options.out, optimize=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(MODULE, __doc__)
    parser.add_argument("--fits", type=Path, required=True, help="file of benchmarks.choice.defaults")
    parser.add_argument("--peer", type=Path, required=True, help="file of benchmarks.choice.beside_peer")
    parser.add_argument("--out", type=Path, required=True, help="the picture, a PNG")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
