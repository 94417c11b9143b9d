"""Queries with batches that a fit does not know: expression, mapping, labels."""

from contextlib import nullcontext

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from anndata import AnnData
from scipy.spatial.distance import cdist

import pyro_scvi as ps
from pyro_scvi.errors import DataError, ModelError, SchemaError
from tests.support.programs import Effect, Observing

N, N_GENES = 120, 20
DONORS = np.array(["a", "b", "c"])
SHIFT = {"a": 1.0, "b": 3.0, "c": 6.0}  # of the first five genes


def simulated():
    """Two kinds of cells of three donors; each donor has more of the first genes than the one before."""
    rng = np.random.default_rng(1)
    donor, kind = DONORS[np.arange(N) // 40], np.array(["p", "q"])[np.arange(N) % 2]
    rates = np.where(kind[:, None] == "p", 1.0, 4.0) ** (np.arange(N_GENES) % 3 - 1) * 4.0
    rates[:, :5] *= np.array([SHIFT[name] for name in donor])[:, None]
    obs = pd.DataFrame(
        {
            "donor": donor,
            "assay": np.array(["s", "t"])[np.arange(N) // 2 % 2],
            "age": rng.normal(40, 9, N),
            "kind": kind,
        },
        index=[f"cell_{i}" for i in range(N)],
    )
    return AnnData(rng.poisson(rates), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)]))


ADATA = simulated()
OPTIONS = {"batch": "donor", "categories": ["assay"], "covariates": ["age"]}
REFERENCE, QUERY = ADATA[:80].copy(), ADATA[60:].copy()


def reference_of(**options):
    return ps.Cells.from_anndata(REFERENCE, **OPTIONS | options)


def fit_of(cells, guide=None, epochs=2, **options):
    model = ps.SCVI(N_GENES, 3, cells.n_covariates, **{"n_hidden": 16} | options)
    return ps.fit(model, cells, None if guide is None else guide(model), epochs=epochs, progress=False)


@pytest.fixture(scope="module")
def fit():
    return fit_of(reference_of(), epochs=20)


@pytest.fixture(scope="module")
def query(fit):
    return query_of(fit)


def query_of(fit, adata=QUERY):
    return ps.Cells.from_anndata(adata, schema=fit.schema, allow_new_batches=True)


@pytest.fixture(scope="module")
def mapped(fit, query):
    return ps.map_query(fit, query, epochs=60, learning_rate=0.05, progress=False)


def shares_by_hand(fit, cells, batch, samples, seed=0):
    """Shares of draws of z, decoded by the network itself in one batch."""
    z = ps.sample_posterior(fit, cells, samples=samples, seed=seed, batch_size=64).z.values
    gamma = torch.as_tensor(cells.with_batch(batch).covariates)
    with torch.no_grad():
        return fit.model.decoder(torch.as_tensor(z), gamma)["log_mean"].softmax(-1).numpy()


# --- normalised expression ---


def test_normalized_expression_is_direct_decoding_averaged_over_batches(fit):
    cells = reference_of().take(range(50))
    by_batch = [shares_by_hand(fit, cells, name, 8) for name in "ab"]
    every = 1e4 * np.mean(by_batch, axis=0)
    found = ps.normalized_expression(fit, cells, samples=8)
    np.testing.assert_allclose(found, every.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found.sum(axis=1), 1e4, rtol=1e-5)
    one = ps.normalized_expression(fit, cells, batches=["b"], per=1.0, samples=8)
    np.testing.assert_allclose(one, by_batch[1].mean(0), rtol=1e-4)
    low_high = ps.normalized_expression(
        fit, cells, genes=["g7", "g2"], quantiles=[0.1, 0.9], samples=8, sampler=ps.Amortized()
    )
    expected = np.quantile(every[..., [7, 2]], [0.1, 0.9], axis=0)
    np.testing.assert_allclose(low_high[0.1], expected[0], rtol=1e-4)
    np.testing.assert_allclose(low_high[0.9], expected[1], rtol=1e-4)
    assert list(low_high.columns) == [(0.1, "g7"), (0.1, "g2"), (0.9, "g7"), (0.9, "g2")]


def test_the_cells_own_batch_is_uncorrected(fit):
    cells = reference_of()
    own = ps.normalized_expression(fit, cells, batches=(), samples=4)
    donor_a = np.flatnonzero(cells.obs["donor"] == "a")
    expected = ps.normalized_expression(fit, cells, batches=["a"], samples=4)
    np.testing.assert_array_equal(own.iloc[donor_a], expected.iloc[donor_a])
    corrected = ps.normalized_expression(fit, cells, samples=4)
    first = [f"g{i}" for i in range(5)]

    def gap(table):
        means = table[first].groupby(cells.obs["donor"].to_numpy()).mean().mean(axis=1)
        return abs(np.log(means["b"] / means["a"]))

    assert gap(corrected) < 0.3 * gap(own)


class MeanByGate(ps.SCVI):
    """A program of one's own whose mean depends on the gate."""

    def decode(self, z, log_library, gamma):
        theta = super().decode(z, log_library, gamma)
        return theta | {"log_mean": theta["log_mean"] + theta["gate_logits"]}


def test_a_mean_that_depends_on_another_head_is_decoded_with_it():
    cells = reference_of()
    fit = ps.fit(MeanByGate(N_GENES, 3, cells.n_covariates, n_hidden=8), cells, epochs=1, progress=False)
    z = torch.as_tensor(ps.sample_posterior(fit, cells, samples=4, batch_size=64).z.values)
    with torch.no_grad():
        eta = fit.model.decoder(z, torch.as_tensor(cells.with_batch("a").covariates))
        expected = (eta["log_mean"].log_softmax(-1) + eta["gate_logits"]).softmax(-1).mean(0)
    found = ps.normalized_expression(fit, cells, batches=["a"], samples=4, per=1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_other_heads_are_there_again_after_a_call(fit):
    cells = reference_of()
    before = ps.technical_zero_probability(fit, cells, samples=2)
    ps.normalized_expression(fit, cells, samples=2)
    np.testing.assert_array_equal(ps.technical_zero_probability(fit, cells, samples=2), before)
    assert all("forward" not in vars(head) for head in fit.model.decoder.heads.values())
    assert "log_mean" not in vars(fit.model.library)


@pytest.mark.parametrize("kind", [ps.libraries.NoLibrary, ps.libraries.ObservedLibrary, ps.libraries.SizeFactor])
def test_shares_are_those_of_the_whole_program_under_every_library(kind):
    adata = REFERENCE.copy()
    adata.obs["sf"] = np.linspace(0.5, 2.0, adata.n_obs)
    factor = {"size_factor": "sf"} if kind is ps.libraries.SizeFactor else {}
    cells = ps.Cells.from_anndata(adata, **OPTIONS | factor)
    library = kind(cells.columns["sf"]) if factor else kind()
    fit = fit_of(cells, library=library, n_hidden=8)
    means = ps.impute(fit, cells, quantity=ps.imputation.mean_given_no_dropout, samples=1, batch_size=64)
    found = ps.normalized_expression(fit, cells, batches=(), samples=1, per=1.0)
    np.testing.assert_allclose(found, means / means.sum(1, keepdims=True), rtol=1e-4)


def test_genes_and_out_are_parts_of_the_whole_table(fit):
    cells = reference_of()
    whole = ps.normalized_expression(fit, cells, samples=3)
    assert whole.columns.tolist() == list(fit.schema.gene_names)
    np.testing.assert_array_equal(
        ps.normalized_expression(fit, cells, samples=3, genes=["g9", "g1"]), whole[["g9", "g1"]]
    )
    out = np.empty((80, 2), dtype=np.float32)
    assert ps.normalized_expression(fit, cells, samples=3, genes=["g9", "g1"], out=out) is out
    np.testing.assert_array_equal(out, whole[["g9", "g1"]])


def test_expression_of_new_batches_is_that_of_known_ones(fit, query):
    found = ps.normalized_expression(fit, query, samples=4)
    known = [query.with_batch(name) for name in "ab"]
    for cells in known:  # z does not depend on the batch, and both are decoded in all
        np.testing.assert_array_equal(found, ps.normalized_expression(fit, cells, samples=4))
    own = ps.normalized_expression(fit, query, batches=(), samples=4).iloc[20:]
    np.testing.assert_allclose(own, found.iloc[20:], rtol=1e-5)
    new = query.take(range(20, 60))
    quantity = ps.imputation.expression
    counts = np.mean([ps.impute(fit, new.with_batch(name), quantity=quantity, samples=400) for name in "ab"], axis=0)
    np.testing.assert_allclose(ps.impute(fit, new, samples=400), counts, rtol=0.1)


def test_an_encoder_that_reads_the_batch_is_averaged_over_known_ones():
    fit = fit_of(reference_of(), lambda model: ps.guides.DiagonalNormal(model, encode_covariates=True))
    query = query_of(fit)
    z = [ps.embed(fit, query.with_batch(name)) for name in "ab"]
    assert not np.allclose(z[0], z[1])
    np.testing.assert_allclose(ps.embed(fit, query)[20:], np.mean(z, axis=0)[20:], atol=1e-6)
    np.testing.assert_array_equal(ps.embed(fit, query)[:20], z[1][:20])  # cells of donor b
    shares = ps.normalized_expression(fit, query, samples=400)
    each = [ps.normalized_expression(fit, query.with_batch(name), samples=400) for name in "ab"]
    np.testing.assert_allclose(shares.iloc[20:], np.mean(each, axis=0)[20:], rtol=0.1)


def test_what_is_wrong_in_a_call_is_named(fit):
    cells = reference_of()
    wrong = {
        "genes 'x9'": {"genes": ["g1", "x9"]},
        "as in \\['g1'\\]": {"genes": "g1"},
        "batches must be names": {"batches": "a"},
        "no batch 'z'": {"batches": ["z"]},
        "per must": {"per": 0.0},
        "quantiles must": {"quantiles": [2.0]},
        "samples must": {"samples": 0},
        "out must be an array of shape \\(80, 20\\)": {"out": np.empty((2, 2))},
        "does not know the genes": {"genes": []},
    }
    for says, options in wrong.items():
        with pytest.raises((ModelError, SchemaError), match=says):
            ps.normalized_expression(fit, cells, **options)


# --- mapping ---


def test_the_reference_does_not_move_by_a_bit(fit, query, mapped):
    again = ps.Cells.from_anndata(REFERENCE, schema=mapped.schema)
    cells = reference_of()
    space = ps.spaces.Expression(3).fitted(fit, cells)
    np.testing.assert_array_equal(ps.embed(mapped, again), ps.embed(fit, cells))
    np.testing.assert_array_equal(ps.embed(mapped, again, space=space), ps.embed(fit, cells, space=space))
    for name, value in fit.guide.state_dict().items():
        assert torch.equal(mapped.guide.state_dict()[name], value)
    old, new = fit.model.state_dict(), mapped.model.state_dict()
    for name, value in new.items():
        kept = torch.cat([value[:, :-4], value[:, -3:]], 1) if value.shape != old[name].shape else value
        assert torch.equal(kept, old[name]), name  # gamma is a, b, new c, assay s, t, age
    np.testing.assert_allclose(ps.impute(mapped, again, samples=3), ps.impute(fit, cells, samples=3), rtol=1e-5)
    assert fit.schema == cells.schema


def test_a_new_batch_is_learned(fit, query, mapped):
    assert mapped.schema.batches == ("a", "b", "c")
    assert mapped.settings["mapped_batches"] == ["c"]
    new = ps.Cells.from_anndata(QUERY[20:].copy(), schema=mapped.schema)
    assert mapped.settings["n_cells"] == len(new) == 40
    assert mapped.history.train_loss.iloc[-1] < mapped.history.train_loss.iloc[0] - 0.5

    def shift(batch):
        table = ps.normalized_expression(mapped, new, batches=[batch], samples=4)
        return np.log(table.iloc[:, :5].sum(axis=1) / table.iloc[:, 5:].sum(axis=1)).mean()

    assert shift("b") - shift("a") > 0.3
    assert shift("c") - shift("b") > 0.2  # between known batches only at the start
    assert all(parameter.requires_grad for parameter in mapped.model.parameters())


def test_a_mapped_fit_is_saved_and_mapped_and_trained_again(mapped, tmp_path):
    mapped.save(tmp_path / "fit")
    loaded = ps.load(tmp_path / "fit")
    new = ps.Cells.from_anndata(QUERY, schema=mapped.schema)
    np.testing.assert_array_equal(ps.embed(loaded, new), ps.embed(mapped, new))
    np.testing.assert_array_equal(ps.impute(loaded, new, samples=2), ps.impute(mapped, new, samples=2))
    other = QUERY.copy()
    other.obs["donor"] = "d"
    with torch.inference_mode():
        twice = ps.map_query(loaded, query_of(loaded, other), epochs=1, progress=False)
    assert twice.schema.batches == ("a", "b", "c", "d")
    again = ps.fit(twice.model, ps.Cells.from_anndata(other, schema=twice.schema), guide=twice.guide, epochs=1)
    assert np.isfinite(again.history.train_loss).all()


@pytest.mark.filterwarnings("ignore:of 80 labels")  # after two epochs
def test_columns_behind_the_batches_move_with_them():
    cells = reference_of(labels="kind")
    prior = ps.priors.ByLabel(3, columns=cells.columns["kind"])
    model = ps.SCVI(N_GENES, 3, cells.n_covariates, prior=prior, decoder=ps.networks.LinearDecoder())
    fit = ps.fit(model, cells, epochs=2, progress=False)
    mapped = ps.map_query(fit, query_of(fit), epochs=2, progress=False)
    again = ps.Cells.from_anndata(REFERENCE, schema=mapped.schema)
    assert mapped.model.prior.columns == again.columns["kind"]
    # Up to rounding: gamma has more columns.
    np.testing.assert_allclose(ps.predict_labels(mapped, again), ps.predict_labels(fit, cells), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ps.impute(mapped, again, samples=2), ps.impute(fit, cells, samples=2), rtol=1e-5)


def test_a_program_of_ones_own_is_mapped_through_its_decoder():
    cells = reference_of()
    fit = ps.fit(Effect(N_GENES, 2, cells.n_covariates, n_hidden=8), cells, epochs=1, progress=False)
    mapped = ps.map_query(fit, query_of(fit), epochs=1, progress=False)
    again = ps.Cells.from_anndata(REFERENCE, schema=mapped.schema)
    np.testing.assert_array_equal(ps.embed(mapped, again), ps.embed(fit, cells))


class Keeps(Observing):
    """Keeps what it draws as attributes: the parameter itself, and a part of it."""

    def outside(self):
        self.kept = pyro.sample("m", dist.Normal(torch.zeros(N_GENES), 0.5).to_event(1))
        self.first = self.kept[:1]

    def decode(self, z, log_library, gamma):
        theta = super().decode(z, log_library, gamma)
        return theta | {"log_mean": theta["log_mean"] + self.kept}


def test_a_program_may_keep_what_it_draws():
    cells = reference_of()
    model = Keeps(N_GENES, 2, cells.n_covariates, n_hidden=8)
    fit = ps.fit(model, cells, epochs=5, batch_size=20, validation=0, progress=False)
    mapped = ps.map_query(fit, query_of(fit), epochs=1, progress=False)
    assert mapped.schema.batches == ("a", "b", "c")
    assert set(dict(mapped.model.named_parameters())) == set(dict(fit.model.named_parameters()))
    at_draws = fit.with_globals({name: value.numpy() for name, value in fit.guide.weights.draws(1).items()})
    assert ps.map_query(at_draws, query_of(at_draws), epochs=1, progress=False).schema.n_batches == 3


class ByNumber(Effect):
    """Reads the age, the last column, by its number."""

    def decode(self, z, log_library, gamma):
        theta = super().decode(z, log_library, gamma)
        return theta | {"log_mean": theta["log_mean"] + gamma[:, 4:5]}


class ByBatch(Effect):
    """Adds something in the first batch, beside the decoder."""

    def decode(self, z, log_library, gamma):
        theta = super().decode(z, log_library, gamma)
        return theta | {"log_mean": theta["log_mean"] + gamma[:, :1]}


def test_what_would_not_know_a_new_batch_is_refused(fit):
    cells = reference_of()
    encoding = lambda model: ps.guides.DiagonalNormal(model, encode_covariates=True)  # noqa: E731
    per_batch = ps.likelihoods.NB(ps.likelihoods.PerGeneAndBatch(N_GENES, 2))
    first = cells.columns["donor"]
    weights = {"decoder.layers.linear.0.weight": ps.weights.NormalWeights()}
    refused = {
        "depends on the batch": lambda: fit_of(cells, encoding),
        r"\['x'\] of this model not only": lambda: fit_of(cells, likelihood=per_batch),
        r"\['l'\] of this model not only": lambda: fit_of(
            cells, library=ps.libraries.LatentLibrary([4.0, 5.0], [0.2, 0.3])
        ),
        r"does not see the batches, and SCVI uses them otherwise, in the distribution of \['z'\]": lambda: fit_of(
            cells, prior=ps.priors.Conditional(3, first)
        ),
        r"does not see the batches, and ByBatch uses them otherwise.*\['x'\]": lambda: ps.fit(
            ByBatch(N_GENES, 2, 5, n_hidden=8, decoder_columns=[]), cells, epochs=1, progress=False
        ),
        "nothing to learn about new ones": lambda: fit_of(cells, decoder_columns=[]),
        "a prior from weight_priors": lambda: fit_of(cells, weight_priors=weights),
        "by their number": lambda: ps.fit(ByNumber(N_GENES, 2, 5, n_hidden=8), cells, epochs=1, progress=False),
        "not only through the decoder": lambda: ps.fit(
            ByBatch(N_GENES, 2, 5, n_hidden=8), cells, epochs=1, progress=False
        ),
    }
    for says, made in refused.items():
        other = made()
        with pytest.raises(ModelError, match=says):
            ps.map_query(other, query_of(other), epochs=1, progress=False)
    with pytest.raises(ModelError, match=r"no cell is of a new batch.*'a', 'b'"):
        ps.map_query(fit, cells)
    with pytest.raises(ModelError, match="learning_rate must"):
        ps.map_query(fit, query_of(fit), learning_rate=0)


def test_one_known_batch_cannot_be_told_from_a_new_one():
    cells = ps.Cells.from_anndata(REFERENCE[:40].copy(), batch="donor")
    with pytest.raises(SchemaError, match="only one batch, 'a'"):
        ps.Cells.from_anndata(QUERY, schema=cells.schema, allow_new_batches=True)
    same = ps.Cells.from_anndata(REFERENCE[:40].copy(), schema=cells.schema, allow_new_batches=True)
    assert same.new_batches == ()


# --- labels ---


def test_labels_are_those_of_the_nearest_cells(fit, query):
    cells = reference_of()
    table = ps.transfer_labels(fit, cells, query, "kind", neighbors=5)
    apart = cdist(ps.embed(fit, query), ps.embed(fit, cells))
    nearest = np.argsort(apart, 1)[:, :5]
    share = (cells.obs["kind"].to_numpy()[nearest] == "p").mean(1)
    np.testing.assert_array_equal(table.label == "p", share > 0.5)
    np.testing.assert_allclose(table.probability, np.maximum(share, 1 - share))
    within = np.sort(cdist(ps.embed(fit, cells), ps.embed(fit, cells)), 1)[:, 1:6].mean(1)
    mean = np.sort(apart, 1)[:, :5].mean(1)
    np.testing.assert_allclose(table.distance_quantile, (within < mean[:, None]).mean(1))
    assert table.index.tolist() == query.cell_names.tolist()
    assert (table.label == query.obs["kind"]).mean() > 0.9


def test_cells_without_a_label_vote_for_nothing(fit, query):
    some = REFERENCE.copy()
    some.obs.loc[some.obs_names[:40], "kind"] = None
    cells = ps.Cells.from_anndata(some, schema=fit.schema)
    table = ps.transfer_labels(fit, cells, query, "kind")
    expected = ps.transfer_labels(fit, reference_of().take(range(40, 80)), query, "kind")
    pd.testing.assert_frame_equal(table, expected)


def test_the_space_is_that_of_the_reference_and_the_mapped_fit_gives_the_same(fit, query, mapped):
    cells, space = reference_of(), ps.spaces.Expression(3)
    found = ps.transfer_labels(fit, cells, query, "kind", space=space)
    same = ps.transfer_labels(fit, cells, query, "kind", space=space.fitted(fit, cells))
    pd.testing.assert_frame_equal(found, same)
    again, new = (ps.Cells.from_anndata(adata, schema=mapped.schema) for adata in (REFERENCE, QUERY))
    pd.testing.assert_frame_equal(
        ps.transfer_labels(mapped, again, new, "kind"), ps.transfer_labels(fit, cells, query, "kind")
    )


def test_too_few_labels_are_refused(fit, query):
    with pytest.raises(DataError, match="10 cells of the reference"):
        ps.transfer_labels(fit, reference_of().take(range(10)), query, "kind", neighbors=10)
    with pytest.raises(SchemaError, match="no column 'type'"):
        ps.transfer_labels(fit, reference_of(), query, "type")


def test_a_new_batch_that_is_written_in_two_ways_is_one(fit):
    """As a number in some cells and as text in others: cells would be read into a column that was never trained."""
    mapped = []
    for values in (["9"], [9, "9"]):
        adata = QUERY.copy()
        adata.obs["donor"] = pd.Series([values[i % len(values)] for i in range(adata.n_obs)], adata.obs_names, object)
        told = pytest.warns(UserWarning, match="as numbers and as text") if len(values) > 1 else nullcontext()
        with told:
            new = ps.Cells.from_anndata(adata, schema=fit.schema, allow_new_batches=True)
        assert new.new_batches == ("9",)
        made = ps.map_query(fit, new, epochs=1, progress=False)
        again = ps.Cells.from_anndata(adata, schema=made.schema)
        mapped.append((made.schema.batches, ps.impute(made, again, samples=2, seed=1)))
    assert mapped[0][0] == mapped[1][0]
    np.testing.assert_array_equal(mapped[0][1], mapped[1][1])
