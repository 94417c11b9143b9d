"""Every usual place of counts has a door: raw, layers, files, lazily read data; and what is none says where it is."""

import json
import warnings
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

import pyro_scvi as ps
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.count_checks import FEATURE_TYPES
from pyro_scvi.data.stores import build
from pyro_scvi.errors import DataError, ModelError, SchemaError

COUNTS = np.random.default_rng(0).poisson(3.0, (20, 6)) + 1
ALL_GENES, SOME = list("abcdef"), [4, 0, 2]


def make_adata(counts=COUNTS, form=sparse.csr_matrix, **columns):
    """Counts of all genes in raw, logarithms of three of them in X, as scanpy's tutorials leave them."""
    obs = pd.DataFrame({"kind": ["a", "b"] * 10}, index=[f"c{i}" for i in range(20)])
    var = pd.DataFrame(columns, index=ALL_GENES)
    adata = AnnData(form(counts.astype(np.float32)), obs=obs, var=var)
    some = adata[:, SOME].copy()
    some.X = np.log1p(counts[:, SOME])
    some.raw = adata
    return some


def dense(cells):
    return cells[:][0].numpy()


# --- raw ---


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize("way", ["memory", "view", "file", "view of a file", "in place"])
def test_counts_of_raw(tmp_path, form, way):
    adata = make_adata(form=form)
    if way in ("file", "view of a file", "in place"):
        adata.write_h5ad(tmp_path / "cells.h5ad")
        adata = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    if form is sparse.csc_matrix and way in ("in place", "view of a file"):
        adata = make_adata(form=form)
        way = "memory"
    adata = adata[:] if way.startswith("view") else adata
    cells = Cells.from_anndata(adata, raw=True, batch="kind", backed=way == "in place")
    np.testing.assert_array_equal(dense(cells), COUNTS)
    assert list(cells.gene_names) == ALL_GENES
    assert cells.schema.raw
    if adata.isbacked:
        adata.file.close()


def test_a_query_is_read_from_raw_too_unless_told(tmp_path):
    adata = make_adata()
    schema = Cells.from_anndata(adata, raw=True).schema
    assert "raw" in repr(schema)
    np.testing.assert_array_equal(dense(Cells.from_anndata(adata, schema=schema)), COUNTS)
    whole = adata.raw.to_adata()
    with pytest.raises(SchemaError, match=r"no adata\.raw to read.*adata\.raw = adata"):
        Cells.from_anndata(whole, schema=schema)
    whole.layers["counts"], whole.X = whole.X, np.log1p(COUNTS)
    np.testing.assert_array_equal(dense(Cells.from_anndata(whole, layer="counts", schema=schema)), COUNTS)


def test_a_schema_remembers_raw_and_older_ones_have_none():
    schema = Cells.from_anndata(make_adata(), raw=True).schema
    assert ps.Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema
    plain = Cells.from_counts(COUNTS).schema
    assert "raw" not in plain.to_dict()
    assert ps.Schema.from_dict(plain.to_dict()) == plain


def test_places_that_exclude_each_other():
    adata = make_adata()
    adata.layers["counts"] = adata.X.copy()
    with pytest.raises(ModelError, match="layer= or raw=True, not both"):
        Cells.from_anndata(adata, layer="counts", raw=True)
    with pytest.raises(ModelError, match="raw must be True or False, got 'X'"):
        Cells.from_anndata(adata, raw="X")
    with pytest.raises(DataError, match=r"its raw; pass the AnnData itself with raw=True"):
        Cells.from_anndata(adata.raw)


def test_messages_point_to_raw_where_there_is_one(tmp_path):
    adata = make_adata()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    ways = (lambda: Cells.from_anndata(adata), lambda: build(tmp_path / "cells.h5ad", tmp_path / "s", progress=False))
    for way in ways:
        with pytest.raises(DataError, match=r"layers: none\)\. There is adata\.raw, too: .* pass raw=True"):
            way()
    adata.raw = adata
    with pytest.raises(DataError) as caught:
        Cells.from_anndata(adata, raw=True)
    assert "raw.X must hold" in str(caught.value)
    assert "There is adata.raw" not in str(caught.value)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_a_store_of_raw(tmp_path, form):
    make_adata(form=form).write_h5ad(tmp_path / "cells.h5ad")
    store = build(tmp_path / "cells.h5ad", tmp_path / "store", raw=True, progress=False)
    assert build(tmp_path / "cells.h5ad", store, raw=True, progress=False) == store  # built already
    cells = Cells.from_store(store)
    np.testing.assert_array_equal(dense(cells), COUNTS)
    assert list(cells.gene_names) == ALL_GENES
    np.testing.assert_array_equal(dense(Cells.from_anndata(make_adata(), schema=cells.schema)), COUNTS)


def test_a_store_of_a_file_without_raw(tmp_path):
    make_adata().raw.to_adata().write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(SchemaError, match=r"cells\.h5ad has no raw\.X; its layers are: none"):
        build(tmp_path / "cells.h5ad", tmp_path / "store", raw=True, progress=False)


# --- data that are read lazily ---


class Chunks:
    """Stands in for a dask array of chunks: what this package asks of one, for where dask is not installed.

    ``test_arrays_of_dask_itself`` and ``test_lazily_read_files`` read dask's own arrays, and skip without it.
    """

    def __init__(self, rows):
        self.rows = rows
        height, width = (sum(part.shape[0] for part, *_ in rows), sum(part.shape[1] for part in rows[0]))
        self.shape, self.dtype, self.ndim = (height, width), rows[0][0].dtype, 2
        self.numblocks = (len(rows), len(rows[0]))

    @property
    def blocks(self):
        return {(i, j): Chunks([[part]]) for i, row in enumerate(self.rows) for j, part in enumerate(row)}

    def compute(self):
        ((part,),) = self.rows
        return part


def chunks_of(form, dtype=np.float32):
    return Chunks([[form(COUNTS[a:b, c:d].astype(dtype)) for c, d in ((0, 4), (4, 6))] for a, b in ((0, 7), (7, 20))])


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csr_array, sparse.csc_matrix])
def test_chunks_are_read_whatever_they_are_made_of(form):
    cells = Cells.from_counts(chunks_of(form))
    np.testing.assert_array_equal(dense(cells), COUNTS)
    assert sparse.issparse(cells.counts) == (form is not np.asarray)


def test_entries_at_one_place_of_a_chunk_are_added_up_in_a_wide_type():
    chunk = sparse.csr_matrix((np.full(25, 200, np.uint8), np.zeros(25, int), [0, 25]), shape=(1, 1))
    other = sparse.csr_matrix(np.ones((1, 1), np.uint8))
    np.testing.assert_array_equal(dense(Cells.from_counts(Chunks([[chunk, other]]))), [[5000, 1]])


def test_a_chunk_that_is_broken_is_refused():
    chunk = sparse.csr_matrix(COUNTS)
    chunk.indptr = np.append(chunk.indptr[:1] + 1, chunk.indptr[1:]).astype(np.int32)
    with pytest.raises(DataError, match="broken sparse matrix"):
        Cells.from_counts(Chunks([[chunk]]))


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csr_array, sparse.csc_matrix])
def test_arrays_of_dask_itself(form):
    da = pytest.importorskip("dask.array", reason="dask, an optional package, is not installed")
    rows = [da.from_array(COUNTS[a:b].astype(np.float32), chunks=(b - a, 6)) for a, b in ((0, 7), (7, 20))]
    cells = Cells.from_counts(da.concatenate(rows).map_blocks(form))
    np.testing.assert_array_equal(dense(cells), COUNTS)


def test_lazily_read_files(tmp_path):
    pytest.importorskip("dask", reason="dask, an optional package, is not installed")
    from anndata.experimental import read_lazy

    adata = make_adata()
    adata.layers["counts"] = sparse.csr_matrix(COUNTS[:, SOME].astype(np.float32))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    lazy = read_lazy(tmp_path / "cells.h5ad")
    for backed in (False, True):
        np.testing.assert_array_equal(dense(Cells.from_anndata(lazy, raw=True, batch="kind", backed=backed)), COUNTS)
    cells = Cells.from_anndata(lazy, layer="counts", batch="kind", backed=True)
    np.testing.assert_array_equal(dense(cells), COUNTS[:, SOME])


# --- what is several data sets, or more than genes ---


def test_a_collection_is_read_in_place_and_as_a_whole():
    from anndata.experimental import AnnCollection

    collection = AnnCollection([make_adata(), make_adata()], index_unique="-")
    with pytest.raises(DataError, match="reads an AnnCollection where it is: pass backed=True"):
        Cells.from_anndata(collection)
    for options in ({}, {"backed": True}):
        with pytest.raises(DataError, match=r"part of one \(AnnCollectionView\).*backed=True\)\.take\(rows\)"):
            Cells.from_anndata(collection[:5], **options)


@pytest.mark.filterwarnings("ignore:3 of the 6 genes")
@pytest.mark.parametrize("fill", [False, True])
def test_raw_is_named_where_it_has_the_genes_that_are_missing(fill, tmp_path):
    """X is a selection of variable genes, which were normalised."""
    few = make_adata()
    whole = Cells.from_anndata(few, raw=True)
    schema = Cells.from_anndata(few.raw.to_adata()).schema
    few.write_h5ad(tmp_path / "few.h5ad")
    on_disk = anndata.read_h5ad(tmp_path / "few.h5ad", backed="r")
    for query, options in ((few, {}), (on_disk, {}), (on_disk, {"backed": True})):
        with pytest.raises((DataError, SchemaError), match=r"adata\.raw.*pass raw=True"):
            Cells.from_anndata(query, schema=schema, fill_missing_genes=fill, **options)
        np.testing.assert_array_equal(
            dense(Cells.from_anndata(query, schema=schema, raw=True, **options)), dense(whole)
        )


def test_raw_is_not_named_where_it_lacks_genes_too():
    few = make_adata()
    schema, few.raw = Cells.from_anndata(few.raw.to_adata()).schema, few[:, :2].copy()
    with pytest.raises(SchemaError, match="are missing") as refused:
        Cells.from_anndata(few, schema=schema)
    assert "raw" not in str(refused.value)


def test_the_one_to_take_of_real_mudata_is_named(tmp_path):
    mudata = pytest.importorskip("mudata", reason="mudata, an optional package, is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mudata's own, on what its next version does
        several = mudata.MuData({"prot": make_adata(), "rna": make_adata()})
        several.write_h5mu(tmp_path / "cells.h5mu")
    with pytest.raises(DataError, match=r"got MuData with 'prot', 'rna'; pass .* such as mdata\['rna'\]"):
        Cells.from_anndata(several)
    with pytest.raises(DataError, match=r"holds MuData .*mdata\['rna'\]\.write_h5ad"):
        build(tmp_path / "cells.h5mu", tmp_path / "store", progress=False)


def test_the_one_to_take_of_several_is_named(tmp_path):
    """By stand-ins for MuData and its file, for where mudata is not installed."""
    several = SimpleNamespace(mod={"prot": make_adata(), "rna": make_adata()})
    with pytest.raises(DataError, match=r"with 'prot', 'rna'; pass .* such as mdata\['rna'\]"):
        Cells.from_anndata(several)
    with pytest.raises(DataError, match=r"such as mdata\['atac'\]"):
        Cells.from_anndata(SimpleNamespace(mod={"atac": make_adata()}))
    with pytest.raises(DataError, match=r"backed=True takes .* with 'prot', 'rna'; pass .* such as mdata\['rna'\]"):
        Cells.from_anndata(several, backed=True)
    with pytest.raises(DataError, match=r"from_counts takes a matrix, .* such as mdata\['rna'\], to from_anndata"):
        Cells.from_counts(several)
    with pytest.raises(DataError, match=r"annotate\(adata, fit\) takes an AnnData first, .* such as mdata\['rna'\]"):
        ps.annotate(several, None)
    import h5py

    with h5py.File(tmp_path / "cells.h5mu", "w") as file:
        file.create_group("mod/gex")
    with pytest.raises(DataError, match=r"holds MuData \(gex\).*mdata\['gex'\]\.write_h5ad"):
        build(tmp_path / "cells.h5mu", tmp_path / "store", progress=False)
    with pytest.raises(DataError, match="got SimpleNamespace; from_counts takes matrices"):
        Cells.from_anndata(SimpleNamespace(mod=3))
    with pytest.raises(DataError, match=r"got the name of a file: pass anndata.read_h5ad\(file\)"):
        Cells.from_anndata(tmp_path / "cells.h5ad")


TYPES = ["Gene Expression"] * 4 + ["Antibody Capture", "CRISPR Guide Capture"]


@pytest.mark.parametrize(
    "values", [TYPES, pd.Categorical(TYPES), pd.array(TYPES, "string"), [*TYPES[:4], None, "Peaks"]]
)
def test_features_that_are_no_genes_are_told(tmp_path, values):
    adata = make_adata(**{FEATURE_TYPES: values}).raw.to_adata()
    n = 2 if None not in list(values) else 1
    text = rf"{n} of the 6 features are not genes according to var\['feature_types'\]: 1 '.*adata\[:, adata"
    with pytest.warns(UserWarning, match=text):
        cells = Cells.from_anndata(adata)
    Cells.from_anndata(adata, schema=cells.schema)  # said once, when a model is made for them
    genes = (adata.var[FEATURE_TYPES] == "Gene Expression").to_numpy(bool)  # anndata 0.12.0 takes no nullable booleans
    Cells.from_anndata(adata[:, genes])
    with anndata.settings.override(allow_write_nullable_strings=True):  # not by default in anndata 0.12.0
        adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.warns(UserWarning, match=text):
        build(tmp_path / "cells.h5ad", tmp_path / "store", progress=False)
    build(tmp_path / "cells.h5ad", tmp_path / "genes", genes=list("abcd"), progress=False)


def test_features_of_raw_are_those_of_its_own():
    adata = make_adata(**{FEATURE_TYPES: TYPES})
    with pytest.warns(UserWarning, match="2 of the 6 features"):
        Cells.from_anndata(adata, raw=True)
