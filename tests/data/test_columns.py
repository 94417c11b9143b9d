"""Columns of obs mean what they are: text is no measurement, a measurement no batch, and units do not change."""

import warnings

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from pyro_scvi.data.cells import Cells
from pyro_scvi.data.schema import Schema
from pyro_scvi.errors import DataError, SchemaError
from pyro_scvi.model import SCVI
from pyro_scvi.training.fit import fit

N = 120
COUNTS = np.random.default_rng(0).poisson(3.0, (N, 4)) + 1
SHARE = np.random.default_rng(1).beta(4, 60, N)


def make_adata(n=N, **columns):
    obs = pd.DataFrame(columns, index=[f"c{i}" for i in range(n)])
    return AnnData(COUNTS[:n].astype(np.float32), obs=obs, var=pd.DataFrame(index=list("abcd")))


def read(batch=None, **columns):
    covariates = [name for name in columns if name != batch]
    return Cells.from_anndata(make_adata(**columns), batch=batch, covariates=covariates)


def query_of(schema, values):
    """Cells of new batches, too."""
    return Cells.from_anndata(make_adata(x=values), schema=schema, allow_new_batches=True)


def told(call, text):
    """The call warns once in these words, at this file's line."""
    with pytest.warns(UserWarning, match=text) as caught:
        result = call()
    assert [each.filename for each in caught] == [__file__]
    return result


# --- covariates ---

DIGITS = [str(i % 11) for i in range(N)]


@pytest.mark.parametrize(
    "values",
    [
        DIGITS,
        pd.Categorical(DIGITS),
        pd.array(DIGITS, dtype="string"),
        pd.Categorical(np.arange(N) % 11),
        pd.Categorical(DIGITS, ordered=True),
        [1, "2"] * 60,
        ["1.5", None] * 60,
        [f"{share:.3f}" for share in SHARE],
    ],
    ids=["text", "categories", "string", "categories of numbers", "ordered", "mixed", "with missing", "decimals"],
)
def test_digits_are_no_measurement(values):
    with pytest.raises(DataError, match=r"'x' must be numeric.*even if they are digits.*batch=.*astype\(float\)"):
        read(x=values)


@pytest.mark.parametrize(
    "values", [np.arange(N), SHARE, np.arange(N).astype(object), np.arange(N) % 2 == 0, pd.array(SHARE, "Float64")]
)
def test_numbers_of_any_type_are(values):
    assert read(x=values).n_covariates == 1


def test_a_second_column_of_categories_is_told_where_it_belongs():
    with pytest.raises(DataError, match=r"into one: obs\['a'\]\.astype\(str\)"):
        read(batch="donor", donor=["x", "y"] * 60, chemistry=pd.Categorical(["v2", "v3", "v3"] * 40))


# --- batches ---


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([f"c{i}" for i in range(N)], "120 of the 120 batches in column 'x' have 1 or 2 cells"),
        (["a"] * 118 + ["rare"] * 2, "1 of the 2 batches in column 'x' have 1 or 2 cells.* 'rare'"),
        (pd.Categorical(["a"] * 119 + ["one"]), "1 of the 2 batches in column 'x' have 1 or 2 cells.* 'one'"),
        ([1] * 119 + [2], "have 1 or 2 cells.* '2'"),
    ],
)
def test_batches_of_one_or_two_cells_are_told(values, text):
    told(lambda: read(batch="x", x=values), text)


def many(levels, each=3):
    return np.repeat(levels, each)


@pytest.mark.parametrize(
    "values",
    [many(np.arange(1000, 1150)), many([str(i) for i in range(150)]), many(np.arange(-150, 0))],
)
def test_integers_with_hundreds_of_levels_are_told(values):
    counts = np.ones((450, 2))
    obs = pd.DataFrame({"n": values})
    told(lambda: Cells.from_counts(counts, obs=obs, batch="n"), "'n' holds integers with 150 levels, each a batch")


def test_hundreds_of_names_are_not():
    obs = pd.DataFrame({"donor": many([f"donor{i}" for i in range(150)])})
    assert Cells.from_counts(np.ones((450, 2)), obs=obs, batch="donor").n_batches == 150


@pytest.mark.parametrize("values", [SHARE, [f"{share:.4f}" for share in SHARE], pd.Categorical(SHARE.astype(str))])
def test_decimals_with_many_levels_are_no_batches(values):
    with pytest.raises(DataError, match=r"'x' holds floats with \d+ levels.*covariates=\['x'\]"):
        read(batch="x", x=values)


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "<NA>", "NA", "null", " "])
def test_words_for_missing_are_told(word):
    text = r"'x' holds '.*' \(10 cells\), as missing values are written in text"
    cells = told(lambda: read(batch="x", x=["a"] * 110 + [word] * 10), text)
    query = make_adata(30, x=["a"] * 20 + [word] * 10)
    Cells.from_anndata(query, schema=cells.schema)  # said once, when it was learnt
    with pytest.raises(SchemaError, match="which the schema does not know"):
        Cells.from_anndata(query, schema=read(batch="x", x=["a", "b"] * 60).schema)


def test_batches_that_differ_by_spaces_are_told():
    cells = told(
        lambda: read(batch="x", x=["a", "b", "a ", "c"] * 30), r"'a ' beside 'a'. Such batches differ by spaces"
    )
    assert cells.schema.batches == ("a", "a ", "b", "c")


def test_numbers_and_text_of_one_name_are_one_batch_and_told():
    values = pd.Series([1] * 60 + ["1"] * 30 + ["b"] * 30, dtype=object).to_numpy()
    cells = told(lambda: read(batch="x", x=values), "the same batches as numbers and as text")
    assert cells.schema.batches == ("1", "b")
    np.testing.assert_array_equal(cells.covariates[:, 0], [1] * 90 + [0] * 30)


LOOKALIKES = {
    "a blank": ("1", "1 "),
    "the form of a number": ("1", "1.0"),
    "capitals": ("Lane", "lane"),
    "blanks inside": ("lane one", "lane  one"),
}


@pytest.mark.parametrize("pair", LOOKALIKES.values(), ids=LOOKALIKES)
def test_names_that_look_alike_are_told(pair):
    """Among batches and categories of a fit, among labels, and in new batches of a query beside those of the fit."""
    known, new = pair
    said = f"'{new}' beside '{known}'|'{known}' beside '{new}'"
    for how in ({"batch": "x"}, {"categories": ["x"]}, {"labels": "x"}):
        told(lambda how=how: Cells.from_anndata(make_adata(x=[*pair, "z"] * 40), **how), said)
    schema = read(batch="x", x=[known, "z"] * 60).schema
    found = told(lambda: query_of(schema, [new, "z"] * 60), f"'{new}' beside '{known}'")
    assert found.new_batches == (new,)


@pytest.mark.parametrize("word", ["nan", "None", "<NA>"])
def test_words_for_missing_in_new_batches_of_a_query_are_told(word):
    schema = read(batch="x", x=["a", "b"] * 60).schema
    told(lambda: query_of(schema, ["a", word] * 60), f"{word!r} .60 cells., as missing values")


@pytest.mark.parametrize("names", [("1", "2", "10"), ("s1", "s10", "S2"), ("9007199254740993", "9007199254740992")])
def test_other_names_do_not_look_alike(names):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schema = read(batch="x", x=[*names] * (120 // len(names))).schema
        query_of(schema, [names[0], "new"] * 60)


@pytest.mark.parametrize("fitted", [[1, 2], [1.0, 2.0], ["1", "2"], pd.Categorical([1, 2])])
@pytest.mark.parametrize("query", [[2, 1], [2.0, 1.0], ["2", "1"]])
def test_batches_are_compared_as_they_are_written(fitted, query):
    cells = read(batch="x", x=np.repeat(fitted, 60))
    found = Cells.from_anndata(make_adata(x=np.repeat(query, 60)), schema=cells.schema)
    np.testing.assert_array_equal(found.covariates, cells.covariates[::-1])
    for name in (1, 1.0, "1", np.int64(1)):
        np.testing.assert_array_equal(cells.with_batch(name).covariates, np.tile([1, 0], (N, 1)))
    for name in (3, "x", None, 1.5):
        with pytest.raises(SchemaError, match="its batches are '1', '2'"):
            cells.with_batch(name)


# --- batches that are held out ---


def test_a_batch_that_is_held_out_as_a_whole_is_told():
    plain = read(x=SHARE)
    test = plain.split_rows(0.1, seed=3)[1]
    donor = np.full(N, "x", dtype=object)
    donor[test[:4]], donor[test[4:8]] = "rare", "scarce"
    cells = read(batch="donor", donor=donor)
    for split in (cells.split, cells.split_rows):
        train, _ = told(lambda split=split: split(0.1, seed=3), "all cells of batch 'rare', 'scarce' .*'donor'")
    cells.split(0.1, seed=4)  # elsewhere, they are in both parts
    cells.take(train).split(0.1, seed=3)  # batches that were not there before are not lost here


@pytest.mark.parametrize("role", ["categories", "labels"])
def test_a_category_or_label_that_is_held_out_as_a_whole_is_told(role):
    rows = read(x=SHARE).split_rows(0.1, seed=3)[1]
    adata = make_adata(donor=["x", "y"] * 60, kind=np.where(np.isin(np.arange(N), rows), "rare", "usual"))
    cells = Cells.from_anndata(adata, batch="donor", **{role: ["kind"] if role == "categories" else "kind"})
    what = "category" if role == "categories" else "label"
    told(lambda: cells.split(0.1, seed=3), f"all cells of {what} 'rare' .*'kind'.* are held out")
    told(lambda: short_fit(cells, validation=0.1, seed=3), f"{what} 'rare' .*'kind'.* has no training cell")


@pytest.mark.parametrize("validation", [0, 0.2, "the others"])
def test_what_no_training_cell_has_is_told_by_fit(validation):
    """Cells of one donor, with the schema of both, whatever watches them."""
    cells = read(batch="donor", donor=["x", "y"] * 60)
    ours, theirs = (cells.take(cells.obs["donor"] == name) for name in "xy")
    watching = theirs if validation == "the others" else validation
    told(lambda: short_fit(ours, validation=watching), "batch 'y' .*'donor'.* has no training cell")
    short_fit(cells.take(range(60)), validation=cells.take(range(60, N)))  # a warning is an error here


def short_fit(cells, **options):
    model = SCVI(cells.n_genes, 2, cells.n_covariates, n_hidden=4, n_layers=1)
    return fit(model, cells, epochs=1, progress=False, device="cpu", **options)


def test_more_cells_held_out_than_kept_are_no_split_for_training():
    cells = read(batch="donor", donor=["x"] * 110 + ["y"] * 10)
    cells.split(0.999)


# --- units ---


def of_share(values):
    return make_adata(len(values), share=values)


SCHEMA = read(share=SHARE).schema


@pytest.mark.parametrize("factor", [100, 1e4, 1e30])
def test_percent_for_share_is_refused(factor):
    with pytest.raises(DataError, match=r"'share' lies more than 50 standard deviations.*percent for a share"):
        Cells.from_anndata(of_share(SHARE[:50] * factor), schema=SCHEMA)


@pytest.mark.parametrize("value", [-4.0, 5.0])
def test_one_cell_that_lies_far_is_named(value):
    with pytest.raises(DataError, match=rf"in 1 of 50 cells: cell 'c7' has {value:g}\. "):
        Cells.from_anndata(of_share(np.where(np.arange(50) == 7, value, SHARE[:50])), schema=SCHEMA)


def test_cells_that_lie_outside_are_told():
    values = SHARE[:50].copy()
    values[:3] = SHARE.mean() + 20 * SHARE.std()
    query = told(
        lambda: Cells.from_anndata(of_share(values), schema=SCHEMA), "more than 10 standard .* in 3 of 50 cells"
    )
    assert np.isfinite(query.covariates).all()


def test_what_the_training_cells_hold_themselves_is_not_told():
    n = 1000
    counts = np.tile([1.0, 2.0], (n, 1))
    adata = AnnData(counts, obs=make_obs(n, np.append(np.linspace(1, 2, n - 1), 30.0)))
    adata.var_names = ["a", "b"]
    cells = Cells.from_anndata(adata, covariates=["x"])
    assert cells.covariates.max() > 10
    Cells.from_anndata(adata, schema=cells.schema)


def test_share_for_percent_is_told():
    percent = read(share=SHARE * 100)
    text = "Is it in another unit, such as a share for percent"
    told(lambda: Cells.from_anndata(of_share(SHARE[:50]), schema=percent.schema), text)


@pytest.mark.parametrize("values", [SHARE, SHARE[:1], np.full(9, SHARE.max()), SHARE[:50] * 1.5, np.zeros(5)])
def test_the_same_unit_is_not(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Cells.from_anndata(of_share(values), schema=SCHEMA)


AGE = np.random.default_rng(2).normal(50, 9, N)


@pytest.mark.parametrize("change", [lambda age: age / 12, lambda age: age + 40, lambda age: -age / 10])
def test_a_query_of_which_half_lies_outside_is_told(change):
    """Years for months: every cell lies 5 standard deviations from the mean."""
    schema = read(age=AGE).schema
    query = make_adata(60, age=change(AGE[:60]))
    told(lambda: Cells.from_anndata(query, schema=schema), "in another unit, .* or years for months")


def test_a_unit_whose_values_lie_among_those_of_the_fit_cannot_be_seen():
    schema = read(age=np.random.default_rng(2).gamma(2, 10, N)).schema
    Cells.from_anndata(make_adata(60, age=np.linspace(10, 70, 60) / 2), schema=schema)


# --- size factors ---

TOTALS = COUNTS.sum(1)


def sized(sizes, counts=COUNTS, schema=None):
    obs = pd.DataFrame({"size": sizes}, index=[f"c{i}" for i in range(len(counts))])
    adata = AnnData(counts.astype(np.float32), obs, pd.DataFrame(index=list("abcd")))
    options = {"size_factor": "size"} if schema is None else {"schema": schema}
    return Cells.from_anndata(adata, **options)


SIZED = sized(TOTALS / np.median(TOTALS))

OTHER_UNITS = {
    "totals for totals over their median": (TOTALS, COUNTS),
    "shares of 10,000": (TOTALS / 1e4, COUNTS),
    "over the median of a deeper query": (TOTALS / np.median(TOTALS), COUNTS * 5),
    "of one cell": (TOTALS[:1], COUNTS[:1]),
}


@pytest.mark.parametrize("change", OTHER_UNITS.values(), ids=OTHER_UNITS)
def test_size_factors_in_another_unit_are_told(change):
    told(lambda: sized(*change, schema=SIZED.schema), r"'size' are in another unit .*: a cell of size factor 1 has")


def test_size_factors_in_the_same_unit_are_not():
    for counts in (COUNTS, COUNTS * 7, COUNTS[:1], COUNTS[:, ::-1]):
        sized(counts.sum(1) / np.median(TOTALS), counts, schema=SIZED.schema)
    factor = 2.0 ** np.random.default_rng(4).normal(size=N)  # sizes that are not the totals
    rough = sized(TOTALS * factor)
    sized(TOTALS / factor, schema=rough.schema)


def test_the_unit_of_size_factors_is_kept_in_a_schema():
    kept = Schema.from_dict(SIZED.schema.to_dict())
    assert kept == SIZED.schema
    told(lambda: sized(TOTALS, schema=kept), r"obs\['size'\] \* 0\.0\d+ has their unit")
    earlier = {name: value for name, value in SIZED.schema.to_dict().items() if name != "size_unit"}
    sized(TOTALS, schema=Schema.from_dict(earlier))  # nothing is known of its unit
    few = AnnData(COUNTS[:, :1].astype(np.float32), make_obs(N, 1.0).assign(size=TOTALS / np.median(TOTALS)))
    few.var_names = ["a"]
    told(
        lambda: Cells.from_anndata(few, schema=SIZED.schema, fill_missing_genes=True), "3 are filled with zeros"
    )  # counts of missing genes say nothing of the unit


def test_a_covariate_that_one_cell_makes_constant_is_refused():
    n = 4000
    values = np.append(np.linspace(1, 2, n - 1), 1e9)
    with pytest.raises(DataError, match=r"in 1 of 4000 cells: cell 'cell_3999' has 1e\+09"):
        Cells.from_counts(np.ones((n, 2)), obs=make_obs(n, values), covariates=["x"])
    with pytest.raises(DataError, match="too large to be standardised"):
        Cells.from_counts(np.ones((4, 2)), obs=make_obs(4, [1e308, -1e308, 1e308, 0]), covariates=["x"])


def make_obs(n, values):
    return pd.DataFrame({"x": values}, index=[f"cell_{i}" for i in range(n)])
