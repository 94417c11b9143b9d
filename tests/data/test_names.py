"""Rows and genes are matched by name where both sides have names, and refused where the names are others."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from anndata import AnnData
from anndata.experimental import AnnCollection

import pyro_scvi as ps
from pyro_scvi.analysis.differential.labels import groups_of
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.names import is_numbering, positions_of
from pyro_scvi.errors import DataError, SchemaError

N, G = 12, 4
COUNTS = np.random.default_rng(0).poisson(3.0, (N, G)) + 1
CELLS, GENES = [f"AAC{i}-1" for i in range(N)], list("dabc")
KIND = np.where(np.arange(N) % 3, "B", "T")
FRAME = pd.DataFrame(COUNTS, index=CELLS, columns=GENES)
OBS = pd.DataFrame({"kind": KIND, "age": np.linspace(20, 50, N)}, index=CELLS)
ORDER = np.random.default_rng(1).permutation(N)


def make_cells(**options):
    return Cells.from_counts(FRAME, obs=OBS, **options)


# --- what is a name ---


@pytest.mark.parametrize("names", [range(3), ["0", "1", "2"], pd.RangeIndex(3), []])
def test_numbers_of_rows_are_no_names(names):
    assert is_numbering(names)


@pytest.mark.parametrize("names", [[1, 2, 3], [1, 0, 2], ["a"], ["0", "2"]])
def test_other_numbers_and_words_are(names):
    assert not is_numbering(names)


# --- counts and their annotations ---


def test_names_of_a_data_frame_are_kept():
    cells = Cells.from_counts(FRAME)
    assert list(cells.gene_names) == GENES
    assert list(cells.cell_names) == CELLS
    plain = Cells.from_counts(pd.DataFrame(COUNTS))
    assert list(plain.gene_names[:2]) == ["gene_0", "gene_1"]
    assert list(plain.cell_names[:2]) == ["cell_0", "cell_1"]


@pytest.mark.parametrize("index", [CELLS, range(100, 100 + N), [f"cell_{i}" for i in range(N)]])
def test_annotations_in_another_order_are_matched_by_name(index):
    obs = OBS.set_axis(list(index))
    for counts, names in ((FRAME.set_axis(list(index)), None), (COUNTS, list(index))):
        cells = Cells.from_counts(counts, obs=obs.iloc[ORDER], cell_names=names, batch="kind", covariates=["age"])
        expected = Cells.from_counts(COUNTS, obs=obs, batch="kind", covariates=["age"])
        assert list(cells.obs["kind"]) == list(KIND)
        np.testing.assert_array_equal(cells[:][1], expected[:][1])
        assert list(cells.cell_names) == [str(name) for name in index]


def test_annotations_of_other_cells_are_refused():
    other = OBS.set_axis([f"{name}-2" for name in CELLS])
    for options in ({}, {"cell_names": CELLS}):
        with pytest.raises(DataError, match=r"obs has no row for 12 of the 12 cells, such as 'AAC0-1'.*'AAC0-1-2'"):
            Cells.from_counts(FRAME if not options else COUNTS, obs=other, **options)


def test_annotations_without_names_are_taken_in_order():
    cells = Cells.from_counts(FRAME, obs=OBS.reset_index(drop=True))
    assert list(cells.obs["kind"]) == list(KIND)
    assert list(cells.cell_names) == CELLS


def test_a_frame_that_was_shuffled_and_annotations_that_were_not_are_refused():
    unnamed = pd.DataFrame(COUNTS, columns=GENES).iloc[ORDER]
    with pytest.raises(DataError, match="obs has no row for 12"):
        Cells.from_counts(unnamed, obs=OBS)


# --- numbers in two orders: of the cell of that number, or in that place ---

NUMBERED = pd.DataFrame(COUNTS, columns=GENES)  # 0, 1, 2, ... where names were lost
NUMBERED_OBS = OBS.reset_index(drop=True)


def shuffled_cells():
    """Cells that carry their numbers of before, and a table that is numbered anew."""
    return Cells.from_counts(NUMBERED.iloc[ORDER], obs=NUMBERED_OBS.iloc[ORDER])


IN_TWO_ORDERS = {
    "groupby": lambda: groups_of(shuffled_cells(), NUMBERED_OBS["kind"]),
    "groupby, sorted": lambda: groups_of(Cells.from_counts(NUMBERED), NUMBERED_OBS["kind"].iloc[ORDER]),
    "groupby, after take": lambda: groups_of(Cells.from_counts(NUMBERED).take(ORDER), NUMBERED_OBS["kind"]),
    "groupby, from 1": lambda: groups_of(
        Cells.from_counts(NUMBERED.set_axis(range(1, N + 1)).iloc[ORDER]),
        NUMBERED_OBS["kind"].set_axis(range(1, N + 1)),
    ),
    "obs": lambda: Cells.from_counts(NUMBERED.iloc[ORDER], obs=NUMBERED_OBS),
    "obs, sorted": lambda: Cells.from_counts(NUMBERED, obs=NUMBERED_OBS.iloc[ORDER]),
    "a mask": lambda: shuffled_cells().take(NUMBERED_OBS["kind"] == "T"),
    "labels of a picture": lambda: ps.plots.embedding(PLACES, NUMBERED_OBS["kind"].iloc[ORDER]),
    "labels of a named picture": lambda: ps.plots.embedding(pd.DataFrame(PLACES).iloc[ORDER], NUMBERED_OBS["kind"]),
    "a baseline": lambda: ps.baselines.Wilcoxon().test(NUMBERED.iloc[ORDER], NUMBERED_OBS["kind"]),
}


@pytest.mark.parametrize("call", IN_TWO_ORDERS.values(), ids=IN_TWO_ORDERS)
def test_numbers_in_two_orders_are_refused(call):
    with pytest.raises(DataError, match=r"numbers instead of names, in two orders.*as \.to_numpy\(\)"):
        call()


def test_numbers_in_one_order_are_positions_and_further_rows_are_found_by_number():
    cells = shuffled_cells()
    assert list(groups_of(cells, NUMBERED_OBS["kind"].iloc[ORDER])) == list(KIND[ORDER])
    assert list(groups_of(cells, KIND[ORDER])) == list(KIND[ORDER])
    assert list(groups_of(cells.take([4, 1]), NUMBERED_OBS["kind"])) == list(KIND[ORDER][[4, 1]])


def test_a_name_that_two_cells_share_is_matched_with_no_row():
    """Two lanes with the same barcodes, and the labels of one of them."""
    with pytest.warns(UserWarning, match="cell names occur more than once"):
        cells = Cells.from_counts(COUNTS, cell_names=["x", "x", *CELLS[2:]])
    with pytest.raises(DataError, match="the list of cells names rows more than once, such as 'x'"):
        groups_of(cells, pd.Series(KIND[1:], index=["x", *CELLS[2:]]))
    extra = pd.Series(["T", "T", *KIND], index=["y", "y", *CELLS])  # a name that no cell has may occur twice
    assert list(groups_of(make_cells(), extra)) == list(KIND)


def test_names_that_are_given_twice_must_agree():
    assert list(Cells.from_counts(FRAME, gene_names=GENES, cell_names=CELLS).gene_names) == GENES
    for names in (GENES[::-1], ["w", "x", "y", "z"]):
        with pytest.raises(DataError, match="gene_names are .* but the counts name their genes 'd', 'a', 'b'"):
            Cells.from_counts(FRAME, gene_names=names)
    with pytest.raises(DataError, match="cell_names are"):
        Cells.from_counts(FRAME, cell_names=CELLS[::-1])


def test_names_that_occur_twice_cannot_be_matched():
    doubled = ["x", "x", *CELLS[2:]]
    with pytest.raises(DataError, match="obs names rows more than once, such as 'x'"):
        Cells.from_counts(COUNTS, cell_names=doubled, obs=OBS.set_axis(doubled).iloc[ORDER])
    with pytest.warns(UserWarning, match="cell names occur more than once"):
        cells = Cells.from_counts(COUNTS, cell_names=doubled, obs=OBS.set_axis(doubled))  # one order needs no match
    assert list(cells.obs["kind"]) == list(KIND)


@pytest.mark.parametrize("kind", ["sparse", "nullable", "labelled", "turned", "Fortran"])
def test_every_kind_of_frame(kind):
    frames = {
        "sparse": FRAME.astype(pd.SparseDtype("uint8", 0)),
        "nullable": FRAME.astype("Int64"),
        "labelled": xr.DataArray(FRAME, dims=("cell", "gene")),
        "turned": xr.DataArray(FRAME.T, dims=("gene", "cell")),
        "Fortran": pd.DataFrame(np.asfortranarray(COUNTS), index=CELLS, columns=GENES),
    }
    cells = Cells.from_counts(frames[kind])
    np.testing.assert_array_equal(cells[:][0], COUNTS)
    assert list(cells.gene_names) == GENES
    assert list(cells.cell_names) == CELLS


def test_frames_that_hold_more_than_counts():
    with pytest.raises(DataError, match=r"1 columns, such as 'kind', hold (object|str).*pass annotations as obs="):
        Cells.from_counts(FRAME.assign(kind=KIND))
    missing = FRAME.astype("Int64")
    missing.iloc[2, 1] = pd.NA
    with pytest.raises(DataError, match="cell 'AAC2-1', gene 'a' holds nan"):
        Cells.from_counts(missing)
    with pytest.raises(DataError, match="from_counts takes a matrix, got an AnnData"):
        Cells.from_counts(AnnData(COUNTS))


# --- genes and columns of a query ---


def test_columns_of_a_frame_are_matched_with_a_schema():
    cells = make_cells()
    query = Cells.from_counts(FRAME[list("cabd")], schema=cells.schema)
    np.testing.assert_array_equal(query[:][0], cells[:][0])
    with pytest.raises(SchemaError, match="pass gene_names, or a DataFrame"):
        Cells.from_counts(FRAME.set_axis(range(G), axis=1), schema=cells.schema)


def test_covariates_may_be_named_in_another_order():
    obs = OBS.assign(depth=np.arange(N) ** 2)
    cells = Cells.from_counts(FRAME, obs=obs, covariates=["age", "depth"])
    for names in (["depth", "age"], ("age", "depth"), ()):
        query = Cells.from_counts(FRAME, obs=obs, covariates=names, schema=cells.schema)
        np.testing.assert_array_equal(query[:][1], cells[:][1])
    for names in (["age"], ["age", "age"], ["age", "kind"]):
        with pytest.raises(SchemaError, match="leave both out"):
            Cells.from_counts(FRAME, obs=obs, covariates=names, schema=cells.schema)


def of_genes(names, counts=COUNTS):
    return AnnData(counts.astype(np.float32), var=pd.DataFrame(index=[str(name) for name in names]))


@pytest.mark.parametrize(
    ("fitted", "query"), [(range(G), range(G)), (range(G), [3, 1, 0, 2]), ([3, 1, 0, 2], range(G)), ([0, 2], range(G))]
)
def test_genes_that_match_by_number_are_told(fitted, query):
    schema = Cells.from_anndata(of_genes(fitted, COUNTS[:, : len(fitted)])).schema
    with pytest.warns(UserWarning, match="genes are named by numbers.* Set adata.var_names") as caught:
        Cells.from_anndata(of_genes(query), schema=schema)
    assert {each.filename for each in caught if "numbers" in str(each.message)} == {__file__}


@pytest.mark.parametrize("form", ["{}", "V{}", "X{}", "gene_{}"])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("order", [range(G), [3, 1, 0, 2]])
def test_genes_that_tools_number_are_told(form, first, order):
    names = [form.format(i + first) for i in range(G)]
    schema = Cells.from_anndata(of_genes(names)).schema
    query = of_genes([names[i] for i in order])
    if form == "gene_{}" and order == range(G):  # of simulated data, mostly
        Cells.from_anndata(query, schema=schema)  # a warning is an error here
        return
    with pytest.warns(UserWarning, match=f"genes are named by numbers .'{names[0]}'"):
        Cells.from_anndata(query, schema=schema)


@pytest.mark.parametrize("names", [["7157", "672", "675", "1017"], ["g0", "g1", "g2", "g3"], ["V1", "X2", "V3", "X4"]])
def test_genes_with_names_of_digits_are_not(names):
    schema = Cells.from_anndata(of_genes(names)).schema
    Cells.from_anndata(of_genes(names[::-1]), schema=schema)  # a warning is an error here


def test_genes_of_several_files_that_match_by_number_are_told(tmp_path):
    parts = [of_genes(range(G)), of_genes(range(G), COUNTS[:5])]
    for part, prefix in zip(parts, "ab", strict=True):
        part.obs_names = [f"{prefix}{i}" for i in range(part.n_obs)]
        part.write_h5ad(tmp_path / f"{prefix}.h5ad")
    ways = (
        lambda: ps.stores.build([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], tmp_path / "store", progress=False),
        lambda: Cells.from_anndata(AnnCollection(parts), backed=True),
    )
    for way in ways:
        with pytest.warns(UserWarning, match="genes are named by numbers"):
            way()
    ps.stores.build(tmp_path / "a.h5ad", tmp_path / "one", progress=False)  # one file matches with itself
    with pytest.raises(SchemaError, match="has no layer 'counts'"):
        Cells.from_anndata(AnnCollection(parts), layer="counts", backed=True)


def test_counts_by_genes_are_seen_by_their_annotations():
    with pytest.raises(DataError, match="12 rows, counts have 4 cells. Are cells and genes swapped"):
        Cells.from_counts(FRAME.T, obs=OBS)


# --- one value per cell ---


def shuffled(values=KIND, index=CELLS):
    return pd.Series(values, index=index, name="kind").iloc[ORDER]


@pytest.mark.parametrize(
    "groupby",
    [
        shuffled(),
        shuffled(pd.Categorical(KIND)),
        shuffled().to_frame(),
        pd.concat([shuffled(), pd.Series(["X"], index=["further"])]),
        xr.DataArray(shuffled().to_numpy(), dims="cell", coords={"cell": shuffled().index}),
        pd.Series(KIND),
        list(KIND),
        "kind",
    ],
)
def test_labels_are_matched_by_name(groupby):
    assert list(groups_of(make_cells(), groupby)) == list(KIND)


def test_labels_of_part_of_the_cells():
    some = make_cells().take([9, 2, 5])
    assert list(groups_of(some, shuffled())) == list(KIND[[9, 2, 5]])


def test_labels_of_other_cells_are_refused():
    other = shuffled().set_axis([f"{name}x" for name in shuffled().index])
    with pytest.raises(DataError, match=r"groupby has no row for 12 .*without names: \.to_numpy\(\)"):
        groups_of(make_cells(), other)
    assert list(groups_of(make_cells(), other.to_numpy())) == list(KIND[ORDER])
    with pytest.raises(DataError, match="12 cells, got 3"):
        groups_of(make_cells(), pd.Series(KIND[:3]))
    with pytest.raises(DataError, match="such as 'AAC0-1'"):
        groups_of(make_cells(), pd.Series(KIND).iloc[ORDER])


def test_labels_for_cells_without_names():
    cells = Cells.from_counts(COUNTS)
    assert list(groups_of(cells, shuffled().sort_index())) == list(shuffled().sort_index())
    with pytest.raises(DataError, match="groupby and the cells have numbers"):
        groups_of(cells, pd.Series(KIND).iloc[ORDER])  # numbered in another order
    assert list(groups_of(cells.take([3, 7]), pd.Series(KIND, index=[f"cell_{i}" for i in range(N)]))) == ["T", "B"]


def test_a_column_that_is_newer_than_the_cells_is_pointed_to():
    with pytest.raises(DataError, match=r"pass one value per cell, such as groupby=adata\.obs\['leiden'\]"):
        groups_of(make_cells(), "leiden")


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "<NA>", ""])
def test_groups_named_by_words_for_missing_are_told(word):
    with pytest.warns(UserWarning, match="as missing values are written in text"):
        groups_of(make_cells(), [word, *KIND[1:]])


# --- masks ---


def test_a_mask_with_names_is_matched_by_name():
    cells = make_cells()
    mask = OBS["kind"] == "T"
    for part in (mask, mask.iloc[ORDER], mask.iloc[ORDER].astype("boolean"), mask.to_numpy()):
        assert list(cells.take(part).cell_names) == list(OBS.index[mask])
        np.testing.assert_array_equal(cells[part][0], COUNTS[mask])
    assert list(cells.take([5, 0, 3]).take(mask.iloc[ORDER]).cell_names) == [CELLS[0], CELLS[3]]
    assert list(cells.take(pd.Series([3, 1])).cell_names) == [CELLS[3], CELLS[1]]


def test_a_mask_of_other_cells_is_refused():
    mask = OBS["kind"] == "T"
    with pytest.raises(DataError, match="the mask has no row"):
        make_cells().take(mask.set_axis([f"{name}x" for name in CELLS]))
    unknown = mask.astype("boolean")
    unknown.iloc[3] = pd.NA
    with pytest.raises(DataError, match="the mask has no value for 1 cells"):
        make_cells().take(unknown)


@pytest.mark.parametrize("index", [N, -N - 1, [0, N], np.array([N + 5])])
def test_a_cell_beyond_the_last_is_named(index):
    with pytest.raises(IndexError, match=rf"cells are numbered from 0 to {N - 1}; there is no cell -?\d+"):
        make_cells()[index]


# --- pictures ---

PLACES = np.stack([np.arange(N, dtype=float), np.arange(N) % 2], 1)


def drawn(latent, labels):
    """Labels by the place at which they are drawn."""
    numbers = pd.Series(labels).map({"B": 0.0, "T": 1.0}) if not isinstance(labels, xr.DataArray) else labels
    dots = ps.plots.embedding(latent, numbers, plt.figure().subplots()).collections[0]
    return dict(zip(dots.get_offsets()[:, 0].tolist(), dots.get_array().tolist(), strict=True))


EXPECTED = {float(i): float(kind == "T") for i, kind in enumerate(KIND)}


@pytest.mark.parametrize(
    "latent",
    [
        pd.DataFrame(PLACES, index=CELLS),
        xr.DataArray(PLACES, dims=("cell", "latent"), coords={"cell": CELLS}),
        ps.plots.Projection(pd.DataFrame(PLACES, index=CELLS), "UMAP"),
        ps.plots.project(pd.DataFrame(PLACES, index=CELLS)),
    ],
)
def test_labels_in_pictures_are_matched_by_name(latent):
    assert drawn(latent, shuffled()) == EXPECTED
    assert drawn(latent, pd.Series(KIND)) == EXPECTED
    with pytest.raises(DataError, match="labels has no row for 12"):
        drawn(latent, shuffled().set_axis([f"{name}x" for name in CELLS]))


def test_labels_for_an_array_are_taken_in_order_unless_they_are_seen_to_be_in_another():
    assert drawn(PLACES, pd.Series(KIND, index=CELLS)) == EXPECTED
    assert drawn(PLACES, pd.Series(KIND).iloc[ORDER].sort_index()) == EXPECTED
    with pytest.raises(DataError, match="one value for each of the 12 cells, got 3"):
        drawn(PLACES, shuffled()[:3])


def test_positions():
    np.testing.assert_array_equal(positions_of(pd.Index(["b", "a"]), pd.Index(["a", "c", "b"]), "it"), [2, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(positions_of(pd.Index(["x", "x"]), pd.Index(["x", "x"]), "it"), [0, 1])
