"""Every kind of site x every verb: it runs, it moves as it must, or it refuses by name."""

import anndata as ad
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from scipy import stats
from scipy.special import logsumexp

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from pyro_scvi.inference.elbo import MeanFieldELBO
from pyro_scvi.program import cells_plate, check_inputs, register
from pyro_scvi.training.checks import TemperedLatents
from tests.support.programs import KNOWN, N_GENES, N_LATENT, FromTheLeft, Own, made, normal
from tests.support.simulate import simulated_counts
from tests.support.toys import cells_of, fit_of, toy

pytestmark = pytest.mark.filterwarnings("ignore:k-hat is above", "ignore:sampler_khat is above")

N_CELLS = 12
LABELS = np.arange(N_CELLS) % 2
QUICK = ps.Importance(steps=3, rounds=1, proposals=40)
FITS = {}
GUIDES = ["DiagonalNormal", "FullRankNormal", "InverseAutoregressiveFlow", "Point", "PerCell"]


def cells():
    return ps.Cells.from_counts(simulated_counts(N_CELLS, N_GENES))


def trained(kind):
    """One fit for all verbs of a kind."""
    if kind not in FITS:
        FITS[kind] = ps.fit(KNOWN[kind][0](), cells(), epochs=12, batch_size=4, validation=0, progress=False)
    return FITS[kind]


def finite(values):
    return bool(np.isfinite(np.asarray(values, dtype=float)).all())


def drawn(fit):
    names = [*fit.guide.coordinates.local, *fit.guide.coordinates.enumerated, *fit.guide.weights.supports]
    draws = ps.sample_posterior(fit, cells(), samples=6, sites=names, sampler=QUICK, progress=False)
    assert all(finite(draws[name]) for name in names)
    return all(("cell" in draws[name].dims) == (name not in fit.guide.weights.supports) for name in names)


def exported(fit):
    everything = {"log_likelihood": True, "posterior_predictive": True, "prior_predictive": True}
    tree = ps.to_datatree(fit, cells(), samples=4, sampler=QUICK, **everything)
    known = fit.guide.coordinates
    parts = sum(tree["log_prior"][name] for name in known.local) + tree["log_likelihood"].x.sum("gene")
    if not known.enumerated:  # entries are not independent given the other latents alone
        np.testing.assert_allclose(parts, tree["sample_stats"].lp, rtol=1e-4)
    assert set(tree["prior"].data_vars) == {*known.local, *known.enumerated}
    return set(tree["posterior"].data_vars) == {*known.local, *known.enumerated, *fit.guide.weights.supports}


def two_seeds_agree(fit):
    few = cells().take(range(2))
    effort = {"samples": 2000, "progress": False}
    tables = [ps.evidence(fit, few, seed=seed, **effort) for seed in (0, 1)]
    good = (tables[0].khat < 0.7) & (tables[1].khat < 0.7)
    gap = (tables[0].log_evidence - tables[1].log_evidence) / np.hypot(tables[0].se, tables[1].se).clip(1e-3)
    return bool((gap[good].abs() < 6).all())


FROM_DENSITIES = {
    "sample_posterior": drawn,
    "hmc": lambda fit: (
        finite(
            ps.sample_posterior(
                fit,
                cells(),
                samples=8,
                sampler=ps.HMC(chains=2, warmup=3, steps=3, leapfrog=2, least=4),
                sites=two(fit),
            ).ess
        )
        or True
    ),
    "evidence": two_seeds_agree,
    "annealed_evidence": lambda fit: finite(
        ps.annealed_evidence(fit, cells(), chains=4, temperatures=4, leapfrog=2).log_evidence
    ),
    "leave_one_out": lambda fit: finite(ps.leave_one_out(fit, cells(), samples=40, sampler=QUICK).elpd),
    "prior_predictive": lambda fit: finite(ps.prior_predictive(fit.model, 5)),
    "posterior_predictive": lambda fit: finite(ps.posterior_predictive(fit, cells(), samples=2)),
    "check_predictions": lambda fit: finite(ps.check_predictions(fit, cells(), samples=4).cells),
    "calibrate": lambda fit: finite(ps.calibrate(fit, 4, sampler=QUICK, draws=19, thin=1, progress=False).ranks),
    "to_datatree": exported,
}
FROM_THETA = {
    "impute": lambda fit: finite(ps.impute(fit, cells(), samples=2)),
    "quantiles": lambda fit: finite(ps.impute(fit, cells(), samples=4, quantiles=(0.1, 0.9))),
    "technical_zero_probability": lambda fit: finite(ps.technical_zero_probability(fit, cells(), samples=2)),
    "differential_expression": lambda fit: finite(
        ps.differential_expression(
            fit, cells(), groupby=LABELS, group_a=0, group_b=1, estimand=ps.differential.RandomPairs(most_pairs=100)
        )
    ),
}


def two(fit):
    return [*fit.guide.coordinates.local][:2]


@pytest.mark.parametrize("kind", KNOWN)
def test_every_verb_follows_the_program(kind, tmp_path):
    fit = trained(kind)
    assert fit.history.train_loss.iloc[-1] < fit.history.train_loss.iloc[0]
    for name, verb in FROM_DENSITIES.items():
        assert verb(fit), name
    for name, verb in FROM_THETA.items():
        if isinstance(fit.model, Own):
            with pytest.raises(ModelError, match="samples x itself"):
                verb(fit)
        else:
            assert verb(fit), name
    if "z" in fit.guide.coordinates.local:
        assert ps.embed(fit, cells()).shape == (N_CELLS, N_LATENT)
    else:
        with pytest.raises(ModelError, match="no latent called 'z'"):
            ps.embed(fit, cells())
    fit.save(tmp_path / "fit")
    model = KNOWN[kind][0]()
    again = ps.load(tmp_path / "fit", model=model, guide=ps.guides.DiagonalNormal(model))
    pd.testing.assert_frame_equal(
        *(ps.evidence(one, cells().take([0]), samples=20, steps=5, rounds=1) for one in (fit, again))
    )


OF_Z = {
    "transfer_labels": lambda fit: ps.transfer_labels(fit, labelled(), labelled(), "label", neighbors=3).probability,
    "differential_abundance": lambda fit: (
        ps.differential_abundance(fit, labelled(), "label", "donor", permutations=4).log_ratio
    ),
}


def labelled():
    """The cells, in two groups of three donors."""
    obs = pd.DataFrame({"label": LABELS.astype(str), "donor": [f"d{n % 6}" for n in range(N_CELLS)]})
    return ps.Cells.from_counts(simulated_counts(N_CELLS, N_GENES), obs=obs)


@pytest.mark.parametrize(
    "kind", ["two enumerated, without a library", "population", "z under another name", "effect of a cell"]
)
def test_so_do_those_that_are_computed_from_z_or_theta(kind):
    fit = trained(kind)
    density = ps.log_density(fit, cells().take([0, 1]), free_globals=bool(fit.guide.weights.supports))
    u = torch.zeros((1, density.size) if density.free_globals else (1, 2, density.size))
    assert bool(density(u).isfinite().all())
    assert bool(density.grad(u).isfinite().all())
    assert not set(fit.guide.coordinates.enumerated) & set(density.names)
    if isinstance(fit.model, Own):
        with pytest.raises(ModelError, match="samples x itself"):
            ps.normalized_expression(fit, cells(), samples=2)
    else:
        assert finite(ps.normalized_expression(fit, cells(), samples=2))
    for verb in OF_Z.values():
        if "z" in fit.guide.coordinates.local:
            assert finite(verb(fit))
        else:
            with pytest.raises(ModelError, match="no latent called 'z'"):
                verb(fit)


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("kind", ["positive and shares", "two enumerated, without a library", "population"])
def test_every_guide_is_derived_from_the_sites(kind, guide):
    model = KNOWN[kind][0]()
    arguments = [N_CELLS] if guide == "PerCell" else []
    fit = ps.fit(model, cells(), getattr(ps.guides, guide)(model, *arguments), epochs=2, validation=0, progress=False)
    assert finite(fit.history.train_loss)
    assert finite(ps.evidence(fit, cells().take(range(2)), samples=40, steps=5, progress=False).log_evidence)
    if guide != "PerCell":
        bound = ps.evidence(fit, cells().take(range(2)), samples=400, progress=False)
        assert guide == "Point" or (bound.amortized_bound < bound.log_evidence + 5 * bound.se + 1).all()


# --- known effects: with a constant decoder, mu = exp(b + e) with e almost known ---

RATE, SD = 12.0, 0.05
EXACT = ps.Importance(proposals=1000)
GATE = 1 / (1 + np.e)


class Tilted(ps.SCVI):
    """E is twice the covariate, up to a twentieth."""

    centre, sd = 2.0, SD
    genes = torch.ones(4)
    """How much e moves each gene."""

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        with cells_plate(gamma, index, n_cells):
            z = pyro.sample("z", self.prior())
            e = pyro.sample("e", dist.Normal(self.centre * gamma[:, :1], self.sd))
            theta = self.decode(z, self.library(x, gamma), gamma)
            theta["log_mean"] = theta["log_mean"] + e * self.genes
            return self.observe(x, theta, marginal=marginal, mask=mask)


@pytest.fixture(scope="module")
def tilted():
    """A fit with half of the cells at gamma = 0 and half at 1, and those cells."""
    treated = np.repeat([0.0, 1.0], 10)
    rng = np.random.default_rng(0)
    counts = rng.poisson(RATE * np.exp(2 * (2 * treated - 1))[:, None], (20, 4)) * (rng.random((20, 4)) > GATE)
    sample = ps.Cells.from_counts(counts, obs=pd.DataFrame({"treated": treated}), covariates=["treated"])
    return by_hand(Tilted, sample), sample


def log_means(sample, centre=Tilted.centre):
    """Mean of log mu, (cells,): covariates are centred and scaled by the schema."""
    return np.log(RATE) + centre * np.asarray(sample.covariates)[:, 0]


def log_zip(x, rate):
    """Log probability of counts under the zero-inflated Poisson."""
    return np.where(x == 0, np.log(GATE + (1 - GATE) * np.exp(-rate)), np.log1p(-GATE) + stats.poisson.logpmf(x, rate))


def grid(sample, centre=Tilted.centre):
    """Log p(x_n, e) (cells, points) with the points' mass in it, and the rates there."""
    e = np.linspace(-30, 30, 1201) * SD
    rate = np.exp(log_means(sample, centre)[:, None] + e)
    mass = stats.norm.logpdf(e, 0, SD) + np.log(e[1] - e[0])
    return log_zip(np.asarray(sample.counts)[:, None, :], rate[..., None]).sum(-1) + mass, rate


def test_the_evidence_moves_with_the_effect(tilted):
    fit, sample = tilted
    expected = logsumexp(grid(sample)[0], 1)
    table = ps.evidence(fit, sample, progress=False)
    assert (np.abs(table.log_evidence - expected) < 5 * table.se + 0.01).all()
    assert table.se.max() < 0.01  # the effect moves it by nats
    annealed = ps.annealed_evidence(fit, sample.take(range(8, 12)), temperatures=60, progress=False)
    np.testing.assert_allclose(annealed.log_evidence, expected[8:12], atol=0.1)


def test_draws_and_exports_move_with_the_effect(tilted):
    fit, sample = tilted
    expected = Tilted.centre * np.asarray(sample.covariates)[:, 0]
    draws = ps.sample_posterior(fit, sample, samples=100, sites=("e", "w"), sampler=EXACT, progress=False)
    np.testing.assert_allclose(draws.e.mean("sample"), expected, atol=0.1)
    np.testing.assert_allclose(np.log(draws.w).mean("sample")[:, 0], log_means(sample), atol=0.1)
    tree = ps.to_datatree(fit, sample, samples=200, sampler=EXACT, prior_predictive=True)
    for group in ("posterior", "prior"):
        np.testing.assert_allclose(tree[group].e.mean(("chain", "draw")), expected, atol=0.1)
    counts = tree["prior_predictive"].x.mean(("chain", "draw", "gene"))
    np.testing.assert_allclose(counts, (1 - GATE) * np.exp(log_means(sample)), rtol=0.15)


def test_imputation_moves_with_the_effect(tilted):
    fit, sample = tilted
    log_joint, rate = grid(sample)
    weights = np.exp(log_joint - logsumexp(log_joint, 1)[:, None])
    expected = (weights * rate).sum(1)
    np.testing.assert_allclose(ps.impute(fit, sample, samples=400, sampler=EXACT)[:, 0], expected, rtol=0.02)
    lost = ps.technical_zero_probability(fit, sample, samples=400, sampler=EXACT)
    zero = np.asarray(sample.counts) == 0
    chance = GATE / (GATE + (1 - GATE) * np.exp(-expected))[:, None]
    np.testing.assert_allclose(lost, np.where(zero, chance, 0), atol=0.02)


def test_differential_expression_moves_with_the_effect(tilted):
    fit, sample = tilted
    gap = Tilted.centre * np.ptp(np.asarray(sample.covariates)[:, 0])
    table = ps.differential_expression(
        fit,
        sample,
        groupby="treated",
        group_a=0.0,
        group_b=1.0,
        estimand=ps.differential.RandomPairs(contrast=ps.differential.Uncorrected(), most_pairs=400, sampler=EXACT),
    )
    np.testing.assert_allclose(table.lfc, -gap / np.log(2), atol=0.05)


def test_predictions_and_leave_one_out_move_with_the_effect(tilted):
    fit, sample = tilted
    replicas = ps.posterior_predictive(fit, sample, samples=400, sampler=EXACT)
    expected = (1 - GATE) * np.exp(log_means(sample))
    np.testing.assert_allclose(replicas.mean(("sample", "gene")), expected, rtol=0.15)
    found = ps.leave_one_out(fit, sample, samples=1000, sampler=EXACT, progress=False)
    log_joint, rate = grid(sample)
    of_gene = log_zip(np.asarray(sample.counts)[:, :1], rate)
    expected = logsumexp(log_joint, 1) - logsumexp(log_joint - of_gene, 1)
    np.testing.assert_allclose(found.elpd[:, 0], expected, atol=0.1)
    new = ps.prior_predictive(fit.model, 2000, gamma=np.ones((2000, 1)))
    assert new.mean() == pytest.approx((1 - GATE) * RATE * np.exp(Tilted.centre), rel=0.1)


def test_calibration_and_checks_see_the_effect(tilted):
    """Ranks of e are uniform under its own prior, not under that of cells without the covariate."""
    fit, sample = tilted
    source = ps.calibration.Prior(sample)
    options = {"source": source, "sampler": ps.Importance(proposals=400), "draws": 19, "thin": 2, "progress": False}
    assert ps.calibrate(fit, 200, **options).summary.rank_p["e"] > 1e-4
    checks = ps.check_predictions(fit, sample, samples=40, sampler=EXACT)
    assert 0.1 < checks.cells["total"].p[10:].mean() < 0.9  # 0 or 1 without the effect


class Untilted(Tilted):
    centre = 0.0


class Loose(Tilted):
    sd = 3.0


class OfOneGene(Tilted):
    genes = torch.tensor([1.0, 0.0, 0.0, 0.0])


def by_hand(kind, sample):
    """A fit as in ``tilted``, of another program."""
    model = kind(4, 1, 1, library=ps.libraries.NoLibrary(), likelihood=ps.likelihoods.ZIP())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.decoder.heads["log_mean"].bias.fill_(np.log(RATE))
        model.decoder.heads["gate_logits"].bias.fill_(-1.0)
    guide = ps.guides.DiagonalNormal(model.double()).double()
    return ps.Fit(model.eval(), guide.eval(), pd.DataFrame(), sample.schema)


def test_normalized_expression_moves_with_the_effect(tilted):
    """Where e moves one gene its share moves, and where it moves all alike none does."""
    fit, sample = tilted
    few, options = sample.take(range(8, 12)), {"samples": 400, "sampler": EXACT, "per": 1.0}
    np.testing.assert_allclose(ps.normalized_expression(fit, few, **options), 0.25, rtol=1e-6)
    one = ps.normalized_expression(by_hand(OfOneGene, sample), few, **options).iloc[:, 0]
    apart = np.linspace(-6, 6, 241)
    e = Tilted.centre * np.asarray(sample.covariates)[8:12, :1] + apart * SD
    log_p = log_zip(np.asarray(few.counts)[:, [0]], RATE * np.exp(e)) + stats.norm.logpdf(apart)
    weights = np.exp(log_p - logsumexp(log_p, 1)[:, None])
    np.testing.assert_allclose(one, (weights * np.exp(e) / (np.exp(e) + 3)).sum(1), rtol=0.03)


def test_the_log_density_has_the_effect(tilted):
    fit, sample = tilted
    density, u = ps.log_density(fit, sample), np.random.default_rng(0).normal(size=(3, 20, 2))
    rate = RATE * np.exp(u[..., 1:])
    of_e = stats.norm.logpdf(u[..., 1], Tilted.centre * np.asarray(sample.covariates)[:, 0], SD)
    expected = stats.norm.logpdf(u[..., 0]) + of_e + log_zip(np.asarray(sample.counts), rate).sum(-1)
    np.testing.assert_allclose(density(u), expected, rtol=1e-6)


class Labelled(ps.SCVI):
    """Z from a prior with labels, and a further latent that may depend on the labels."""

    slope, from_prior = 0.0, True

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        with cells_plate(gamma, index, n_cells):
            law = self.prior_of(gamma) if self.from_prior else dist.Normal(gamma[..., None, :1], 1.0).to_event(1)
            z = pyro.sample("z", law)
            e = pyro.sample("e", dist.Normal(self.slope * gamma[..., :1], 1.0))
            theta = self.decode(z, self.library(x, gamma), gamma)
            return self.observe(x, theta | {"log_mean": theta["log_mean"] + e}, marginal=marginal, mask=mask)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"slope": 1.0}, r"\['e'\] of this model depend on the labels too"),
        ({"from_prior": False}, "Labelled does not sample z from its prior ByLabel"),
    ],
)
def test_labels_are_predicted_from_z_where_it_alone_depends_on_them(changed, message):
    obs = pd.DataFrame({"type": np.array(["b", "t"])[np.arange(12) % 2]})
    sample = ps.Cells.from_counts(np.random.default_rng(0).poisson(3.0, (12, 4)), obs=obs, labels="type")
    prior, options = ps.priors.ByLabel(1, sample.columns["type"]), {"library": ps.libraries.NoLibrary()}
    model = type("Labelled", (Labelled,), changed)(4, 1, 2, prior=prior, n_hidden=4, **options).double()
    fit = ps.Fit(model.eval(), ps.guides.DiagonalNormal(model).double().eval(), pd.DataFrame(), sample.schema)
    if message:
        with pytest.raises(ModelError, match=message):
            ps.predict_labels(fit, sample, progress=False)
    else:
        np.testing.assert_allclose(ps.predict_labels(fit, sample, progress=False).sum(1), 1.0)


def test_compare_moves_with_the_effect(tilted):
    fit, sample = tilted
    table = ps.compare({"with": fit, "without": by_hand(Untilted, sample)}, sample, samples=500, progress=False)
    exact = [logsumexp(grid(sample, centre)[0], 1) for centre in (Tilted.centre, 0.0)]
    assert table.index[0] == "with"
    assert table.difference["without"] == pytest.approx((exact[1] - exact[0]).mean(), abs=0.05)
    assert (exact[1] - exact[0]).mean() < -5


def test_prior_sensitivity_moves_with_the_effect(tilted):
    """The prior of e matters where it is narrow, and not where it is wide; z is known from its prior alone."""
    _, sample = tilted
    means = []
    for kind in (Tilted, Loose):
        sampler = ps.Importance(proposals=4000)
        tree = ps.to_datatree(by_hand(kind, sample), sample.take([10, 11]), samples=1000, sampler=sampler)
        means.append(ps.prior_sensitivity(tree).groupby("variable").mean())
    narrow, wide = means
    assert narrow.prior["e"] > 3 * wide.prior["e"]
    assert wide.likelihood["e"] > 0.06
    for table in means:
        assert table.prior["z[0]"] > 3 * table.likelihood["z[0]"]


class Explained(Tilted):
    """Log mu is z and what e adds to it: the more e explains, the less is left for z."""

    def decode(self, z, log_library, gamma):
        theta = super().decode(z, log_library, gamma)
        return theta | {"log_mean": np.log(RATE) + z[..., 0].expand_as(theta["log_mean"])}


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
def test_embeddings_move_with_the_effect():
    """Two groups of cells: what e explains of the gap between them is not left for z, nor for what z tells."""
    treated = np.repeat([0.0, 1.0], 20)
    counts = np.random.default_rng(0).poisson(RATE * np.exp(treated - 0.5)[:, None], (40, 4))
    of_cells = pd.DataFrame({"treated": treated, "group": treated.astype(str)})
    of_cells["donor"] = of_cells.group + (np.arange(40) % 4).astype(str)
    sample = ps.Cells.from_counts(counts, obs=of_cells, covariates=["treated"])
    obs = pd.DataFrame({"treated": treated}, index=[f"c{i}" for i in range(40)])
    adata = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=list(sample.gene_names)))
    gaps, ratios, known = [], [], []
    for centre in (0.5, 0.0):
        model = Explained(4, 1, 1, library=ps.libraries.NoLibrary(), likelihood=ps.likelihoods.Poisson())
        model.decoder.requires_grad_(False)
        model.centre = centre
        fit = ps.fit(model, sample, epochs=100, batch_size=40, validation=0, progress=False)
        z, rate = np.linspace(-4, 4, 401), RATE * np.exp(centre * np.asarray(sample.covariates)[:, :1])
        log_x = stats.poisson.logpmf(counts[:, None], (rate * np.exp(z))[..., None]).sum(-1)
        log_p = log_x + stats.norm.logpdf(z)
        exact = np.exp(log_p - logsumexp(log_p, 1)[:, None]) @ z
        found = ps.embed(fit, sample)[:, 0]
        gaps.append([np.subtract(*of.reshape(2, 20).mean(1)) for of in (found, exact)])
        table = ps.differential_abundance(fit, sample, "group", "donor", permutations=4)
        ratios.append(np.subtract(*table.log_ratio.to_numpy().reshape(2, 20)[::-1].mean(1)))
        given = ps.transfer_labels(fit, sample, sample, "group", neighbors=9)
        known.append(given.probability[given.label == of_cells.group.to_numpy()].sum() / 40)
        ps.annotate(adata, fit, space=None, overwrite=True)
        np.testing.assert_allclose(adata.obsm["X_pyro_scvi"][:, 0], found, atol=1e-5)
    (found, exact), (found_without, exact_without) = gaps
    assert found == pytest.approx(exact, abs=0.15)
    assert found_without == pytest.approx(exact_without, abs=0.15)
    assert exact > exact_without + 0.8
    assert abs(ratios[0]) < 1 < ratios[1] - 2
    assert known[0] < 0.75 < 0.9 < known[1]


# --- the bound takes a closed form only where it is one ---


class Later(ps.SCVI):
    """p(z | e), with e after z in the guide's order."""

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        with cells_plate(gamma, index, n_cells):
            e = pyro.sample("e", dist.Normal(0.0, 3.0))
            z = pyro.sample("z", dist.Normal(0.3 * e[..., None], 1.0).to_event(1))
            theta = self.decode(z, self.library(x, gamma), gamma)
            return self.observe(x, theta, marginal=marginal, mask=mask)


@pytest.mark.parametrize("guide", ["DiagonalNormal", "FullRankNormal"])
def test_the_bound_is_that_of_draws_alone(guide):
    """The mean difference to Pyro's estimator without closed forms, draw by draw, is none; a wrong one is 3 nats."""
    model = toy(Later)
    q = getattr(ps.guides, guide)(model).double()
    with torch.no_grad():
        for name, parameter in q.named_parameters():
            parameter.add_(3.0 * ("lower.bias" in name))
    x, gamma = (t.double() for t in cells_of()[:])
    gaps = []
    with torch.no_grad(), pyro.get_param_store().scope():
        for seed in range(400):
            losses = []
            for elbo in (MeanFieldELBO(), Trace_ELBO()):
                torch.manual_seed(seed)
                losses.append(elbo.loss(model, q, x, gamma))
            gaps.append(losses[0] - losses[1])
    assert abs(np.mean(gaps)) < 5 * np.std(gaps) / 20 + 1e-9


# --- global latents ---


class Level(ps.SCVI):
    """A level that all cells share, on every log mean, which starts at 1."""

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        level = pyro.sample("level", dist.LogNormal(torch.tensor(0.0, dtype=torch.float64), 1.0))
        with cells_plate(gamma, index, n_cells):
            z = pyro.sample("z", self.prior())
            theta = self.decode(z, self.library(x, gamma), gamma)
            theta["log_mean"] = theta["log_mean"] * 0.0 + level.log()
            return self.observe(x, theta, marginal=marginal, mask=mask)


def test_a_global_latent_is_recovered_and_shown():
    """The posterior of one Poisson rate under a LogNormal prior, by quadrature."""
    sample = cells_of(40)
    model = toy(Level)
    guide = ps.guides.DiagonalNormal(model)
    fit = ps.fit(
        model,
        sample,
        guide,
        epochs=60,
        batch_size=40,
        validation=0,
        learning_rate=ps.schedules.Constant(0.05),
        data_start=False,
        dtype=torch.float64,
        progress=False,
    )
    rate = np.linspace(1.0, 3.0, 4001)
    counts = np.asarray(sample.counts)
    log_p = stats.poisson.logpmf(counts.sum(), counts.size * rate) + stats.lognorm(1.0).logpdf(rate)
    weights = np.exp(log_p - logsumexp(log_p))
    mean = weights @ rate
    sd = np.sqrt(weights @ rate**2 - mean**2)
    draws = ps.sample_posterior(fit, sample, samples=2000, sites=("level", "z"), progress=False)
    assert draws["level"].dims == ("sample",)
    assert float(draws["level"].mean()) == pytest.approx(mean, abs=2 * sd)
    assert float(draws["level"].std()) == pytest.approx(sd, rel=0.5)
    tree = ps.to_datatree(fit, sample, samples=20)
    assert tree["posterior"]["level"].dims == ("chain", "draw")
    assert "level" in [site.name for site in fit.model.sites()]
    found = ps.evidence(fit, sample.take(range(3)), progress=False).log_evidence
    at_median = float(fit.guide.weights.medians()["level"].detach())
    np.testing.assert_allclose(found, stats.poisson.logpmf(counts[:3], at_median).sum(1), atol=0.02)


def test_a_positive_weight_starts_where_its_parameter_does():
    class Above(torch.nn.Module):
        def forward(self, name, like):
            return pyro.sample(name, dist.LogNormal(torch.zeros_like(like), 10.0).to_event(like.dim()))

    name = "likelihood.dispersion.log_inverse_dispersion"
    likelihood = ps.likelihoods.NB(ps.likelihoods.PerGene(N_GENES))
    with torch.no_grad():
        likelihood.dispersion.log_inverse_dispersion.fill_(10.0)
    model = made(likelihood=likelihood, weight_priors={name: Above()})
    torch.testing.assert_close(ps.guides.DiagonalNormal(model).weights.medians()[name], torch.full((N_GENES,), 10.0))


def test_draws_of_globals_leave_those_of_cells_alone():
    fit = trained("population")
    one, both = (
        ps.sample_posterior(fit, cells(), samples=5, sites=sites, seed=3, progress=False)
        for sites in (("z",), ("z", "tau", "m"))
    )
    np.testing.assert_array_equal(one.z, both.z)
    assert both.m.dims == ("sample", "m_dim_0")


# --- programs of other kinds ---


class PoissonLogNormal(ps.SCVI):
    """Counts whose log rate is normal, by quadrature; the program samples x itself."""

    nodes, masses = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(40))

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        with cells_plate(gamma, index, n_cells), pyro.poutine.mask(mask=mask):
            z = pyro.sample("z", self.prior())
            log_mean = self.decode(z, self.library(x, gamma), gamma)["log_mean"]
            rates = dist.Poisson((log_mean[..., None] + 0.7 * self.nodes).exp())
            law = dist.MixtureSameFamily(dist.Categorical(self.masses.expand(rates.batch_shape)), rates)
            with pyro.plate("genes", self.n_genes, dim=-1):
                return pyro.sample("x", law, obs=x)


def test_poisson_lognormal_counts_by_brute_force():
    model, sample = toy(PoissonLogNormal), cells_of(3)
    fit = fit_of(model)
    z, e = np.linspace(-7, 7, 281), np.linspace(-6, 6, 401)
    with torch.no_grad():
        eta = model.decoder(torch.as_tensor(z)[:, None], torch.zeros(281, 0).double())["log_mean"].numpy()
    rate = np.exp(eta[:, :, None] + 0.7 * e)
    inner = stats.norm.logpdf(e) + np.log(e[1] - e[0])
    log_x = logsumexp(stats.poisson.logpmf(np.asarray(sample.counts)[:, None, :, None], rate) + inner, -1).sum(-1)
    expected = logsumexp(log_x + stats.norm.logpdf(z) + np.log(z[1] - z[0]), 1)
    table = ps.evidence(fit, sample, samples=2000, progress=False)
    assert (abs(table.log_evidence - expected) / table.se.clip(1e-3)).max() < 5
    assert finite(ps.posterior_predictive(fit, sample, samples=3))
    with pytest.raises(ModelError, match="PoissonLogNormal samples x itself"):
        ps.impute(fit, sample)
    with pytest.raises(ModelError, match="PoissonLogNormal samples x itself"):
        ps.differential_expression(fit, sample, groupby=[0, 1, 1], group_a=0, group_b=1)


class Dirichlet(ps.SCVI):
    """A Dirichlet process mixture of z, cut off at six components, with a learned concentration."""

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        alpha = pyro.sample("alpha", dist.Gamma(torch.tensor(2.0), 1.0))
        with pyro.plate("sticks", 5, dim=-1):
            sticks = pyro.sample("sticks_of", dist.Beta(torch.tensor(1.0), alpha))
        with pyro.plate("components", 6, dim=-1):
            centre = pyro.sample("centre", dist.Normal(torch.zeros(N_LATENT), 3.0).to_event(1))
        left = torch.cat([torch.ones(1), (1 - sticks).cumprod(-1)])
        weights = torch.cat([sticks, torch.ones(1)]) * left
        with cells_plate(gamma, index, n_cells):
            c = pyro.sample("c", dist.Categorical(weights), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(centre[c], 1.0).to_event(1))
            return self.observe(x, self.decode(z, self.library(x, gamma), gamma), marginal=marginal, mask=mask)


def test_a_dirichlet_process_mixture():
    sample = cells()
    fit = ps.fit(made(Dirichlet), sample, epochs=10, batch_size=4, validation=0, progress=False)
    assert fit.history.train_loss.iloc[-1] < fit.history.train_loss.iloc[0]
    draws = ps.sample_posterior(fit, sample, samples=20, sites=("alpha", "centre", "c", "sticks_of"), progress=False)
    assert draws.alpha.dims == ("sample",)
    assert draws.centre.shape == (20, 6, N_LATENT)
    assert set(np.unique(draws.c)) <= set(range(6))
    assert finite(ps.evidence(fit, sample.take(range(2)), samples=100, progress=False).log_evidence)


@pytest.mark.parametrize("kind", ["two enumerated, without a library", "population", "effect of a cell, observed"])
def test_compiled_steps_and_densities_are_the_same(kind):
    fits = [
        ps.fit(KNOWN[kind][0](), cells(), epochs=2, batch_size=6, validation=0, compiled=compiled, progress=False)
        for compiled in (False, True)
    ]
    np.testing.assert_allclose(*(fit.history.train_loss for fit in fits), rtol=1e-4)
    few, effort = cells().take(range(4)), {"samples": 100, "steps": 20, "rounds": 1, "progress": False}
    tables = [ps.evidence(fits[0], few, compiled=compiled, **effort) for compiled in (False, True)]
    np.testing.assert_allclose(*(table.log_evidence for table in tables), rtol=1e-3)


# --- programs that mean something else than they say ---


@pytest.mark.parametrize("n_latent", [1, 3])
def test_a_program_that_counts_dimensions_from_the_left_is_refused(n_latent):
    model = FromTheLeft(N_GENES, n_latent, n_hidden=8, n_layers=1)
    with pytest.raises(ModelError, match="index from the right"):
        ps.guides.DiagonalNormal(model)


def test_the_library_size_keeps_its_full_divergence_under_a_weight():
    """Under a weight of 0 the loss moves with the prior of l, not with that of z."""
    x, gamma = cells()[:]
    losses = []
    for loc, shift in ((5.0, 0.0), (5.0, 2.0), (6.0, 0.0)):
        model = made(prior=lambda shift=shift: normal(shift), library=ps.libraries.LatentLibrary(loc, 1.0))
        guide = ps.guides.DiagonalNormal(model, seed=1)
        known = guide.coordinates
        names = {name for name, site in known.local.items() if site is not known.library}
        torch.manual_seed(0)
        with TemperedLatents(0.0, names), torch.no_grad(), pyro.get_param_store().scope():
            losses.append(MeanFieldELBO().loss(model, guide, x, gamma))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert abs(losses[2] - losses[0]) > 1


def test_prior_draws_of_a_program_that_needs_counts_say_so():
    class Counting(Own):
        def latent(self, x, gamma):
            return super().latent(x, gamma) + x.sum(-1, keepdim=True)[..., None] * 0

    with pytest.raises(ModelError, match="cannot be run without counts"):
        ps.prior_predictive(made(Counting), 3)


def test_the_diagram_shows_global_latents_of_any_plate():
    ax = ps.plots.program(KNOWN["population"][0]())
    assert "theta" in {str(artist.get_gid()).removeprefix("node:") for artist in ax.patches}
