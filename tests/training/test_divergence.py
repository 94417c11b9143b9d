"""Divergence: the learning rate is halved, and what stays not finite is refused with its cause."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.errors import FitError
from pyro_scvi.inference.elbo import MeanFieldELBO
from pyro_scvi.nn.networks import Decoder
from pyro_scvi.persistence import archive
from pyro_scvi.schedules import Constant, ConstantKL, OneCycle
from pyro_scvi.training.checkpoint import CHECKPOINT_FACTS
from pyro_scvi.training.divergence import HALVINGS
from pyro_scvi.training.loop import Trainer
from tests.support.simulate import simulated_counts
from tests.training.test_checkpoint import check_equal, parts, run, stopped


def broken(monkeypatch, *steps):
    """Let gradients be no numbers after the given training steps, counted from 1 over all attempts."""
    loss_and_grads, at = MeanFieldELBO.loss_and_grads, [0]

    def counted(self, model, guide, *args, **kwargs):
        loss = loss_and_grads(self, model, guide, *args, **kwargs)
        at[0] += 1
        if at[0] in steps:
            next(guide.parameters()).grad[0] = math.nan
        return loss

    monkeypatch.setattr(MeanFieldELBO, "loss_and_grads", counted)


class Undefined(dist.Poisson):
    """Counts above 90 have no probability."""

    def log_prob(self, value):
        return torch.where(value > 90, torch.nan, super().log_prob(value))


class UndefinedCounts(ps.likelihoods.Likelihood):
    heads = ("log_mean",)

    def marginal(self, log_mean):
        return Undefined(log_mean.exp())


@pytest.mark.parametrize("step", [6, 8], ids=["seen by the next loss", "seen at the end of the epoch"])
@pytest.mark.parametrize("rate", [OneCycle(0.02), Constant(0.02)], ids=["one cycle", "constant"])
def test_a_bad_step_goes_back_an_epoch_and_halves_the_rate(cells, monkeypatch, step, rate):
    whole = run(cells, learning_rate=rate)
    broken(monkeypatch, step)
    with pytest.warns(UserWarning, match="halved 1 times"):
        fit = run(cells, learning_rate=rate)
    assert fit.settings["halvings"] == 1
    assert fit.history.train_loss.iloc[0] == whole.history.train_loss.iloc[0]
    np.testing.assert_allclose(fit.history.learning_rate.iloc[1:], whole.history.learning_rate.iloc[1:] / 2, rtol=1e-12)
    assert np.isfinite(fit.history.train_loss).all()


def test_the_retried_epoch_is_one_at_half_the_rate_from_the_same_state(cells, monkeypatch):
    """A rate halved from the start gives the same as a divergence in the first epoch."""
    half = run(cells, learning_rate=Constant(0.01))
    broken(monkeypatch, 3)
    with pytest.warns(UserWarning, match="halved"):
        fit = run(cells, learning_rate=Constant(0.02))
    fit.settings.pop("halvings")
    check_equal(fit, half)


def test_a_run_that_diverged_resumes_to_the_same_end(cells, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        broken(patch, 6)
        with pytest.warns(UserWarning, match="halved"):
            whole = run(cells)
    with monkeypatch.context() as patch:
        broken(patch, 6)
        epoch, left = Trainer.epoch, [4]  # the second, its retry, and two more

        def counted(self, *args, **kwargs):
            left[0] -= 1
            if left[0] < -1:
                raise ZeroDivisionError
            return epoch(self, *args, **kwargs)

        patch.setattr(Trainer, "epoch", counted)
        with pytest.raises(ZeroDivisionError):
            run(cells, checkpoint=tmp_path / "run")
    with pytest.warns(UserWarning, match="halved 1 times"):
        check_equal(run(cells, checkpoint=tmp_path / "run", resume=True), whole)


def as_written_before(folder, scale):
    """Rewrite a checkpoint as it was once: the class by its old name, the schedule's own rates halved, no scale."""
    content = archive.read(folder, {"checkpoint": CHECKPOINT_FACTS})
    assert content.facts["run"]["kl_weight"]["part"] == "ConstantKL"
    content.facts["run"]["kl_weight"]["part"] = "Weight"
    state = content.facts["progress"]
    assert state.pop("rate_scale") == scale
    for name in ("base_lrs", "_last_lr"):
        state["schedule"][name] = [rate * scale for rate in state["schedule"][name]]
    for group in state["groups"]:
        rates = group.keys() & {"lr", "initial_lr", "max_lr", "min_lr"}
        group.update({name: group[name] * scale for name in rates})
    archive.write(folder, content)


@pytest.mark.parametrize("rate", [OneCycle(0.02), Constant(0.02)], ids=["one cycle", "constant"])
def test_an_earlier_checkpoint_of_a_halved_rate_resumes_to_the_same_end(cells, tmp_path, monkeypatch, rate):
    options = {"learning_rate": rate, "kl_weight": ConstantKL(0.5)}
    with monkeypatch.context() as patch:
        broken(patch, 6, 12)
        with pytest.warns(UserWarning, match="halved 2 times"):
            whole = run(cells, **options)
    with monkeypatch.context() as patch:
        broken(patch, 6, 12)
        stopped(cells, tmp_path / "run", patch, 6, **options)  # four epochs and the two that were tried again
    as_written_before(tmp_path / "run", 0.25)
    with pytest.warns(UserWarning, match="halved 2 times"):
        check_equal(run(cells, checkpoint=tmp_path / "run", resume=True, **options), whole)


def test_when_halving_does_not_help_the_error_carries_the_last_good_fit(cells, tmp_path, monkeypatch):
    two = run(cells, checkpoint=tmp_path / "whole")
    model, guide = parts(cells)
    with monkeypatch.context() as patch:
        broken(patch, *range(10, 500))
        with pytest.raises(
            FitError, match=f"halved {HALVINGS} times.*after epoch 2.*largest is .*gene_.*cell_"
        ) as caught:
            run(cells, model, guide, checkpoint=tmp_path / "run")
    fit = caught.value.fit
    assert fit.guide.model is fit.model is not model
    assert fit.history.drop(columns="seconds").equals(two.history.drop(columns="seconds").iloc[:2])
    assert np.isfinite(ps.embed(fit, cells)).all()
    fit.save(tmp_path / "fit")
    assert len(ps.load(tmp_path / "run").history) == 2
    check_equal(run(cells, checkpoint=tmp_path / "run", resume=True), two)


def test_cells_and_genes_without_a_finite_probability_are_named(monkeypatch):
    counts = np.minimum(simulated_counts(), 50)
    counts[17, 3] = counts[41, 8] = 91
    cells = ps.Cells.from_counts(counts)
    model = ps.SCVI(20, 3, likelihood=UndefinedCounts())
    monkeypatch.setattr("torch.distributions.Distribution._validate_args", False)
    with pytest.raises(
        FitError, match="no finite log probability for gene 'gene_3' in cell 'cell_17', gene 'gene_8'"
    ) as caught:
        ps.fit(model, cells, epochs=3, validation=0, progress=False, device="cpu", batch_size=10)
    assert caught.value.fit is None
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_loss_that_is_no_number_before_any_step_is_an_error_at_once(cells, monkeypatch):
    """A smaller learning rate could not help."""
    monkeypatch.setattr(
        Decoder, "forward", lambda self, z, gamma: {n: z.squeeze() @ torch.full((3, 20), torch.nan) for n in self.heads}
    )
    epoch, tried = Trainer.epoch, []
    monkeypatch.setattr(Trainer, "epoch", lambda *a, **k: tried.append(0) or epoch(*a, **k))
    with pytest.raises(FitError, match="cannot score these cells"):
        run(cells)
    assert len(tried) == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("epochs", [2, 12])
@pytest.mark.parametrize("rate", [Constant(50.0), OneCycle(50.0)], ids=["constant", "one cycle"])
@pytest.mark.filterwarnings("ignore:the loss was NaN or infinite")
def test_a_learning_rate_of_50_gives_a_usable_fit_or_an_error(cells, rate, epochs, seed):
    error = None
    try:
        fit = ps.fit(ps.SCVI(20), cells, epochs=epochs, learning_rate=rate, seed=seed, progress=False, device="cpu")
    except FitError as raised:
        error = raised
    if error is not None:
        assert "learning_rate" in str(error)
        assert error.fit is None or np.isfinite(ps.embed(error.fit, cells)).all()
        return
    good = run(cells, epochs=1, learning_rate=Constant(0.0))
    assert fit.settings["halvings"] > 0
    assert fit.history.held_out_loss.min() < good.history.held_out_loss.min()
    assert np.isfinite(ps.embed(fit, cells)).all()


def test_parameters_that_are_no_numbers_are_named_and_not_the_cells(cells):
    model, guide = parts(cells)
    with torch.no_grad():
        model.decoder.heads["log_mean"].weight[0, 0] = math.nan
    with pytest.raises(FitError, match=r"decoder.heads.log_mean.weight holds values that are no numbers.*new model"):
        run(cells, model, guide)


def test_a_prior_without_a_finite_density_is_named(cells):
    class Nowhere(torch.distributions.Normal):
        def log_prob(self, value):
            return super().log_prob(value) * math.nan

    def prior():
        return pyro.distributions.torch.Independent(Nowhere(torch.zeros(3), torch.ones(3)), 1)

    with pytest.raises(FitError, match="prior"):
        run(cells, *parts(cells, prior=prior), elbo=pyro.infer.Trace_ELBO())
