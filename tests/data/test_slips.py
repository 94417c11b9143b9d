"""Somebody else's .h5ad: slips that were made before its counts are read, in memory, by a command and from a store."""

import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import pyro_scvi as ps
from pyro_scvi.cli.files import read_h5ad
from pyro_scvi.errors import DataError, SchemaError

N_CELLS, N_GENES = 100, 60
RNG = np.random.default_rng(0)
BARCODES = ["".join(RNG.choice(list("ACGT"), 16)) + "-1" for _ in range(N_CELLS)]
GENES = [f"ENSG{i:011d}.{i % 3 + 1}" for i in range(N_GENES)]
COUNTS = RNG.poisson(RNG.gamma(0.8, 2.0, (N_CELLS, N_GENES)))
COUNTS[0, 0] = 300


def made(counts=COUNTS):
    obs = pd.DataFrame({"lane": ["p", "q"] * (N_CELLS // 2)}, index=BARCODES)
    return anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs, pd.DataFrame(index=GENES))


SCHEMA = ps.Cells.from_anndata(made(), batch="lane").schema


def in_memory(adata, folder, **options):
    return ps.Cells.from_anndata(adata, **options)


def by_a_command(adata, folder, **options):
    adata.write_h5ad(folder / "cells.h5ad")
    return ps.Cells.from_anndata(read_h5ad(folder / "cells.h5ad"), **options)


def from_a_store(adata, folder, **options):
    adata.write_h5ad(folder / "cells.h5ad")
    return ps.Cells.from_store(
        ps.stores.build(folder / "cells.h5ad", folder / "cells.store", progress=False), **options
    )


WAYS = (in_memory, by_a_command, from_a_store)
everywhere = pytest.mark.parametrize("way", WAYS)


def renamed(change):
    adata = made()
    adata.var_names = [change(name) for name in GENES]
    return adata


# --- names of genes in another form ---

FORMS = {
    "another version": lambda name: name.split(".")[0] + ".9",
    "no version": lambda name: name.split(".")[0],
    "lower case": str.lower,
    "a space": lambda name: f"{name} ",
}


@pytest.mark.parametrize("change", FORMS.values(), ids=FORMS)
def test_genes_in_another_form_are_pointed_out(change, tmp_path):
    for way in WAYS:
        with pytest.raises(SchemaError, match="60 of them are probably there under names that differ only by case"):
            way(renamed(change), tmp_path, schema=SCHEMA)


def test_zeros_for_genes_that_are_there_in_another_form_are_told(tmp_path):
    half = renamed(lambda name: name if name < GENES[30] else name.lower())
    with pytest.raises(SchemaError, match="30 are missing.*30 of them are probably there"):
        in_memory(half, tmp_path, schema=SCHEMA)
    with pytest.warns(UserWarning, match="30 are filled with zeros.*30 of them are probably there"):
        in_memory(half, tmp_path, schema=SCHEMA, fill_missing_genes=True)


@pytest.mark.parametrize("missing", ["AL627309.1", "GAPDH"])
def test_other_genes_are_no_other_forms(missing):
    """Genes named after clones have numbers that are no versions; a gene that matched already is not another's form."""
    genes = ["Gapdh", "AL627309.5", "ACTB"]
    schema = ps.Cells.from_counts(COUNTS[:, :4] + 1, gene_names=[*genes, missing]).schema
    with pytest.raises(SchemaError) as refused:
        ps.Cells.from_counts(COUNTS[:, :3] + 1, gene_names=genes, schema=schema)
    assert "probably" not in str(refused.value)


def test_genes_of_two_files_in_another_form_are_told(tmp_path):
    made().write_h5ad(tmp_path / "one.h5ad")
    other = renamed(lambda name: name if name < GENES[30] else name.split(".")[0])
    other.obs_names = [f"{name}b" for name in BARCODES]
    other.write_h5ad(tmp_path / "two.h5ad")
    with pytest.warns(UserWarning, match="are left out. 30 of them are probably there"):
        ps.stores.build([tmp_path / "one.h5ad", tmp_path / "two.h5ad"], tmp_path / "store", progress=False)


# --- cells and genes swapped ---


@everywhere
def test_swapped_cells_and_genes_are_told(way, tmp_path):
    turned = made().T.copy()
    turned.X = turned.X.tocsr()
    with pytest.warns(UserWarning, match="genes are named like cells"):
        way(turned, tmp_path)
    symbols = made().T.copy()
    symbols.var_names = [f"c{i}" for i in range(N_CELLS)]
    with pytest.warns(UserWarning, match="cells are named like genes: 'ENSG00000000000.1'"):
        in_memory(symbols, tmp_path)


def test_a_swapped_frame_is_told():
    with pytest.warns(UserWarning, match="genes are named like cells"):
        ps.Cells.from_counts(made().to_df().T)


def test_short_words_of_the_letters_of_dna_are_no_barcodes():
    ps.Cells.from_counts(COUNTS[:, :3] + 1, gene_names=["CAT", "TTN", "GATAGATA"], cell_names=BARCODES)


# --- counts that are not what they were ---

CHANGED = {
    "turned into 0 and 1": (lambda x: (x > 0).astype(np.float32), r"all \d+ counts above 0 in X.* are 1\. Were they"),
    "multiplied": (lambda x: x * 7.0, r"are multiples of 7\. Were they"),
    "normalised and rounded": (
        lambda x: np.rint(x / x.sum(1, keepdims=True) * 1e5),
        "all 100 cells have a total of .* normalised and then rounded",
    ),
    "in 8 bits": (lambda x: x.astype(np.uint8) * 0 + np.minimum(x, 255).astype(np.uint8), "few bits, which cuts"),
    "in float16": (lambda x: (x * np.where(np.arange(N_GENES) == 0, 20, 1)).astype(np.float16), "of 16 bits, which"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_counts_that_were_changed_are_told(change, tmp_path):
    how, text = CHANGED[change]
    adata = anndata.AnnData(how(COUNTS), made().obs, made().var)
    for way in WAYS:
        if way is not from_a_store or change != "normalised and rounded":  # a store has no totals to compare
            with pytest.warns(UserWarning, match=text):
                way(adata, tmp_path)


@pytest.mark.parametrize("change", ["turned into 0 and 1", "multiplied", "normalised and rounded"])
def test_values_that_are_said_to_be_no_counts_are_not(change):
    ps.Cells.from_counts(CHANGED[change][0](COUNTS), allow_non_integer=True)


def test_counts_of_16_bits_near_their_end_are_told():
    for kind, largest in ((np.int16, 32_767), (np.uint16, 65_535)):
        counts = COUNTS.astype(kind)
        counts[3, 4] = largest
        with pytest.warns(UserWarning, match="few bits, which cuts or wraps counts above"):
            ps.Cells.from_counts(counts)


def test_entries_at_one_place_that_add_up_beyond_their_type_are_not():
    entries = (np.array([200, 100], dtype=np.uint8), ([0, 0], [0, 0]))
    assert ps.Cells.from_counts(sparse.coo_matrix(entries, shape=(1, 1))).totals == 300


def test_counts_that_wrapped_below_zero_are_refused(tmp_path):
    adata = anndata.AnnData((COUNTS * 60).astype(np.int8))
    for way in WAYS:
        with pytest.raises(DataError, match="counts of 0 or more"):
            way(adata, tmp_path)


def test_counts_that_were_thinned_to_one_total_are_counts():
    thinned = np.random.default_rng(1).multinomial(500, np.full(N_GENES, 1 / N_GENES), size=N_CELLS)
    assert (ps.Cells.from_counts(thinned).totals == 500).all()


def test_negative_zeros_are_zeros(tmp_path):
    signed = np.where(COUNTS == 0, -0.0, COUNTS).astype(np.float32)
    for way in WAYS:
        cells = way(anndata.AnnData(signed, made().obs), tmp_path)
        np.testing.assert_array_equal(cells[:][0], COUNTS)


# --- names and columns of other types ---


def test_names_in_bytes_are_read_as_text():
    names = [name.encode() for name in GENES]
    cells = ps.Cells.from_counts(COUNTS, gene_names=names, cell_names=[name.encode() for name in BARCODES])
    assert list(cells.gene_names) == GENES
    assert list(cells.cell_names) == BARCODES
    adata = made()
    adata.obs["lane"] = [b"p", b"q"] * (N_CELLS // 2)
    assert ps.Cells.from_anndata(adata, schema=SCHEMA).schema.batches == ("p", "q")


COLUMNS = {  # values of a batch -> what the batches are called, or why they are refused
    "booleans": ([True, False] * (N_CELLS // 2), ("False", "True")),
    "floats": ([1.0, 2.0] * (N_CELLS // 2), ("1", "2")),
    "floats with NaN": ([1.0, np.nan] * (N_CELLS // 2), "no value for 50 cells"),
    "booleans with NA": (pd.array([True, None] * (N_CELLS // 2), dtype="boolean"), "no value for 50 cells"),
    "levels that no cell has": (pd.Categorical(["p", "q"] * (N_CELLS // 2), ["q", "none", "p"]), ("q", "p")),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_batches_of_other_types(column, tmp_path):
    values, expected = COLUMNS[column]
    for way in WAYS:
        adata = made()
        adata.obs["lane"] = values
        if isinstance(expected, str):
            with pytest.raises(DataError, match=expected):
                way(adata, tmp_path, batch="lane")
        else:
            assert way(adata, tmp_path, batch="lane").schema.batches == expected


@everywhere
def test_cells_of_one_name_are_told(way, tmp_path):
    adata = made()
    adata.obs_names = BARCODES[:50] * 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Observation names are not unique")
        with pytest.warns(UserWarning, match="cell names occur more than once"):
            way(adata, tmp_path)


@everywhere
def test_logarithms_point_to_the_layer_with_counts(way, tmp_path):
    adata = made()
    adata.layers["raw"], adata.X = adata.X.copy(), adata.X.log1p()
    with pytest.raises(DataError, match="layers: 'raw'"):
        way(adata, tmp_path)


def test_a_frame_whose_index_is_numbers_in_words():
    frame = made().to_df().set_axis([str(i) for i in range(N_CELLS)])
    assert list(ps.Cells.from_counts(frame, obs=made().obs).cell_names) == BARCODES
    with pytest.raises(DataError, match="obs has no row for 100 of the 100 cells"):
        ps.Cells.from_counts(frame.iloc[::-1], obs=made().obs)


# --- files ---


def old_file(path):
    """A file as anndata wrote it before version 0.7: tables as records, sparse matrices under names of their own."""
    counts = made().X
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = b"csr", np.array(counts.shape)
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(counts, name)
        for name, words in (("obs", BARCODES), ("var", GENES)):
            file[name] = np.array([(word.encode(),) for word in words], dtype=[("index", "S20")])
        file.create_group("uns")
    return path


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
def test_files_of_early_versions_are_read_or_refused_with_the_way_out(tmp_path):
    old = old_file(tmp_path / "old.h5ad")
    for cells in (ps.Cells.from_anndata(anndata.read_h5ad(old)), ps.Cells.from_anndata(read_h5ad(old))):
        np.testing.assert_array_equal(cells[:][0], COUNTS)
        assert list(cells.gene_names) == GENES
    with pytest.raises(DataError, match="an early version of anndata wrote the file, write it anew"):
        ps.stores.build(old, tmp_path / "store", progress=False)


def test_a_view_of_a_file_is_read(tmp_path):
    made().write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    rows, genes = np.arange(N_CELLS) % 3 == 0, np.arange(N_GENES) % 2 == 0
    cells = ps.Cells.from_anndata(backed[rows, genes], batch="lane")
    np.testing.assert_array_equal(cells[:][0], COUNTS[rows][:, genes])
    assert list(cells.obs.lane) == list(made().obs.lane[rows])
    with pytest.raises(DataError, match="views into memory"):
        ps.Cells.from_anndata(backed[rows], backed=True)
    backed.file.close()
