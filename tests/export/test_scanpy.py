"""What is written into an AnnData: the verbs' own numbers in the right places, and nothing that was there is lost."""

import itertools
import json
import re
import signal
import warnings

import anndata
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

import pyro_scvi as ps
from pyro_scvi.data.reading import layer_names
from pyro_scvi.errors import DataError, ModelError, SchemaError
from pyro_scvi.export import records, scanpy
from tests.support.cli_runs import make_adata
from tests.support.faults import failing, interrupts_raise

EXPRESSION, TECHNICAL = "pyro_scvi_expression", "pyro_scvi_technical_zero"
REFINED = ps.Refined(steps=3)


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
    assert layer_names(adata) == ["raw"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    found = anndata.read_h5ad(tmp_path / "a.h5ad").uns["pyro_scvi"]["X_pyro_scvi"]
    assert found["version"] == ps.__version__
    assert found["layer"] == "raw"
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


def test_a_layer_of_an_earlier_call_keeps_its_own_provenance(fit, adata, tmp_path):
    cells = ps.Cells.from_anndata(make_adata(), layer="raw", batch="donor")
    other = ps.fit(ps.SCVI(cells.n_genes, 3, cells.n_covariates, likelihood=ps.likelihoods.NB()), cells, epochs=1)
    ps.annotate(adata, fit, expression=True, technical_zeros=True, samples=2, sampler=REFINED, seed=1)
    first = adata.copy()
    ps.annotate(adata, other, expression=True, seed=9, overwrite=True)
    found = adata.uns["pyro_scvi"]
    assert set(found) == {"X_pyro_scvi", "X_pyro_scvi_expression_pca", EXPRESSION, TECHNICAL}
    np.testing.assert_array_equal(adata.layers[TECHNICAL], first.layers[TECHNICAL])
    assert found[TECHNICAL] == first.uns["pyro_scvi"][TECHNICAL]
    assert [found[TECHNICAL][name] for name in ("seed", "samples", "sampler")] == [1, 2, repr(REFINED)]
    assert found[TECHNICAL]["model"] == repr(fit.model)
    assert [found[EXPRESSION][name] for name in ("seed", "samples", "model")] == [9, 25, repr(other.model)]
    assert found["X_pyro_scvi"]["model"] == repr(other.model)
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert anndata.read_h5ad(tmp_path / "a.h5ad").uns["pyro_scvi"][TECHNICAL]["seed"] == 1
    del adata.layers[TECHNICAL]
    ps.annotate(adata, other, overwrite=True)
    assert set(adata.uns["pyro_scvi"]) == {"X_pyro_scvi", "X_pyro_scvi_expression_pca", EXPRESSION}


def test_counts_that_were_kept_in_a_layer_are_annotated_after_normalisation():
    """The usual order with scanpy: fit on X, then normalise X."""
    adata = make_adata()
    cells = ps.Cells.from_anndata(adata)
    fit = ps.fit(ps.SCVI(cells.n_genes, 2), cells, epochs=1, progress=False)
    adata.X = np.log1p(adata.X.toarray())
    with pytest.raises(DataError, match=r"Pass layer= with raw counts \(layers: 'raw'\)"):
        ps.annotate(adata, fit)
    ps.annotate(adata, fit, layer="raw", expression=True, seed=2)
    np.testing.assert_array_equal(adata.obsm["X_pyro_scvi"], ps.embed(fit, cells, seed=2))
    assert adata.uns["pyro_scvi"][EXPRESSION]["layer"] == "raw"
    with pytest.raises(SchemaError, match="no layer 'counts'; the layers are: .*'raw'"):
        ps.annotate(adata, fit, layer="counts", overwrite=True)


def test_counts_that_are_in_raw_alone_are_pointed_to():
    adata = make_adata()
    del adata.layers["raw"]
    fit = ps.fit(ps.SCVI(20, 2), ps.Cells.from_anndata(adata), epochs=1, progress=False)
    adata.raw = adata.copy()
    adata.X = np.log1p(adata.X.toarray())
    with pytest.raises(DataError, match=r"layers: none\).*adata\.raw.* pass adata\.raw\.to_adata\(\)"):
        ps.annotate(adata, fit)
    ps.annotate(adata.raw.to_adata(), fit)
    adata.raw = None
    with pytest.raises(DataError) as caught:
        ps.annotate(adata, fit)
    assert "adata.raw" not in str(caught.value)


def test_counts_that_raw_kept_are_annotated_with_raw():
    adata = make_adata()
    adata.X = adata.layers["raw"].copy()
    cells = ps.Cells.from_anndata(adata)
    fit = ps.fit(ps.SCVI(cells.n_genes, 3), cells, epochs=1, progress=False)
    later = adata.copy()
    later.raw = later.copy()
    later.X = np.log1p(later.X.toarray())
    with pytest.raises(ModelError, match="not both"):
        ps.annotate(later, fit, layer="raw", raw=True)
    ps.annotate(later, fit, raw=True)
    np.testing.assert_array_equal(later.obsm["X_pyro_scvi"], ps.embed(fit, cells))
    assert later.uns["pyro_scvi"]["X_pyro_scvi"]["layer"] == "raw.X"


def test_values_that_are_no_integers_are_annotated_if_the_fit_was_made_of_such():
    adata = make_adata()
    adata.X = np.log1p(adata.X.toarray())
    cells = ps.Cells.from_anndata(adata, allow_non_integer=True)
    fit = ps.fit(ps.SCVI(cells.n_genes, 2), cells, epochs=1, progress=False)
    with pytest.raises(DataError, match="pass allow_non_integer=True"):
        ps.annotate(adata, fit)
    ps.annotate(adata, fit, allow_non_integer=True)
    np.testing.assert_array_equal(adata.obsm["X_pyro_scvi"], ps.embed(fit, cells))


def test_sampler_and_batch_size_are_those_of_impute(fit, adata):
    options = {"samples": 3, "sampler": REFINED, "seed": 4, "batch_size": 7}
    ps.annotate(adata, fit, expression=True, technical_zeros=True, **options)
    cells = ps.Cells.from_anndata(adata, schema=fit.schema)
    expected = {
        EXPRESSION: ps.impute(fit, cells, **options),
        TECHNICAL: ps.technical_zero_probability(fit, cells, **options),
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(adata.to_df(layer=name)[cells.gene_names], values)
    for left_out in ("sampler", "batch_size"):
        other = ps.impute(fit, cells, **{name: value for name, value in options.items() if name != left_out})
        assert not np.array_equal(expected[EXPRESSION], other), left_out


WRONG = {
    "swapped": (lambda adata, fit: ps.annotate(fit, adata), DataError, r"annotate\(adata, fit\) takes .*got Fit"),
    "cells": (lambda adata, fit: ps.annotate(ps.Cells.from_anndata(adata, layer="raw"), fit), DataError, "got Cells"),
    "a model": (lambda adata, fit: ps.annotate(adata, fit.model), ModelError, "expected the Fit .*got SCVI"),
    "a view": (lambda adata, fit: ps.annotate(adata[:5], fit), DataError, "view.*copy"),
    "no samples": (
        lambda adata, fit: ps.annotate(adata, fit, samples=0),
        ModelError,
        "samples must .*1 or more, got 0",
    ),
    "no batch": (lambda adata, fit: ps.annotate(adata, fit, batch_size=0), ModelError, "batch_size must"),
    "a seed": (lambda adata, fit: ps.annotate(adata, fit, seed=-1), ModelError, "seed must"),
    "a sampler": (lambda adata, fit: ps.annotate(adata, fit, sampler=ps.HMC), ModelError, "sampler must .*class HMC"),
    "a layer": (lambda adata, fit: ps.annotate(adata, fit, layer=["raw"]), ModelError, "name of a layer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_annotate_refuses_what_it_cannot_take_and_writes_nothing(fit, adata, name):
    call, error, says = WRONG[name]
    with pytest.raises(error, match=says):  # and no warning, as anndata gives when it writes into a view
        call(adata, fit)
    assert not [key for slot in (adata.obsm, adata.uns, layer_names(adata)) for key in slot if "pyro_scvi" in key]


def test_genes_that_are_missing_may_be_filled(fit, adata):
    few = adata[:, 3:].copy()
    with pytest.warns(UserWarning, match="3 are filled") as caught:
        ps.annotate(few, fit, expression=True, fill_missing_genes=True, samples=2)
    assert {warning.filename for warning in caught} == {__file__}
    assert few.to_df(layer=EXPRESSION).drop(columns="new").notna().all(axis=None)


def test_scanpy_finds_the_ranked_genes():
    scanpy = pytest.importorskip("scanpy")
    adata = make_adata()
    cells = ps.Cells.from_anndata(adata, layer="raw")
    fit = ps.fit(ps.SCVI(cells.n_genes, 2), cells, epochs=60, progress=False)
    pairs = ps.differential.RandomPairs(largest_se=0.05)
    table = ps.differential_expression(fit, cells, groupby="bulk_labels", estimand=pairs)
    ps.add_rank_genes_groups(adata, table, "bulk_labels")
    for group in adata.obs["bulk_labels"].cat.categories:
        found = scanpy.get.rank_genes_groups_df(adata, group=group).set_index("names")
        ours = table.loc[group].loc[found.index]
        assert found.scores.is_monotonic_decreasing
        np.testing.assert_allclose(found.scores, -ours.log_bayes_factor)
        np.testing.assert_allclose(found.logfoldchanges, ours.lfc)
        np.testing.assert_allclose(found.pvals, np.maximum(1 - ours.p_lfc, half_of_the_least(ours.p_lfc)))
        np.testing.assert_allclose(
            found.pvals_adj, np.maximum(ours.expected_false_share, half_of_the_least(ours.p_lfc))
        )
    # A gene that is higher in the group than in the rest has positive score and fold change.
    group = "Dendritic"
    found = scanpy.get.rank_genes_groups_df(adata, group=group).set_index("names")
    ours = table.loc[group].loc[found.index]
    rate = np.log2(ours.mean_a / ours.mean_a.sum()) - np.log2(ours.mean_b / ours.mean_b.sum())
    assert np.corrcoef(found.logfoldchanges, rate)[0, 1] > 0.5


def test_scanpy_finds_the_tests_of_group_means():
    """z, p and q of GroupMeans; genes that were not tested come last but for those lower in the group, with p = 1."""
    scanpy = pytest.importorskip("scanpy")
    adata = make_adata()
    cells = ps.Cells.from_anndata(adata, layer="raw")
    fit = ps.fit(ps.SCVI(cells.n_genes, 2), cells, epochs=2, progress=False)
    means = ps.differential.GroupMeans(min_molecules=cells.counts.sum(0)[3] + 1)
    table = ps.differential_expression(fit, cells, groupby="bulk_labels", estimand=means)
    ps.add_rank_genes_groups(adata, table, "bulk_labels")
    assert not table.tested.all()
    for group in adata.obs["bulk_labels"].cat.categories:
        found = scanpy.get.rank_genes_groups_df(adata, group=group).set_index("names")
        ours = table.loc[group].loc[found.index]
        assert found.scores.is_monotonic_decreasing
        np.testing.assert_allclose(found.scores[ours.tested], ours.z[ours.tested])
        np.testing.assert_allclose(found.logfoldchanges[ours.tested], ours.lfc[ours.tested])
        np.testing.assert_allclose(found.pvals_adj[ours.tested], ours.q_value[ours.tested])
        assert (found.pvals[~ours.tested] == 1).all()
        assert (found.scores[~ours.tested] == 0).all()


def half_of_the_least(p):
    """Half of the least distance from 0 or 1 that is above 0, or of one thousandth."""
    return min([x for x in (*p, *(1 - p)) if x > 0] + [0.001]) / 2


def table_of(adata, p_lfc):
    """A table of every kind against the rest: all genes have these probabilities, and a false share of 0 at 1."""
    index = pd.MultiIndex.from_product([adata.obs["bulk_labels"].cat.categories, adata.var_names], names=LEVELS)
    p = np.resize(p_lfc, len(index))
    odds = np.linspace(-3, 3, len(index))
    columns = {"log_bayes_factor": odds, "lfc": -odds, "p_lfc": p, "expected_false_share": (1 - p) / 4}
    return pd.DataFrame(columns, index=index)


LEVELS = ["group", "gene"]


@pytest.mark.parametrize(("others", "least"), [((0.5, 0.9), 0.0005), ((0.5, 0.9998), 0.0001), ((0.0001, 0.5), 0.00005)])
def test_rates_of_zero_are_written_as_half_of_what_the_pairs_resolve(others, least):
    adata = make_adata()
    table = table_of(adata, [1.0, *others, 0.0])
    ps.add_rank_genes_groups(adata, table, "bulk_labels")
    names = adata.uns["rank_genes_groups"]["names"]
    for group in names.dtype.names:
        ours = table.loc[group].loc[names[group]]
        for name, expected in (("pvals", 1 - ours.p_lfc), ("pvals_adj", ours.expected_false_share)):
            found = adata.uns["rank_genes_groups"][name][group]
            assert found.min() == pytest.approx(least)
            large = (expected > least).to_numpy()
            np.testing.assert_array_equal(found[large], expected[large])


def test_scanpy_colours_dots_by_the_logarithm_of_the_rates():
    scanpy = pytest.importorskip("scanpy")
    mpl.use("Agg")
    adata = make_adata()
    adata.X = adata.X.astype(np.float32)
    ps.add_rank_genes_groups(adata, table_of(adata, [1.0, 0.5, 0.9]), "bulk_labels")
    options = {"values_to_plot": "log10_pvals_adj", "dendrogram": False, "return_fig": True, "n_genes": 5}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # of scanpy's own calls
        warnings.filterwarnings("error", category=RuntimeWarning)
        plot = scanpy.pl.rank_genes_groups_dotplot(adata, **options)
    assert np.isfinite(plot.dot_color_df.to_numpy()).all()
    assert plot.dot_color_df.to_numpy().max() == pytest.approx(-np.log10(0.0005))


WRONG_TABLES = {
    "a dict": (lambda adata, table: (adata, dict(table), "bulk_labels"), "must be the DataFrame .*got dict"),
    "a fit": (lambda adata, table: (None, table, "bulk_labels"), "takes an AnnData first, got NoneType"),
    "a view": (lambda adata, table: (adata[:50], table, "bulk_labels"), "view.*copy"),
    "another column": (lambda adata, table: (adata, table, "donor"), r"groups of the table, '<i>NK</i>', .*'a', 'b'"),
    "no column": (lambda adata, table: (adata, table, ["bulk_labels"]), "no column"),
    "fewer groups": (
        lambda adata, table: (adata, table.loc[["Dendritic"]], "bulk_labels"),
        "are not those of adata.obs",
    ),
    "other genes": (
        lambda adata, table: (adata[:, 2:].copy(), table, "bulk_labels"),
        "2 genes of the table are not in adata.var_names: 'g0', 'g1'",
    ),
    "called genes": (lambda adata, table: (adata, table.iloc[1:], "bulk_labels"), "every gene once for each group"),
    "genes twice": (
        lambda adata, table: (adata, pd.concat([table, table.iloc[:3]]), "bulk_labels"),
        "every gene once for each group",
    ),
    "no rows": (lambda adata, table: (adata, table.iloc[:0], "bulk_labels"), "every gene once for each group"),
    "no rates": (
        lambda adata, table: (adata, table.drop(columns="expected_false_share"), "bulk_labels"),
        r"columns \['expected_false_share'\] are missing",
    ),
}


@pytest.mark.parametrize("name", WRONG_TABLES)
def test_ranked_genes_refuse_what_does_not_match_and_write_nothing(name):
    arguments, says = WRONG_TABLES[name]
    adata = make_adata()
    given, *others = arguments(adata, table_of(adata, [0.5, 0.9]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # anndata warns when it writes into a view
        with pytest.raises(DataError, match=says):
            ps.add_rank_genes_groups(given, *others)
    assert "rank_genes_groups" not in adata.uns


def test_ranked_genes_may_be_some_of_those_that_adata_has():
    adata = make_adata()
    ps.add_rank_genes_groups(adata, table_of(adata[:, :7], [0.5, 0.9]), "bulk_labels")
    assert len(adata.uns["rank_genes_groups"]["names"]) == 7


def test_ranked_genes_refuse_a_pair_a_wrong_column_and_a_taken_key(fit):
    adata = make_adata()
    cells = ps.Cells.from_anndata(adata, schema=fit.schema)
    options = {"groupby": "bulk_labels"}
    pair = ps.differential_expression(fit, cells, group_a="CD19+ B", group_b="Dendritic", **options)
    with pytest.raises(DataError, match="every group in turn"):
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


def with_groups(names):
    """An AnnData with a table of these groups, and the table's rows."""
    adata = anndata.AnnData(np.ones((len(names), 2), np.float32), pd.DataFrame({"kind": names}, index=[*names]))
    index = pd.MultiIndex.from_product([names, adata.var_names], names=["group", "gene"])
    columns = ("log_bayes_factor", "lfc", "p_lfc", "expected_false_share")
    table = pd.DataFrame({name: np.linspace(0.1, 0.9, len(index)) for name in columns}, index=index)
    ps.add_rank_genes_groups(adata, table, "kind")
    return adata


MARKED = ("B: naive?", "CD4/CD8 T", "::", "β:1", "a;b [c].d")


@pytest.mark.filterwarnings("ignore")  # of anndata and zarr, on formats to come
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_groups_of_any_name_are_written_and_read(zarr_format, tmp_path):
    adata = with_groups(MARKED)
    expected = adata.uns["rank_genes_groups"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    with anndata.settings.override(zarr_write_format=zarr_format):
        adata[1:].copy().write_zarr(tmp_path / "a.zarr")
        from_file = anndata.read_h5ad(tmp_path / "a.h5ad")
        anndata.io.write_zarr(tmp_path / "b.zarr", from_file, compressor=None)
    for found in (from_file, *(anndata.read_zarr(tmp_path / f"{name}.zarr") for name in "ab")):
        table = found.uns["rank_genes_groups"]
        assert table["names"].dtype.names == MARKED
        for name, group in itertools.product(("names", "scores", "logfoldchanges", "pvals", "pvals_adj"), MARKED):
            np.testing.assert_array_equal(table[name][group], expected[name][group])


def test_names_of_groups_that_zarr_cannot_write_are_told(monkeypatch):
    """Of an anndata that takes no writers of other packages."""
    monkeypatch.setattr(records, "WRITERS", None)
    with pytest.warns(UserWarning, match=re.escape("':' in their names ('B: naive?')")):
        adata = with_groups(("B: naive?", "T"))
    assert adata.uns["rank_genes_groups"]["names"].dtype.names == ("B: naive?", "T")


def test_scanpy_reads_marked_groups():
    scanpy = pytest.importorskip("scanpy")
    names = MARKED[:2]
    found = scanpy.get.rank_genes_groups_df(with_groups(names).copy(), group=list(names))
    assert list(found.group.unique()) == list(names)
    assert set(found.names) == {*"01"}


@pytest.mark.parametrize("verb", ["expression", "technical_zeros"])
def test_genes_that_only_raw_has_are_told(verb):
    """Counts of all genes in raw, and X of the variable ones."""
    whole = make_adata()
    whole.X = whole.layers["raw"].copy()
    cells = ps.Cells.from_anndata(whole, batch="donor")
    fit = ps.fit(ps.SCVI(cells.n_genes, 2, 2), cells, epochs=1, progress=False)
    adata = whole[:, 3:].copy()
    adata.raw = whole
    with pytest.warns(UserWarning, match=rf"3 of the {cells.n_genes} genes of the fit are in adata.raw only.*to_adata"):
        ps.annotate(adata, fit, raw=True, samples=1, **{verb: True})
    ps.annotate(adata, fit, raw=True, overwrite=True)  # an embedding loses none


@pytest.mark.faults
def test_an_interrupt_while_results_are_written_waits_until_all_are(fit, adata, monkeypatch):
    monkeypatch.setattr(scanpy, "_kept", lambda adata: signal.raise_signal(signal.SIGINT) or {})
    with interrupts_raise(), pytest.raises(KeyboardInterrupt):
        ps.annotate(adata, fit, expression=True, samples=1)
    assert set(adata.uns["pyro_scvi"]) == {*adata.obsm, *adata.layers} - {"raw"}
    assert set(adata.obsm) == {"X_pyro_scvi", "X_pyro_scvi_expression_pca"}


@pytest.mark.faults
def test_without_memory_for_a_layer_nothing_is_written(fit, adata):
    with failing(scanpy, "in_genes_of", MemoryError()), pytest.raises(MemoryError):
        ps.annotate(adata, fit, expression=True, samples=1)
    assert (list(adata.obsm), list(adata.layers), list(adata.uns)) == ([], ["raw"], [])
