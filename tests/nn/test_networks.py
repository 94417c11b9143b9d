"""Networks, normalisation and dropout for any leading dimensions."""

import pytest
import torch

from pyro_scvi.nn.dropout import Dropout
from pyro_scvi.nn.networks import Decoder, Encoder
from pyro_scvi.nn.normalization import BatchNorm, LayerNorm

NORMS = [BatchNorm(), LayerNorm(), None]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("lead", [(), (7,), (2, 3)])
def test_any_leading_dimensions(norm, lead):
    decoder = Decoder(3, 11, ("log_mean", "gate_logits"), n_covariates=2, n_hidden=8, norm=norm).eval()
    z, gamma = torch.randn(*lead, 5, 3), torch.randn(5, 2)
    heads = decoder(z, gamma)
    assert {head.shape for head in heads.values()} == {(*lead, 5, 11)}
    assert list(heads) == ["log_mean", "gate_logits"]
    flat = decoder(z.reshape(-1, 5, 3)[-1], gamma)["log_mean"]
    torch.testing.assert_close(heads["log_mean"].reshape(-1, 5, 11)[-1], flat)


@pytest.mark.parametrize("norm", NORMS)
def test_a_single_cell_in_training(norm):
    decoder = Decoder(3, 4, ("log_mean",), n_hidden=8, norm=norm).train()
    assert torch.isfinite(decoder(torch.randn(1, 3), torch.zeros(1, 0))["log_mean"]).all()


def test_batch_statistics_pool_samples_and_cells():
    decoder = Decoder(3, 4, ("log_mean",), n_hidden=8, n_layers=1).train()
    z, gamma = torch.randn(6, 5, 3), torch.zeros(5, 0)
    torch.testing.assert_close(decoder(z, gamma)["log_mean"].flatten(0, 1), decoder(z.flatten(0, 1), gamma)["log_mean"])


def test_covariates_matter_and_log_input_too():
    encoder = Encoder(6, 2, n_covariates=1, n_hidden=8).eval()
    x = torch.poisson(torch.full((4, 6), 3.0))
    one, two = encoder(x, torch.zeros(4, 1)), encoder(x, torch.ones(4, 1))
    assert not torch.allclose(one.loc, two.loc)
    raw = Encoder(6, 2, log_input=False, n_hidden=8).eval()
    raw.load_state_dict(logged_state := Encoder(6, 2, n_hidden=8).eval().state_dict())
    logged = Encoder(6, 2, n_hidden=8).eval()
    logged.load_state_dict(logged_state)
    none = torch.zeros(4, 0)
    torch.testing.assert_close(raw(torch.log1p(x), none).loc, logged(x, none).loc)


def test_initial_sd():
    decoder = Decoder(3, 400, ("log_mean",), n_hidden=50, initial_sd=0.01)
    weights = decoder.heads["log_mean"].weight.detach()
    assert weights.abs().max() <= 0.02
    assert float(weights.std()) == pytest.approx(0.0088, rel=0.05)  # a normal truncated at two standard deviations
    assert not decoder.heads["log_mean"].bias.any()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(2001,), (3, 5, 401)])
def test_dropout_drops_the_share_it_is_told_and_keeps_the_mean(p, shape):
    """Share within 5 standard errors: fails by chance once in a million."""
    dropout = Dropout(p).train()
    x = torch.ones(40, *shape, requires_grad=True)
    out = dropout(x)
    kept = out > 0
    assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)), rtol=1e-3, atol=0)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    halves = kept.double().flatten(1)
    assert abs(torch.corrcoef(torch.stack([halves[:, :-1].flatten(), halves[:, 1:].flatten()]))[0, 1]) < 0.02


def test_dropout_follows_the_seed_and_sleeps_in_evaluation():
    dropout, x = Dropout(0.3), torch.ones(1000)
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(dropout.train()(x))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(Dropout(0.0).train()(x), x)
    assert not Dropout(1.0).train()(x).any()
