"""Spaces of an embedding: against NumPy, and a query beside its reference."""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

import pyro_scvi as ps
from pyro_scvi.errors import DataError, ModelError, SchemaError
from tests.support.simulate import simulated_counts
from tests.support.toys import Cluster, cells_of, fit_of, toy

N = 60
GENES = pd.DataFrame(index=[f"g{i}" for i in range(20)])


@pytest.fixture(scope="module")
def adata():
    obs = pd.DataFrame(
        {
            "donor": np.array(["a", "b", "c"])[np.arange(N) % 3],
            "assay": np.array(["s", "t"])[np.arange(N) // 30],
            "age": np.linspace(20.0, 60.0, N),
            "kind": ["p"] * 20 + ["q"] * 20 + [None] * 20,
        },
        index=[f"cell_{i}" for i in range(N)],
    )
    return AnnData(simulated_counts(), obs=obs, var=GENES)


@pytest.fixture(scope="module")
def cells(adata):
    return ps.Cells.from_anndata(adata, batch="donor", categories=["assay"], covariates=["age"], labels="kind")


@pytest.fixture(scope="module")
def fit(cells):
    return ps.fit(ps.SCVI(20, 3, cells.n_covariates, n_hidden=16), cells, epochs=3, progress=False)


def decoded_by_hand(fit, cells, what):
    """Mean of ``what(eta or hidden)`` over the six combinations of donor and assay, in NumPy."""
    z = torch.as_tensor(ps.embed(fit, cells))
    found = []
    for donor in range(3):
        for assay in range(2):
            gamma = torch.zeros(len(z), cells.n_covariates)
            gamma[:, donor] = gamma[:, 3 + assay] = 1.0
            with torch.no_grad():
                found.append(what(fit.model.decoder, z, gamma).numpy().astype(np.float64))
    return np.mean(found, axis=0)


def of_shares(decoder, z, gamma):
    return decoder(z, gamma)["log_mean"].softmax(-1)


def of_hidden(decoder, z, gamma):
    return decoder.layers(z, gamma)


def components(features, n):
    """Principal components by the eigenvectors of the covariance, with the largest entry of each axis positive."""
    centred = features - features.mean(0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, ::-1][:, :n]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(n)])
    return centred @ axes


def test_expression_is_the_pca_of_decoded_shares_with_batches_and_categories_averaged(fit, cells):
    shares = decoded_by_hand(fit, cells, of_shares)
    expected = components(np.sqrt(shares * np.median(cells.totals)), 4)
    found = ps.embed(fit, cells, space=ps.spaces.Expression(4), batch_size=7)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert found.dtype == np.float32


def test_hidden_is_the_pca_of_the_last_hidden_layer(fit, cells):
    expected = components(decoded_by_hand(fit, cells, of_hidden), 3)
    found = ps.embed(fit, cells, space=ps.spaces.Hidden(3))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_the_default_is_z(fit, cells):
    np.testing.assert_array_equal(ps.embed(fit, cells), ps.embed(fit, cells, space=ps.spaces.Latent()))
    assert ps.spaces.Latent().fitted(fit, cells) == ps.spaces.Latent()


@pytest.mark.parametrize("space", [ps.spaces.Expression(3), ps.spaces.Hidden(3)], ids=repr)
def test_a_fitted_space_places_every_cell_where_its_own_axes_do(fit, cells, space):
    fitted = space.fitted(fit, cells)
    everything = ps.embed(fit, cells, space=fitted)
    np.testing.assert_array_equal(everything, ps.embed(fit, cells, space=space))
    some = ps.embed(fit, cells.take(range(40, 50)), space=fitted)
    np.testing.assert_allclose(some, everything[40:50], rtol=1e-4, atol=1e-5)
    alone = ps.embed(fit, cells.take(range(40, 50)), space=space)
    assert not np.allclose(alone, some, atol=1e-3)


def test_neither_batches_nor_labels_of_the_cells_are_read(fit, cells):
    space = ps.spaces.Expression(3).fitted(fit, cells)
    plain = ps.embed(fit, cells, space=space)
    for other in (cells.with_batch("b"), cells.without("kind")):
        np.testing.assert_array_equal(ps.embed(fit, other, space=space), plain)


def test_many_cells_and_features_have_the_same_axes(monkeypatch, fit, cells):
    from pyro_scvi.analysis.integration import spaces

    dense = ps.spaces.Expression(3).fitted(fit, cells)
    monkeypatch.setattr(spaces, "DENSE", 5)
    leading = ps.spaces.Expression(3).fitted(fit, cells)
    np.testing.assert_allclose(leading.axes, dense.axes, atol=1e-5)
    monkeypatch.setattr(spaces, "MOST_FEATURES", 30 * cells.n_genes)
    half = ps.spaces.Expression(3).fitted(fit, cells)
    np.testing.assert_allclose(half.axes, ps.spaces.Expression(3).fitted(fit, cells.take(range(0, N, 2))).axes)
    assert half.factor == dense.factor


def test_annotate_writes_the_components_and_a_query_lies_beside_its_reference(fit, adata, cells, tmp_path):
    reference, query = adata[:40].copy(), adata[40:].copy()
    ps.annotate(reference, fit, space=ps.spaces.Expression(3))
    expected = ps.embed(fit, cells.take(range(40)), space=ps.spaces.Expression(3))
    np.testing.assert_array_equal(reference.obsm["X_pyro_scvi_expression_pca"], expected)
    reference.write_h5ad(tmp_path / "reference.h5ad")
    space = ps.spaces.from_record(anndata.read_h5ad(tmp_path / "reference.h5ad"))
    ps.annotate(query, fit, space=space)
    beside = ps.embed(fit, cells.take(range(40, N)), space=ps.spaces.Expression(3).fitted(fit, cells.take(range(40))))
    np.testing.assert_allclose(query.obsm["X_pyro_scvi_expression_pca"], beside, rtol=1e-5, atol=1e-6)


def test_a_fit_without_batches_keeps_its_axes_in_a_file(tmp_path):
    adata = AnnData(simulated_counts(), var=GENES)
    plain = ps.Cells.from_anndata(adata)
    fit = ps.fit(ps.SCVI(20, 2, n_hidden=8), plain, epochs=1, progress=False)
    ps.annotate(adata, fit, space=ps.spaces.Hidden(2))
    adata.write_h5ad(tmp_path / "a.h5ad")
    space = ps.spaces.from_record(anndata.read_h5ad(tmp_path / "a.h5ad"))
    np.testing.assert_allclose(ps.embed(fit, plain, space=space), adata.obsm["X_pyro_scvi_expression_pca"], atol=1e-6)


def test_z_alone_replaces_the_components_of_an_earlier_call(fit, adata):
    annotated = adata.copy()
    ps.annotate(annotated, fit)
    with pytest.raises(DataError, match="X_pyro_scvi_expression_pca"):
        ps.annotate(annotated, fit, space=None)
    ps.annotate(annotated, fit, space=None, overwrite=True)
    assert set(annotated.obsm) == {"X_pyro_scvi"} == set(annotated.uns["pyro_scvi"])


def test_discrete_latents_are_averaged_over():
    fit = fit_of(toy(Cluster))
    space, few = ps.spaces.Expression(2), cells_of(8)
    placed = ps.embed(fit, few, space=space.fitted(fit, few, seed=1), seed=1)
    np.testing.assert_array_equal(placed, ps.embed(fit, few, space=space, seed=1))


@pytest.mark.parametrize("guide", [ps.guides.FullRankNormal, ps.guides.InverseAutoregressiveFlow, ps.guides.PerCell])
def test_every_guide_has_the_spaces(guide):
    cells = ps.Cells.from_counts(simulated_counts()[:8])
    model = ps.SCVI(20, 2, n_hidden=8)
    options = {"n_cells": 8} if guide is ps.guides.PerCell else {}
    fit = ps.fit(model, cells, guide(model, **options), epochs=1, progress=False)
    assert np.isfinite(ps.embed(fit, cells, space=ps.spaces.Expression(2))).all()


def test_of_no_library_the_shares_still_sum_to_one(cells):
    model = ps.SCVI(20, 2, cells.n_covariates, library=ps.libraries.NoLibrary(), n_hidden=8)
    fit = ps.fit(model, cells, epochs=1, progress=False)
    shares = decoded_by_hand(fit, cells, of_shares)
    expected = components(np.sqrt(shares * np.median(cells.totals)), 2)
    found = ps.embed(fit, cells, space=ps.spaces.Expression(2))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_what_is_no_space_of_this_fit_is_refused(fit, cells):
    linear = ps.fit(
        ps.SCVI(20, 3, cells.n_covariates, decoder=ps.networks.LinearDecoder()), cells, epochs=1, progress=False
    )
    refused = {
        "the class Latent": lambda: ps.embed(fit, cells, space=ps.spaces.Latent),
        "'expression'": lambda: ps.embed(fit, cells, space="expression"),
        "components must": lambda: ps.spaces.Expression(0),
        "numbers of cells and features, 5": lambda: ps.embed(fit, cells.take(range(5)), space=ps.spaces.Expression(5)),
        "no hidden layer that": lambda: ps.embed(linear, cells, space=ps.spaces.Hidden(2)),
        "another fit": lambda: ps.embed(linear, cells, space=ps.spaces.Expression(2).fitted(fit, cells)),
    }
    for says, call in refused.items():
        with pytest.raises(ModelError, match=says):
            call()


def test_without_a_number_there_are_30_components_or_as_many_as_cells_and_genes_allow(fit, cells, monkeypatch):
    from pyro_scvi.analysis.integration import spaces

    monkeypatch.setattr(spaces, "MOST_COMPONENTS", 6)
    fitted = {n: ps.spaces.Expression().fitted(fit, cells.take(range(n))) for n in (2, 5, N)}
    assert [space.space.components for space in fitted.values()] == [1, 4, 6]
    assert [ps.embed(fit, cells, space=space).shape for space in fitted.values()] == [(N, 1), (N, 4), (N, 6)]
    expected = ps.embed(fit, cells, space=ps.spaces.Expression(6))
    np.testing.assert_array_equal(ps.embed(fit, cells, space=ps.spaces.Expression()), expected)
    monkeypatch.undo()
    assert ps.spaces.Expression().fitted(fit, cells).space == ps.spaces.Expression(cells.n_genes - 1)
    assert spaces.MOST_COMPONENTS == 30


def test_a_latent_space_has_no_components_to_annotate(fit, adata):
    with pytest.raises(ModelError, match=r"Latent has no components: pass space=None"):
        ps.annotate(adata.copy(), fit, space=ps.spaces.Latent())


def test_cells_that_are_all_alike_have_axes(fit, cells, monkeypatch):
    from pyro_scvi.analysis.integration import spaces

    monkeypatch.setattr(spaces, "DENSE", 5)
    placed = ps.embed(fit, cells.take(np.zeros(30, int)), space=ps.spaces.Expression(3))
    np.testing.assert_allclose(placed, 0, atol=1e-3)


def test_annotating_few_cells_says_what_to_pass(fit, adata):
    with pytest.raises(
        ModelError, match=r"need 2 cells and 2 features, got 1 and 20.*fitted to more cells.*space=None"
    ):
        ps.annotate(adata[:1].copy(), fit)
    with pytest.raises(ModelError, match=r"fitted to more cells.*space=None"):
        ps.annotate(adata[:5].copy(), fit, space=ps.spaces.Expression(10))
    few = adata[:5].copy()
    ps.annotate(few, fit, space=None)
    with pytest.raises(DataError, match="no axes"):
        ps.spaces.from_record(few)
    few.uns["pyro_scvi"]["X_pyro_scvi_expression_pca"] = {"pca": {"mean": [1.0]}}
    with pytest.raises(DataError, match="not as ps.annotate"):
        ps.spaces.from_record(few)


def test_cells_of_other_genes_are_refused(fit):
    with pytest.raises(SchemaError, match="genes"):
        ps.embed(fit, cells_of(8), space=ps.spaces.Expression(2))


BROKEN = {
    "mean of NaN": {"mean": np.full(20, np.nan)},
    "mean of infinity": {"mean": np.full(20, np.inf)},
    "mean of one gene": {"mean": np.ones(1)},
    "mean that is a number": {"mean": np.float64(1.0)},
    "mean that is none": {"mean": None},
    "axes of NaN": {"axes": np.full((3, 20), np.nan)},
    "axes of 1e308": {"axes": np.full((3, 20), 1e308)},
    "axes too long": {"axes": np.ones((3, 20))},
    "axes of other genes": {"axes": np.eye(3, 19)},
    "one axis without its dimension": {"axes": np.eye(20)[0]},
    "axes of three dimensions": {"axes": np.eye(20)[None]},
    "no axes": {"axes": np.ones((0, 20))},
    "complex axes": {"axes": np.eye(3, 20) + 1j},
    "axes of text": {"axes": np.eye(3, 20).astype(str)},
    "a factor of NaN": {"factor": np.nan},
    "a factor of 1e308": {"factor": 1e308},
    "a factor of text": {"factor": "x"},
    "factors": {"factor": np.ones(3)},
    "another space": {"space": "Hidden"},
    "no space": {"space": "Latents"},
    "an unknown batch": {"batches": np.array(["a", "z"], dtype=object)},
    "no batch": {"batches": np.array([], dtype=object)},
}


@pytest.fixture(scope="module")
def annotated(fit, adata):
    annotated = adata.copy()
    ps.annotate(annotated, fit, space=ps.spaces.Expression(3))
    return annotated


@pytest.mark.faults
@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_broken_axes_of_a_file_place_no_cell(fit, cells, annotated, change):
    record = annotated.uns["pyro_scvi"]["X_pyro_scvi_expression_pca"]["pca"] | change
    broken = AnnData(uns={"pyro_scvi": {"X_pyro_scvi_expression_pca": {"pca": record}}})
    with pytest.raises(DataError, match=r"as ps.annotate|with the batches|belongs to another fit"):
        ps.embed(fit, cells, space=ps.spaces.from_record(broken))


@pytest.mark.faults
@pytest.mark.parametrize("known", ["text", [1], {"X_pyro_scvi_expression_pca": "text"}])
def test_other_records_than_axes_hold_no_axes(fit, known):
    with pytest.raises(DataError, match="no axes"):
        ps.spaces.from_record(AnnData(uns={"pyro_scvi": known}))


@pytest.mark.faults
def test_batches_that_a_file_names_often_count_once(fit, cells, annotated):
    record = annotated.uns["pyro_scvi"]["X_pyro_scvi_expression_pca"]["pca"]
    often = record | {"batches": np.tile(record["batches"], 100_000)}  # each would be decoded
    space = ps.spaces.from_record(AnnData(uns={"pyro_scvi": {"X_pyro_scvi_expression_pca": {"pca": often}}}))
    np.testing.assert_array_equal(ps.embed(fit, cells, space=space), annotated.obsm["X_pyro_scvi_expression_pca"])
