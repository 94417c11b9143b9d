"""A model of a fit knows its schema: training goes on with cells of its genes and covariates, in their order."""

import copy
import pickle

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import pyro_scvi as ps
from pyro_scvi.errors import ModelError, SchemaError
from tests.support.simulate import simulated_counts

COUNTS = simulated_counts(40)
NAMES = [f"G{i}" for i in range(20)]
OBS = pd.DataFrame({"donor": ["x", "y"] * 20, "age": np.linspace(20.0, 60.0, 40)})
OPTIONS = {"epochs": 1, "progress": False, "device": "cpu"}


def read(order=slice(None), obs=OBS, **options):
    options = options or {"batch": "donor", "covariates": ["age"]}
    names = list(np.array(NAMES)[order])
    return ps.Cells.from_counts(COUNTS[:, order], gene_names=names, obs=obs, **options)


def fitted(cells):
    model = ps.SCVI(20, 2, cells.n_covariates, n_hidden=8, n_layers=1)
    return ps.fit(model, cells, **OPTIONS)


def go_on(fit, cells):
    return ps.fit(fit.model, cells, guide=fit.guide, **OPTIONS)


TURNED = slice(None, None, -1)
OTHERS = {
    "genes in another order": (
        lambda: read(TURNED),
        "or are in another order: the cells have 20 genes, the fit has 20, and 20 are in both",
    ),
    "other genes": (
        lambda: ps.Cells.from_counts(COUNTS, obs=OBS, batch="donor", covariates=["age"]),
        "20 genes, the fit has 20, and 0 are in both",
    ),
    "fewer genes": (lambda: read(slice(0, 19)), "19 genes, the fit has 20, and 19 are in both"),
    "other batches": (
        lambda: read(obs=OBS.replace({"donor": {"x": "z"}})),
        "donor=y.*donor=z.*fit has.*donor=x.*donor=y",
    ),
    "another scale": (
        lambda: read(obs=OBS.assign(age=OBS.age * 12)),
        r"'age' have other scales than in the fit: .* means of 40 .* here of 480",
    ),
    "another column with the same batches": (
        lambda: read(obs=OBS.rename(columns={"donor": "plate"}), batch="plate", covariates=["age"]),
        "plate=x.*the fit has.*donor=x",
    ),
    "covariates for batches": (
        lambda: read(
            obs=OBS.assign(size=OBS.age[::-1].to_numpy(), b=1.0 * (OBS.index % 3)), covariates=["age", "size", "b"]
        ),
        "the cells have .*size",
    ),
}
MADE = {
    "by fit": lambda fit, folder: fit,
    "loaded": lambda fit, folder: (fit.save(folder / "fit"), ps.load(folder / "fit"))[1],
    "loaded into a model": lambda fit, folder: (fit.save(folder / "fit"), ps.load(folder / "fit", model=fit.model))[1],
    "a deep copy": lambda fit, folder: copy.deepcopy(fit),
    "pickled": lambda fit, folder: pickle.loads(pickle.dumps(fit)),
    "trained twice": lambda fit, folder: go_on(fit, read()),
}


@pytest.mark.parametrize(("others", "said"), OTHERS.values(), ids=OTHERS.keys())
def test_cells_of_another_schema_are_refused(others, said):
    with pytest.raises(SchemaError, match=said) as refused:
        go_on(fitted(read()), others())
    assert "schema=fit.schema" in str(refused.value)


@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
def test_a_model_keeps_its_schema(make, tmp_path):
    fit = make(fitted(read()), tmp_path)
    with pytest.raises(SchemaError, match="the fit, or are in another order"):
        go_on(fit, read(TURNED))
    with pytest.raises(SchemaError, match="the fit, or are in another order"):  # with a guide of its own, too
        ps.fit(fit.model, read(TURNED), **OPTIONS)


def test_cells_read_with_the_schema_are_those_of_the_fit():
    fit = fitted(read())
    query = ps.Cells.from_counts(COUNTS[:, TURNED], gene_names=NAMES[::-1], obs=OBS, schema=fit.schema)
    more, same = go_on(fit, query), go_on(fit, read())
    for ours, theirs in zip(more.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_cells_that_were_read_anew_in_the_same_way_are_taken():
    assert len(go_on(fitted(read()), read()).history) == 1


@pytest.mark.parametrize("seed", range(8))
def test_cells_in_another_order_have_the_scales_of_the_fit(seed):
    fit, rows = fitted(read()), np.random.default_rng(seed).permutation(40)
    again = ps.Cells.from_counts(
        COUNTS[rows],
        gene_names=NAMES,
        obs=OBS.iloc[rows].astype({"age": np.float32}).reset_index(drop=True),
        batch="donor",
        covariates=["age"],
    )
    assert ps.embed(fit, again).shape == (40, 2)


def with_rows(cells, n_cells):
    model = ps.SCVI(20, 2, cells.n_covariates, n_hidden=8, n_layers=1)
    return ps.fit(model, cells, ps.guides.PerCell(model, n_cells), **OPTIONS)


def test_a_guide_that_knows_its_cells_by_row_goes_on_with_these_alone(tmp_path):
    cells = read()
    fit = with_rows(cells, 40)
    assert len(go_on(fit, cells).history) == 1
    assert len(go_on(copy.deepcopy(fit), cells).history) == 1
    for others in (cells.take(range(39, -1, -1)), read(obs=OBS.set_axis([f"c{i}" for i in range(40)]))):
        with pytest.raises(SchemaError, match="PerCell has parameters for each cell of its fit"):
            go_on(fit, others)
    for n_cells in (39, 41):
        with pytest.raises(ModelError, match=f"PerCell was made for {n_cells} cells, got 40"):
            with_rows(cells, n_cells)
    fit.save(tmp_path / "fit")
    with pytest.warns(UserWarning, match="knows its cells by row only"):
        go_on(ps.load(tmp_path / "fit"), cells)


def test_a_mapped_fit_has_the_schema_of_its_query():
    fit = fitted(read())
    obs = OBS.assign(donor=["x", "z"] * 20)
    query = read(obs=obs, schema=fit.schema, allow_new_batches=True)
    mapped = ps.map_query(fit, query, epochs=1, progress=False)
    assert mapped.model.trained_on == mapped.schema != fit.schema == fit.model.trained_on
    assert len(go_on(mapped, read(obs=obs, schema=mapped.schema)).history) == 1
    with pytest.raises(SchemaError, match="donor=z"):
        go_on(mapped, read())


def test_callbacks_see_a_fit_that_knows_its_schema():
    seen, cells = [], read()
    model = ps.SCVI(20, 2, cells.n_covariates, n_hidden=8, n_layers=1)
    ps.fit(model, cells, callbacks=[lambda epoch, row, fit: seen.append(fit.model.trained_on)], **OPTIONS)
    assert seen == [cells.schema]
    assert model.trained_on is None  # what was given is of no fit


def test_a_model_trained_by_hand_has_no_schema():
    cells = read()
    model = ps.SCVI(20, 2, cells.n_covariates, n_hidden=8, n_layers=1)
    guide = ps.guides.DiagonalNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(*cells[:])
    assert not model.trained
    assert ps.fit(model, read(TURNED), guide=guide, **OPTIONS).model.trained


def test_size_factors_in_another_unit_are_told_when_training_goes_on():
    obs = pd.DataFrame({"size": COUNTS.sum(1) / 100.0})
    cells = read(obs=obs, size_factor="size")
    library = ps.libraries.SizeFactor(cells.columns["size"])
    fit = ps.fit(ps.SCVI(20, 2, 1, library=library, n_hidden=8, n_layers=1), cells, **OPTIONS)
    go_on(fit, cells)
    with pytest.warns(UserWarning, match="size factors in column 'size' are in another unit"):
        go_on(fit, read(obs=obs * 100, size_factor="size"))
