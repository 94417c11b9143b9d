"""scvi-tools on as many cells as the mouse brain data: cost of loading and training."""

from collections.abc import Callable

import anndata

from benchmarks.harness.resident_memory import peak_megabytes
from benchmarks.harness.stopwatch import Sample, Stopwatch
from benchmarks.systems.scvi_tools import fit, model_of


def load_and_train(path: str, steps: int, batch_size: int) -> Callable[[], Sample]:
    """Read the file and train for ``steps`` batches."""

    def measure() -> Sample:
        before = peak_megabytes()
        with Stopwatch() as watch:
            model = model_of(anndata.read_h5ad(path))
            loaded = peak_megabytes()
            with Stopwatch() as training:
                fit(model, 1, batch_size, max_steps=steps)
        per_epoch = training.cpu / steps * model.adata.n_obs / batch_size
        peaks = {"before": before, "loaded": loaded, "peak": peak_megabytes()}
        return watch.sample(work=1, cpu_seconds_per_epoch=per_epoch, **peaks)

    return measure


def epochs(path: str, n_epochs: int, batch_size: int, device: str) -> Callable[[], Sample]:
    """Read the file and train for ``n_epochs``; wall seconds of an epoch, the set-up of training in it, and of all."""

    def measure() -> Sample:
        with Stopwatch() as watch:
            model = model_of(anndata.read_h5ad(path))
            with Stopwatch() as training:
                fit(model, n_epochs, batch_size, device)
        return watch.sample(work=1, seconds_per_epoch=training.wall / n_epochs, seconds=watch.wall)

    return measure
