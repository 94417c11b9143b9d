"""What is written into an AnnData: the verbs' own numbers in the right places, and nothing that was there is lost."""

import json

import anndata
import numpy as np
import pytest
from cli_runs import make_adata

import pyro_scvi as ps
from pyro_scvi.errors import DataError

EXPRESSION, TECHNICAL = "pyro_scvi_expression", "pyro_scvi_technical_zero"


@pytest.fixture(scope="module")
def fit():
    cells = ps.Cells.from_anndata(make_adata(), layer="raw", batch="donor")
    return ps.fit(ps.SCVI(cells.n_genes, 4, cells.n_covariates), cells, epochs=3, progress=False)


@pytest.fixture
def adata():
    """Other cells than the fit's, genes reversed, one that it does not know, and logarithms in X."""
    adata = make_adata()[10:40, ::-1].copy()
    more = adata[:, :1].copy()
    more.var_names = ["new"]
    adata = anndata.concat([adata, more], axis=1, merge="same")
    adata.X = np.log1p(adata.X.toarray())
    return adata


def test_annotate_writes_what_the_verbs_say(fit, adata):
    x, raw = adata.X.copy(), adata.layers["raw"].copy()
    ps.annotate(adata, fit, expression=True, technical_zeros=True, samples=4, seed=3)
    cells = ps.Cells.from_anndata(adata, schema=fit.schema)
    np.testing.assert_array_equal(adata.obsm["X_pyro_scvi"], ps.embed(fit, cells, seed=3))
    expected = {
        EXPRESSION: ps.impute(fit, cells, samples=4, seed=3),
        TECHNICAL: ps.technical_zero_probability(fit, cells, samples=4, seed=3),
    }
    for name, values in expected.items():
        layer = adata.to_df(layer=name)
        np.testing.assert_array_equal(layer[cells.gene_names], values)
        assert layer["new"].isna().all()
    np.testing.assert_array_equal(adata.X, x)
    assert (adata.layers["raw"] != raw).nnz == 0


def test_provenance_survives_a_file(fit, adata, tmp_path):
    ps.annotate(adata, fit, seed=5)
    assert set(adata.layers) == {"raw"}
    adata.write_h5ad(tmp_path / "a.h5ad")
    found = anndata.read_h5ad(tmp_path / "a.h5ad").uns["pyro_scvi"]
    assert found["version"] == ps.__version__
    assert found["seed"] == 5
    assert found["seconds"] > 0
    assert json.loads(found["schema"]) == fit.schema.to_dict()
    assert json.loads(found["settings"])["n_cells"] == fit.settings["n_cells"]


@pytest.mark.parametrize("name", ["X_pyro_scvi", "pyro_scvi", EXPRESSION])
def test_annotate_never_overwrites_without_being_told(fit, adata, name):
    ps.annotate(adata, fit, expression=True, samples=2)
    for slot in (adata.obsm, adata.uns, adata.layers):
        for key in ("X_pyro_scvi", "pyro_scvi", EXPRESSION):
            if key in slot and key != name:
                del slot[key]
    before = {slot: set(getattr(adata, slot)) for slot in ("obsm", "uns", "layers")}
    with pytest.raises(DataError, match=f"'{name}'.*overwrite=True"):
        ps.annotate(adata, fit, expression=True, samples=2)
    assert before == {slot: set(getattr(adata, slot)) for slot in ("obsm", "uns", "layers")}
    ps.annotate(adata, fit, expression=True, samples=2, overwrite=True)


def test_annotate_refuses_a_view(fit, adata):
    with pytest.raises(DataError, match="view.*copy"):
        ps.annotate(adata[:5], fit)


def test_genes_that_are_missing_may_be_filled(fit, adata):
    few = adata[:, 3:].copy()
    with pytest.warns(UserWarning, match="3 are filled"):
        ps.annotate(few, fit, expression=True, fill_missing_genes=True, samples=2)
    assert few.to_df(layer=EXPRESSION).drop(columns="new").notna().all(axis=None)


def test_scanpy_finds_the_ranked_genes():
    scanpy = pytest.importorskip("scanpy")
    adata = make_adata()
    cells = ps.Cells.from_anndata(adata, layer="raw")
    fit = ps.fit(ps.SCVI(cells.n_genes, 2), cells, epochs=60, progress=False)
    table = ps.differential_expression(fit, cells, groupby="bulk_labels", largest_se=0.05)
    ps.add_rank_genes_groups(adata, table, "bulk_labels")
    for group in adata.obs["bulk_labels"].cat.categories:
        found = scanpy.get.rank_genes_groups_df(adata, group=group).set_index("names")
        ours = table.loc[group].loc[found.index]
        assert found.scores.is_monotonic_decreasing
        np.testing.assert_allclose(found.scores, -ours.log_bayes_factor)
        np.testing.assert_allclose(found.logfoldchanges, -ours.lfc_mean)
        np.testing.assert_allclose(found.pvals, 1 - ours.p_lfc)
        np.testing.assert_allclose(found.pvals_adj, ours.fdr)
    # A gene that is higher in the group than in the rest has positive score and fold change.
    group = "Dendritic"
    found = scanpy.get.rank_genes_groups_df(adata, group=group).set_index("names")
    ours = table.loc[group].loc[found.index]
    rate = np.log2(ours.mean_a / ours.mean_a.sum()) - np.log2(ours.mean_b / ours.mean_b.sum())
    assert np.corrcoef(found.logfoldchanges, rate)[0, 1] > 0.5


def test_ranked_genes_refuse_a_pair_a_wrong_column_and_a_taken_key(fit):
    adata = make_adata()
    cells = ps.Cells.from_anndata(adata, schema=fit.schema)
    options = {"groupby": "bulk_labels", "largest_se": 0.1}
    pair = ps.differential_expression(fit, cells, group_a="CD19+ B", group_b="Dendritic", **options)
    with pytest.raises(DataError, match="every group against the rest"):
        ps.add_rank_genes_groups(adata, pair, "bulk_labels")
    table = ps.differential_expression(fit, cells, **options)
    with pytest.raises(DataError, match="no column 'cluster'"):
        ps.add_rank_genes_groups(adata, table, "cluster")
    adata.uns["rank_genes_groups"] = {"mine": 1}
    with pytest.raises(DataError, match="already.*overwrite"):
        ps.add_rank_genes_groups(adata, table, "bulk_labels")
    assert adata.uns["rank_genes_groups"] == {"mine": 1}
    ps.add_rank_genes_groups(adata, table, "bulk_labels", overwrite=True)
    assert "names" in adata.uns["rank_genes_groups"]
