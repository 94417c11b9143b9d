"""Priors that are given gamma, against quadrature and enumeration on one latent."""

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from tests.support.toys import N_GENES, grid_of, on_line

pytestmark = pytest.mark.filterwarnings("ignore:k-hat is above", "ignore:.*1 or 2 cells")

N = 12
TYPES = ["t", "b", None]
POISSON = {"likelihood": ps.likelihoods.Poisson(), "library": ps.libraries.NoLibrary()}
SMALL = {"n_hidden": 4, "n_layers": 1, "norm": None, **POISSON}
EXACT = {"samples": 4000, "steps": 50, "progress": False}


@pytest.fixture(scope="module")
def cells():
    """Cells of two donors, a third of them without a label."""
    obs = pd.DataFrame({"donor": ["a", "b"] * (N // 2), "type": TYPES * (N // 3)}, [f"c{i}" for i in range(N)])
    counts = np.random.default_rng(0).poisson(2.0, (N, N_GENES))
    return ps.Cells.from_counts(counts, obs=obs, batch="donor", labels="type")


def fit_of(cells, prior, **options):
    """A fit as one makes it by hand, without training, in double precision."""
    model = ps.SCVI(N_GENES, 1, cells.n_covariates, prior=prior, **SMALL | options).double()
    with torch.no_grad():
        for name, start in {"loc": 1.5, "log_scale": -0.3, "logits": 0.4}.items():
            if isinstance(held := getattr(prior, name, None), torch.nn.Parameter):
                held.copy_(start * torch.arange(-1.0, len(held) - 1).reshape(-1, *[1] * (held.dim() - 1)) + 0.2)
    return ps.Fit(model.eval(), ps.guides.DiagonalNormal(model).double().eval(), pd.DataFrame(), cells.schema)


def ours(gamma):
    """A prior of one's own: two means, by donor."""
    return dist.Normal(3 * (gamma[..., :1] - gamma[..., 1:2]), 1.0).to_event(1)


def log_evidence(fit, cells, laws):
    """By quadrature, with a law of z for every cell."""
    grids = [grid_of(fit.model, cells.take([i]), {"z": on_line(law, -12, 12, 2001)}, lambda at: 0 * at["z"])
             for i, law in enumerate(laws)]  # fmt: skip
    return np.concatenate([grid.log_evidence for grid in grids])


def assert_evidence(fit, cells, laws):
    table = ps.evidence(fit, cells, **EXACT)
    error = (table.log_evidence - log_evidence(fit, cells, laws)).abs()
    assert (error < 5 * table.se + 1e-3).all()


class Mixture:
    """A mixture of normals, as scipy's frozen laws."""

    def __init__(self, weights, laws):
        self.weights, self.laws = weights, laws

    def logpdf(self, at):
        return logsumexp([np.log(w) + law.logpdf(at) for w, law in zip(self.weights, self.laws, strict=True)], 0)


def by_label(prior):
    """Its components, as scipy's laws, and their weights."""
    loc, sd = prior.loc.detach().numpy().ravel(), prior.log_scale.detach().exp().numpy().ravel()
    return [stats.norm(*pair) for pair in zip(loc, sd, strict=True)], prior.logits.detach().softmax(-1).numpy()


@pytest.mark.parametrize("scale", [0.5, None])
def test_evidence_by_category_is_that_of_quadrature(cells, scale):
    prior = ps.priors.Conditional(1, cells.columns["donor"], scale=scale)
    fit = fit_of(cells, prior, decoder_columns=[])
    sd = np.full(2, 0.5) if scale else prior.log_scale.detach().exp().numpy().ravel()
    laws = [stats.norm(prior.loc.detach().numpy().ravel()[i % 2], sd[i % 2]) for i in range(N)]
    assert_evidence(fit, cells, laws)


def test_a_prior_of_ones_own_is_given_gamma_in_every_verb(cells):
    fit = fit_of(cells, ours, decoder_columns=[])
    means = np.where(np.arange(N) % 2, -3.0, 3.0)
    assert_evidence(fit, cells, [stats.norm(mean, 1) for mean in means])
    tree = ps.to_datatree(fit, cells, samples=400)
    drawn = tree["prior"]["z"].mean(["chain", "draw"]).values.ravel()
    assert np.abs(drawn - means).max() < 0.35


def test_ranks_under_a_prior_of_ones_own_are_calibrated(cells):
    fit = fit_of(cells, ours, decoder_columns=[])
    sampler = ps.Importance(steps=30, rounds=1, proposals=300)
    source = ps.calibration.Prior(cells)
    result = ps.calibrate(fit, 300, source=source, sampler=sampler, draws=19, thin=1, batch_size=300, progress=False)
    assert abs(result.summary.coverage_90["z_0"] - 0.9) < 0.05


@pytest.mark.parametrize("weights", [None, "uniform"])
def test_evidence_by_label_is_p_of_x_given_the_label(cells, weights):
    fit = fit_of(cells, ps.priors.ByLabel(1, cells.columns["type"], weights), decoder_columns=[])
    laws, shares = by_label(fit.model.prior)
    assert np.allclose(shares, 0.5) == (weights == "uniform")
    everything = Mixture(shares, laws)
    known = {"b": laws[0], "t": laws[1], None: everything}  # labels are sorted
    assert_evidence(fit, cells, [known[TYPES[i % 3]] for i in range(N)])
    assert_evidence(fit, cells.without("type"), [everything] * N)


def test_predicted_labels_are_those_of_enumeration(cells):
    fit = fit_of(cells, ps.priors.ByLabel(1, cells.columns["type"]), decoder_columns=[])
    laws, shares = by_label(fit.model.prior)
    joint = np.stack([np.log(w) + log_evidence(fit, cells, [law] * N) for w, law in zip(shares, laws, strict=True)], 1)
    exact = np.exp(joint - logsumexp(joint, 1, keepdims=True))
    sampler = ps.Importance(steps=50, proposals=4000)
    table = ps.predict_labels(fit, cells, samples=4000, sampler=sampler, progress=False)
    assert table.columns.tolist() == ["b", "t"]
    assert table.index.equals(pd.Index(cells.cell_names, name="cell"))
    assert np.abs(table.to_numpy() - exact).max() < 0.05
    pd.testing.assert_frame_equal(
        ps.predict_labels(fit, cells, progress=False), ps.predict_labels(fit, cells.without("type"), progress=False)
    )


@pytest.mark.parametrize(("turned", "n", "warned"), [(True, 48, True), (False, 48, False), (True, 6, False)])
def test_components_that_are_not_those_of_their_labels_are_warned_of(recwarn, turned, n, warned):
    """Two types far apart, with the components at their places or exchanged; fewer than 20 labels say nothing."""
    kind = np.arange(n) % 2
    counts = np.random.default_rng(0).poisson(np.where(kind[:, None], [9.0, 1, 9, 1], [1.0, 9, 1, 9]))
    cells = ps.Cells.from_counts(counts, obs=pd.DataFrame({"type": np.array(["b", "t"])[kind]}), labels="type")
    prior = ps.priors.ByLabel(1, cells.columns["type"])
    decoder = ps.networks.LinearDecoder()
    model = ps.SCVI(N_GENES, 1, 2, prior=prior, decoder=decoder, **POISSON).double()
    with torch.no_grad():
        prior.loc.copy_(torch.tensor([[1.0], [-1.0]]) if turned else torch.tensor([[-1.0], [1.0]]))
        prior.log_scale.fill_(-1.0)
        head = model.decoder.heads["log_mean"]
        head.weight.copy_(torch.tensor([[1.1], [-1.1], [1.1], [-1.1]]))
        head.bias.fill_(1.1)
    fit = ps.Fit(model.eval(), ps.guides.DiagonalNormal(model).double().eval(), pd.DataFrame(), cells.schema)
    ps.predict_labels(fit, cells, samples=20, sampler=ps.Refined(), progress=False)
    said = [str(one.message) for one in recwarn if "larger label_weight" in str(one.message)]
    assert len(said) == warned
    assert not said or f"of {n} labels that these cells have, 0% are predicted" in said[0]


def test_labels_count_more_in_training_and_nowhere_else(cells):
    """The density by scipy, with the term of Kingma et al. (2014) in training mode alone."""
    prior = fit_of(cells, ps.priors.ByLabel(1, cells.columns["type"], label_weight=3.0)).model.prior
    (laws, shares), gamma = by_label(prior), torch.as_tensor(cells.covariates).double()[:, None]
    z = torch.linspace(-2, 2, N).double()
    joint = np.stack([np.log(share) + law.logpdf(z) for share, law in zip(shares, laws, strict=True)])
    given = np.array([{"b": 0, "t": 1, None: 2}[TYPES[i % 3]] for i in range(N)])
    exact = np.vstack([joint - np.log(shares)[:, None], logsumexp(joint, 0)])[given, np.arange(N)]
    score = np.vstack([joint - logsumexp(joint, 0), np.zeros(N)])[given, np.arange(N)]
    for training in (False, True):
        law = prior.train(training)(gamma)
        for of, value in ((law, z[:, None, None]), (law.expand((2, N, 1)), z[:, None, None].expand(2, N, 1, 1))):
            found = of.log_prob(value).detach().reshape(-1, N)
            np.testing.assert_allclose(found, np.tile(exact + 3 * score * training, (len(found), 1)), rtol=1e-10)
    known = law.log_prob(z[:, None, None])[given < 2].sum()
    assert not torch.autograd.grad(known, prior.logits, allow_unused=True)[0].abs().max()  # pi is of the others


def test_few_labels_are_enough_where_types_are_apart():
    """Four types of which 3 % have a label: components stay with them, which they do not by p(z | label) alone."""
    rng = np.random.default_rng(0)
    kind, rates = np.arange(600) % 4, rng.lognormal(1, 0.7, (4, 30))
    labels = np.where(np.arange(600) < 20, np.array(list("abcd"))[kind], None)
    cells = ps.Cells.from_counts(rng.poisson(rates[kind]), obs=pd.DataFrame({"type": labels}), labels="type")
    right = []
    for weight in (0.0, 50.0):
        prior = ps.priors.ByLabel(4, cells.columns["type"], label_weight=weight)
        fit = ps.fit(ps.SCVI(30, 4, 4, prior=prior, n_hidden=32), cells, epochs=15, progress=False)
        found = ps.predict_labels(fit, cells.without("type"), progress=False).to_numpy().argmax(1)
        right.append((found == kind)[20:].mean())
    assert right[1] > 0.95
    assert right[0] < right[1]


def test_predicted_labels_are_refused_where_they_are_not_in_z_alone(cells):
    labelled = ps.priors.ByLabel(1, cells.columns["type"])
    with pytest.raises(ModelError, match=r"\['x'\] of this model depend on the labels"):
        ps.predict_labels(fit_of(cells, labelled, decoder_columns=[cells.columns["type"]]), cells)
    with pytest.raises(ModelError, match="StandardNormal has no labels"):
        ps.predict_labels(fit_of(cells, ps.priors.StandardNormal(1)), cells)
    with pytest.raises(ModelError, match="not those of one column"):
        ps.predict_labels(fit_of(cells, ps.priors.ByLabel(1, slice(1, 3))), cells)


def test_evidence_given_labels_is_not_set_beside_evidence(cells):
    fits = {
        "labels": fit_of(cells, ps.priors.ByLabel(1, cells.columns["type"])),
        "plain": fit_of(cells, ps.priors.StandardNormal(1), decoder_columns=[cells.columns["donor"]]),
        "decoder": fit_of(cells, ps.priors.StandardNormal(1)),
    }
    few, cells = {"samples": 50, "progress": False}, cells.take(range(3))
    with pytest.raises(ModelError, match=r"\['labels', 'decoder'\] is log p\(x \| type\).*cells.without\('type'\)"):
        ps.compare(fits, cells, **few)
    assert ps.compare(fits, cells.without("type"), **few).attrs["quantity"] == "log p(x)"
    fits.pop("plain")
    assert ps.compare(fits, cells, **few).attrs["quantity"] == "log p(x | type)"


@pytest.mark.slow  # compiles for a minute
@pytest.mark.parametrize("kind", [ps.priors.Conditional, ps.priors.ByLabel])
def test_compiled_steps_are_the_same(cells, kind):
    losses = []
    for compiled in (False, True):
        model = ps.SCVI(N_GENES, 2, cells.n_covariates, prior=kind(2, cells.columns["type"]), n_hidden=8)
        fit = ps.fit(model, cells, epochs=3, validation=0, compiled=compiled, progress=False)
        losses.append(fit.history.train_loss)
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize("kind", [ps.priors.Conditional, ps.priors.ByLabel])
def test_they_train_save_and_load(cells, kind, tmp_path):
    model = ps.SCVI(N_GENES, 2, cells.n_covariates, prior=kind(2, cells.columns["type"]), n_hidden=8)
    fit = ps.fit(model, cells, epochs=8, validation=0, progress=False)
    assert fit.history.train_loss.iloc[-1] < fit.history.train_loss.iloc[0]
    assert fit.model.prior.loc.abs().max() > 0
    fit.save(tmp_path / "fit")
    loaded = ps.load(tmp_path / "fit")
    assert repr(loaded.model) == repr(fit.model)
    assert loaded.schema == fit.schema
    options = {"samples": 100, "steps": 10, "rounds": 1, "progress": False}
    again = ps.evidence(loaded, cells, **options)
    pd.testing.assert_frame_equal(ps.evidence(fit, cells, **options), again)
    other = ps.evidence(fit, cells, **options | {"seed": 1})
    assert abs((other.log_evidence - again.log_evidence).mean()) < 5 * np.hypot(other.se, again.se).mean()


def test_columns_leave_the_decoder_by_default_alone(cells):
    every = cells.columns
    sizes = {
        None: [ps.SCVI(N_GENES, 2, 4, prior=prior) for prior in (None, ps.priors.Conditional(2, every["donor"]))],
        "chosen": [ps.SCVI(N_GENES, 2, 4, decoder_columns=[every["type"]])],
    }
    inputs = [m.decoder.layers.linear[0].in_features - 2 for models in sizes.values() for m in models]
    assert inputs == [4, 2, 2]
    gamma = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    with torch.no_grad():
        eta = sizes[None][1].eval().decode(torch.zeros(2, 1, 2), torch.zeros(2, 1), gamma)["log_mean"]
    assert torch.equal(eta[0], eta[1])


def refused(match, **options):
    with pytest.raises(ModelError, match=match):
        ps.SCVI(N_GENES, 2, 3, **options)


def test_what_is_no_prior_given_gamma_is_refused():
    refused("columns 2 to 4 of gamma, of which the model has 3", prior=ps.priors.Conditional(2, slice(2, 5)))
    refused("decoder_columns must be a list", decoder_columns=slice(0, 2))
    refused("columns of gamma, as cells.columns", decoder_columns=[0])
    refused("twice", decoder_columns=[slice(0, 2), slice(1, 3)])
    refused("needs", prior=lambda gamma, scale: None)
    refused(
        r"batch shape \(cells, 1\), got \(2,\)",
        prior=lambda gamma: dist.Normal(torch.zeros(2, 2) + gamma[:, 0, :1], 1.0).to_event(1),
    )
    for columns in (0, [0, 1], slice(2, 1), slice(0, 4, 2), slice(None, 2)):
        with pytest.raises(ModelError, match="columns must be columns of gamma"):
            ps.priors.Conditional(2, columns)


def test_arguments_with_defaults_are_no_gamma():
    assert ps.SCVI(N_GENES, 2, prior=lambda scale=2.0: dist.Normal(torch.zeros(2), scale).to_event(1)).sites()
