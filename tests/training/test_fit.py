"""fit: what it learns, what it refuses, and what a Fit says."""

import inspect
import math
from dataclasses import fields

import numpy as np
import pyro
import pytest
import torch
from scipy import sparse

import pyro_scvi as ps
from pyro_scvi.data.minibatches import Minibatches
from pyro_scvi.errors import FitError, ModelError, SchemaError
from pyro_scvi.inference.evaluation import bound_terms
from pyro_scvi.training.options import TrainingOptions, default_epochs


def small_model(cells, **options):
    return ps.SCVI(cells.n_genes, 3, cells.n_covariates, n_hidden=16, n_layers=1, **options)


def small_fit(cells, model=None, **options):
    return ps.fit(model or small_model(cells), cells, **{"epochs": 4, "progress": False, "device": "cpu"} | options)


def parameters(fit):
    return [p.detach().clone() for part in (fit.model, fit.guide) for p in part.parameters()]


def test_training_lowers_the_loss_and_says_so(cells):
    fit = small_fit(cells, epochs=30, batch_size=16)
    assert fit.history.train_loss.iloc[-1] < fit.history.train_loss.iloc[0] - 3
    assert fit.history.held_out_loss.iloc[-1] < fit.history.held_out_loss.iloc[0]
    assert list(fit.history.columns) == ["train_loss", "held_out_loss", "kl", "learning_rate", "kl_weight", "seconds"]
    assert list(fit.history.index) == list(range(1, 31))
    assert not fit.model.training
    assert not fit.guide.training
    assert "30 epochs" in repr(fit)
    assert "nats per cell" in repr(fit)


def test_a_fit_names_the_epoch_that_was_kept(cells):
    fit = small_fit(cells, epochs=12, learning_rate=ps.schedules.Constant(0.03))
    best = 2
    fit.history.loc[best, "held_out_loss"] -= 100
    assert f"held-out loss: {fit.settings['held_out_loss']:.2f} nats per cell in epoch {best}, " in repr(fit)
    assert f"training loss: {fit.history.train_loss[best]:.2f} nats per cell in epoch {best}" in repr(fit)
    page = fit._repr_html_()
    assert page.count("<polyline") == 2
    assert ">training</text>" in page
    assert ">held out</text>" in page


def test_a_fit_without_held_out_cells_says_so(cells):
    fit = small_fit(cells, epochs=1, validation=0)
    assert "training: 1 epoch of" in repr(fit)
    assert "no cells held out; the last epoch was kept" in repr(fit)
    assert fit._repr_html_().count("<polyline") == 1


def test_a_fit_without_prior_is_judged_without_it(cells):
    """As in training, whose kept parameters must be those of the epoch that is named."""
    fit = small_fit(cells, epochs=5, learning_rate=ps.schedules.Constant(0.03), kl_weight=ps.schedules.ConstantKL(0.0))
    best = (fit.history.held_out_loss - fit.history.kl).idxmin()
    assert f"in epoch {best}, the best" in repr(fit)


def test_one_seed_gives_one_fit_and_the_global_state_is_untouched(cells):
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = small_fit(cells), small_fit(cells)
    other = small_fit(cells, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(parameters(first), parameters(second), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(parameters(first), parameters(other), strict=True))
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert not pyro.get_param_store().keys()


def test_the_loss_is_the_bound_in_nats_per_cell(cells):
    """One step of the whole data, no learning: the reported loss is Pyro's own ELBO divided by the cells."""
    model = small_model(cells, norm=None)
    guide = ps.guides.DiagonalNormal(model, n_hidden=16, norm=None)
    fit = small_fit(
        cells, model, guide=guide, epochs=1, batch_size=60, validation=0, learning_rate=ps.schedules.Constant(0.0)
    )
    started, started_guide = fit.model.train(), fit.guide.train()  # at the means of the data, not trained
    losses = []
    for seed in range(200):
        torch.manual_seed(seed)
        losses.append(pyro.infer.TraceMeanField_ELBO().loss(started, started_guide, *cells[:]) / len(cells))
    assert fit.history.train_loss.iloc[0] == pytest.approx(np.mean(losses), abs=5 * np.std(losses))
    assert np.std(losses) < 0.5


@pytest.mark.parametrize("n_cells", [1, 2, 129])
def test_every_cell_trains_whatever_the_batches(n_cells):
    cells = ps.Cells.from_counts(np.random.default_rng(0).poisson(3.0, size=(n_cells, 7)) + 1)
    fit = small_fit(cells, batch_size=128, validation=0, epochs=2)
    assert np.isfinite(ps.embed(fit, cells)).all()
    assert np.isfinite(fit.history.train_loss).all()


def test_batches_of_one_cell(cells):
    assert np.isfinite(small_fit(cells, batch_size=1, epochs=1).history.train_loss).all()


def test_shuffled_minibatches_visit_every_cell_once_in_even_batches(cells):
    batches = list(Minibatches(cells, torch.device("cpu")).shuffled(16))
    assert sorted(torch.cat(batches).tolist()) == list(range(60))
    assert {len(batch) for batch in batches} == {15}


def test_cells_too_many_to_be_resident_are_read_by_row(cells, monkeypatch):
    resident = small_fit(cells)
    monkeypatch.setattr("pyro_scvi.data.minibatches.RESIDENT_BYTES", 0)
    streamed = small_fit(cells)
    assert all(torch.equal(a, b) for a, b in zip(parameters(resident), parameters(streamed), strict=True))


@pytest.mark.parametrize(
    ("largest", "stored"), [(255, torch.uint8), (256, torch.int16), (32767, torch.int16), (32768, torch.float32)]
)
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_array])
def test_counts_lie_on_the_device_in_the_smallest_type(largest, stored, form):
    x = np.random.default_rng(0).poisson(1.0, size=(40, 7)) + 1
    x[3, 2] = largest
    batches = Minibatches(ps.Cells.from_counts(form(x)), torch.device("cpu"))
    assert batches.resident.dtype == stored
    rows, gamma = batches.rows(torch.tensor([3, 0, 3]))
    np.testing.assert_array_equal(rows, x[[3, 0, 3]])
    assert rows.dtype == torch.float32
    assert gamma.shape == (3, 0)


def test_values_between_integers_are_not_rounded():
    x = np.array([[1.0, 0.5], [2.0, 3.25]])
    batches = Minibatches(ps.Cells.from_counts(x, allow_non_integer=True), torch.device("cpu"))
    np.testing.assert_array_equal(batches.rows(torch.arange(2))[0], x)


def test_corrected_counts_can_be_fitted():
    x = 0.7 * np.random.default_rng(0).poisson(3.0, size=(40, 7)) + 0.1
    fit = small_fit(ps.Cells.from_counts(x, allow_non_integer=True), epochs=2)
    assert np.isfinite(fit.history.train_loss).all()


def test_the_held_out_bound_looks_at_cells_from_all_over_the_file(monkeypatch):
    """4,000 held-out cells, the second half ten times as deep: a bound of the first half alone would be too low."""
    x = np.random.default_rng(0).poisson(np.repeat([[2.0], [20.0]], 4000, axis=0), size=(8000, 5)) + 1
    cells, seen = ps.Cells.from_counts(x), []
    rows = Minibatches.rows
    monkeypatch.setattr(Minibatches, "rows", lambda self, index: seen.append(self.selected[index]) or rows(self, index))
    ps.fit(small_model(cells), cells, epochs=1, batch_size=2000, validation=0.5, progress=False, device="cpu")
    held_out = set(cells.split_rows(0.5, seed=0)[1])
    looked_at = np.concatenate([index for index in seen if set(index) <= held_out])
    assert len(set(looked_at)) == 2048
    assert abs((looked_at >= 4000).mean() - 0.5) < 0.02


def test_gradients_left_behind_do_not_enter_a_fit(cells):
    model = small_model(cells)
    guide = ps.guides.DiagonalNormal(model, n_hidden=16, n_layers=1)
    for parameter in (*model.parameters(), *guide.parameters()):
        parameter.grad = torch.full_like(parameter, torch.nan)
    assert np.isfinite(small_fit(cells, model, guide=guide, epochs=1).history.train_loss).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float16}, "torch.float32 or torch.float64, got torch.float16"),
        ({"dtype": torch.float64, "autocast": torch.bfloat16}, "autocast is for parameters in torch.float32"),
    ],
)
def test_precisions_that_cannot_be(cells, options, message):
    with pytest.raises(ModelError, match=message):
        small_fit(cells, **options)


def test_covariates_reach_decoder_and_by_choice_encoder(batched_cells):
    model = small_model(batched_cells)
    fit = small_fit(batched_cells, model, guide=ps.guides.DiagonalNormal(model, encode_covariates=True))
    swapped = batched_cells.with_batch("a")
    assert not np.allclose(ps.embed(fit, batched_cells), ps.embed(fit, swapped))
    fit = small_fit(batched_cells)
    np.testing.assert_array_equal(ps.embed(fit, batched_cells), ps.embed(fit, swapped))
    _x, gamma = batched_cells[:]
    z = torch.zeros(60, 1, 3)
    log_l = torch.zeros(60, 1)
    differ = fit.model.decode(z, log_l, gamma)["log_mean"] - fit.model.decode(z, log_l, swapped[:][1])["log_mean"]
    assert differ.abs().max() > 1e-3


def test_float64_is_possible(cells):
    fit = small_fit(cells, dtype=torch.float64)
    assert fit.dtype == torch.float64
    assert ps.embed(fit, cells).dtype == np.float64


@pytest.mark.parametrize("elbo", [pyro.infer.Trace_ELBO(), pyro.infer.RenyiELBO(0.5, num_particles=2)])
def test_any_elbo_trains(cells, elbo):
    fit = small_fit(cells, elbo=elbo, epochs=15)
    assert fit.history.train_loss.iloc[-1] < fit.history.train_loss.iloc[0]


def test_kl_weight_zero_lets_z_say_more_and_the_history_stays_untempered(cells):
    free, bound = (small_fit(cells, kl_weight=ps.schedules.ConstantKL(w), epochs=60) for w in (0.0, 1.0))
    assert free.history.kl.iloc[-1] > 2 * bound.history.kl.iloc[-1]
    untempered = free.history.train_loss.iloc[-5:].mean()
    assert untempered == pytest.approx(free.history.held_out_loss.iloc[-5:].mean(), rel=0.35)
    assert untempered > bound.history.train_loss.iloc[-5:].mean()


def test_a_warm_up_must_end_inside_the_run(cells):
    fit = small_fit(cells, kl_weight=ps.schedules.WarmUp(3), epochs=4)
    assert fit.history.kl_weight.tolist() == pytest.approx([1 / 3, 2 / 3, 1, 1])
    with pytest.raises(ModelError, match="does not end within"):
        small_fit(cells, kl_weight=ps.schedules.WarmUp(4), epochs=4)


def test_early_stopping_waits_for_patience_after_the_best_epoch(cells):
    train, held_out = cells.split(held_out=0.3, seed=0)
    fit = small_fit(
        train, validation=held_out, patience=3, epochs=300, learning_rate=ps.schedules.Constant(0.03), batch_size=16
    )
    losses = fit.history.held_out_loss
    assert len(losses) < 300
    assert losses.idxmin() == len(losses) - 3


def test_the_best_epoch_is_kept_under_the_weight_that_was_trained_for(cells):
    """Overtrained on 30 cells: the kept state's bound is that of the best epoch, not that of the last."""
    train, held_out = cells.split(held_out=0.5, seed=0)
    fit = small_fit(train, validation=held_out, epochs=120, batch_size=8, learning_rate=ps.schedules.Constant(0.02))
    losses = fit.history.held_out_loss
    assert losses.iloc[-1] > losses.min() + 1
    x, gamma = held_out[:]
    with torch.no_grad():
        torch.manual_seed(0)
        kept = -float(bound_terms(fit.guide, x, gamma, 50)[0].mean())
    assert kept == pytest.approx(losses.min(), abs=1.5)
    free = small_fit(train, validation=held_out, epochs=40, batch_size=8, kl_weight=ps.schedules.ConstantKL(0.0))
    without_prior = free.history.held_out_loss - free.history.kl
    with torch.no_grad():
        torch.manual_seed(0)
        log_weight, gap = bound_terms(free.guide, x, gamma, 50)
    assert -float((log_weight + gap).mean()) == pytest.approx(without_prior.min(), abs=1.0)
    assert without_prior[free.history.held_out_loss.idxmin()] > without_prior.min() + 2


@pytest.mark.parametrize("option", [{"epochs": 0}, {"batch_size": 0}])
def test_runs_of_nothing_are_refused(cells, option):
    with pytest.raises(ModelError, match="1 or more"):
        small_fit(cells, **option)


def test_per_cell_parameters_train_in_minibatches(cells):
    model = small_model(cells)
    fit = small_fit(cells, model, guide=ps.guides.PerCell(model, cells.n_cells), batch_size=16, epochs=20)
    assert fit.history.train_loss.iloc[-1] < fit.history.train_loss.iloc[0]


def test_fitting_again_goes_on_from_where_the_model_is(cells):
    fit = small_fit(cells, epochs=30)
    bias = fit.model.decoder.heads["log_mean"].bias.detach().clone()
    small_fit(cells, fit.model, guide=fit.guide, epochs=1, learning_rate=ps.schedules.Constant(0.0))
    assert torch.equal(fit.model.decoder.heads["log_mean"].bias, bias)


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")  # Pyro's own
def test_a_frozen_bias_stays_as_it_is(cells):
    model = small_model(cells)
    head = model.decoder.heads["log_mean"]
    head.bias.requires_grad_(False).fill_(0.25)
    fit = small_fit(cells, model, epochs=2)
    assert torch.equal(fit.model.decoder.heads["log_mean"].bias, torch.full((cells.n_genes,), 0.25))
    head.bias.requires_grad_(True)
    assert not torch.equal(small_fit(cells, model, epochs=2).model.decoder.heads["log_mean"].bias, head.bias)


def test_the_untempered_loss_does_not_depend_on_how_particles_are_laid_out(cells):
    losses = []
    for vectorised in (False, True):
        elbo = pyro.infer.Trace_ELBO(
            num_particles=200, vectorize_particles=vectorised, max_plate_nesting=2 if vectorised else float("inf")
        )
        fit = small_fit(
            cells,
            elbo=elbo,
            epochs=1,
            validation=0,
            kl_weight=ps.schedules.ConstantKL(0.0),
            learning_rate=ps.schedules.Constant(0.0),
        )
        losses.append(fit.history.train_loss.iloc[0])
    assert losses[0] == pytest.approx(losses[1], abs=1.0)


def test_cells_that_are_not_the_models_are_refused(cells, batched_cells):
    with pytest.raises(ModelError, match="20 and 3"):
        small_fit(batched_cells, small_model(cells))
    with pytest.raises(SchemaError, match="validation"):
        small_fit(cells, validation=batched_cells)


def test_cells_to_watch_that_are_trained_on_are_told(cells):
    train, held_out = cells.split(0.2, seed=0)
    with pytest.warns(
        UserWarning, match=rf"of validation= are among the training cells, {held_out.cell_names[0]!r} for one"
    ):
        small_fit(cells, validation=held_out, epochs=1)
    small_fit(train, validation=held_out, epochs=1)  # no warning
    first, second = (ps.Cells.from_counts(part.counts) for part in (train, held_out))
    assert set(second.cell_names) < set(first.cell_names)  # numbers of rows
    small_fit(first, validation=second, epochs=1)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"learning_rate": 0.01}, "OneCycle"),
        ({"kl_weight": 0.5}, "ConstantKL"),
        ({"kl_weight": ps.schedules.WarmUp(0)}, "1 epoch or more"),
        ({"kl_weight": ps.schedules.WarmUp(float("nan"))}, "1 epoch or more"),
        ({"elbo": pyro.infer.Trace_ELBO}, "Trace_ELBO"),
        ({"device": "gpu"}, r"cannot be used: .{,120}; 'auto' takes"),
        ({"device": 3.5}, "must be a name, such as 'cpu'"),
        ({"validation": 2.0}, "validation must be a share from 0 to below 1, .*got 2.0"),
        ({"validation": -1}, "validation must be"),
        ({"validation": True}, "validation must be"),
        ({"validation": "a tenth"}, "validation must be"),
    ],
)
def test_options_of_the_wrong_kind_say_what_is_right(cells, option, says):
    with pytest.raises(ModelError, match=says):
        small_fit(cells, **option)


def test_encoder_options_beside_a_shared_encoder_are_refused(cells):
    model = small_model(cells, prior=ps.priors.VampPrior(20, 3, 5))
    with pytest.raises(ModelError, match="shares the encoder"):
        ps.guides.DiagonalNormal(model, n_hidden=7)
    assert ps.guides.DiagonalNormal(model, seed=1).encoder is model.prior.encoder


def test_parameters_that_the_guide_shares_cannot_have_a_prior(cells):
    normal = {"prior.*": ps.weights.NormalWeights()}
    with pytest.raises(ModelError, match=r"'prior.encoder.*cannot have a prior, because the guide uses them too"):
        small_model(cells, prior=ps.priors.VampPrior(20, 3, 5), weight_priors=normal)
    assert small_model(cells, prior=ps.priors.GaussianMixture(3), weight_priors=normal).weights.prior_of


def test_a_guide_of_another_model_is_refused(cells):
    with pytest.raises(ModelError, match="another model"):
        small_fit(cells, small_model(cells), guide=ps.guides.DiagonalNormal(small_model(cells)))


def test_a_diverging_run_is_an_error(cells):
    with pytest.raises(FitError, match="learning"):
        small_fit(cells, learning_rate=ps.schedules.Constant(1e30), epochs=5)


def test_a_parameter_without_a_gradient_is_an_error(cells):
    model = small_model(cells)
    model.stray = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ModelError, match="stray"):
        small_fit(cells, model)


def test_a_latent_of_the_prior_that_the_guide_lacks_is_an_error(cells):
    def prior():
        tau = pyro.sample("tau", pyro.distributions.Gamma(1.0, 1.0))
        return pyro.distributions.Normal(torch.zeros(3), tau[..., None]).to_event(1)

    model = small_model(cells, prior=lambda: pyro.distributions.Normal(torch.zeros(3), 1.0).to_event(1))
    guide = ps.guides.DiagonalNormal(model)
    model.prior = prior
    with pytest.raises(ModelError, match=r"model samples \['tau'\], which the guide does not"):
        small_fit(cells, model, guide=guide)


def test_a_latent_that_is_stretched_over_the_cells_is_an_error(cells):
    def prior():
        tau = pyro.sample("tau", pyro.distributions.Gamma(1.0, 1.0))
        return pyro.distributions.Normal(torch.zeros(3), tau).to_event(1)  # of shape (cells,): [..., None] is missing

    with pytest.raises(ModelError, match=r"site 'z' has batch shape \(2, 2\).*\[..., None\] missing"):
        small_fit(cells, small_model(cells, prior=prior))


def test_a_prior_with_pyro_param_is_an_error(cells):
    def prior():
        return pyro.distributions.Normal(pyro.param("loc", torch.zeros(3)), 1.0).to_event(1)

    with pytest.raises(ModelError, match="loc"):
        small_fit(cells, small_model(cells, prior=prior))


def test_a_prior_that_learns_is_learned(cells):
    class Shifted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.zeros(3))

        def forward(self):
            return pyro.distributions.Normal(self.loc, 1.0).to_event(1)

    prior = Shifted()
    fit = small_fit(cells, small_model(cells, prior=prior))
    assert fit.model.prior.loc.abs().min() > 0
    assert not prior.loc.any()


def test_data_start_takes_depth_and_means_from_the_cells(cells):
    model = small_fit(cells, epochs=1, learning_rate=ps.schedules.Constant(0.0), validation=0).model
    log_totals = np.log(cells.totals)
    assert float(model.library.loc) == pytest.approx(log_totals.mean(), rel=1e-5)
    assert float(model.library.scale) == pytest.approx(log_totals.std(), rel=1e-5)
    bias = model.decoder.heads["log_mean"].bias.detach().numpy()
    np.testing.assert_allclose(bias, np.log(cells.counts.mean(0) + 1 / 60), rtol=1e-5)


def test_the_options_are_the_arguments_of_fit_beside_model_cells_and_guide():
    assert [option.name for option in fields(TrainingOptions)] == list(inspect.signature(ps.fit).parameters)[3:]


def test_default_epochs_fall_with_the_square_root():
    assert default_epochs(2500) == 60
    assert default_epochs(10_000) == 30
    assert default_epochs(1_300_000) == 8
    assert default_epochs(10) == 60


def test_embed_refuses_other_genes_and_batches(cells, batched_cells):
    fit = small_fit(cells)
    other = ps.Cells.from_counts(cells.counts[:, ::-1], gene_names=list(cells.gene_names[::-1]))
    with pytest.raises(SchemaError, match="schema=fit.schema"):
        ps.embed(fit, other)
    with pytest.raises(SchemaError, match="donor=a"):
        ps.embed(fit, batched_cells)


def test_per_cell_parameters_recover_the_cells_they_were_fitted_on(cells):
    """Refined embeddings of the fitted cells lie where the free parameters put them."""
    model = small_model(cells)
    guide = ps.guides.PerCell(model, cells.n_cells)
    fit = small_fit(cells, model, guide=guide, epochs=150, validation=0, batch_size=60)
    free = fit.guide.loc.detach().numpy()[:, :3]
    found = ps.embed(fit, cells)
    correlations = [np.corrcoef(free[:, k], found[:, k])[0, 1] for k in range(3)]
    assert np.mean(correlations) > 0.8
    assert math.isnan(fit.history.held_out_loss.iloc[-1])


def test_moving_a_fit_there_and_back_changes_nothing(cells):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    fit = small_fit(cells)
    before = ps.evidence(fit, cells, samples=200)
    on_device = ps.evidence(fit.to("cuda"), cells, samples=200)
    after = ps.evidence(fit.to("cpu"), cells, samples=200)
    assert after.log_evidence.equals(before.log_evidence)
    assert ((on_device.log_evidence - before.log_evidence).abs() < 5 * (before.se + on_device.se)).all()


def test_epsilon_is_in_nats_per_cell():
    """Twice the same cells: the same step, since Adam's epsilon is held against the gradient of one cell."""
    x, ends = np.random.default_rng(0).poisson(3.0, size=(20, 6)) + 1, []
    for counts in (x, np.concatenate([x, x])):
        cells = ps.Cells.from_counts(counts)
        model = small_model(cells, norm=None, head_sd=None)  # a prior of weights weighs less beside more cells
        guide = ps.guides.Point(model, n_hidden=16, norm=None)
        options = {"epochs": 1, "batch_size": 100, "eps": 1.0, "data_start": False, "dtype": torch.float64}
        fit = small_fit(cells, model, guide=guide, validation=0, learning_rate=ps.schedules.Constant(0.1), **options)
        ends.append(parameters(fit))
    for one, twice in zip(*ends, strict=True):
        torch.testing.assert_close(one, twice, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:k-hat")
def test_the_held_out_loss_shown_is_not_the_least_of_noisy_looks(cells):
    watched, train = cells.take(range(8)), cells.take(range(8, cells.n_cells))
    fit = ps.fit(ps.SCVI(cells.n_genes, 2, n_hidden=8), train, epochs=20, validation=watched, progress=False)
    shown = fit.settings["held_out_loss"]
    assert f"{shown:.2f} nats per cell" in repr(fit)
    bound = ps.evidence(fit, watched, samples=2, steps=0, rounds=0, progress=False).amortized_bound
    assert abs(shown + bound.mean()) < 0.3
    again = ps.fit(ps.SCVI(cells.n_genes, 2, n_hidden=8), cells, epochs=2, validation=0, progress=False)
    assert "held_out_loss" not in again.settings


def head_weights(fit):
    return {name: head.weight.detach() for name, head in fit.model.decoder.heads.items()}


def test_the_prior_of_heads_is_normal_in_the_gradient_of_all_cells():
    decoder = ps.networks.MLPDecoder(n_hidden=16, head_sd=0.8)(2, 6, ("log_mean", "gate_logits"), 0)
    weights = [head.weight for head in decoder.heads.values()]
    decoder.heads["log_mean"].weight.register_hook(lambda gradient: gradient * (torch.arange(6) > 2)[:, None])
    log_prior = sum(torch.distributions.Normal(0.0, 0.8 / 16**0.5).log_prob(weight).sum() for weight in weights)
    torch.testing.assert_close(decoder.log_prior_of_weights(), log_prior)
    assert ps.networks.MLPDecoder(head_sd=None)(2, 6, ("log_mean",), 0).log_prior_of_weights() == 0
    expected = torch.autograd.grad(-log_prior, weights)
    expected[0][:3] = 0.0  # what a user's hook keeps as it is
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    decoder.add_gradient_of_prior()
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, 1.0 + gradient)
    others = [p for p in decoder.parameters() if not any(p is weight for weight in weights)]
    assert all(p.grad is None for p in others)


@pytest.mark.filterwarnings("ignore:.* was not registered in the param store")
def test_frozen_heads_have_no_prior(cells):
    model = small_model(cells, head_sd=0.1)
    model.decoder.heads["gate_logits"].weight.requires_grad_(False)
    start = model.decoder.heads["gate_logits"].weight.clone()
    assert torch.equal(small_fit(cells, model).model.decoder.heads["gate_logits"].weight, start)


def test_a_narrow_prior_of_heads_leaves_the_means_of_the_genes(cells):
    options = {"epochs": 20, "validation": 0}
    wide, narrow = (small_fit(cells, small_model(cells, head_sd=sd), **options) for sd in (None, 0.01))
    for name, weight in head_weights(narrow).items():
        assert weight.abs().mean() < 0.3 * head_weights(wide)[name].abs().mean(), name
    biases = [fit.model.decoder.heads["log_mean"].bias.std() for fit in (wide, narrow)]
    assert biases[1] > 0.5 * biases[0]


def test_other_decoders_and_weights_with_a_prior_have_no_prior_of_heads(cells):
    with pytest.raises(ModelError, match=r"\['head_sd'\] are for the default decoder"):
        ps.SCVI(cells.n_genes, 3, decoder=ps.networks.LinearDecoder(), head_sd=0.01)
    latent = small_model(cells, weight_priors={"decoder.heads.log_mean.weight": ps.weights.NormalWeights()})
    (weights,) = [latent.decoder.head_weights()]
    assert {id(w) for w in weights} == {
        id(latent.decoder.heads[n].weight) for n in ("log_inverse_dispersion", "gate_logits")
    }
