"""Recorded and compiled steps against the programs that were recorded, and what cannot be recorded."""

import copy
import shutil
import signal

import numpy as np
import pyro
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.errors import FitError, ModelError
from pyro_scvi.guides.log_joint import log_joint
from pyro_scvi.inference.compiled import Recorded, RecordedJoint
from pyro_scvi.inference.elbo import Bound, MeanFieldELBO
from pyro_scvi.inference.evaluation import evaluating
from pyro_scvi.nn.dropout import Dropout
from pyro_scvi.utils.execution import executing
from tests.system.test_combinations import GUIDES, LIKELIHOODS, PRIORS, make_guide, make_prior, meaningful

pytestmark = pytest.mark.integration

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler, g++")
WEIGHTS = {
    "none": {},
    "normal": {"decoder.heads.*": ps.weights.NormalWeights()},
    "horseshoe": {"decoder.heads.log_mean.weight": ps.weights.HorseshoeWeights()},
}
COMBINATIONS = [
    *((prior, likelihood, "DiagonalNormal", "none") for prior in PRIORS for likelihood in ("ZINB", "Poisson")),
    *(("Laplace", likelihood, guide, "none") for likelihood in LIKELIHOODS for guide in GUIDES),
    *(("StandardNormal", "ZINB", guide, "normal") for guide in GUIDES),
    ("StandardNormal", "NB", "DiagonalNormal", "horseshoe"),
]
COMBINATIONS = [those for those in dict.fromkeys(COMBINATIONS) if meaningful(those[0], those[2])]


@pytest.fixture
def uncompiled(monkeypatch):
    """Recordings are run as they are: that torch compiles them rightly is for other tests."""
    monkeypatch.setattr(torch, "compile", lambda recording, **options: recording)


def step_of(model, guide, cells, *, recorded, sizes=(30,), seed=5):
    """Loss, gradients and buffers after one step on the first cells for each of the sizes."""
    model, guide = copy.deepcopy((model, guide))
    take = Recorded(Bound(MeanFieldELBO(), model, guide)) if recorded else None
    torch.manual_seed(seed)
    losses = []
    with pyro.validation_enabled(False), executing(register_parameters=False, check_programs=False):
        for size in sizes:
            rows = torch.arange(size)
            x, gamma = (t[:size].double() for t in cells[:])
            if recorded:
                losses.append(take(x, gamma, index=rows, n_cells=60, len_all=size))
            else:
                losses.append(MeanFieldELBO().loss_and_grads(model, guide, x, gamma, index=rows, n_cells=60))
    parts = torch.nn.ModuleList([model, guide])
    gradients = {name: p.grad for name, p in parts.named_parameters()}
    return losses, gradients, dict(parts.named_buffers())


def check_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert (ours[name] is None) == (value is None), name
            if value is not None:
                torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-9, msg=name)
                assert ours[name].stride() == value.stride(), name  # the fused optimiser goes through memory in order


def parts_of(cells, prior="StandardNormal", likelihood="ZINB", guide="DiagonalNormal", weights="none", **options):
    law = getattr(ps.likelihoods, likelihood)()
    options = {"n_hidden": 8, "n_layers": 1, "weight_priors": WEIGHTS[weights]} | options
    model = ps.SCVI(cells.n_genes, 3, cells.n_covariates, prior=make_prior(prior, cells), likelihood=law, **options)
    guide = make_guide(guide, model, cells)
    with torch.no_grad():
        for parameter in torch.nn.ModuleList([model, guide]).parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model.double(), guide.double()


@pytest.mark.parametrize(("prior", "likelihood", "guide", "weights"), COMBINATIONS)
def test_a_recording_is_the_programs(cells, uncompiled, prior, likelihood, guide, weights):
    """Value, gradients, draws and statistics, float64; the second size has a recording of its own."""
    parts = parts_of(cells, prior, likelihood, guide, weights)
    expected = step_of(*parts, cells, recorded=False, sizes=(30, 29, 30))
    check_same(step_of(*parts, cells, recorded=True, sizes=(30, 29, 30)), expected)


def test_masks_of_dropout_are_the_programs(cells, uncompiled):
    parts = parts_of(cells, dropout=0.3, n_layers=2)
    expected = step_of(*parts, cells, recorded=False, sizes=(30, 29, 30))
    assert expected[0] != step_of(*parts, cells, recorded=False, sizes=(30, 29, 30), seed=6)[0]
    check_same(step_of(*parts, cells, recorded=True, sizes=(30, 29, 30)), expected)


def test_covariates_are_arguments(batched_cells, uncompiled):
    parts = parts_of(batched_cells)
    model, guide = copy.deepcopy(parts)
    take = Recorded(Bound(MeanFieldELBO(), model, guide))
    x, gamma = (t[:30].double() for t in batched_cells[:])
    losses = []
    with pyro.validation_enabled(False), executing(register_parameters=False, check_programs=False):
        for given in (gamma, 1 - gamma):
            torch.manual_seed(0)
            losses.append(take(x, given, index=torch.arange(30), n_cells=60, len_all=30))
    assert abs(losses[0] - losses[1]) > 1e-3


JOINTS = [
    *((prior, "ZINB", "none") for prior in PRIORS if prior != "Flat"),
    *(("StandardNormal", likelihood, "none") for likelihood in LIKELIHOODS),
    ("StandardNormal", "NB", "horseshoe"),
]


@pytest.mark.parametrize(("prior", "likelihood", "weights"), dict.fromkeys(JOINTS))
def test_a_recorded_density_is_the_programs(cells, uncompiled, monkeypatch, prior, likelihood, weights):
    """Values and gradients by u, float64, also after parameters have changed, for two shapes of u."""
    monkeypatch.setattr(RecordedJoint, "OFTEN", 1)
    model, guide = parts_of(cells, prior, likelihood, weights=weights)
    x, gamma = (t[:30].double() for t in cells[:])
    joint = RecordedJoint(30)
    with evaluating(model, guide, 0):
        for change, samples in ((0.0, 4), (0.01, 4), (0.0, 3)):
            for parameter in model.parameters():
                parameter += change
            given = model, x, gamma, guide.weights.medians()
            u = guide.start(x, gamma)[0] + 0.1 * torch.randn(samples, 30, guide.coordinates.size, dtype=torch.float64)
            torch.testing.assert_close(joint(*given)(u), log_joint(*given)(u), rtol=1e-12, atol=1e-12)
            with torch.enable_grad():
                u.requires_grad_()
                weight = torch.randn(samples, 30, dtype=torch.float64)
                gradients = [torch.autograd.grad((of(*given)(u) * weight).sum(), u)[0] for of in (joint, log_joint)]
            torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert sorted((shape[0], differentiated) for shape, differentiated in joint.recordings) == [
        (samples, differentiated) for samples in (3, 4) for differentiated in (False, True)
    ]


def test_what_is_asked_seldom_or_of_other_batches_is_not_recorded(cells, uncompiled):
    model, guide = parts_of(cells)
    x, gamma = (t[:30].double() for t in cells[:])
    joint = RecordedJoint(30)
    with evaluating(model, guide, 0):
        for rows, times in ((30, 9), (29, 12)):
            density = joint(model, x[:rows], gamma[:rows], {})
            for _ in range(times):
                density(torch.zeros(2, rows, guide.coordinates.size, dtype=torch.float64))
        assert not joint.recordings


@needs_compiler
def test_compiled_evidence_is_the_evidence(cells, monkeypatch):
    """With 12 cells in the last batch, which are left to the program."""
    monkeypatch.setattr(RecordedJoint, "OFTEN", 3)  # few calls have one shape where cells are few
    model = ps.SCVI(cells.n_genes, 2, n_hidden=8)
    fit = ps.fit(model, cells, epochs=2, validation=0, dtype=torch.float64, progress=False)
    tables = [ps.evidence(fit, cells, samples=100, batch_size=24, compiled=c, progress=False) for c in (False, True)]
    np.testing.assert_allclose(*(table.log_evidence for table in tables), rtol=1e-9)
    assert not np.array_equal(*(table.log_evidence for table in tables))


HISTORY = ["train_loss", "held_out_loss", "kl"]


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"kl_weight": ps.schedules.WarmUp(2)}], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_compiled_fit_is_the_fit(batched_cells, options, dropout):
    """Epoch by epoch but for rounding, with minibatches of two sizes (54 cells: 18, and 108 in all: 22 and 21)."""
    cells = batched_cells
    fits = [
        ps.fit(
            ps.SCVI(cells.n_genes, 3, cells.n_covariates, n_hidden=16, n_layers=2, dropout=dropout),
            *(cells,),
            **{"epochs": 4, "batch_size": 22, "dtype": torch.float64, "progress": False, "compiled": compiled},
            **options,
        )
        for compiled in (False, True)
    ]
    assert fits[0].history.train_loss.diff().abs().max() > 1
    np.testing.assert_allclose(*(fit.history[HISTORY] for fit in fits), rtol=1e-9)


class TwiceDropped(ps.priors.StandardNormal):
    """A law whose mean says which of many units two layers of dropout kept."""

    def __init__(self, n_latent):
        super().__init__(n_latent)
        self.first, self.second = Dropout(0.5), Dropout(0.5)
        self.register_buffer("kept", torch.zeros(2, 4096))

    def forward(self):
        ones = torch.ones(4096)
        if self.training:
            self.kept.copy_(torch.stack((self.first(ones), self.second(ones))))
        return super().forward()


@needs_compiler
def test_every_layer_has_dropout_of_its_own(cells):
    """Masks of two layers of one size are independent, and new in every step and by every seed."""
    kept = []
    for epochs, seed in ((1, 0), (2, 0), (2, 0), (2, 1)):
        model = ps.SCVI(cells.n_genes, 2, prior=TwiceDropped(2), n_hidden=8)
        options = {"batch_size": 20, "validation": 0, "progress": False, "compiled": True}
        fit = ps.fit(model, cells, epochs=epochs, seed=seed, **options)
        kept.append(fit.model.prior.kept > 0)
    assert all(abs(float(part.double().mean()) - 0.5) < 0.05 for masks in kept for part in masks)  # 6 sd
    differing = [kept[0][0] ^ kept[0][1], kept[0][0] ^ kept[1][0], kept[1][0] ^ kept[3][0]]
    assert all(abs(float(part.double().mean()) - 0.5) < 0.05 for part in differing)
    assert torch.equal(kept[1], kept[2])


@needs_compiler
def test_a_compiled_run_is_another_run(cells, tmp_path):
    """That it resumes bit for bit is among the tests of checkpoints."""
    options = {"epochs": 1, "progress": False, "checkpoint": tmp_path / "run"}
    ps.fit(ps.SCVI(20, 2, n_hidden=8), cells, compiled=True, **options)
    with pytest.raises(ps.errors.CheckpointError, match="compiled"):
        ps.fit(ps.SCVI(20, 2, n_hidden=8), cells, resume=True, **options)


class Conditional(ps.priors.StandardNormal):
    """A law whose Python looks at values."""

    def forward(self):
        law = super().forward()
        return law if float(law.mean.sum()) == 0 else law.expand(())


def test_evidence_under_a_condition_on_values_is_refused(cells, uncompiled):
    fit = ps.fit(ps.SCVI(cells.n_genes, 2, prior=Conditional(2), n_hidden=8), cells, epochs=1, progress=False)
    with pytest.raises(FitError, match=r"a density cannot be compiled .*leave compiled=True out"):
        ps.evidence(fit, cells, samples=20, compiled=True, progress=False)


def test_a_condition_on_values_is_refused(cells, uncompiled):
    model = ps.SCVI(cells.n_genes, 2, prior=Conditional(2), n_hidden=8)
    with pytest.raises(FitError, match=r"a training step cannot be compiled .*leave compiled=True out"):
        ps.fit(model, cells, epochs=1, batch_size=20, progress=False, compiled=True)


class Replacing(ps.priors.StandardNormal):
    """A law that puts a new tensor in the place of its buffer, or keeps it and changes it in place."""

    def __init__(self, n_latent, in_place):
        super().__init__(n_latent)
        self.in_place = in_place
        self.register_buffer("sd", torch.ones(n_latent))

    def forward(self):
        if self.training:
            self.sd = self.sd.mul_(1.01) if self.in_place else self.sd * 1.01
        return pyro.distributions.Normal(torch.zeros_like(self.sd), self.sd.clone()).to_event(1)


def test_a_buffer_is_changed_in_place_or_refused(cells, uncompiled):
    options = {"epochs": 3, "batch_size": 20, "validation": 0, "progress": False}
    models = [ps.SCVI(cells.n_genes, 2, prior=Replacing(2, True), n_hidden=8) for _ in range(2)]
    fits = [ps.fit(model, cells, **options, compiled=c) for model, c in zip(models, (False, True), strict=True)]
    assert fits[0].model.prior.sd[0] > 1.05
    torch.testing.assert_close(models[1].prior.sd, models[0].prior.sd)
    np.testing.assert_allclose(*(fit.history.train_loss for fit in fits), rtol=1e-4)
    with pytest.raises(FitError, match=r"replaces the tensors \['model.prior.sd'.*in place"):
        ps.fit(ps.SCVI(cells.n_genes, 2, prior=Replacing(2, False), n_hidden=8), cells, **options, compiled=True)


def test_hooks_are_refused(cells, uncompiled):
    model = ps.SCVI(cells.n_genes, 2, n_hidden=8)
    model.decoder.heads["log_mean"].weight.register_hook(torch.zeros_like)
    with pytest.raises(FitError, match=r"\['model.decoder.heads.log_mean.weight'.*have hooks"):
        ps.fit(model, cells, epochs=1, batch_size=20, progress=False, compiled=True)


@pytest.mark.filterwarnings("ignore:.* was not registered in the param store")
def test_parameters_that_are_not_trained_stay(cells, uncompiled):
    """Frozen weights, and integers, which could not have a gradient."""
    model = ps.SCVI(cells.n_genes, 2, n_hidden=8)
    model.codes = torch.nn.Parameter(torch.arange(3), requires_grad=False)
    frozen = model.decoder.heads["gate_logits"].requires_grad_(False).weight
    fit = ps.fit(model, cells, epochs=2, batch_size=20, progress=False, compiled=True)
    assert torch.equal(fit.model.decoder.heads["gate_logits"].weight, frozen)
    assert torch.equal(fit.model.codes, torch.arange(3))


def test_a_signal_that_ends_the_compiler_ends_training(cells, monkeypatch):
    def killed(recording, **options):
        signal.raise_signal(signal.SIGINT)  # to this thread, so that it is noted before the error
        raise RuntimeError("C++ compile error Command: g++ -O3 ... Output: Killed. Set TORCHDYNAMO_VERBOSE=1 for more")

    monkeypatch.setattr(torch, "compile", killed)
    options = {"epochs": 4, "batch_size": 20, "progress": False, "compiled": True}
    with pytest.raises(KeyboardInterrupt, match="SIGINT before the first epoch"):
        ps.fit(ps.SCVI(cells.n_genes, 2, n_hidden=8), cells, **options)
    warm_up = ps.schedules.WarmUp(2)  # whose steps are not compiled
    with pytest.warns(UserWarning, match="interrupted by SIGINT after epoch"):
        fit = ps.fit(ps.SCVI(cells.n_genes, 2, n_hidden=8), cells, **options, kl_weight=warm_up)
    assert 1 <= len(fit.history) < 4


def test_the_compilers_words_are_those_of_the_error(cells, monkeypatch):
    def failing(recording, **options):
        raise RuntimeError(
            f"C++ compile error Command: {'g++ ' * 200} Output: no space left. Set TORCHDYNAMO_VERBOSE=1"
        )

    monkeypatch.setattr(torch, "compile", failing)
    with pytest.raises(FitError, match=r"cannot be compiled \(RuntimeError: no space left\.\); leave"):
        ps.fit(ps.SCVI(cells.n_genes, 2, n_hidden=8), cells, batch_size=20, progress=False, compiled=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compiled": 1}, "compiled must be True or False, got 1"),
        ({"compiled": True, "elbo": pyro.infer.Trace_ELBO()}, "compiled=True is for elbo=None, got"),
    ],
)
def test_what_is_no_option_is_refused(cells, options, message):
    with pytest.raises(ModelError, match=message):
        ps.fit(ps.SCVI(cells.n_genes), cells, progress=False, **options)
