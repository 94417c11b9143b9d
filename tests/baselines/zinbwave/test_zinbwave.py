"""ZINB-WaVE against zinbwave 1.25.2 in R (shared/golden/zinbwave.npz) and against identities.

Perturbed once each, and seen to fail here: a term of the likelihood, every weight of the penalty, the share of the
gamma terms, the balance of W and alpha, the refit's penalty, the weight of a technical zero.
"""

import warnings

import numpy as np
import pytest
import torch
from scipy import sparse, stats
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

from pyro_scvi.baselines.zinbwave.estimator import (
    CommonDispersion,
    GenewiseDispersion,
    ZINBWaVE,
    technical_zero,
    zeros_imputed,
)
from pyro_scvi.baselines.zinbwave.initialization import intercepts
from pyro_scvi.baselines.zinbwave.lbfgs import Separable, minimise
from pyro_scvi.baselines.zinbwave.model import CellParameters, GeneParameters, Penalties, orthogonal
from pyro_scvi.baselines.zinbwave.optimization import Problem
from pyro_scvi.errors import DataError, ModelError
from tests.conftest import simulated_counts

STAGES = [(name, CommonDispersion()) for name in ("init", "iter1", "iter2", "iter25")]
STAGES.append(("genedisp", GenewiseDispersion()))


def tensor(array):
    return torch.as_tensor(np.array(array), dtype=torch.float64)


@pytest.fixture
def golden(data_path):
    return dict(np.load(data_path("../golden/zinbwave.npz")))


def of_r(golden, stage, dispersion):
    """The problem and R's parameters at one stage of its fit."""
    y = tensor(golden["Y"])
    penalties = Penalties(y.shape[1], *y.shape, dispersion)
    problem = Problem(y, torch.ones(len(y), 1).double(), torch.ones(y.shape[1], 1).double(), penalties)
    names = "W", "gamma_mu", "gamma_pi", "alpha_mu", "alpha_pi", "beta_mu", "beta_pi", "zeta"
    w, gamma_mu, gamma_pi, alpha_mu, alpha_pi, beta_mu, beta_pi, zeta = (tensor(golden[f"{stage}_{n}"]) for n in names)
    zeta = zeta[: dispersion.values(len(zeta))]
    cells = CellParameters(w, gamma_mu[:, None], gamma_pi[:, None])
    return problem, cells, GeneParameters(alpha_mu, alpha_pi, beta_mu[None], beta_pi[None], zeta)


def counts(n_cells=40, n_genes=12, seed=0):
    return simulated_counts(n_cells, n_genes, seed)


@pytest.fixture(scope="module")
def fitted():
    return ZINBWaVE(2, tol=1e-8).fit(counts())


# --- against R ---


@pytest.mark.parametrize(("stage", "dispersion"), STAGES)
def test_likelihood_and_penalty_are_those_of_r(golden, stage, dispersion):
    problem, cells, genes = of_r(golden, stage, dispersion)
    assert float(problem.log_likelihood(cells, genes).sum()) == pytest.approx(golden[f"s_{stage}_loglik"], abs=1e-6)
    penalty = float(problem.penalties.of_cells(cells) + problem.penalties.of_genes(genes))
    assert penalty == pytest.approx(golden[f"s_{stage}_penalty"], abs=1e-6)


@pytest.mark.parametrize("zeta", [-2, 0, 1, 2])
def test_likelihood_and_its_slope_by_dispersion_are_those_of_r(golden, zeta):
    problem, cells, genes = of_r(golden, "init", GenewiseDispersion())
    genes = genes._replace(zeta=torch.full_like(genes.zeta, zeta))
    assert float(problem.log_likelihood(cells, genes).sum()) == pytest.approx(golden[f"s_disp_ll_{zeta}"], abs=1e-6)
    _, gradients = problem.negative().value(cells, genes)  # the penalty of equal zetas has no slope
    assert -float(gradients[-1][0]) == pytest.approx(golden[f"s_disp_grad_g1_{zeta}"], abs=1e-6)


def test_start_is_that_of_r(golden):
    problem, cells, genes = of_r(golden, "init", CommonDispersion())
    gamma_mu, beta_mu = intercepts(problem.x, problem.x_cov, problem.v_cov, problem.penalties)
    torch.testing.assert_close(gamma_mu, cells.gamma_mu, atol=1e-7, rtol=0)
    torch.testing.assert_close(beta_mu, genes.beta_mu, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("dispersion", "first", "last"),
    [(CommonDispersion(), "init", "iter25"), (GenewiseDispersion(), "genedisp", "genedisp")],
)
def test_maximum_is_at_least_that_of_r(golden, dispersion, first, last):
    reached_by_r = golden[f"s_{last}_loglik"] - golden[f"s_{last}_penalty"]
    problem, cells, genes = of_r(golden, first, dispersion)
    from_r = -problem.maximise(cells, genes, 1e-6, 2000).value
    own = ZINBWaVE(2, dispersion=dispersion).fit(golden["Y"]).penalised_log_likelihood_
    assert from_r > reached_by_r + 0.9
    assert own > reached_by_r + 1.1
    if last == "iter25":
        np.testing.assert_allclose([from_r, own], -2552.668, atol=0.01)


def test_a_nearly_poisson_start_is_left_again(golden):
    """The original's wide bracket ends at zeta = 45 on these counts (s_disp_argmax_original_m100_100)."""
    problem, cells, genes = of_r(golden, "init", CommonDispersion())
    for zeta in (-3.0, 4.0):
        found = problem.maximise(cells, genes._replace(zeta=torch.full((1,), zeta).double()), 1e-6, 2000)
        assert -found.value == pytest.approx(-2552.668, abs=0.02)
    own_zeta = problem.start(2)[1].zeta
    assert float(own_zeta) == pytest.approx(golden["s_disp_argmax_m10_10"], abs=0.5)


def test_imputation_is_that_of_r(golden):
    problem, cells, genes = of_r(golden, "iter25", CommonDispersion())
    found = torch.cat([zeros_imputed(law) for law in problem.laws(cells, genes)])
    np.testing.assert_allclose(found, golden["iter25_imputed"], rtol=1e-8)


# --- the law ---


@pytest.mark.parametrize("dispersion", [CommonDispersion(), GenewiseDispersion()])
def test_gradients_are_those_of_differences(dispersion):
    problem, cells, genes = random_problem(dispersion)
    parameters, function = [*cells, *genes], problem.negative()
    _, gradients = function.value(cells, genes)
    generator = torch.Generator().manual_seed(0)
    for i, parameter in enumerate(parameters):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        sides = []
        for step in (1e-5, -1e-5):
            moved = [*parameters[:i], parameter + step * direction, *parameters[i + 1 :]]
            sides.append(function.value(tuple(moved[:3]), tuple(moved[3:]))[0])
        slope = (sides[0] - sides[1]) / 2e-5
        assert float((gradients[i] * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-5)


def random_problem(dispersion):
    generator = torch.Generator().manual_seed(1)
    x = tensor(counts())
    covariates = [
        torch.cat((torch.ones(n, 1), torch.randn(n, 1, generator=generator)), 1).double() for n in (len(x), x.shape[1])
    ]
    problem = Problem(x, *covariates, Penalties(7.0, *x.shape, dispersion))
    cells, genes = problem.start(2)
    zeta = 0.3 * torch.randn(genes.zeta.shape, generator=generator, dtype=torch.float64)
    return problem, cells, genes._replace(zeta=zeta)


def test_penalty_is_its_formula_with_covariates():
    problem, cells, genes = random_problem(GenewiseDispersion())
    of_w, of_alpha = 7 / 40, 7 / 12  # epsilon over cells and over genes

    def squares(t):
        return float(t.square().sum())

    expected = of_w * (squares(cells.w) + squares(cells.gamma_mu[:, 1]) + squares(cells.gamma_pi[:, 1]))
    expected += of_alpha * (squares(genes.alpha_mu) + squares(genes.alpha_pi))
    expected += of_alpha * (squares(genes.beta_mu[1]) + squares(genes.beta_pi[1]))
    expected += 1e-3 * (squares(cells.gamma_pi[:, 0]) + squares(genes.beta_pi[0]))
    expected += 7 * squares(genes.zeta - genes.zeta.mean()) / 11
    found = float(problem.penalties.of_cells(cells) + problem.penalties.of_genes(genes))
    assert found == pytest.approx(expected / 2, rel=1e-12)


@pytest.mark.parametrize("zeta", [-3.0, 0.0, 8.0, 30.0])
def test_objective_is_the_law_less_the_penalty_also_near_poisson(zeta):
    problem, cells, genes = random_problem(CommonDispersion())
    genes = genes._replace(zeta=torch.full((1,), zeta).double())
    value, gradients = problem.negative().value(cells, genes)
    penalty = problem.penalties.of_cells(cells) + problem.penalties.of_genes(genes)
    expected = float(penalty - problem.log_likelihood(cells, genes).sum())
    assert value == pytest.approx(expected, rel=1e-11)
    if zeta > 20:
        assert abs(float(gradients[-1])) < 1e-6


def test_likelihood_is_that_of_scipy(fitted):
    x = counts()
    mu = np.exp(fitted.beta_mu_ + fitted.gamma_mu_ + fitted.W_ @ fitted.alpha_mu_)
    pi = 1 / (1 + np.exp(-(fitted.beta_pi_ + fitted.gamma_pi_ + fitted.W_ @ fitted.alpha_pi_)))
    theta = np.exp(fitted.zeta_)
    p = pi * (x == 0) + (1 - pi) * stats.nbinom.pmf(x, theta, theta / (theta + mu))
    assert np.log(p).sum() == pytest.approx(fitted.log_likelihood_, abs=1e-6)


def test_chunks_change_nothing():
    problem, cells, genes = random_problem(CommonDispersion())
    whole = problem.negative()
    parts = Separable(whole.loss, whole.penalty, [slice(0, 7), slice(7, 40)])
    one, other = (function.value(cells, genes) for function in (whole, parts))
    assert one[0] == pytest.approx(other[0], rel=1e-12)
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b)


def test_orthogonal_form_keeps_the_law_and_has_the_least_penalty():
    problem, cells, genes = random_problem(CommonDispersion())
    turned = torch.tensor([[2.0, 1.0], [0.5, -1.0]]).double()
    skewed = cells._replace(w=cells.w @ turned)
    inverse = turned.inverse()
    of_genes = genes._replace(alpha_mu=inverse @ genes.alpha_mu, alpha_pi=inverse @ genes.alpha_pi)
    found_cells, found_genes = orthogonal(skewed, of_genes, problem.penalties)
    for name in ("alpha_mu", "alpha_pi"):
        torch.testing.assert_close(found_cells.w @ getattr(found_genes, name), cells.w @ getattr(genes, name))
    gram = found_cells.w.T @ found_cells.w
    torch.testing.assert_close(gram, gram.diagonal().diag(), atol=1e-10, rtol=0)
    products = torch.cat((cells.w @ genes.alpha_mu, cells.w @ genes.alpha_pi), 1)
    weights = problem.penalties.w, problem.penalties.alpha
    least = (weights[0] * weights[1]) ** 0.5 * torch.linalg.svdvals(products).sum()  # the nuclear norm
    zero = [torch.zeros_like(t) for t in (*found_cells[1:], *found_genes[2:])]
    penalty = problem.penalties.of_cells(CellParameters(found_cells.w, *zero[:2]))
    penalty = penalty + problem.penalties.of_genes(GeneParameters(*found_genes[:2], *zero[2:]))
    torch.testing.assert_close(penalty, least)


# --- the fit ---


def test_fit_is_a_maximum_and_repeats(fitted):
    assert fitted.converged_
    again = ZINBWaVE(2, tol=1e-8).fit(sparse.csr_matrix(counts()))
    np.testing.assert_array_equal(again.W_, fitted.W_)
    problem, _ = fitted._refitted(counts(), None)
    cells = CellParameters(*map(tensor, (fitted.W_, fitted.gamma_mu_, fitted.gamma_pi_)))
    value, gradients = problem.negative().value(cells, fitted._genes())
    assert -value == pytest.approx(fitted.penalised_log_likelihood_, rel=1e-10)
    assert max(float(g.abs().max()) for g in gradients) < 0.1


def test_refit_finds_the_cells_of_the_fit(fitted):
    assert np.median(np.abs(fitted.transform(counts()) - fitted.W_)) < 1e-3
    np.testing.assert_allclose(fitted.score_samples(counts()).sum(), fitted.log_likelihood_, atol=1.0)
    new = counts(seed=5)
    w = fitted.transform(new)
    assert w.shape == (40, 2)
    np.testing.assert_allclose(w[:10], fitted.transform(new[:10]), atol=1e-3)  # cells do not matter to each other
    problem, cells = fitted._refitted(new, None)
    with torch.enable_grad():
        leaves = [t.requires_grad_() for t in cells]
        value = problem.log_likelihood(cells, fitted._genes()).sum() - problem.penalties.of_cells(cells)
        gradients = torch.autograd.grad(value, leaves)
    assert max(float(g.abs().max()) for g in gradients) < 0.05


def test_imputation_and_technical_zeros(fitted):
    x = counts()
    mu, technical = fitted.impute(x), fitted.technical_zero_probability(x)
    assert mu.shape == technical.shape == x.shape
    assert ((technical >= 0) & (technical <= 1)).all()
    np.testing.assert_allclose(fitted.impute_zeros(x), np.where(x > 0, x, mu * technical))
    problem, cells = fitted._refitted(x, None)
    law = next(problem.laws(cells, fitted._genes()))
    pi, theta = law.gate.sigmoid(), law.zeta.exp()
    by_hand = pi / (pi + (1 - pi) * (1 + law.log_mu.exp() / theta) ** -theta)
    torch.testing.assert_close(technical_zero(law), by_hand)


def test_covariates_explain_what_they_say():
    x, batch = counts(60), np.arange(60) % 3 == 0
    x[batch] *= 4
    length = np.linspace(-1, 1, x.shape[1])
    plain = ZINBWaVE(1).fit(x)
    informed = ZINBWaVE(1).fit(x, cell_covariates=batch, gene_covariates=length)
    assert informed.beta_mu_.shape == (2, 12)
    assert informed.gamma_mu_.shape == (60, 2)
    assert informed.penalised_log_likelihood_ > plain.penalised_log_likelihood_
    assert informed.score_samples(x[:5], batch[:5]).shape == (5,)
    with pytest.raises(DataError, match="the fit had 1 cell_covariates, now there are 0"):
        informed.transform(x)


def test_contract():
    method = ZINBWaVE(1, dispersion=GenewiseDispersion(), epsilon=5.0)
    assert clone(method).get_params() == method.get_params()
    assert method.fit(counts()).zeta_.shape == (12,)


def test_says_that_it_has_not_converged():
    with pytest.warns(ConvergenceWarning, match="not converged in 10 iterations"):
        assert not ZINBWaVE(2, max_iter=10).fit(counts()).converged_


def test_minimum_of_a_quadratic_in_both_kinds_of_parameters():
    target = torch.arange(6.0, dtype=torch.float64)[:, None]

    def loss(cells, rows, shared):
        return (rows[0] + shared[0] - target[cells]).square().sum()

    def penalty(rows, shared):
        return 1 + shared[0].square().sum()

    function = Separable(loss, penalty, [slice(0, 4), slice(4, 6)])
    start = (torch.zeros(6, 1).double(),), (torch.ones(1).double(),)
    found = minimise(function, *start, tol=1e-12, max_iter=100)
    assert found.converged
    assert found.value == pytest.approx(1, abs=1e-10)
    torch.testing.assert_close(found.rows[0], target, atol=1e-4, rtol=0)


# --- refusals ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.__setitem__((2, 3), -1), "cell 2, gene 3 is -1"),
        (lambda x: x.__setitem__((slice(None), 4), 0), "1 genes have no count"),
        (lambda x: x.__setitem__(5, 0), "1 cells have no count, the first of them cell 5"),
    ],
)
def test_refuses_counts(change, message):
    x = counts().astype(float)
    change(x)
    with pytest.raises(DataError, match=message):
        ZINBWaVE(2).fit(x)


def test_refuses_options(fitted):
    with pytest.raises(ModelError, match="n_latent must be at most 12"):
        ZINBWaVE(13).fit(counts())
    with pytest.raises(ModelError, match="max_iter must be an integer of 1 or more, got 0"):
        ZINBWaVE(2, max_iter=0).fit(counts())
    for given in (CommonDispersion, "genewise"):
        with pytest.raises(ModelError, match=r"dispersion must be CommonDispersion\(\) or GenewiseDispersion\(\)"):
            ZINBWaVE(2, dispersion=given).fit(counts())
    with pytest.raises(ModelError, match="epsilon must be above 0"):
        ZINBWaVE(2, epsilon=0.0).fit(counts())
    with pytest.raises(ModelError, match="has not been fitted"):
        ZINBWaVE(2).transform(counts())
    with pytest.raises(DataError, match="fitted on 12 genes, these counts have 11"):
        fitted.transform(counts()[:, 1:])
    with pytest.raises(DataError, match="cell_covariates must be 40 rows"):
        ZINBWaVE(2).fit(counts(), cell_covariates=np.ones(39))


def test_a_refused_fit_and_other_options_change_no_fit():
    method = ZINBWaVE(1).fit(counts())
    before = method.transform(counts())
    method.set_params(epsilon=1000.0)
    with pytest.raises(DataError, match="gene_covariates must be 12 rows"):
        method.fit(counts(30), cell_covariates=np.arange(30), gene_covariates=np.ones(11))
    np.testing.assert_array_equal(method.transform(counts()), before)


def test_dispersion_of_one_gene_does_not_vary():
    assert float(GenewiseDispersion().variance(torch.ones(1))) == 0


def test_covariates_reach_fit_and_transform_together():
    method, batch = ZINBWaVE(1), np.arange(40) % 2
    w = method.fit_transform(counts(), cell_covariates=batch)
    np.testing.assert_array_equal(w, method.transform(counts(), batch))


@pytest.mark.slow
def test_cortex(data_path):
    """A tenth of the cells: the fit converges and its score is near that of the authors on held-out cells."""
    import anndata

    x = anndata.read_h5ad(data_path("cortex_558.h5ad")).X[::10].toarray()
    x = x[:, x.any(0)]
    with warnings.catch_warnings(action="error"):
        fitted = ZINBWaVE(10).fit(x[::2])
    assert fitted.converged_
    assert -1500 < fitted.score_samples(x[1::2]).mean() < -1000
