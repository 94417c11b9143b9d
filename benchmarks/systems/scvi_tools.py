"""scvi-tools, with its progress bar, logger and checkpoints off, which is in its favour."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import anndata
import numpy as np
import scvi
from scipy import sparse

from benchmarks.harness.accelerator import synchronise
from benchmarks.harness.data import simulated
from benchmarks.harness.stopwatch import Sample, Stopwatch

QUIET = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": False,
}
LIKE_OUR_DEFAULTS = {
    "n_layers": 2,
    "dropout_rate": 0.0,
    "dispersion": "gene-cell",
    "use_observed_lib_size": False,
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {"default": {}, "like our defaults": LIKE_OUR_DEFAULTS}
OUR_OPTIMISER = {"lr": 1e-2, "eps": 1e-8}

for _name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning|scvi|torch")  # on stderr they would hide ours
scvi.settings.verbosity = logging.ERROR


def model_of(data: anndata.AnnData, configuration: str = "default", seed: int = 0) -> Any:
    """An untrained SCVI on a copy of the data in the types that it is fast with: CSR float32."""
    scvi.settings.seed = seed
    prepared = anndata.AnnData(sparse.csr_matrix(data.X, dtype=np.float32), obs=data.obs.copy(), var=data.var.copy())
    scvi.model.SCVI.setup_anndata(prepared, batch_key="batch" if "batch" in data.obs else None)
    return scvi.model.SCVI(prepared, **CONFIGURATIONS[configuration])


def fit(model: Any, epochs: int, batch_size: int = 128, device: str = "cpu", **options: Any) -> None:
    """Train on all cells of the model; ``options`` go to ``train``, where plan_kwargs are the optimiser's."""
    accelerator = "gpu" if device == "cuda" else device
    given = {"train_size": 1.0, "accelerator": accelerator, "devices": 1, **QUIET, **options}
    model.train(max_epochs=epochs, batch_size=batch_size, **given)
    synchronise(device)


def train(
    configuration: str, n_cells: int, n_genes: int, batch_size: int, epochs: int, device: str = "cpu"
) -> Callable[[], Sample]:
    """Train on synthetic cells: a call of ``train`` for ``epochs`` passes, on a model that had one of them before."""
    model = model_of(simulated(n_cells, n_genes), configuration)
    fit(model, 1, batch_size, device)

    def measure() -> Sample:
        with Stopwatch() as watch:
            fit(model, epochs, batch_size, device)
        return watch.sample(work=n_cells * epochs)

    return measure


def fitted(n_cells: int, n_genes: int, epochs: int = 2) -> Any:
    """A short fit with defaults: time does not depend on how well it fits."""
    model = model_of(simulated(n_cells, n_genes))
    fit(model, epochs)
    return model


def predictive_draws(n_cells: int, n_genes: int, cells: int, samples: int, warm: bool = True) -> Callable[[], Sample]:
    """Posterior predictive counts of some cells; ``warm`` makes a first call that is not measured."""
    model = fitted(n_cells, n_genes)

    def measure() -> Sample:
        with Stopwatch() as watch:
            drawn = model.posterior_predictive_sample(indices=np.arange(cells), n_samples=samples)
        return watch.sample(work=int(np.prod(drawn.shape)))

    if warm:
        measure()
    return measure


def weighted_evidence(n_cells: int, n_genes: int, cells: int, samples: int, per_pass: int = 1) -> Callable[[], Sample]:
    """Log p(x) of some cells by as many importance weights of draws from its posterior, by default one at a time."""
    model = fitted(n_cells, n_genes)

    def measure() -> Sample:
        with Stopwatch() as watch:
            found = model.get_marginal_ll(
                indices=np.arange(cells), n_mc_samples=samples, n_mc_samples_per_pass=per_pass, return_mean=True
            )
        return watch.sample(work=cells * samples, mean=float(found))

    return measure


def differential_expression(n_cells: int, n_genes: int, mode: str) -> Callable[[], Sample]:
    """Compare the first half of the cells with the second."""
    model = fitted(n_cells, n_genes)
    first, second = np.arange(n_cells // 2), np.arange(n_cells // 2, n_cells)

    def measure() -> Sample:
        with Stopwatch() as watch:
            model.differential_expression(idx1=first, idx2=second, mode=mode, silent=True)
        return watch.sample(work=1)

    return measure
