"""Labels of cells, wherever they are passed: one name each, matched by name, and errors in the argument's own name."""

import warnings

import anndata
import matplotlib
import numpy as np
import pandas as pd
import pytest
import xarray as xr

import pyro_scvi as ps
from pyro_scvi.errors import DataError, ModelError, SchemaError
from tests.support.simulate import simulated_counts

matplotlib.use("Agg")

N, N_GENES = 40, 12
ORDER = np.random.default_rng(3).permutation(N)
KIND = np.where(np.arange(N) % 4 < 2, 1, 2)
MIXED = np.array([str(kind) if i % 3 else int(kind) for i, kind in enumerate(KIND)], dtype=object)
SAMPLE = KIND * 10 + np.arange(N) % 2
NAMES = [f"cell-{i:03d}" for i in ORDER]


def made():
    obs = pd.DataFrame({"kind": [str(kind) for kind in KIND], "number": KIND, "mixed": MIXED}, index=NAMES)
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(N_GENES)])
    return anndata.AnnData(simulated_counts(N, N_GENES).astype(np.float32), obs, var)


ADATA = made()
CELLS = ps.Cells.from_anndata(ADATA)
MIXED_SAMPLES = np.array([str(each) if i % 3 else int(each) for i, each in enumerate(SAMPLE)], dtype=object)
MEANS = {"min_molecules": 1}


@pytest.fixture(scope="module")
def fit():
    model = ps.SCVI(N_GENES, 2, n_hidden=8, n_layers=1)
    return ps.fit(model, CELLS, epochs=2, batch_size=20, validation=0, progress=False, device="cpu")


def compared(fit, groupby, **options):
    estimand = ps.differential.GroupMeans(**MEANS)
    return ps.differential_expression(fit, CELLS, groupby=groupby, estimand=estimand, **options)


def by_donor(fit, replicates):
    estimand = ps.differential.GroupMeans(replicates=replicates, **MEANS)
    return ps.differential_expression(fit, CELLS, groupby="kind", group_a="1", group_b="2", estimand=estimand)


VERBS = {  # name of the argument, verb of it -> a table, the words it says of mixed labels
    "groups": ("groupby", compared, "groupby holds the same groups as numbers"),
    "replicates": ("replicates", by_donor, "replicates holds the same replicates as numbers"),
    "groups of samples": (
        "groupby",
        lambda fit, labels: ps.differential_abundance(fit, CELLS, labels, SAMPLE, permutations=5),
        "groupby holds the same groups as numbers",
    ),
    "samples": (
        "sample",
        lambda fit, labels: ps.differential_abundance(fit, CELLS, "kind", labels, permutations=5),
        "sample holds the same samples as numbers",
    ),
    "transfer": (
        "labels",
        lambda fit, labels: ps.transfer_labels(fit, CELLS, CELLS.take([3, 1]), labels, neighbors=5),
        None,
    ),
}
OF_SAMPLES = ("replicates", "samples")
every_verb = pytest.mark.parametrize("name", VERBS)


def plain(name):
    return (SAMPLE if name in OF_SAMPLES else KIND).astype(str)


@every_verb
@pytest.mark.filterwarnings("ignore")
def test_a_label_has_one_name_however_it_is_written(name, fit):
    _, verb, says = VERBS[name]
    mixed = MIXED_SAMPLES if name in OF_SAMPLES else MIXED
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = verb(fit, mixed)
    if says is not None:
        assert any(str(each.message).startswith(says) for each in caught)
    pd.testing.assert_frame_equal(found, verb(fit, plain(name)))


@pytest.mark.filterwarnings("ignore")
def test_groups_are_named_as_numbers_or_text(fit):
    expected = compared(fit, "kind", group_a="1", group_b="2")
    for column in ("number", "mixed", "kind"):
        for a, b in ((1, "2"), ("1", 2.0), (np.int64(1), "2")):
            found = compared(fit, column, group_a=a, group_b=b)
            pd.testing.assert_frame_equal(found, expected)
    against = ps.differential.EveryOther()
    one = compared(fit, "number", group_a="1", against=against)
    pd.testing.assert_frame_equal(one.drop(columns="against"), expected[one.columns.drop("against")])
    with pytest.raises(DataError, match="both groups are"):
        compared(fit, "mixed", group_a=1, group_b="1")


@pytest.mark.filterwarnings("ignore")
def test_ranked_genes_match_a_column_that_is_written_in_another_way(fit):
    for column in ("number", "mixed", "kind"):
        adata = made()
        ps.add_rank_genes_groups(adata, compared(fit, "number"), column)
        assert set(adata.uns["rank_genes_groups"]["names"].dtype.names) == {"1", "2"}
    doubled = compared(fit, "number")
    twice = pd.concat([doubled, doubled.rename(index=str, level="group")])
    with pytest.raises(DataError, match="every gene once for each group"):
        ps.add_rank_genes_groups(made(), twice, "kind")


CONTAINERS = {
    "list": list,
    "tuple": tuple,
    "array": np.asarray,
    "Index": pd.Index,
    "Categorical": pd.Categorical,
    "Series": lambda values: pd.Series(values, NAMES).sort_index(),
    "frame": lambda values: pd.Series(values, NAMES).sort_index().to_frame("x"),
    "DataArray": lambda values: xr.DataArray(values[ORDER], {"cell": np.array(NAMES)[ORDER]}, "cell"),
    "dict": lambda values: pd.Series(values, NAMES).sort_index().to_dict() | {"another": "x"},
}


@every_verb
@pytest.mark.filterwarnings("ignore")
def test_labels_come_in_any_container(name, fit):
    verb, values = VERBS[name][1], plain(name)
    expected = verb(fit, values)
    for kind, make in CONTAINERS.items():
        pd.testing.assert_frame_equal(verb(fit, make(values)), expected, obj=kind)


BAD = {
    "too short": ["1"] * 5,
    "a set": {"1", "2"},
    "a word that is no column": "nowhere",
    "an empty list": [],
    "an empty dict": {},
    "other cells": {f"other-{i}": "1" for i in range(N)},
    "a Series of other cells": pd.Series(KIND, [f"other-{i}" for i in range(N)]),
    "None": None,
    "a number": 3,
    "two columns": pd.DataFrame({"x": KIND, "y": KIND}, NAMES),
    "lists": [["1"]] * N,
}


@every_verb
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_errors_call_the_argument_as_the_user_wrote_it(name, bad, fit):
    argument, verb, _ = VERBS[name]
    if name == "replicates" and bad is None:
        pytest.skip("None means no replicates")
    with pytest.raises((DataError, SchemaError)) as refused:
        verb(fit, bad)
    assert str(refused.value).startswith(argument) or f"{argument}=" in str(refused.value)


@pytest.mark.parametrize("named", [True, False])
def test_a_picture_takes_a_dict_of_labels_by_name(named):
    points = np.random.default_rng(0).normal(size=(N, 2))
    latent = pd.DataFrame(points, NAMES) if named else points
    labels = pd.Series(KIND.astype(str), NAMES)
    shuffled = labels.sort_index().to_dict()
    if not named:
        with pytest.raises(DataError, match="labels is a dict by name, and there are no names"):
            ps.plots.embedding(latent, shuffled)
        return
    colours = [ps.plots.embedding(latent, of).collections[0].get_facecolors() for of in (labels, shuffled)]
    np.testing.assert_array_equal(*colours)
    with pytest.raises(DataError, match="labels has no row for 1 of the 40 cells"):
        ps.plots.embedding(latent, {name: "a" for name in NAMES[1:]})
    legend = ps.plots.embedding(latent, MIXED).get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["1", "2"]
    matplotlib.pyplot.close("all")


def test_a_mask_may_be_a_dict_by_name():
    mask = dict(sorted(zip(NAMES, (KIND == 1).tolist(), strict=True)))
    assert list(CELLS.take(mask).cell_names) == [name for name, kind in zip(NAMES, KIND, strict=True) if kind == 1]
    with pytest.raises(DataError, match="the mask has no row for"):
        CELLS.take({"x": True})
    with pytest.raises(DataError, match="the mask must be True or False"):
        CELLS.take(dict.fromkeys(NAMES, 3))


@pytest.mark.parametrize("index", [slice("a", "b"), slice(0.5, None), slice(None, None, 0)], ids=str)
def test_slices_that_are_no_integers_are_refused_in_words(index):
    with pytest.raises(DataError, match="a slice of cells takes integers"):
        CELLS.take(index)
    with pytest.raises(DataError, match="a slice of cells takes integers"):
        CELLS[index]


BATCHES = ps.Cells.from_anndata(ADATA, batch="number")


@pytest.mark.parametrize("verb", [ps.impute, ps.normalized_expression], ids=lambda verb: verb.__name__)
def test_batches_come_in_any_container(verb):
    model = ps.SCVI(N_GENES, 2, BATCHES.n_covariates, n_hidden=8, n_layers=1)
    fit = ps.fit(model, BATCHES, epochs=1, validation=0, progress=False, device="cpu")
    mean = {"quantity": ps.imputation.mean_given_no_dropout} if verb is ps.impute else {}
    few = BATCHES.take([0, 1])
    expected = verb(fit, few, samples=2, batches=["1", "2"], **mean)
    for batches in (("1", "2"), [1, 2.0], np.array([1, 2]), pd.Index(["1", "2"]), pd.Series([1, 2]), iter(["1", "2"])):
        np.testing.assert_array_equal(verb(fit, few, samples=2, batches=batches, **mean), expected)
    for batches in ("1", 1):
        with pytest.raises(ModelError, match="batches must be names in a list"):
            verb(fit, few, samples=2, batches=batches, **mean)


def test_transferred_labels_say_which_cells_are_wrong(fit):
    with pytest.raises(ModelError, match="expected Cells as reference=, got AnnData"):
        ps.transfer_labels(fit, ADATA, CELLS, "kind")
    with pytest.raises(ModelError, match="expected Cells as query=, got AnnData"):
        ps.transfer_labels(fit, CELLS, ADATA, "kind")
