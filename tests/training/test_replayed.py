"""Replayed steps: the bits of the programs, and the programs themselves wherever a recording could differ."""

import pyro
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.inference.elbo import Bound, MeanFieldELBO
from pyro_scvi.training import replayed
from pyro_scvi.training.replayed import Replayed, is_known
from pyro_scvi.utils.execution import executing
from tests.inference.test_compiled import parts_of
from tests.training.test_checkpoint import check_equal, run, stopped

PARTS = [
    ("StandardNormal", "ZINB", "DiagonalNormal", "none"),
    ("VampPrior", "NB", "DiagonalNormal", "none"),
    ("StandardNormal", "Poisson", "FullRankNormal", "none"),
    ("GaussianMixture", "ZIP", "PerCell", "none"),
    ("StandardNormal", "ZINB", "DiagonalNormal", "normal"),
]


@pytest.fixture
def from_the_first(monkeypatch):
    """Recordings for runs of any length; returns the Replayed that are made."""
    made = []

    class Noted(Replayed):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(replayed, "LEAST_STEPS", 1)
    monkeypatch.setattr(replayed, "Replayed", Noted)
    return made


def steps(model, guide, cells, *, takes, sizes=(30, 30, 29, 30)):
    """Losses, gradients and buffers after steps without an optimiser, from one seed."""
    torch.manual_seed(5)
    parts = torch.nn.ModuleList([model, guide])
    losses, gradients = [], []
    with pyro.validation_enabled(False), executing(register_parameters=False, check_programs=False):
        for size in sizes:
            parts.zero_grad()
            x, gamma = (t[:size] for t in cells[:])
            losses.append(takes(x, gamma, index=torch.arange(size), n_cells=60, len_all=size))
            gradients += [p.grad.clone() for p in parts.parameters()]
    return losses, [*gradients, *(buffer.clone() for buffer in parts.buffers())]


def programs_of(model, guide):
    def take(x, gamma, *, len_all, **given):
        return MeanFieldELBO().loss_and_grads(model, guide, x, gamma, **given)

    return take


def replayed_of(model, guide):
    return Replayed(Bound(MeanFieldELBO(), model, guide), programs_of(model, guide), {30, 29})


@pytest.mark.parametrize(("prior", "likelihood", "guide", "weights"), PARTS)
def test_steps_have_the_bits_of_the_programs(cells, prior, likelihood, guide, weights):
    """float32: losses, gradients, running statistics; the size that comes once is compared and not replayed."""
    made = [tuple(part.float() for part in parts_of(cells, prior, likelihood, guide, weights)) for _ in range(2)]
    takes = replayed_of(*made[1])
    (losses, tensors), (again, others) = (
        steps(*made[0], cells, takes=programs_of(*made[0])),
        steps(*made[1], cells, takes=takes),
    )
    assert losses == again
    assert all(map(torch.equal, tensors, others))
    assert takes.proven == {30: True, 29: True}


def test_a_fit_is_the_same_and_goes_on_from_a_checkpoint(batched_cells, tmp_path, monkeypatch, from_the_first):
    with monkeypatch.context() as patch:
        patch.setattr(replayed, "LEAST_STEPS", 10**9)
        expected = run(batched_cells)
    assert not from_the_first
    check_equal(run(batched_cells), expected)
    assert set(from_the_first[0].proven.values()) == {True}
    stopped(batched_cells, tmp_path / "run", monkeypatch, 3)
    check_equal(run(batched_cells, checkpoint=tmp_path / "run", resume=True), expected)


def test_a_recording_that_differs_is_not_used(cells, monkeypatch):
    """Were it not compared, the gradients of the second step would be twice too large."""

    def doubled(step, example):
        def other(*given):
            loss, gradients = step(*given)
            return loss, [2 * gradient for gradient in gradients]

        return torch.enable_grad()(other)

    monkeypatch.setattr(replayed, "_without_overhead", doubled)
    check_programs_are_used(cells)


def test_without_a_recording_steps_are_the_programs(cells, monkeypatch):
    def refused(step, example):
        raise RuntimeError("it looks at values")

    monkeypatch.setattr(replayed, "_without_overhead", refused)
    check_programs_are_used(cells)


def check_programs_are_used(cells):
    made = [tuple(part.float() for part in parts_of(cells)) for _ in range(2)]
    takes = replayed_of(*made[1])
    expected = steps(*made[0], cells, takes=programs_of(*made[0]))
    found = steps(*made[1], cells, takes=takes)
    assert found[0] == expected[0]
    assert all(map(torch.equal, found[1], expected[1]))
    assert takes.proven == {30: False, 29: False}


class Counting(ps.priors.StandardNormal):
    """A prior of the user's own that counts its calls."""

    called = 0

    def forward(self):
        type(self).called += 1
        return super().forward()


def test_parts_of_others_are_called_in_every_step(cells, from_the_first):
    Counting.called = 0
    run(cells, *with_guide(ps.SCVI(20, 2, prior=Counting(2), n_hidden=8)), epochs=5, validation=0)
    assert Counting.called >= 5 * 4  # of 60 cells in batches of 16
    assert not from_the_first


def with_guide(model):
    return model, ps.guides.DiagonalNormal(model, n_hidden=8)


def standard_normal():
    return pyro.distributions.Normal(torch.zeros(2), torch.ones(2)).to_event(1)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_what_is_not_known_is_not_recorded():
    known = ps.SCVI(20, 2, n_hidden=8)
    hooked, patched = ps.SCVI(20, 2, n_hidden=8), ps.SCVI(20, 2, n_hidden=8)
    hooked.decoder.register_forward_hook(lambda *_: None)
    patched.decoder.forward = patched.decoder.forward
    weights = {
        "decoder.heads.log_mean.bias": lambda name, like: pyro.sample(name, pyro.distributions.Normal(like, 1.0))
    }
    others = [
        hooked,
        patched,
        ps.SCVI(20, 2, prior=standard_normal, n_hidden=8),
        ps.SCVI(20, 2, prior=Counting(2), n_hidden=8),
        ps.SCVI(20, 2, weight_priors=weights, n_hidden=8),
    ]
    assert bound_is_known(known)
    assert not any(map(bound_is_known, others))
    with pyro.poutine.block():
        assert not bound_is_known(known)
    with torch.autograd.detect_anomaly(check_nan=False):
        assert not bound_is_known(known)


def bound_is_known(model):
    return is_known(Bound(MeanFieldELBO(), *with_guide(model)))
