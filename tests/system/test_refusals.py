"""No verb is silently wrong about a site that it does not know: each refuses it by name, and says what to do."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from anndata import AnnData
from pyro.infer import SVI, Trace_ELBO

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from pyro_scvi.program import cells_plate, check_inputs, register
from tests.support.programs import (
    BIAS,
    KINDS,
    KNOWN,
    N_GENES,
    N_LATENT,
    REFUSED,
    Observing,
    Own,
    ScaleInPlate,
    made,
    normal,
)
from tests.support.simulate import simulated_counts

pytestmark = pytest.mark.filterwarnings("ignore:k-hat is above", "ignore:sampler_khat is above", "ignore:depths differ")

N_CELLS = 12
QUICK = ps.Importance(steps=3, rounds=1, proposals=40)


def cells_of(n=N_CELLS):
    return ps.Cells.from_counts(simulated_counts(n, N_GENES))


def fit_of(model, guide=ps.guides.DiagonalNormal):
    """A fit as one makes it by hand."""
    return ps.Fit(model.eval(), guide(model).eval(), pd.DataFrame(), cells_of().schema)


def fit_that_was_changed(model):
    """A fit whose model became another after the guide was made."""
    fit = fit_of(made(weight_priors=BIAS) if model.weights.prior_of else made())
    fit.guide._model = (model.eval(),)
    fit.model = model
    return fit


def adata_of(cells):
    return AnnData(cells.counts, var=pd.DataFrame(index=cells.gene_names), obs=pd.DataFrame(index=cells.cell_names))


LABELS = np.arange(N_CELLS) % 2

FROM_DENSITIES = {
    "embed": lambda fit, cells, tmp: ps.embed(fit, cells),
    "sample_posterior": lambda fit, cells, tmp: ps.sample_posterior(fit, cells, samples=4),
    "evidence": lambda fit, cells, tmp: ps.evidence(fit, cells, samples=40, steps=3, rounds=1),
    "evidence, compiled": lambda fit, cells, tmp: ps.evidence(fit, cells, samples=4, steps=0, rounds=0, compiled=True),
    "annealed_evidence": lambda fit, cells, tmp: ps.annealed_evidence(fit, cells, chains=4, temperatures=3, leapfrog=2),
    "compare": lambda fit, cells, tmp: ps.compare({"a": fit}, cells.take(range(2)), samples=20),
    "to_datatree": lambda fit, cells, tmp: ps.to_datatree(fit, cells, samples=4),
    "shards.write": lambda fit, cells, tmp: ps.shards.write(fit, cells, tmp / "a.h5ad", {"z": ps.embed}, seed=1),
    "annotate": lambda fit, cells, tmp: ps.annotate(adata_of(cells), fit, space=None, overwrite=True),
    "leave_one_out": lambda fit, cells, tmp: ps.leave_one_out(fit, cells, samples=40, sampler=QUICK),
    "posterior_predictive": lambda fit, cells, tmp: ps.posterior_predictive(fit, cells, samples=2),
    "check_predictions": lambda fit, cells, tmp: ps.check_predictions(fit, cells, samples=4),
    "calibrate": lambda fit, cells, tmp: ps.calibrate(fit, 4, sampler=QUICK, draws=19, thin=1, progress=False),
    "to_datatree with predictions": lambda fit, cells, tmp: ps.to_datatree(
        fit, cells, samples=4, posterior_predictive=True, prior_predictive=True
    ),
}
FROM_THETA = {
    "sample_posterior of w": lambda fit, cells, tmp: ps.sample_posterior(fit, cells, samples=4, sites=("w",)),
    "impute": lambda fit, cells, tmp: ps.impute(fit, cells, samples=2),
    "technical_zero_probability": lambda fit, cells, tmp: ps.technical_zero_probability(fit, cells, samples=2),
    "differential_expression": lambda fit, cells, tmp: ps.differential_expression(
        fit, cells, groupby=LABELS, group_a=0, group_b=1
    ),
    "differential_expression of pairs": lambda fit, cells, tmp: ps.differential_expression(
        fit, cells, groupby=LABELS, group_a=0, group_b=1, estimand=ps.differential.RandomPairs(most_pairs=100)
    ),
}
VERBS = FROM_DENSITIES | FROM_THETA


@pytest.mark.parametrize("kind", REFUSED)
def test_the_guide_names_the_site_that_is_not_supported(kind):
    build, site = REFUSED[kind]
    with pytest.raises(ModelError, match=f"'{site}'"):
        ps.guides.DiagonalNormal(build())


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", REFUSED)
def test_so_does_every_verb(kind, verb, tmp_path):
    build, site = REFUSED[kind]
    with pytest.raises(ModelError, match=f"'{site}'"):
        VERBS[verb](fit_that_was_changed(build()), cells_of(), tmp_path)


@pytest.mark.parametrize("kind", KNOWN)
def test_a_guide_that_was_made_before_the_site_is_refused(kind, tmp_path):
    build, site = KNOWN[kind]
    fit, cells = fit_that_was_changed(build()), cells_of()
    for verb in ("embed", "evidence", "impute", "to_datatree"):
        with pytest.raises(ModelError, match=f"'{site}'"):
            VERBS[verb](fit, cells, tmp_path)


@pytest.mark.parametrize("kind", REFUSED)
def test_fit_names_it(kind):
    build, site = REFUSED[kind]
    with pytest.raises(ModelError, match=f"'{site}'"):
        ps.fit(build(), cells_of(30), epochs=1, progress=False, validation=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_and_their_fits_are_made_shown_and_stored(kind, tmp_path):
    build, _ = KINDS[kind]
    fit = fit_that_was_changed(build())
    assert "there is no history" in repr(fit)
    assert "Fit" in fit._repr_html_()
    fit.save(tmp_path / "fit")


@pytest.mark.parametrize("verb", FROM_DENSITIES)
def test_a_model_without_such_sites_passes(verb, tmp_path):
    if verb == "evidence, compiled":
        pytest.skip("compiling is tested elsewhere")
    for kind in (ps.SCVI, Own):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        FROM_DENSITIES[verb](fit_of(made(kind)), cells_of(), folder)


@pytest.mark.parametrize("verb", FROM_THETA)
def test_a_program_that_does_not_tell_its_theta_is_not_bypassed(verb, tmp_path):
    FROM_THETA[verb](fit_of(made()), cells_of(), tmp_path)
    FROM_THETA[verb](fit_of(made(Observing)), cells_of(), tmp_path)
    with pytest.raises(ModelError, match="Own samples x itself"):
        FROM_THETA[verb](fit_of(made(Own)), cells_of(), tmp_path)


class Shifted(Own):
    """p(z) = N(3, 1), in the program alone."""

    def latent(self, x, gamma):
        return pyro.sample("z", normal(3.0))


def test_an_overridden_program_is_what_prior_draws_and_evidence_are_of():
    shifted, named = fit_of(made(Shifted)), fit_of(made(prior=lambda: normal(3.0)))
    cells = cells_of()
    drawn = ps.to_datatree(shifted, cells, samples=100)["prior"].z
    assert abs(float(drawn.mean()) - 3) < 5 / np.sqrt(drawn.size)
    tables = [ps.evidence(fit, cells, samples=400, progress=False) for fit in (shifted, named)]
    gap = (tables[0].log_evidence - tables[1].log_evidence) / np.hypot(tables[0].se, tables[1].se)
    assert gap.abs().max() < 5


@pytest.mark.parametrize("kind", ["factor", "global factor"])
def test_prior_draws_refuse_what_weighs_them(kind):
    build, site = KINDS[kind]
    with pytest.raises(ModelError, match=f"'{site}'"):
        ps.prior_predictive(build(), 5)


@pytest.mark.parametrize("kind", KNOWN)
def test_prior_draws_run_the_program_whatever_its_latents(kind):
    assert ps.prior_predictive(KINDS[kind][0](), 5).shape == (5, N_GENES)


# --- sites that come, go and change ---


class Seldom(Own):
    """One more latent where cells are deep."""

    def latent(self, x, gamma):
        z = super().latent(x, gamma)
        deep = x is not None and x.shape[0] > 2
        return z + pyro.sample("e", dist.Normal(0.0, 1.0))[..., None] if deep else z


@pytest.mark.parametrize("verb", ["sample_posterior", "evidence", "annealed_evidence", "to_datatree"])
def test_a_site_under_a_condition_is_refused_where_it_comes_up(verb, tmp_path):
    with pytest.raises(ModelError, match="'e' under a condition"):
        VERBS[verb](fit_of(made(Seldom)), cells_of().take(range(5)), tmp_path)


def test_what_was_changed_after_the_guide_was_made_is_seen():
    model = made()
    fit, cells = fit_of(model), cells_of()
    ps.embed(fit, cells)
    model.prior = ps.priors.Dirichlet(N_LATENT)
    with pytest.raises(ModelError, match="'z'.*after the model's last change"):
        ps.embed(fit, cells)
    model.prior = ps.priors.StudentT(N_LATENT)
    ps.embed(fit, cells)
    model.library = ps.libraries.NoLibrary()
    with pytest.raises(ModelError, match="'l'"):
        ps.embed(fit, cells)


def test_a_model_in_double_precision_with_a_prior_that_is_not():
    model = made(prior=normal)
    fit = ps.fit(model, cells_of(30), epochs=1, dtype=torch.float64, progress=False)
    assert np.isfinite(ps.evidence(fit, cells_of().take(range(2)), samples=40, progress=False).log_evidence).all()


# --- the look leaves no trace ---


def test_looking_shifts_no_random_numbers_and_shows_no_handler_a_site():
    fit = fit_of(made())
    before = torch.get_rng_state()
    with pyro.poutine.trace() as traced, pyro.plate("outer", 7, dim=-3):
        fit.guide.require_supported()
    assert torch.equal(before, torch.get_rng_state())
    assert [name for name in traced.trace.nodes if name != "outer"] == []
    assert not list(pyro.get_param_store().keys())


def test_plain_pyro_is_not_refused():
    model = KINDS["effect of a cell"][0]()
    x = cells_of()[:][0]

    def guide(x, gamma=None):
        loc = pyro.param("loc", torch.zeros(len(x), 1))
        with pyro.plate("cells", len(x), dim=-2):
            pyro.sample("z", normal().expand([len(x), 1]))
            pyro.sample("l", dist.LogNormal(torch.log1p(x.sum(-1, keepdim=True)), 1.0))
            pyro.sample("e", dist.Normal(loc, 1.0))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert np.isfinite([svi.step(x) for _ in range(3)]).all()
    made(Own)(x, marginal=False)
    ps.guides.DiagonalNormal(made(Observing))(x, marginal=False)


# --- laws without coordinates, when the model is made ---


def of_z(law):
    return law.expand([N_LATENT]).to_event(1)


PHASE = dist.VonMises(torch.tensor(0.0), 1.0)
TWO = dist.Categorical(torch.ones(2))
LAWS = {
    "von Mises": lambda: of_z(PHASE),
    "masked": lambda: of_z(PHASE.mask(True)),
    "mixture": lambda: dist.MixtureSameFamily(TWO, dist.VonMises(torch.zeros(2, N_LATENT), 1.0).to_event(1)),
    "mixtures": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(N_LATENT, 2)), dist.VonMises(torch.zeros(N_LATENT, 2), 1.0)
    ).to_event(1),
    "scaled": lambda: of_z(dist.TransformedDistribution(PHASE, [dist.transforms.AffineTransform(0.0, 2.0)])),
    "projected": lambda: dist.ProjectedNormal(torch.ones(N_LATENT)),
    "coin": lambda: of_z(dist.Bernoulli(torch.tensor(0.5))),
    "counts": lambda: of_z(dist.Poisson(torch.tensor(0.5))),
    "one of three": lambda: dist.OneHotCategorical(torch.ones(N_LATENT)),
    "point": lambda: dist.Delta(torch.zeros(N_LATENT), event_dim=1),
    "half of a point": lambda: dist.MaskedMixture(
        torch.tensor([True, False, True]), dist.Delta(torch.zeros(N_LATENT)), dist.Normal(torch.zeros(N_LATENT), 1.0)
    ).to_event(1),
    "part of a codomain": lambda: of_z(
        dist.TransformedDistribution(dist.Beta(torch.tensor(1.0), 1.0), [dist.transforms.AffineTransform(-1.0, 2.0)])
    ),
    "components apart": lambda: dist.MixtureSameFamily(
        TWO, dist.Uniform(torch.zeros(2, N_LATENT), torch.tensor([[1.0], [2.0]]).expand(2, N_LATENT)).to_event(1)
    ),
}


@pytest.mark.parametrize("law", LAWS)
def test_a_prior_without_coordinates_is_refused_when_the_model_is_made(law):
    with pytest.raises(ModelError, match="the prior of z"):
        made(prior=LAWS[law])


def test_discrete_weights_are_refused_when_the_guide_is_made():
    model = made(weight_priors={"decoder.heads.log_mean.bias": ScaleInPlate()})
    with pytest.raises(ModelError, match="'switch' is a discrete latent"):
        ps.guides.DiagonalNormal(model)


def spike_and_slab():
    scales = torch.tensor([0.05, 1.0]).expand(N_LATENT, 2)
    return dist.MixtureSameFamily(
        dist.Categorical(torch.ones(N_LATENT, 2)), dist.Normal(torch.zeros(N_LATENT, 2), scales)
    ).to_event(1)


def uniforms():
    law = dist.Uniform(torch.zeros(2, N_LATENT), torch.ones(2, N_LATENT)).to_event(1)
    return dist.MixtureSameFamily(TWO, law)


@pytest.mark.parametrize("prior", [spike_and_slab, uniforms, lambda: spike_and_slab().expand([])])
def test_mixtures_of_every_latent_by_itself(prior):
    model = made(prior=prior)
    fit = ps.fit(model, cells_of(30), epochs=2, progress=False)
    table = ps.evidence(fit, cells_of().take(range(3)), samples=100, progress=False)
    assert np.isfinite(table.log_evidence).all()


def test_the_evidence_under_a_mixture_of_every_latent_is_that_of_all_their_combinations():
    """With two latents, (spike + slab) x (spike + slab) is a mixture of four normals."""
    scales = torch.tensor([0.05, 1.0])
    each = dist.MixtureSameFamily(dist.Categorical(torch.ones(2, 2)), dist.Normal(torch.zeros(2, 2), scales))
    each = each.to_event(1)
    pairs = torch.cartesian_prod(scales, scales)
    joint = dist.MixtureSameFamily(dist.Categorical(torch.ones(4)), dist.Normal(torch.zeros(4, 2), pairs).to_event(1))
    models = [ps.SCVI(N_GENES, 2, prior=lambda law=law: law, n_hidden=8, n_layers=1) for law in (each, joint)]
    tables = [ps.evidence(fit_of(model), cells_of(), samples=400, progress=False) for model in models]
    gap = (tables[0].log_evidence - tables[1].log_evidence) / np.hypot(tables[0].se, tables[1].se).clip(1e-3)
    assert gap.abs().max() < 5


# --- fits made by hand ---


def test_a_fit_made_by_hand_is_shown_stored_and_used(tmp_path):
    fit, cells = fit_of(made()), cells_of()
    for history in (pd.DataFrame(), pd.DataFrame({"train_loss": [3.0, 2.0]}), pd.DataFrame({"loss": [1.0]})):
        fit.history = history
        assert "guide: DiagonalNormal" in repr(fit)
        assert "<table>" in fit._repr_html_()
        fit.save(tmp_path / "fit")
        loaded = ps.load(tmp_path / "fit")
        assert len(loaded.history) == len(history)
        assert repr(loaded) == repr(fit)
        assert np.array_equal(ps.embed(loaded, cells), ps.embed(fit, cells))
    assert np.isfinite(ps.compare({"by hand": fit}, cells.take(range(2)), samples=20).log_evidence["by hand"])
    with pytest.raises(ModelError, match="no history"):
        ps.plots.loss(fit)


# --- programs whose numbers would be wrong without a word ---


class Written(ps.SCVI):
    """The program with a part of it to be written otherwise."""

    def plate(self, gamma, index, n_cells):
        return cells_plate(gamma, index, n_cells)

    def more(self, x, gamma):
        return 0.0

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        with self.plate(gamma, index, n_cells):
            z = pyro.sample("z", self.prior())
            more = self.more(x, gamma)
            theta = self.decode(z, self.depth(x, gamma), gamma)
            theta["log_mean"] = theta["log_mean"] + more
            return self.observe(x, theta, marginal=marginal, mask=mask)

    def depth(self, x, gamma):
        return self.library(x, gamma)


class PlateByHand(Written):
    def plate(self, gamma, index, n_cells):
        return pyro.plate("cells", len(gamma), dim=-2)


class WithParam(Written):
    def more(self, x, gamma):
        return pyro.param("shift", torch.zeros(()))


class Markov(Written):
    def more(self, x, gamma):
        c = 0
        for t in pyro.markov(range(3)):
            law = dist.Categorical(torch.tensor([[0.8, 0.2], [0.3, 0.7]])[c])
            c = pyro.sample(f"c{t}", law, infer={"enumerate": "parallel"})
        return 1.0 * c


class Options(Written):
    options = {"expand": True}

    def more(self, x, gamma):
        law = dist.Categorical(torch.tensor([0.2, 0.8]))
        return 1.0 * pyro.sample("c", law, infer={"enumerate": "parallel", **self.options})


class Sampled(Options):
    options = {"num_samples": 10}


class MaskedLatent(Written):
    def more(self, x, gamma):
        return pyro.sample("e", dist.Normal(0.0, 1.0).mask(False))


class Unused(Written):
    def depth(self, x, gamma):
        return torch.zeros(len(gamma), 1)


class Centred(Written):
    def more(self, x, gamma):
        e = pyro.sample("e", dist.Normal(0.0, 1.0))
        return e - e.mean(-2, keepdim=True)


class OfAllCounts(Written):
    def more(self, x, gamma):
        return 0.0 if x is None else torch.log1p(x.mean())


class ByPlace(Written):
    def more(self, x, gamma):
        return torch.arange(1.0 * len(gamma))[:, None]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WithParam, "'shift' is a pyro.param"),
        (Markov, "pyro.markov is not supported"),
        (Options, "expand= is not supported"),
        (Sampled, "num_samples= is not supported"),
        (MaskedLatent, "'e' is masked"),
        (Centred, "depends on the cells that come with it"),
        (OfAllCounts, "depends on the cells that come with it"),
        (ByPlace, "its place among them"),
    ],
)
def test_programs_without_a_density_of_each_cell_are_refused(kind, message):
    with pytest.raises(ModelError, match=message):
        ps.evidence(fit_of(made(kind)), cells_of(), samples=4, steps=0, rounds=0)


def test_a_library_that_the_program_does_not_use_is_refused():
    with pytest.raises(ModelError, match="does not use the model's library"):
        fit_of(made(Unused, library=ps.libraries.ObservedLibrary()))


class LearnedBound(Written):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.bound = torch.nn.Parameter(torch.tensor(1.0))

    def more(self, x, gamma):
        return pyro.sample("u", dist.Uniform(-9.0, self.bound.exp()))


class SizeByCluster(Written):
    def depth(self, x, gamma):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.2, 0.8])), infer={"enumerate": "parallel"})
        return pyro.sample("l", dist.LogNormal(2.0 + c, 0.4)).log()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (PlateByHand, {}, "'z' is not scaled by n_cells"),
        (LearnedBound, {}, "'u' depends on parameters"),
        (SizeByCluster, {"kl_weight": ps.schedules.ConstantKL(0.3)}, "has a weight and that of 'l'"),
    ],
)
def test_programs_that_would_be_trained_wrongly_are_refused(kind, options, message):
    with pytest.raises(ModelError, match=message):
        ps.fit(made(kind), cells_of(), epochs=1, batch_size=4, progress=False, **options)


class Bounded(Written):
    """A bound that is written for each cell, and is the same for all."""

    def more(self, x, gamma):
        return pyro.sample("e", dist.Uniform(torch.zeros(len(gamma), 1), 1.0))


class TwoInOnePlate(Written):
    def plate(self, gamma, index, n_cells):
        with pyro.plate("donors", 3, dim=-1):
            self.m = pyro.sample("m", dist.Normal(0.0, 1.0))
            self.s = pyro.sample("s", dist.HalfNormal(1.0))
        return super().plate(gamma, index, n_cells)

    def more(self, x, gamma):
        return self.m[0] + self.s[1]


class OtherPlate(Written):
    def plate(self, gamma, index, n_cells):
        return pyro.plate("obs", len(gamma), dim=-2)


class Outside(Written):
    def plate(self, gamma, index, n_cells):
        self.e = pyro.sample("e", dist.Normal(0.0, 1.0).expand([len(gamma), 1]).to_event(2))
        return super().plate(gamma, index, n_cells)

    def more(self, x, gamma):
        return self.e


@pytest.mark.parametrize(("kind", "name"), [(OtherPlate, "z"), (Outside, "e")])
def test_latents_of_cells_outside_their_plate_are_refused(kind, name):
    with pytest.raises(ModelError, match=f"'{name}' has a value for each cell and is outside"):
        fit_of(made(kind))


class Slash(Written):
    def more(self, x, gamma):
        return pyro.sample("a/b", dist.Normal(0.0, 1.0))


def test_names_with_slashes_are_refused():
    with pytest.raises(ModelError, match="has a '/' in its name"):
        ps.embed(fit_of(made(Slash)), cells_of())


@pytest.mark.parametrize("kind", [Bounded, TwoInOnePlate])
def test_programs_that_look_alike_are_trained(kind):
    fit = ps.fit(made(kind), cells_of(), epochs=1, batch_size=4, progress=False)
    assert np.isfinite(ps.evidence(fit, cells_of(), samples=40, steps=3, rounds=1, progress=False).log_evidence).all()


# --- what shows only where covariates, parameters or weights are not 0 ---


class FromTheLeft(Written):
    def more(self, x, gamma):
        e = pyro.sample("e", dist.Normal(0.0, 1.0))
        return gamma[..., :1] * e[:, :1]


class BoundByCovariate(Written):
    def more(self, x, gamma):
        return pyro.sample("u", dist.Uniform(0.0, 1 + 3 * gamma[..., :1]))


class CentredCovariate(Written):
    def more(self, x, gamma):
        return 2 * (gamma - gamma.mean(0))[..., :1]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (FromTheLeft, "index from the right"),
        (BoundByCovariate, "'u' depends on other sites, counts or covariates"),
        (CentredCovariate, "depends on the cells that come with it"),
    ],
)
def test_what_covariates_multiply_or_bound_is_looked_at(kind, message):
    with pytest.raises(ModelError, match=message):
        ps.guides.DiagonalNormal(made(kind, n_covariates=2))


class Slope(Written):
    """An index from the left behind a slope that starts at 0."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.slope = torch.nn.Parameter(torch.tensor(0.0))

    def more(self, x, gamma):
        e = pyro.sample("e", dist.Normal(0.0, 1.0))
        return self.slope * e[:, :1]


@pytest.mark.parametrize("verb", [ps.evidence, ps.sample_posterior, ps.impute])
def test_a_slope_that_training_has_moved_from_0_is_seen(verb):
    fit = fit_of(made(Slope))
    verb(fit, cells_of(), samples=4)
    with torch.no_grad():
        fit.model.slope.fill_(1.0)
    with pytest.raises(ModelError, match="index from the right"):
        verb(fit, cells_of(), samples=4)


class BoundedByTotal(ps.libraries.LatentLibrary):
    def forward(self, x, gamma):
        most = torch.full((len(gamma), 1), 20.0) if x is None else 2 * x.sum(-1, keepdim=True)
        return pyro.sample("l", dist.Uniform(0.0, most)).log()


class BoundedByWeight(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.top = torch.nn.Parameter(torch.ones(N_LATENT))

    def forward(self):
        return dist.Uniform(torch.zeros(N_LATENT), self.top.exp()).to_event(1)


class SeldomDecoded(ps.SCVI):
    def decode(self, z, log_library, gamma):
        theta = super().decode(z, log_library, gamma)
        if bool((z > 1.2).any()):
            theta["log_mean"] = theta["log_mean"] + pyro.sample("e", dist.Normal(0.0, 1.0))
        return theta


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: made(library=BoundedByTotal()), "'l' depends on other sites, counts"),
        (
            lambda: made(prior=BoundedByWeight(), weight_priors={"prior.top": ps.weights.NormalWeights(1.0)}),
            "'z' depends on other sites, counts",
        ),
        (lambda: made(SeldomDecoded), "'e' under a condition only"),
    ],
    ids=["library", "prior", "decode"],
)
def test_parts_of_ones_own_are_looked_at_as_programs_are(model, message):
    with pytest.raises(ModelError, match=message):
        ps.guides.DiagonalNormal(model())


class ShiftedByCluster(ps.SCVI):
    """Two clusters 2 apart, and the second batch 2 above the first."""

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        with cells_plate(gamma, index, n_cells):
            z = pyro.sample("z", self.prior())
            c = pyro.sample("c", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            theta = self.decode(z, self.library(x, gamma), gamma)
            theta["log_mean"] = 0.1 * theta["log_mean"] + 2.0 * c + 2.0 * gamma[:, 1:2]
            return self.observe(x, theta, marginal=marginal, mask=mask)


def test_clusters_are_drawn_in_the_cells_own_batch_whatever_it_is_decoded_in():
    """What is decoded in the second batch is e^2 of what is decoded in the first, cell by cell."""
    counts = np.array([1.0, 8.0] * 3)[:, None] * np.ones((6, 4))
    adata = AnnData(counts.astype(np.float32), obs=pd.DataFrame({"b": ["p"] * 3 + ["q"] * 3}, list("abcdef")))
    cells = ps.Cells.from_anndata(adata, batch="b")
    parts = {"likelihood": ps.likelihoods.Poisson(), "library": ps.libraries.NoLibrary(), "decoder_columns": []}
    model = ShiftedByCluster(4, 1, 2, n_hidden=4, norm=None, **parts).eval()
    fit = ps.Fit(model, ps.guides.DiagonalNormal(model).eval(), pd.DataFrame(), cells.schema)
    options = {"quantity": ps.imputation.mean_given_no_dropout, "samples": 200, "sampler": ps.Importance()}
    first, second = (ps.impute(fit, cells, batches=[name], **options) for name in "pq")
    np.testing.assert_allclose(second / first, np.exp(2.0), rtol=0.02)
    pairs = {"groupby": [0, 1] * 3, "group_a": 0, "group_b": 1}
    by_batch = [
        ps.differential_expression(
            fit, cells, estimand=ps.differential.RandomPairs(most_pairs=400, decode_in=name, sampler=QUICK), **pairs
        )
        for name in "pq"
    ]
    np.testing.assert_allclose(by_batch[0].lfc, by_batch[1].lfc, atol=0.05)
