"""Schema: reading annotations, and matching a query with the data that a model was fitted on."""

import json
import logging

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from pyro_scvi.data.cells import Cells, Schema
from pyro_scvi.errors import DataError, ModelError, SchemaError

COUNTS = np.random.default_rng(2).poisson(2.0, size=(24, 5)) + 1
GENES = ["CD3E", "CD19", "NKG7", "LYZ", "PPBP"]
FORMS = [pytest.param(np.asarray, id="dense"), pytest.param(sparse.csr_matrix, id="sparse")]


def make_adata(form=np.asarray, **columns):
    obs = pd.DataFrame({"run": ["a", "b", "c"] * 8, "mito": np.linspace(1, 9, 24)}, index=[f"c{i}" for i in range(24)])
    return AnnData(form(COUNTS), obs=obs.assign(**columns), var=pd.DataFrame(index=GENES))


def make_cells(**columns):
    return Cells.from_anndata(make_adata(**columns), batch="run", covariates=["mito"])


def test_json_round_trip():
    schema = make_cells().schema
    assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema
    assert (schema.n_genes, schema.n_batches, schema.n_covariates) == (5, 3, 4)


def test_foreign_dictionary_is_refused():
    values = make_cells().schema.to_dict()
    with pytest.raises(SchemaError, match="keys .*got .*'colour'"):
        Schema.from_dict(values | {"colour": "red"})
    with pytest.raises(SchemaError, match="lengths differ"):
        Schema.from_dict(values | {"means": []})
    values.pop("batch")
    with pytest.raises(SchemaError, match="keys"):
        Schema.from_dict(values)


@pytest.mark.parametrize("form", FORMS)
def test_query_genes_are_reordered_by_name(form):
    cells = make_cells()
    query = Cells.from_anndata(make_adata(form)[:, [4, 2, 0, 3, 1]], schema=cells.schema)
    for ours, theirs in zip(query[:], cells[:], strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    assert query.schema == cells.schema


@pytest.mark.parametrize("form", FORMS)
def test_bad_entry_of_a_reordered_query_is_named(form):
    counts = COUNTS.astype(float)
    counts[7, 1] = -1
    adata = AnnData(form(counts[:, ::-1]), var=pd.DataFrame(index=GENES[::-1]))
    with pytest.raises(DataError, match="cell '7', gene 'CD19' holds -1"):
        Cells.from_anndata(adata, schema=Cells.from_counts(COUNTS, gene_names=GENES).schema)


@pytest.mark.parametrize("form", FORMS)
def test_extra_genes_are_left_out_and_logged(form, caplog):
    schema = Cells.from_anndata(make_adata()[:, [3, 1]]).schema
    with caplog.at_level(logging.INFO, logger="pyro_scvi"):
        query = Cells.from_anndata(make_adata(form), schema=schema)
    np.testing.assert_array_equal(query[:][0].numpy(), COUNTS[:, [3, 1]])
    assert "3 genes of the query" in caplog.text


@pytest.mark.parametrize("form", FORMS)
def test_missing_genes_are_an_error_or_on_request_zero(form):
    cells = make_cells()
    adata = make_adata(form)[:, [3, 0, 1]].copy()
    with pytest.raises(SchemaError, match="3 of the 5 genes.*2 are missing: 'NKG7', 'PPBP'.*fill_missing_genes=True"):
        Cells.from_anndata(adata, schema=cells.schema)
    with pytest.warns(UserWarning, match="2 are filled with zeros: 'NKG7', 'PPBP'") as caught:
        query = Cells.from_anndata(adata, schema=cells.schema, fill_missing_genes=True)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(query[:][0].numpy(), COUNTS * [1, 1, 0, 1, 0])
    assert sparse.issparse(query.counts) == sparse.issparse(adata.X)
    if sparse.issparse(adata.X):
        query.counts.check_format(full_check=True)
        assert query.counts.indices.dtype == query.counts.indptr.dtype == np.int32


def test_many_missing_genes_are_counted_and_only_some_shown():
    cells = Cells.from_counts(np.ones((2, 100)), gene_names=[f"g{i}" for i in range(100)])
    with pytest.raises(SchemaError, match=r"99 are missing: 'g1', .*'g10', \.\.\. \(99 in all\)"):
        Cells.from_counts(np.ones((2, 1)), gene_names=["g0"], schema=cells.schema)


@pytest.mark.parametrize("fill", [False, True])
def test_all_other_genes_are_refused(fill):
    adata = make_adata()
    adata.var_names = [f"ENSG{i}" for i in range(5)]
    with pytest.raises(SchemaError, match="0 of the 5 genes.*like 'CD3E'.*the query's are 'ENSG0'"):
        Cells.from_anndata(adata, schema=make_cells().schema, fill_missing_genes=fill)


def test_bare_query_needs_gene_names():
    with pytest.raises(SchemaError, match="gene_names"):
        Cells.from_counts(COUNTS, schema=make_cells().schema)


def test_query_is_standardised_by_the_first_data():
    cells = make_cells()
    query = Cells.from_anndata(make_adata(mito=5.0), schema=cells.schema)  # constant, which is fine in a query
    np.testing.assert_allclose(query.covariates[:, 3], 0.0, atol=1e-6)
    query = Cells.from_anndata(make_adata(mito=5.0 + np.linspace(1, 9, 24).std()), schema=cells.schema)
    np.testing.assert_allclose(query.covariates[:, 3], 1.0, rtol=1e-6)


def test_query_reads_the_schemas_layer_unless_told():
    adata = make_adata()
    adata.layers["raw"], adata.X = adata.X, np.log1p(adata.X)
    cells = Cells.from_anndata(adata, layer="raw")
    np.testing.assert_array_equal(Cells.from_anndata(adata, schema=cells.schema)[:][0].numpy(), COUNTS)
    adata.layers["other"] = adata.layers.pop("raw")
    np.testing.assert_array_equal(Cells.from_anndata(adata, layer="other", schema=cells.schema)[:][0].numpy(), COUNTS)
    with pytest.raises(SchemaError, match="no layer 'raw'; the layers are: 'other'"):
        Cells.from_anndata(adata, schema=cells.schema)


def test_query_keeps_the_schemas_columns():
    schema = make_cells().schema
    assert Cells.from_anndata(make_adata(), batch="run", covariates=["mito"], schema=schema).schema is schema
    for wrong in ({"batch": "mito"}, {"covariates": ["run"]}):
        with pytest.raises(SchemaError, match="leave both out"):
            Cells.from_anndata(make_adata(), schema=schema, **wrong)


def test_fewer_batches_in_a_query_keep_their_columns():
    query = Cells.from_anndata(make_adata(run="b"), schema=make_cells().schema)
    np.testing.assert_array_equal(query.covariates[:, :3], np.tile([0, 1, 0], (24, 1)))


def test_unseen_batches_are_named_with_the_way_out():
    adata, schema = make_adata(run=["a", "d", "e"] * 8), make_cells().schema
    with pytest.raises(SchemaError, match=r"'run' holds 'd', 'e', .*batches are 'a', 'b', 'c'.*allow_new_batches=True"):
        Cells.from_anndata(adata, schema=schema)
    query = Cells.from_anndata(adata, schema=schema, allow_new_batches=True)
    np.testing.assert_allclose(query.covariates[:3, :3], [[1, 0, 0], [1 / 3] * 3, [1 / 3] * 3], rtol=1e-6)
    assert query.new_batches == ("d", "e")
    assert query.schema == schema
    assert "new batches: d, e" in repr(query)
    known = [query.with_batch(name) for name in schema.batches] + [query.take(range(0, 24, 3))]
    assert all(cells.new_batches == () for cells in known)
    average = np.mean([cells.covariates for cells in known[:3]], axis=0)
    np.testing.assert_allclose(average[:, :3], 1 / 3, rtol=1e-6)


def test_new_batches_are_for_queries_and_of_a_column_that_is_there():
    with pytest.raises(ModelError, match="pass schema=fit.schema"):
        Cells.from_anndata(make_adata(), batch="run", allow_new_batches=True)
    adata = make_adata(run="d")
    del adata.obs["run"]
    with pytest.raises(SchemaError, match="no column 'run'"):
        Cells.from_anndata(adata, schema=make_cells().schema, allow_new_batches=True)


def test_category_that_no_cell_of_the_query_has_is_no_error():
    run = pd.Categorical(["a"] * 24, categories=["a", "d"])
    assert Cells.from_anndata(make_adata(run=run), schema=make_cells().schema).n_batches == 3


@pytest.mark.parametrize(
    ("column", "batches"),
    [
        (["b", "a"] * 12, ("a", "b")),
        ([10, 9] * 12, ("9", "10")),
        ([10.0, 9.0] * 12, ("9", "10")),
        ([0.5, 2.0] * 12, ("0.5", "2")),
        ([True, False] * 12, ("False", "True")),
        (pd.Categorical(["b", "a"] * 12, categories=["b", "z", "a"]), ("b", "a")),
        (pd.array([2, 1] * 12, dtype="Int64"), ("1", "2")),
    ],
)
def test_batches_of_every_type(column, batches):
    cells = Cells.from_anndata(make_adata(run=column), batch="run")
    assert cells.schema.batches == batches
    named = pd.Index(batches)[cells.covariates.argmax(axis=1)]
    assert [float(name) if name[0] in "0129" else name for name in named] == [
        float(value) if not isinstance(value, str | bool | np.bool) else str(value) for value in column
    ]


@pytest.mark.parametrize("values", [["a", None, "b"] * 8, [1.0, np.nan, 2.0] * 8, pd.Categorical(["a", None, "b"] * 8)])
def test_missing_batch_is_named(values):
    with pytest.raises(DataError, match="batch column 'run' has no value for 8 cells, such as 'c1'"):
        Cells.from_anndata(make_adata(run=values), batch="run")


def test_continuous_column_is_no_batch():
    with pytest.raises(DataError, match=r"'mito' holds floats with 24 levels.*covariates=\['mito'\]"):
        Cells.from_anndata(make_adata(), batch="mito")


@pytest.mark.parametrize("kwargs", [{"batch": "lane"}, {"covariates": ["lane"]}])
def test_missing_column_lists_the_columns(kwargs):
    with pytest.raises(SchemaError, match=r"no column 'lane'; its columns are \['mito', 'run'\]"):
        Cells.from_anndata(make_adata(), **kwargs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (0.1, "'mito' is constant"),
        (0.0, "'mito' is constant"),
        ([np.nan] + [1.0, 2.0, 3.0] * 7 + [1.0, 2.0], "'mito' must be finite; 1 cells, such as 'c0'"),
        ([np.inf, 1.0] * 12, "'mito' must be finite; 12 cells"),
        (pd.array([None, 1] * 12, dtype="Int64"), "'mito' must be finite; 12 cells"),
        (["x", "y"] * 12, "'mito' must be numeric.*batch="),
        (pd.Categorical(["x", "y"] * 12), "'mito' must be numeric.*batch="),
    ],
)
def test_unusable_covariates_are_named(values, message):
    with pytest.raises(DataError, match=message):
        Cells.from_anndata(make_adata(mito=values), covariates=["mito"])


def test_covariates_may_be_small_numbers_or_flags():
    cells = Cells.from_anndata(make_adata(mito=np.linspace(1, 2, 24) * 1e-12), covariates="mito")
    assert cells.schema.covariates == ("mito",)
    np.testing.assert_allclose(cells.covariates.std(), 1.0, rtol=1e-5)
    assert Cells.from_anndata(make_adata(mito=[True, False] * 12), covariates=["mito"]).covariates[0, 0] == 1


@pytest.mark.parametrize("scale", [1e-99, 1e-90, 1e-30, 1e30, 1e90, 1e99])
@pytest.mark.parametrize("kind", [np.float64, np.longdouble])
def test_covariates_of_any_scale_are_right(scale, kind):
    values = np.linspace(-1, 2, 24) ** 3
    cells = Cells.from_anndata(make_adata(mito=(values * scale).astype(kind)), covariates=["mito"])
    np.testing.assert_allclose(cells.covariates[:, 0], (values - values.mean()) / values.std(), atol=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        *(np.linspace(-1, 2, 24) * scale for scale in (1e101, 1e200, 5e307, 1e-110, 1e-160, 1e-200, 1e-310, 5e-324)),
        np.linspace(0, 1, 24).astype(np.longdouble) * np.longdouble("1e400"),
        pd.Series([10**400 + i for i in range(24)], [f"c{i}" for i in range(24)], dtype=object),
        np.r_[np.linspace(0, 1, 23), np.inf].astype(np.float32),
        np.r_[np.linspace(0, 1, 23), -np.inf].astype(np.float16),
    ],
)
def test_covariates_beyond_numbers_are_refused(values):
    """Squares of such values overflow or underflow: the column would be a constant, or have a wrong scale."""
    with pytest.raises(DataError, match="too (large|small) to be standardised|must be finite"):
        Cells.from_anndata(make_adata(mito=values), covariates=["mito"])


def test_one_column_cannot_serve_twice():
    for kwargs in ({"covariates": ["mito", "mito"]}, {"batch": "mito", "covariates": ["mito"]}):
        with pytest.raises(ModelError, match="different columns"):
            Cells.from_anndata(make_adata(), **kwargs)


def test_doubled_column_is_refused():
    obs = pd.DataFrame([[1.0, 2.0], [2.0, 1.0]], columns=["mito", "mito"])
    with pytest.raises(DataError, match="2 columns named 'mito'"):
        Cells.from_counts(np.ones((2, 2)), obs=obs, covariates=["mito"])


def test_bare_counts_take_annotations():
    cells = Cells.from_counts(COUNTS, gene_names=GENES, obs=make_adata().obs, batch="run", covariates=["mito"])
    reference = make_cells()
    assert cells.schema == reference.schema
    np.testing.assert_array_equal(cells.covariates, reference.covariates)
    assert list(cells.cell_names) == list(reference.cell_names)
    renamed = Cells.from_counts(COUNTS, cell_names=range(24), obs=make_adata().obs)
    assert list(renamed.cell_names[:2]) == ["0", "1"]


def labelled(**columns):
    given = {"assay": ["v3", "v2"] * 12, "type": ["B", None, "T", "B"] * 6} | columns
    return make_adata(**given)


ALL = {"batch": "run", "categories": ["assay"], "covariates": ["mito"], "labels": "type"}


def test_columns_of_gamma_say_what_they_are():
    cells = Cells.from_anndata(labelled(), **ALL)
    assert cells.columns == {"run": slice(0, 3), "assay": slice(3, 5), "mito": slice(5, 6), "type": slice(6, 8)}
    assert list(cells.schema.column_names) == [
        *("run=a", "run=b", "run=c", "assay=v2", "assay=v3", "mito", "type=B", "type=T")
    ]
    gamma = cells[:][1].numpy()
    np.testing.assert_array_equal(gamma[:4, 3:5], [[0, 1], [1, 0], [0, 1], [1, 0]])
    np.testing.assert_array_equal(gamma[:4, 6:], [[1, 0], [0, 0], [0, 1], [1, 0]])
    assert (cells.n_covariates, cells.n_batches) == (8, 3)
    assert "type (B, T) of 18 cells" in repr(cells)


def test_only_labels_may_be_missing():
    cells = Cells.from_anndata(labelled(), **ALL)
    stripped = cells.without("type")
    assert not stripped[:][1][:, 6:].any()
    assert stripped.schema == cells.schema
    np.testing.assert_array_equal(stripped.covariates[:, :6], cells.covariates[:, :6])
    for name in ("run", "assay", "mito", "colour"):
        with pytest.raises(SchemaError, match="only labels may be missing"):
            cells.without(name)
    with pytest.raises(DataError, match="category column 'assay' has no value for 12 cells"):
        Cells.from_anndata(labelled(assay=["v3", None] * 12), **ALL)
    with pytest.raises(DataError, match="label column 'type' has no value for any cell"):
        Cells.from_anndata(labelled(type=[None] * 24), **ALL)


def test_a_query_is_encoded_like_the_training_cells_and_may_lack_labels():
    cells = Cells.from_anndata(labelled(), **ALL)
    saved = Schema.from_dict(json.loads(json.dumps(cells.schema.to_dict())))
    assert saved == cells.schema
    query = labelled(assay=["v3"] * 24, type=["T"] * 24)
    gamma = Cells.from_anndata(query, schema=saved)[:][1].numpy()
    np.testing.assert_array_equal(gamma[:, 3:5], np.tile([0, 1], (24, 1)))
    np.testing.assert_array_equal(gamma[:, 6:], np.tile([0, 1], (24, 1)))
    for adata in (labelled(type=[None] * 24), make_adata(assay=["v2"] * 24)):
        assert not Cells.from_anndata(adata, schema=saved)[:][1][:, 6:].any()
    with pytest.raises(SchemaError, match="'v4', which the schema does not know; its categories are 'v2', 'v3'"):
        Cells.from_anndata(labelled(assay=["v4"] * 24), schema=saved)
    with pytest.raises(SchemaError, match="'NK', which the schema does not know; its labels are 'B', 'T'.*missing"):
        Cells.from_anndata(labelled(type=["NK"] * 24), schema=saved)
    with pytest.raises(SchemaError, match="categories .'assay',. and labels 'type'"):
        Cells.from_anndata(labelled(), schema=saved, labels="assay")


def test_slips_in_categories_and_labels_are_named():
    with pytest.warns(UserWarning, match="label column 'type' holds 'Unknown'"):
        Cells.from_anndata(labelled(type=["Unknown", "T"] * 12), **ALL)
    with pytest.warns(UserWarning, match="2 of the 3 categories in column 'assay' have 1 or 2 cells"):
        Cells.from_anndata(labelled(assay=["v2"] + ["v3"] * 22 + ["v1"]), **ALL)
    for doubled in ({"labels": "run"}, {"categories": ["run"]}, {"categories": ["assay", "assay"]}):
        with pytest.raises(ModelError, match="must be different columns"):
            Cells.from_anndata(labelled(), **ALL | doubled)
    with pytest.raises(ModelError, match="categories must be names of columns"):
        Cells.from_anndata(labelled(), categories=3)


def test_schemas_without_categories_are_written_as_before():
    saved = make_cells().schema.to_dict()
    assert list(saved) == ["gene_names", "layer", "batch", "batches", "covariates", "means", "sds"]


def test_the_order_of_categories_is_known():
    def ordered(column):
        return Cells.from_anndata(labelled(assay=column), **ALL).schema.ordered

    days = ["day 2", "day 10"] * 12
    assert ordered(days) == ordered(pd.Categorical(days)) == ()
    assert ordered(pd.Categorical(days, ["day 2", "day 10"], ordered=True)) == ("assay",)
    assert ordered([2, 10] * 12) == ("assay",)
    assert ordered(pd.Categorical([2, 10] * 12, [10, 2])) == ()


def test_the_order_of_labels_is_known():
    def ordered(column):
        return Cells.from_anndata(labelled(type=column), **ALL).schema.ordered

    days = ["day 2", "day 10", None] * 8
    assert ordered(days) == ()
    assert ordered(pd.Categorical(days, ["day 2", "day 10"], ordered=True)) == ("type",)
    assert ordered([2.0, 10.0, np.nan] * 8) == ("type",)
