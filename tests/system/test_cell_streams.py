"""One seed gives a cell one answer: batch size and the cells beside it change nothing beyond rounding."""

import anndata
import numpy as np
import pandas as pd
import pytest

import pyro_scvi as ps
from tests.support.simulate import simulated_counts

N_CELLS, N_GENES = 9, 8
FEW = {"samples": 6, "seed": 4}


@pytest.fixture(scope="module")
def fit_and_cells():
    kind = np.where(np.arange(N_CELLS) % 2, "a", "b")
    counts = simulated_counts(N_CELLS, N_GENES).astype(np.float32)
    cells = ps.Cells.from_anndata(anndata.AnnData(counts, pd.DataFrame({"kind": kind}).rename(str)), labels="kind")
    prior = ps.priors.ByLabel(2, columns=cells.columns["kind"])
    model = ps.SCVI(N_GENES, 2, cells.n_covariates, n_hidden=8, n_layers=1, prior=prior)
    return ps.fit(model, cells, epochs=2, validation=0, progress=False, device="cpu"), cells


VERBS = {
    "embed": lambda fit, cells, size: ps.embed(fit, cells, seed=4, batch_size=size),
    "predict_labels": lambda fit, cells, size: ps.predict_labels(fit, cells, batch_size=size, **FEW).to_numpy(),
    "normalized_expression": lambda fit, cells, size: ps.normalized_expression(
        fit, cells, batch_size=size, **FEW
    ).to_numpy(),
    "check_predictions": lambda fit, cells, size: ps.check_predictions(
        fit, cells, batch_size=size, **FEW
    ).cells.to_numpy(),
    "annealed_evidence": lambda fit, cells, size: ps.annealed_evidence(
        fit, cells, chains=4, temperatures=3, batch_size=size, progress=False
    )[["log_evidence", "se"]].to_numpy(),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_the_answer_for_a_cell_is_its_own(verb, fit_and_cells):
    fit, cells = fit_and_cells
    whole = verb(fit, cells, 9)
    np.testing.assert_allclose(verb(fit, cells, 4), whole, rtol=2e-3, atol=1e-4)
    rows = [7, 3, 4]
    np.testing.assert_allclose(verb(fit, cells.take(rows), 2), whole[rows], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("aggregate", [False, True])
def test_ranks_of_simulated_cells_do_not_depend_on_the_batch_size(aggregate, fit_and_cells):
    fit, cells = fit_and_cells
    source = (
        ps.calibration.AggregatePosterior(cells, sampler=ps.Amortized()) if aggregate else ps.calibration.Prior(cells)
    )
    options = {"source": source, "sampler": ps.Amortized(), "draws": 19, "thin": 1, "progress": False}
    first, again = (ps.calibrate(fit, 12, batch_size=size, **options).ranks for size in (12, 5))
    assert (first == again).all(axis=None)
    assert len(first.drop_duplicates()) > 6
