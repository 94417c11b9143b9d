"""Rows of training speed: every system on the same synthetic cells."""

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.harness.interleaving import Comparison, Interleaved
from benchmarks.harness.processes import System
from benchmarks.harness.results import CELLS_PER_SECOND, AtLeast

OURS, PEER = "benchmarks.systems.ours:train", "benchmarks.systems.scvi_tools:train"
BARS = {128: AtLeast(2.5), 1024: AtLeast(3.0)}
HALF_BARS = {128: None, 1024: AtLeast(3.75)}
LIMIT_BARS = {128: AtLeast(0.30), 1024: AtLeast(0.50)}


@dataclass(frozen=True)
class Size:
    """Genes, cells of an epoch by batch size, and epochs of a measurement (one more is the warm-up)."""

    genes: int = 720
    cells: tuple[tuple[int, int], ...] = ((128, 6400), (1024, 6144))
    epochs: int = 4

    def options(self, batch_size: int) -> dict[str, Any]:
        """Arguments of the training tasks."""
        n_cells = dict(self.cells)[batch_size]
        return {"n_cells": n_cells, "n_genes": self.genes, "batch_size": batch_size, "epochs": self.epochs}


QUICK = Size(genes=80, cells=((128, 256), (1024, 256)), epochs=1)


def with_compiled(configuration: str, options: dict[str, Any]) -> dict[str, System]:
    """Ours as it is, and with its steps compiled."""
    ours = {"configuration": configuration, **options}
    return {"ours": System("ours", OURS, ours), "compiled": System("ours", OURS, {**ours, "compiled": True})}


def with_compiled_line(title: str, **others: Any) -> tuple[Comparison, Comparison]:
    """The same comparison of both."""
    return (
        Comparison(title, CELLS_PER_SECOND, **others),
        Comparison(f"{title}, compiled", CELLS_PER_SECOND, ours="compiled", note="after the compilation", **others),
    )


def like_for_like(batch_size: int, size: Size) -> Interleaved:
    """Equal networks, likelihood and optimiser, in float32; beside the matrix products alone."""
    options = size.options(batch_size)
    systems = {
        **with_compiled("matched_constant", options),
        "peer": System("scvi-tools", PEER, {"configuration": "default", **options}),
        "limit": System("matrix products", "benchmarks.systems.matrix_products:gemms", options),
    }
    bars, of_limit = {"bar": BARS[batch_size]}, {"bar": LIMIT_BARS[batch_size], "peer": "limit"}
    lines = (
        *with_compiled_line(f"training at batch {batch_size}", **bars, peer="peer", limit="limit"),
        *with_compiled_line(f"share of the float32 matrix products at batch {batch_size}", **of_limit),
    )
    return Interleaved(f"training-{batch_size}", systems, lines)


def in_bfloat16(batch_size: int, size: Size) -> Interleaved:
    """The same with our wide layers in bfloat16, the peer in float32."""
    options = size.options(batch_size)
    systems = {
        **with_compiled("matched_constant", {"half": True, **options}),
        "peer": System("scvi-tools", PEER, {"configuration": "default", **options}),
    }
    title = f"training at batch {batch_size}, ours in bfloat16"
    lines = with_compiled_line(title, bar=HALF_BARS[batch_size], peer="peer")
    condition = System("ours", "benchmarks.systems.ours:autocast_available")
    return Interleaved(f"training-{batch_size}-bfloat16", systems, lines, condition)


def against_defaults(name: str, title: str, configuration: str, bar: AtLeast, size: Size) -> Interleaved:
    """Our defaults against one configuration of the peer."""
    options = size.options(128)
    systems = {
        **with_compiled("default", options),
        "peer": System("scvi-tools", PEER, {"configuration": configuration, **options}),
    }
    return Interleaved(name, systems, with_compiled_line(title, bar=bar, peer="peer"))


def preset(size: Size) -> Interleaved:
    """The seed preset, which has no peer."""
    system = System("ours", OURS, {"configuration": "seed_2017", **size.options(128)})
    return Interleaved("training-seed", {"ours": system}, (Comparison("seed preset, training", CELLS_PER_SECOND),))


def against_pyro(size: Size) -> Interleaved:
    """Against a user's plain Pyro, and against the same bound written out without Pyro."""
    options = size.options(128)
    systems = {
        **with_compiled("matched_constant", options),
        "plain": System("plain Pyro", "benchmarks.systems.pyro_svi:plain", options),
        "by hand": System("by hand", "benchmarks.systems.pyro_svi:by_hand", options),
    }
    plain, by_hand = "training against plain Pyro SVI at batch 128", "Pyro beside the same bound by hand at batch 128"
    note = "1 / 1.1 is an overhead of 10 %"
    lines = (
        *with_compiled_line(plain, bar=AtLeast(2.5), peer="plain"),
        Comparison(by_hand, CELLS_PER_SECOND, AtLeast(1 / 1.1), peer="by hand", note=note),
    )
    return Interleaved("training-pyro", systems, lines)


def replaying(batch_size: int, size: Size) -> Interleaved:
    """Our defaults with replayed steps against the same steps by the programs, to the same bits."""
    options = {"configuration": "default", **size.options(batch_size)}
    task = "benchmarks.systems.ours:train_replaying"
    systems = {
        "ours": System("ours", task, {**options, "replays": True}),
        "programs": System("ours", task, {**options, "replays": False}),
    }
    title = f"replayed steps against the programs' at batch {batch_size}, {size.epochs} epochs, start included"
    lines = (Comparison(title, CELLS_PER_SECOND, peer="programs"),)
    return Interleaved(f"training-{batch_size}-replayed", systems, lines)


def rows(size: Size) -> list[Interleaved]:
    """All rows of training speed."""
    ours, theirs = "our defaults against scvi-tools' defaults", "our defaults against scvi-tools with the same choices"
    return [
        *(like_for_like(batch_size, size) for batch_size in BARS),
        *(in_bfloat16(batch_size, size) for batch_size in BARS),
        against_defaults("training-defaults", ours, "default", AtLeast(1.6), size),
        against_defaults("training-same-choices", theirs, "like our defaults", AtLeast(2.5), size),
        preset(size),
        against_pyro(size),
        *(replaying(batch_size, replace(size, epochs=5 * size.epochs)) for batch_size in BARS),
    ]
