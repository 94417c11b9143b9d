"""gamma kept as positions of words and as numbers, beside dense arrays made by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.data import minibatches
from pyro_scvi.data.covariates import MEAN, NONE, Covariates, Numbers, Words
from pyro_scvi.data.minibatches import Minibatches

N = 40
RANDOM = np.random.default_rng(0)
WORDS, LABELS = np.arange(N) % 3, RANDOM.integers(-1, 4, N)
WORDS[5] = MEAN
AGE = RANDOM.normal(size=N).astype(np.float32)
GAMMA = Covariates(N, {"donor": Words.of(WORDS, 3), "age": Numbers(AGE), "label": Words.of(LABELS, 4)})


def by_hand():
    rows = []
    for word, age, label in zip(WORDS, AGE, LABELS, strict=True):
        donor = [1 / 3] * 3 if word == MEAN else [float(word == i) for i in range(3)]
        rows.append([*donor, age, *(float(label == i) for i in range(4))])
    return np.array(rows, dtype=np.float32)


EXPECTED = by_hand()


@pytest.mark.parametrize("columns", [slice(None), slice(0, 3), slice(3, 4), slice(2, 6), slice(5, 8), slice(3, 3)])
@pytest.mark.parametrize("rows", [slice(None), slice(4, 9), np.array([7, 5, 5, 39]), np.array([], dtype=int)])
def test_any_rows_and_columns_are_those_of_the_dense_array(rows, columns):
    found = GAMMA[rows, columns]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, EXPECTED[rows, columns])


def test_blocks_other_cells_and_other_words():
    assert b"".join(GAMMA.blocks()) == EXPECTED.tobytes()
    rows = np.array([3, 5, 1])
    np.testing.assert_array_equal(GAMMA.take(rows)[:], EXPECTED[rows])
    both = GAMMA.gathered(lambda values: np.concatenate([values, values[:2]]))
    np.testing.assert_array_equal(both[:], np.vstack([EXPECTED, EXPECTED[:2]]))
    none = GAMMA.replaced("label", Words.of(np.full(N, NONE), 4))
    assert not none[:, 4:].any()
    np.testing.assert_array_equal(none[:, :4], EXPECTED[:, :4])
    assert Covariates(N, {})[np.arange(4)].shape == (4, 0)


@pytest.mark.parametrize("width", [1, 2, 127, 128, 129, 255, 32768, 32769])
def test_the_smallest_type_holds_every_word(width):
    codes = np.array([0, width - 1, NONE, MEAN])
    words = Words.of(codes, width)
    np.testing.assert_array_equal(words.codes, codes)
    assert words.codes.dtype.itemsize == (1 if width <= 128 else 2 if width <= 32768 else 4)


def test_a_thousand_batches_take_the_memory_of_ten():
    n_cells = 20_000
    counts = np.tile(np.array([1, 2, 3], dtype=np.uint8), (n_cells, 1))
    for n_batches in (10, 1000):
        obs = pd.DataFrame({"batch": np.char.add("b", (np.arange(n_cells) % n_batches).astype(str))})
        cells = ps.Cells.from_counts(counts, obs=obs, batch="batch")
        assert sum(part.codes.nbytes for part in cells.gamma.parts.values()) <= 2 * n_cells
        rows = np.array([0, 999, 19_999])
        np.testing.assert_array_equal(cells[rows][1].argmax(1), pd.Categorical(obs.batch).codes[rows])
        assert Minibatches(cells, torch.device("cpu")).n_cells == n_cells


@pytest.fixture
def annotated():
    random = np.random.default_rng(1)
    obs = pd.DataFrame({"donor": random.choice(list("pqr"), 60), "age": random.normal(size=60)})
    obs["kind"] = pd.Series(random.choice(["a", "b"], 60)).where(random.random(60) < 0.5)
    return ps.Cells.from_counts(random.poisson(2.0, (60, 8)), obs=obs, batch="donor", covariates=["age"], labels="kind")


@pytest.mark.parametrize("counts_too", [False, True])
def test_a_fit_is_the_same_where_covariates_do_not_stay_on_the_device(annotated, monkeypatch, counts_too):
    def bits():
        model = ps.SCVI(8, 2, annotated.n_covariates)
        fit = ps.fit(model, annotated, epochs=2, batch_size=16, progress=False)
        return fit.history.to_numpy(float)[:, :2], ps.embed(fit, annotated)

    history, z = bits()
    needed = 0 if counts_too else 60 * 8  # uint8 counts of all cells, but fewer bytes than their covariates have
    monkeypatch.setattr(minibatches, "RESIDENT_BYTES", needed)
    data = Minibatches(annotated, torch.device("cpu"))
    assert data.gamma is None
    assert (data.resident is None) == counts_too
    again, z_again = bits()
    np.testing.assert_array_equal(history, again)
    np.testing.assert_array_equal(z, z_again)
