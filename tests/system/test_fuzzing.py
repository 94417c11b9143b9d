"""Every kind of AnnData through the public entries: the result of plain dense counts, or an error of the package.

``PYRO_SCVI_FUZZ_SEED`` draws other examples than the fixed ones; ``pytest -m slow`` draws 500 for each entry.
"""

import os
import string
import warnings
from functools import cache
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import seed as seeded_by
from scipy import sparse

import pyro_scvi as ps
from pyro_scvi.data.count_checks import LARGEST_EXACT_COUNT
from pyro_scvi.errors import DataError, PyroScviError, SchemaError

SEED = os.environ.get("PYRO_SCVI_FUZZ_SEED")
FITTED_GENES = ["g0", "g1", "g2", "g3"]

DTYPES = ["f2", "f4", "f8", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">f4", ">i4", "?"]
POISON = [np.nan, np.inf, -np.inf, -1.0, 0.5, 1e7, 2.0**24, 2.0**25, 1e30]


class Example(NamedTuple):
    """An AnnData with what its counts are, (cells, genes) in float64, and how it is to be read."""

    adata: AnnData
    counts: np.ndarray
    boolean: bool
    layer: str | None

    def __repr__(self):
        obs = {name: column.tolist() for name, column in self.adata.obs.items()}
        kinds = {name: str(column.dtype) for name, column in self.adata.obs.items()}
        return f"{self.form} {self.counts.tolist()}, genes {self.genes}, obs {obs} {kinds}, view {self.adata.is_view}"

    @property
    def form(self):
        """What holds the counts; None where AnnData itself cannot give it (SciPy takes no rows of sparse float16)."""
        try:
            matrix = self.adata.X if self.layer is None else self.adata.layers[self.layer]
        except ValueError:
            return None
        return f"{type(matrix).__name__} of {matrix.dtype}"

    @property
    def genes(self):
        return [str(name) for name in self.adata.var_names]

    def has_own_names(self):
        """Whether every gene has a name of its own."""
        return len(set(self.genes)) == len(self.genes)

    def countable(self):
        """Whether a count model can take the matrix."""
        x = self.counts
        whole = bool(np.isfinite(x).all()) and bool(((x >= 0) & (x == np.rint(x)) & (x <= LARGEST_EXACT_COUNT)).all())
        return whole and self.has_own_names() and self.form is not None and 0 not in x.shape and not self.boolean


# --- strategies ---


@st.composite
def matrices(draw, n_cells, n_genes):
    """A matrix of any kind that AnnData takes, its values in float64, and whether it is boolean."""
    x = np.array(draw(st.lists(st.integers(0, 9), min_size=n_cells * n_genes, max_size=n_cells * n_genes)), dtype=float)
    x = x.reshape(n_cells, n_genes)
    if x.size and draw(st.integers(0, 5)) == 0:
        x.flat[draw(st.integers(0, x.size - 1))] = draw(st.sampled_from(POISON))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    with np.errstate(all="ignore"):
        typed = x.astype(dtype)
    form = draw(st.sampled_from([np.asarray, np.asfortranarray, "csr", "csc", "csr_array", "csc_array"]))
    if not isinstance(form, str):
        return form(typed), typed.astype(float), dtype.kind == "b"
    return sparsely(draw, typed, form), typed.astype(float), dtype.kind == "b"


def sparsely(draw, typed, form):
    """A sparse matrix with, at will, stored zeros, long or mixed index types, and rows out of order."""
    make = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "csr_array": sparse.csr_array}.get(
        form, sparse.csc_array
    )
    by_column = form.startswith("csc")
    dense = typed.T if by_column else typed
    lengths, indices, data = [], [], []
    for row in dense:
        stored = draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row)))
        kept = np.flatnonzero((row != 0) | np.array(stored, bool))
        kept = kept[::-1] if draw(st.booleans()) else kept
        lengths.append(len(kept)), indices.append(kept), data.append(row[kept])
    index_types = draw(st.sampled_from([("i4", "i4"), ("i8", "i8"), ("i4", "i8")]))
    parts = (
        np.concatenate([np.zeros(0, typed.dtype), *data]),
        np.concatenate([np.zeros(0, int), *indices]).astype(index_types[0]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(index_types[1]),
    )
    matrix = make(typed.shape, dtype=np.float32)  # SciPy makes none of float16, but AnnData files hold some
    matrix.data, matrix.indices, matrix.indptr = parts
    matrix.has_sorted_indices = False
    return matrix


def names(n, prefix):
    """Names of all kinds: plain, permuted, unicode, empty, integers, missing, or with one that occurs twice."""
    plain = [f"{prefix}{i}" for i in range(n)]
    odd = st.lists(st.text(string.ascii_letters + "é β細胞 -\n", max_size=4), min_size=n, max_size=n)
    missing = st.just([np.nan, *plain[1:]] if n else [])
    twice = st.just([plain[-1], *plain[1:]] if n else [])
    return st.one_of(st.just(plain), st.permutations(plain), odd, st.just(list(range(n))), missing, twice)


@st.composite
def columns(draw, n):
    """A column of obs: categories with unused and missing ones, strings, numbers, dates, mixtures, one value."""
    pool = draw(
        st.sampled_from(
            [
                ["a", "b"],
                ["a", None],
                [1, 2, 3],
                [0.5, np.nan],
                [1.0, 2.0],
                [True, False],
                ["a", 1, 2.5],
                [np.inf, 1.0],
                ["", " "],
                [pd.Timestamp("2020-01-01"), pd.Timestamp("2021-01-01")],
                [None],
                [(1, 2), (3, 4)],
                [2**60, 2**60 + 1],
                [b"a", b"b"],
                [1 + 2j, 3j],
            ]
        )
    )
    values = [pool[i] for i in draw(st.lists(st.integers(0, len(pool) - 1), min_size=n, max_size=n))]
    made: Any = pd.Series(values, dtype=draw(st.sampled_from([None, object])))
    kind = draw(st.sampled_from(["as is", "categorical", "ordered", "nullable"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if kind == "nullable":
                made = made.convert_dtypes()
            elif kind != "as is":
                known = pd.unique(made.dropna())
                spare = ["unused"] if len(known) and isinstance(known[0], str) else []
                made = pd.Series(pd.Categorical(values, [*known[::-1], *spare], ordered=kind == "ordered"))
        except (TypeError, ValueError):
            assume(False)
    return made.to_numpy() if kind == "as is" else made.array


@st.composite
def examples(draw, genes, n_genes):
    n_cells, n_genes = draw(st.integers(0, 6)), draw(n_genes)
    matrix, counts, boolean = draw(matrices(n_cells, n_genes))
    layer = draw(st.sampled_from([None, None, "raw"]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            obs = pd.DataFrame({name: draw(columns(n_cells)) for name in ("batch", "kind")}, index=range(n_cells))
            ages = st.lists(st.integers(20, 70), min_size=n_cells, max_size=n_cells)
            obs["age"] = draw(st.one_of(ages, ages.map(lambda values: np.array(values) / 8), columns(n_cells)))
            obs.index = pd.Index(draw(names(n_cells, "c")))
            var = pd.DataFrame(index=pd.Index(draw(genes(n_genes, "g"))))
            if layer is None:
                adata = AnnData(matrix, obs=obs, var=var)
            else:
                adata = AnnData(draw(st.sampled_from([None, np.full((n_cells, n_genes), 0.5)])), obs=obs, var=var)
                adata.layers[layer] = matrix
            if draw(st.booleans()) and n_cells:
                rows = draw(st.lists(st.integers(0, n_cells - 1), min_size=1, unique=True))
                adata, counts = adata[rows], counts[rows]
    except (TypeError, ValueError, KeyError):
        assume(False)  # no AnnData either
    return Example(adata, counts, boolean, layer)


# --- what is right ---


def dense_twin(example, **options):
    """The cells of the same counts as a plain dense float32 matrix."""
    obs = example.adata.obs.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = AnnData(example.counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=example.genes))
        return ps.Cells.from_anndata(twin, **options)


def read(example, **options):
    """The cells, or None where the package refuses them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", UserWarning)  # of empty cells, large counts and doubled names
        try:
            return ps.Cells.from_anndata(example.adata, layer=example.layer, **options)
        except (DataError, SchemaError):
            return None


def usable_batch(column):
    return not column.isna().any() and not (column.dtype.kind == "f" and column.nunique() > 20)


def as_numbers(column):
    """A covariate as floats, or None where it is none: by Python's own float of every value."""
    values = column.tolist()
    if isinstance(column.dtype, pd.CategoricalDtype):
        return None
    if column.isna().any() or any(isinstance(v, str | bytes | complex | tuple | pd.Timestamp) for v in values):
        return None
    floats = np.array([float(value) for value in values])
    return floats if np.isfinite(floats).all() and floats.std() > 1e-10 * abs(floats.mean()) else None


def check_reading(example):
    cells = read(example)
    assert (cells is not None) == example.countable()
    if cells is not None:
        np.testing.assert_array_equal(cells[:][0].numpy(), example.counts)
        np.testing.assert_array_equal(cells.totals, example.counts.sum(1))
        assert list(cells.gene_names) == example.genes
        assert list(cells.cell_names) == list(example.adata.obs_names)


def check_annotations(example):
    obs = example.adata.obs
    cells = read(example, batch="batch", covariates=["age"])
    ages = as_numbers(obs["age"]) if len(obs) else None
    assert (cells is not None) == (example.countable() and usable_batch(obs["batch"]) and ages is not None)
    if cells is not None:
        np.testing.assert_allclose(cells.covariates[:, -1], (ages - ages.mean()) / ages.std(), rtol=1e-4, atol=1e-5)
        one_hot, labels = cells.covariates[:, :-1], obs["batch"].tolist()
        assert (one_hot.sum(1) == 1).all()
        same = [[a == b for a in labels] for b in labels]
        np.testing.assert_array_equal(one_hot @ one_hot.T, same)
        assert cells.n_batches == len(set(labels))


def quick_fit(cells):
    model = ps.SCVI(cells.n_genes, 2, cells.n_covariates, n_hidden=4, n_layers=1)
    half = -(-cells.n_cells // 2)
    return ps.fit(model, cells, epochs=1, batch_size=half, validation=0, progress=False, device="cpu")


def check_fit(example):
    cells = read(example, batch="batch")
    if cells is None:
        return
    fit = quick_fit(cells)
    assert all(bool(value.isfinite().all()) for part in (fit.model, fit.guide) for value in part.state_dict().values())
    assert np.isfinite(fit.history[["train_loss", "kl"]]).all(axis=None)
    twin = dense_twin(example, batch="batch")
    np.testing.assert_allclose(ps.embed(fit, cells), ps.embed(quick_fit(twin), twin), rtol=1e-3, atol=1e-4)


@cache
def known_fit():
    x = np.random.default_rng(0).poisson(2.0, (12, 4)) + 1
    return quick_fit(ps.Cells.from_counts(x, gene_names=FITTED_GENES))


def query(example):
    """The cells as the known fit wants them, and their counts in its order of genes; None where they are refused."""
    cells = read(example, schema=known_fit().schema)
    if not (example.has_own_names() and set(FITTED_GENES) <= set(example.genes)):
        assert cells is None
        return None
    x = example.counts[:, [example.genes.index(name) for name in FITTED_GENES]]
    assert (cells is not None) == example._replace(counts=x).countable()
    return None if cells is None else (cells, x)


def query_names(n, prefix):
    """The genes of the known fit in any order, at times with others."""
    known = st.permutations(FITTED_GENES + ["other"] * (n - 4)) if n >= 4 else names(n, prefix)
    return st.one_of(known, names(n, prefix))


def check_embedding(example):
    found = query(example)
    if found is not None:
        cells, x = found
        twin = ps.Cells.from_counts(x.astype(np.float32), gene_names=FITTED_GENES)
        latent = ps.embed(known_fit(), cells)
        assert np.isfinite(latent).all()
        np.testing.assert_allclose(latent, ps.embed(known_fit(), twin), rtol=1e-5, atol=1e-6)


def differential_expression(cells, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "groupby holds '", UserWarning)  # words for missing values
        return ps.differential_expression(known_fit(), cells, **options)


def check_differential_expression(example):
    found = query(example)
    if found is None:
        return
    cells, x = found
    labels = example.adata.obs["kind"].tolist()
    known = [label for label in dict.fromkeys(labels) if not pd.isna(label)] if labels else []
    options = {"estimand": ps.differential.RandomPairs(largest_se=1.0, most_pairs=64)}
    groups = {"group_a": known[0], "group_b": known[1]} if len(known) > 1 else {"group_a": known[0] if known else "x"}
    try:
        table = differential_expression(cells, groupby="kind", **groups, **options)
    except PyroScviError:
        assert not known or len(set(map(str, labels))) == 1
        return
    assert list(table.index) == FITTED_GENES
    assert np.isfinite(table.to_numpy()).all()
    in_a = np.array([not pd.isna(label) and label == groups["group_a"] for label in labels])
    np.testing.assert_allclose(table.mean_a, x[in_a].mean(0), rtol=1e-5)
    names = list(cells.cell_names)  # pairs are drawn by these
    twin = ps.Cells.from_counts(x.astype(np.float32), gene_names=FITTED_GENES, cell_names=names)
    other = differential_expression(twin, groupby=labels, **groups, **options)
    np.testing.assert_allclose(table, other, rtol=1e-4, atol=1e-5)


ANY, ENOUGH = st.integers(0, 5), st.one_of(st.integers(4, 5), st.integers(0, 5))
CHECKS = {
    "from_anndata": (check_reading, names, ANY),
    "batch and covariates": (check_annotations, names, ANY),
    "fit": (check_fit, names, ANY),
    "embed": (check_embedding, query_names, ENOUGH),
    "differential_expression": (check_differential_expression, query_names, ENOUGH),
}


@pytest.mark.parametrize("n", [25, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("entry", CHECKS)
def test_any_anndata_is_read_right_or_refused(entry, n):
    check, *kinds = CHECKS[entry]

    @settings(
        max_examples=n,
        deadline=None,
        derandomize=SEED is None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(examples(*kinds))
    def run(example):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", UserWarning)
            check(example)

    (run if SEED is None else seeded_by(int(SEED))(run))()
