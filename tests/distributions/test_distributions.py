"""The count laws against mpmath, SciPy, Bayes' rule and their own samples."""

from functools import cache

import mpmath
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_scvi.distributions.negative_binomial import NegativeBinomial
from pyro_scvi.distributions.zero_inflated import ZeroInflated

FAILURE_RATE = 2e-5  # of each goodness-of-fit test, over seeds
N_DRAWS = 200_000

INVERSE_DISPERSIONS = [10.0**k for k in range(-6, 9)]
MEANS = [10.0**k for k in range(-8, 6)]
GATES = [-100.0, -30.0, -10.0, -3.0, 0.0, 3.0, 10.0, 30.0, 100.0]
COUNTS = [0.0, 1.0, 2.0, 5.0, 17.0, 100.0, 1e3, 1e4, 1e5]
SMALL = [(2.0, 0.7), (0.3, 5.0), (6.0, 40.0), (3.0, 0.2)]  # (mean, inverse dispersion) that can be sampled


def law(mean, r, gate=None, dtype=torch.float64):
    base = NegativeBinomial(torch.tensor(mean, dtype=dtype).log(), torch.tensor(r, dtype=dtype).log())
    return base if gate is None else ZeroInflated(base, torch.tensor(gate, dtype=dtype))


# --- against mpmath: the truth is evaluated at the float32 inputs themselves; gradients are relative above 1 ---


def grid():
    r, mean, x = np.meshgrid(INVERSE_DISPERSIONS, MEANS, COUNTS, indexing="ij")
    return (torch.tensor(np.log(a).ravel(), dtype=torch.float32) for a in (mean, r)), torch.tensor(x.ravel()).float()


@cache
def truth():
    """Log NB, its gradients by log mean and log r, (3, points) in double precision; exact arithmetic behind them."""
    (log_mean, log_r), x = grid()
    rows, lgamma, psi = [], cache(mpmath.loggamma), cache(mpmath.digamma)
    with mpmath.workdps(60):
        factorial = {k: mpmath.loggamma(k + 1) for k in COUNTS}
        for a, b, k in zip(log_mean.tolist(), log_r.tolist(), x.tolist(), strict=True):
            mu, r = mpmath.exp(a), mpmath.exp(b)
            log_p = mpmath.log(r / (r + mu))
            value = lgamma(r + k) - lgamma(r) - factorial[k] + r * log_p + k * mpmath.log(mu / (r + mu))
            by_mean = (k - mu) * r / (r + mu)
            by_r = r * (psi(r + k) - psi(r) + log_p + (mu - k) / (r + mu))
            rows.append([value, by_mean, by_r])
    return rows


@cache
def zero_inflated_truth():
    """Log ZINB and its gradients by log mean, log r and gate logits, (gates, points, 4) in exact arithmetic."""
    x = grid()[1].tolist()
    out = np.empty((len(GATES), len(x), 4))
    with mpmath.workdps(60):
        for i, gate in enumerate(GATES):
            pi = 1 / (1 + mpmath.exp(-mpmath.mpf(gate)))
            log_kept = mpmath.log(1 - pi)
            for j, (k, (value, by_mean, by_r)) in enumerate(zip(x, truth(), strict=True)):
                if k > 0:
                    out[i, j] = value + log_kept, by_mean, by_r, -pi
                    continue
                p0 = mpmath.exp(value)
                total = pi + (1 - pi) * p0
                share = (1 - pi) * p0 / total
                out[i, j] = mpmath.log(total), share * by_mean, share * by_r, pi * (1 - pi) * (1 - p0) / total
    return out


def worst(found, expected, floor):
    return (np.abs(found - expected) / np.maximum(np.abs(expected), floor)).max()


@pytest.fixture(params=["gathered", "in place"])
def entries(request, monkeypatch):
    """Both ways to treat the entries above zero: gathered, as on a CPU, and in their places, as on a GPU."""
    monkeypatch.setattr("pyro_scvi.distributions.selected_entries.gathers", lambda device: request.param == "gathered")


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize("zero_inflated", [False, True])
@pytest.mark.parametrize(
    ("dtype", "value_error", "gradient_error"), [(torch.float32, 1e-5, 1e-3), (torch.float64, 1e-12, 1e-10)]
)
def test_agrees_with_exact_arithmetic(zero_inflated, dtype, value_error, gradient_error):
    (log_mean, log_r), x = grid()
    log_mean, log_r, x, gates = (t.to(dtype) for t in (log_mean, log_r, x, torch.tensor(GATES)[:, None]))
    inputs = [t.clone().expand(len(GATES) if zero_inflated else 1, -1).clone() for t in (log_mean, log_r)]
    inputs += [gates.expand(-1, len(x)).clone()] if zero_inflated else []
    for t in inputs:
        t.requires_grad_()
    counts = NegativeBinomial(*inputs[:2])
    value = (ZeroInflated(counts, inputs[2]) if zero_inflated else counts).log_prob(x)
    gradients = torch.autograd.grad(value.sum(), inputs)
    expected = zero_inflated_truth() if zero_inflated else np.array([truth()], dtype=float)
    assert all(torch.isfinite(t).all() for t in (value, *gradients))
    value, *gradients = (t.detach().double().numpy() for t in (value, *gradients))
    assert (np.abs(value - expected[..., 0]) / (1 + np.abs(expected[..., 0]))).max() <= value_error
    for i, gradient in enumerate(gradients, start=1):
        assert worst(gradient, expected[..., i], floor=1.0) <= gradient_error


# --- float64 identities ---


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize("gate", [None, -3.0, 0.5])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradients_are_those_of_the_value(check, gate):
    generator = torch.Generator().manual_seed(0)
    log_mean, log_r = (torch.randn(8, generator=generator).double().requires_grad_() for _ in range(2))
    x = torch.tensor([0.0, 0.0, 1.0, 2.0, 5.0, 17.0, 40.0, 1000.0]).double()
    logits = torch.full((8,), 0.0 if gate is None else gate).double().requires_grad_()

    def log_prob(log_mean, log_r, logits):
        base = NegativeBinomial(log_mean, log_r)
        return (base if gate is None else ZeroInflated(base, logits)).log_prob(x)

    inputs = (log_mean, log_r) if gate is None else (log_mean, log_r, logits)
    assert check(lambda *t: log_prob(*t[:2], t[2] if len(t) > 2 else None), inputs)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_second_derivatives_by_one_parameter_are_those_by_all(trained):
    x = torch.tensor([0.0, 1.0, 2.0, 40.0]).double()
    values = [torch.linspace(-1, 1, 4).double() + shift for shift in (0.0, 0.3, -0.2)]

    def second(requires):
        inputs = [value.clone().requires_grad_(some) for value, some in zip(values, requires, strict=True)]
        law = ZeroInflated(NegativeBinomial(*inputs[:2]), inputs[2])
        (first,) = torch.autograd.grad(law.log_prob(x).sum(), inputs[trained], create_graph=True)
        return torch.autograd.grad(first.sum(), inputs[trained])[0]

    alone = second([i == trained for i in range(3)])
    torch.testing.assert_close(alone, second([True] * 3))
    assert alone.abs().max() > 0.01


@pytest.mark.usefixtures("entries")
def test_fractions_of_counts_follow_the_formula_of_whole_ones():
    """Corrected counts on both sides of 1 and of 8, between which formulas change; draws share some parameters."""
    x = torch.tensor([0.25, 0.5, 0.999, 1.0, 1.5, 2.0, 3.0, 7.5, 8.0, 8.5, 9.0, 30.25]).double().reshape(2, 6)
    mean, r = torch.tensor([0.2, 3.0, 40.0]).double()[:, None, None], torch.linspace(0.1, 20, 6).double()
    coefficient = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1)
    expected = coefficient - r * torch.log1p(mean / r) + x * torch.log(mean / (r + mean))
    found = NegativeBinomial(mean.log().expand(3, 2, 6), r.log(), validate_args=False).log_prob(x)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("entries")
def test_no_parameter_is_too_far_out_for_float32():
    corners = torch.cartesian_prod(*[torch.tensor([-1e4, -100.0, -50.0, 0.0, 50.0, 100.0, 1e4])] * 3)
    log_mean, log_r, gate = (column.clone().requires_grad_() for column in corners[:, None].unbind(-1))
    value = ZeroInflated(NegativeBinomial(log_mean, log_r), gate).log_prob(torch.tensor([0.0, 1.0, 2.0, 1e5]))
    gradients = torch.autograd.grad(value.sum(), (log_mean, log_r, gate))
    assert all(torch.isfinite(t).all() for t in (value, *gradients))
    assert (value <= 1e-5).all()


@pytest.mark.parametrize("gate", [None, -30.0, -1.0, 0.0, 2.0, 30.0])
@pytest.mark.parametrize(("mean", "r"), SMALL)
def test_sums_to_one(mean, r, gate):
    x = torch.arange(3000.0).double()
    assert law(mean, r, gate).log_prob(x).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("r", [1e-3, 0.4, 7.0, 1e3])
@pytest.mark.parametrize("mean", [1e-2, 1.0, 80.0])
def test_agrees_with_scipy(mean, r):
    x = np.array([0, 1, 2, 10, 100, 3000])
    expected = stats.nbinom.logpmf(x, r, r / (r + mean))
    np.testing.assert_allclose(law(mean, r).log_prob(torch.tensor(x).double()), expected, rtol=1e-9)
    assert law(mean, r).mean.item() == pytest.approx(stats.nbinom.mean(r, r / (r + mean)), rel=1e-12)
    assert law(mean, r).variance.item() == pytest.approx(stats.nbinom.var(r, r / (r + mean)), rel=1e-12)


def test_approaches_poisson_as_r_grows():
    x, mean = torch.tensor([0.0, 1.0, 3.0, 20.0]).double(), 4.0
    poisson = dist.Poisson(torch.tensor(mean).double()).log_prob(x)
    # To first order in 1 / r the difference is ((x - mu)^2 - x) / (2 r).
    for r in (1e4, 1e6):
        gap = law(mean, r).log_prob(x) - poisson
        torch.testing.assert_close(gap * r, ((x - mean) ** 2 - x) / 2, rtol=0, atol=3e3 / r + 1e-6 * r**0.5)
    torch.testing.assert_close(law(mean, 1e14).log_prob(x), poisson, rtol=1e-12, atol=1e-12)


def test_gates_far_out_give_base_and_certain_zero():
    x = torch.tensor([0.0, 1.0, 9.0]).double()
    torch.testing.assert_close(law(2.0, 0.7, -1e3).log_prob(x), law(2.0, 0.7).log_prob(x), rtol=1e-13, atol=0)
    assert law(2.0, 0.7, 1e3).log_prob(x)[0] == 0
    assert (law(2.0, 0.7, 1e3).log_prob(x)[1:] < -900).all()


# --- samples ---


@pytest.mark.parametrize("gate", [None, -2.0, 0.4])
@pytest.mark.parametrize(("mean", "r"), SMALL)
def test_moments_are_those_of_the_samples(mean, r, gate):
    d = law(mean, r, gate)
    draws = d.sample((N_DRAWS,))
    centred = draws - d.mean
    se_mean = (d.variance / N_DRAWS).sqrt()
    se_variance = ((centred**4).mean() - d.variance**2).div(N_DRAWS).sqrt()
    assert abs(centred.mean() / se_mean) < 5
    assert abs(((centred**2).mean() - d.variance) / se_variance) < 5


def goodness_of_fit(sampled, claimed, most=100):
    """P-value of the counts of ``sampled`` under ``claimed``, rare counts pooled (Pearson's chi-squared test).

    SciPy's, because pyro.distributions.testing.gof.multinomial_goodness_of_fit says p = 1 for chi-squared values of
    some hundreds: its series for the survival function stops after 100 terms.
    """
    probs = claimed.log_prob(torch.arange(float(most)).double()).exp()
    kept = probs * N_DRAWS > 20
    draws = sampled.sample((N_DRAWS,)).long().clamp(max=most)
    counts = torch.bincount(draws, minlength=most + 1)[:most][kept]
    observed = [*counts.tolist(), N_DRAWS - int(counts.sum())]
    expected = [*probs[kept].tolist(), 1 - float(probs[kept].sum())]
    return stats.chisquare(observed, np.array(expected) * N_DRAWS).pvalue


@pytest.mark.parametrize("gate", [None, -2.0, 0.4])
@pytest.mark.parametrize(("mean", "r"), SMALL)
def test_samples_follow_the_law(mean, r, gate):
    assert goodness_of_fit(law(mean, r, gate), law(mean, r, gate)) > FAILURE_RATE


# (mean, inverse dispersion) where little is seen, nearly all variation is Poisson's, or one count in many is large
FAR = [(1e-3, 1e-3), (0.01, 1e6), (0.02, 0.3), (50.0, 0.02), (30.0, 1e5), (1500.0, 3.0), (200.0, 1e-3)]


@pytest.mark.parametrize("gate", [None, 0.4])
@pytest.mark.parametrize(("mean", "r"), FAR)
def test_float32_samples_far_out_follow_the_law(mean, r, gate):
    sampled = law(mean, r, gate, dtype=torch.float32)
    assert goodness_of_fit(sampled, law(mean, r, gate), most=3000) > FAILURE_RATE


def test_chances_below_the_digits_of_a_uniform_are_kept(monkeypatch):
    """Where the first 16 digits are 0, as once in 65,536, a count of chance 0.3 / 2^16 is drawn three times in ten."""
    lowest = torch.full((N_DRAWS,), -(2**15), dtype=torch.int16)
    monkeypatch.setattr("pyro_scvi.distributions.nb_sampling.random_bits", lambda like: lowest)
    rare = NegativeBinomial(torch.full((N_DRAWS,), 0.3 / 2**16).log(), torch.zeros(()))
    share = (rare.sample() > 0).double().mean()
    assert abs(share - 0.3) < 5 * (0.21 / N_DRAWS) ** 0.5


@pytest.mark.parametrize("sampled", [(6.0, 40.0, 0.5), (6.0, 20.0, 0.4), (6.2, 40.0, 0.4)])
def test_goodness_of_fit_notices_a_wrong_parameter(sampled):
    assert goodness_of_fit(law(*sampled), law(6.0, 40.0, 0.4)) < FAILURE_RATE


# --- shapes, other bases, validation ---


def test_expand_keeps_the_law():
    d = ZeroInflated(NegativeBinomial(torch.zeros(3), torch.arange(3.0)), torch.arange(3.0)[:, None, None])
    assert d.batch_shape == (3, 1, 3)
    wide = d.expand((5, 3, 4, 3))
    assert wide.batch_shape == (5, 3, 4, 3)
    assert wide.sample((2,)).shape == (2, 5, 3, 4, 3)
    x = torch.arange(3.0)
    torch.testing.assert_close(wide.log_prob(x), d.log_prob(x).expand(5, 3, 4, 3))
    torch.testing.assert_close(wide.mean, d.mean.expand(5, 3, 4, 3))
    base = NegativeBinomial(torch.zeros(3), torch.zeros(3))
    assert type(base.expand((2, 3))) is NegativeBinomial
    assert type(wide) is ZeroInflated


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize(
    ("counts", "parameters"),
    [
        ((4, 6), (4, 6)),
        ((4, 6), (5, 4, 6)),
        ((6,), (5, 4, 6)),
        ((5, 4, 6), (4, 6)),
        ((4, 6), (1, 1)),
        ((4, 1), (3, 1, 6)),
    ],
)
def test_counts_broadcast_against_parameters(counts, parameters):
    generator = torch.Generator().manual_seed(1)
    x = torch.poisson(torch.full(counts, 3.0).double(), generator=generator)
    log_mean, log_r, gate = (torch.randn(parameters, generator=generator).double().requires_grad_() for _ in range(3))
    d = ZeroInflated(NegativeBinomial(log_mean, log_r), gate)
    value = d.log_prob(x)
    shape = torch.broadcast_shapes(counts, parameters)
    one_by_one = [
        ZeroInflated(NegativeBinomial(a, b), c).log_prob(k)
        for a, b, c, k in zip(*(t.expand(shape).reshape(-1) for t in (log_mean, log_r, gate, x)), strict=True)
    ]
    torch.testing.assert_close(value, torch.stack(one_by_one).reshape(shape))
    together, apart = (
        torch.autograd.grad(total, (log_mean, log_r, gate)) for total in (value.sum(), torch.stack(one_by_one).sum())
    )
    torch.testing.assert_close(together, apart)


def test_parameters_may_lie_in_any_order_in_memory():
    x = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 0.0]]).double()
    plain = [torch.randn(4, 2, 3, dtype=torch.float64) for _ in range(3)]
    turned = [t.permute(2, 1, 0).contiguous().permute(2, 1, 0) for t in plain]
    found = []
    for log_mean, log_r, gate in (plain, turned):
        parameters = [t.requires_grad_() for t in (log_mean, log_r, gate)]
        value = ZeroInflated(NegativeBinomial(*parameters[:2]), parameters[2]).log_prob(x)
        found.append((value, *torch.autograd.grad(value.sum(), parameters)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize("inflated", [False, True])
@pytest.mark.parametrize("of_r", [(2, 1, 1, 5), (1, 3, 1, 1), (1, 1, 4, 1), (2, 3, 4, 5), (5,), ()])
def test_draws_may_share_dispersions_along_any_dimension(of_r, inflated):
    generator = torch.Generator().manual_seed(0)
    x = torch.arange(20.0).reshape(4, 5).double()
    log_mean, gate = (torch.randn(2, 3, 4, 5, generator=generator).double() for _ in range(2))
    log_r = torch.randn(of_r, generator=generator).double()
    found, expected = (
        (ZeroInflated(NegativeBinomial(log_mean, r), gate) if inflated else NegativeBinomial(log_mean, r)).log_prob(x)
        for r in (log_r, log_r.expand(2, 3, 4, 5).contiguous())
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)])
def test_nothing_has_no_counts_and_no_log_probability(shape):
    nothing, genes = torch.zeros(shape), torch.zeros(shape[-1:])
    for counts in (NegativeBinomial(nothing, genes), ZeroInflated(NegativeBinomial(nothing, genes), nothing)):
        assert counts.sample().shape == counts.log_prob(nothing).shape == shape
    assert NegativeBinomial(torch.zeros(3, 5), torch.zeros(5)).sample((0,)).shape == (0, 3, 5)


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize("gate", [None, 0.0])
def test_what_is_no_count_has_no_log_probability(gate):
    x = torch.tensor([0.0, 1.0, torch.nan, -1.0, 2.0])
    base = NegativeBinomial(torch.zeros(5), torch.zeros(5), validate_args=False)
    found = (base if gate is None else ZeroInflated(base, torch.zeros(5), validate_args=False)).log_prob(x)
    assert torch.isnan(found).tolist() == [False, False, True, True, False]


@pytest.mark.usefixtures("entries")
def test_certain_gates_are_limits():
    x, zeros = torch.tensor([0.0, 1.0, 2.0, 9.0]), torch.zeros(4)
    base = NegativeBinomial(zeros, zeros)
    never, always = (ZeroInflated(base, torch.full((4,), gate)).log_prob(x) for gate in (-torch.inf, torch.inf))
    torch.testing.assert_close(never, base.log_prob(x), rtol=1e-6, atol=1e-6)
    assert always[0] == 0
    assert (always[1:] < -1e29).all()


def test_a_gate_far_below_costs_no_digits():
    base = NegativeBinomial(torch.tensor([0.1]).log(), torch.tensor([1e-4]).log())
    found = ZeroInflated(base, torch.tensor([-100.0])).log_prob(torch.zeros(1))
    torch.testing.assert_close(found, base.log_prob(torch.zeros(1)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("log_r", [90.0, 750.0])
def test_samples_of_an_endless_inverse_dispersion_are_poisson(log_r):
    draws = NegativeBinomial(torch.zeros(40_000).double(), torch.tensor(log_r).double()).sample()
    assert abs(draws.mean() - 1) < 6 / 200
    assert abs(draws.var() - 1) < 6 * 2 / 200


def test_samples_of_parameters_that_are_no_numbers_are_none():
    numbers, nan = torch.zeros(3), torch.full((3,), torch.nan)
    for log_mean, log_r, gate in ((nan, numbers, numbers), (numbers, nan, numbers), (numbers, numbers, nan)):
        base = NegativeBinomial(log_mean, log_r, validate_args=False)
        assert torch.isnan(ZeroInflated(base, gate, validate_args=False).sample()).all()


@pytest.mark.parametrize("gate", [None, 0.0])
def test_samples_are_of_parameters_in_any_order_in_memory(gate):
    log_mean, log_r = torch.linspace(-3, 5, 20).reshape(4, 5), torch.linspace(-2, 3, 20).reshape(5, 4)
    draws = []
    for given in ((log_mean.T, log_r), (log_mean.T.contiguous(), log_r.T.contiguous().T)):
        counts = NegativeBinomial(*given)
        torch.manual_seed(0)
        draws.append((counts if gate is None else ZeroInflated(counts, torch.zeros(5, 4))).sample((50,)))
    assert torch.equal(*draws)
    means = draws[0].mean(0) * (1 if gate is None else 2)
    assert ((means - log_mean.T.exp()).abs() < 6 * (counts.variance / 50).sqrt() * 2 + 0.5).all()


def test_plates_may_broadcast_one_law_over_entries():
    x = torch.tensor([[0.0, 2.0], [1.0, 0.0]]).double()
    expected = law(2.0, 0.7, 0.1).log_prob(x.reshape(-1)).reshape(2, 2)
    torch.testing.assert_close(law(2.0, 0.7, 0.1).expand((2, 2)).log_prob(x), expected)


@pytest.mark.usefixtures("entries")
def test_no_cells_have_no_log_probability():
    none = torch.zeros(0, 5)
    base = NegativeBinomial(none, none)
    assert base.log_prob(none).shape == ZeroInflated(base, none).log_prob(none).shape == (0, 5)


@pytest.mark.usefixtures("entries")
def test_parameters_may_differ_in_precision():
    x, double = torch.tensor([0.0, 1.0, 4.0]), torch.full((3,), 0.3).double()
    mixed = ZeroInflated(NegativeBinomial(double.float(), double.float()), double).log_prob(x)
    torch.testing.assert_close(
        mixed, ZeroInflated(NegativeBinomial(double, double), double).log_prob(x), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("value", [-1.0, 0.5, float("nan")])
@pytest.mark.parametrize("gate", [None, 0.0])
def test_refuses_what_is_no_count(value, gate):
    with pytest.raises(ValueError, match="within the support"):
        law(2.0, 0.7, gate).log_prob(torch.tensor(value).double())


def test_refuses_parameters_that_are_no_numbers():
    zero, nan = torch.zeros(()), torch.tensor(float("nan"))
    for build in (
        lambda: NegativeBinomial(nan, zero),
        lambda: NegativeBinomial(zero, nan),
        lambda: ZeroInflated(NegativeBinomial(zero, zero), nan),
    ):
        with pytest.raises(ValueError, match="nan"):
            build()


@pytest.mark.parametrize("gate", [-30.0, -1.0, 0.0, 2.0, 30.0])
def test_technical_zeros_by_bayes_rule(gate):
    r, mean = 0.7, 2.0
    pi = stats.logistic.cdf(gate)
    p0 = stats.nbinom.pmf(0, r, r / (r + mean))
    expected = np.log(pi) - np.log(stats.logistic.cdf(-gate) * p0)
    assert law(mean, r, gate).technical_zero_logits.item() == pytest.approx(expected, rel=1e-9)


BASES = [dist.Poisson(torch.tensor([0.1, 3.0]).double()), dist.Geometric(torch.tensor([0.2, 0.7]).double())]


@pytest.mark.parametrize("base", BASES, ids=["poisson", "geometric"])
@pytest.mark.parametrize("gate", [-2.0, 0.0, 3.0])
def test_inflates_any_law_of_counts(base, gate):
    d = ZeroInflated(base, torch.tensor(gate).double())
    x = torch.arange(400.0)[:, None].double()
    pi = 1 / (1 + np.exp(-gate))
    expected = (pi * (x == 0).double() + (1 - pi) * base.log_prob(x).exp()).log()
    likely = expected > -100
    torch.testing.assert_close(d.log_prob(x)[likely], expected[likely], rtol=1e-10, atol=0)
    p = d.log_prob(x).exp()
    mean = (p * x).sum(0)
    torch.testing.assert_close(p.sum(0), torch.ones(2).double())
    torch.testing.assert_close(d.mean, mean)
    torch.testing.assert_close(d.variance, (p * (x - mean) ** 2).sum(0))
