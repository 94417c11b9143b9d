"""Evidence by annealed importance sampling: an independent check of ``evidence`` on few cells."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_scvi.analysis.evidence.totals import CONDITIONAL, total_term, warn_if_conditional
from pyro_scvi.analysis.inputs import batches_in_streams, require_inputs
from pyro_scvi.data.cells import Cells
from pyro_scvi.guides.base import Guide
from pyro_scvi.guides.log_joint import LogTerms, log_terms
from pyro_scvi.inference.evaluation import drawn_from_prior, evaluating
from pyro_scvi.inference.hmc import Whitened, transition
from pyro_scvi.inference.importance import Proposal, evidence_of
from pyro_scvi.inference.proposals import normals
from pyro_scvi.priors.base import require_proper
from pyro_scvi.types import LogJoint
from pyro_scvi.utils.checks import require_at_least, switches_checked
from pyro_scvi.utils.precision import in_float64, put_back
from pyro_scvi.utils.progress_bars import over_cells

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

PILOTS = 8  # chains that set the step size for the others and are then dropped: those stay independent of it
STEPS = 100  # of the normal whose covariance shapes the moves
TARGET, GAIN = 0.8, 0.2  # acceptance aimed at, and how fast the log step size follows


@switches_checked
def annealed_evidence(
    fit: Fit,
    cells: Cells,
    *,
    chains: int = 32,
    temperatures: int = 300,
    leapfrog: int = 4,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> pd.DataFrame:
    r"""Log marginal likelihood of every cell by annealed importance sampling from the prior.

    See Neal (2001).

    .. math:: \log p(x_n) = \log E \prod_t p(x_n | u_t)^{\beta_{t+1} - \beta_t}, \qquad u_0 \sim p(u),
        \quad u_t | u_{t-1} \text{ leaves } p(u)\, p(x_n | u)^{\beta_t} \text{ invariant}

    u are the unconstrained latents. beta goes from 0 to 1 in ``temperatures`` steps as (t / T)^4, with one draw of
    Hamiltonian Monte Carlo at each. This costs dozens of times as much per cell as ``evidence``. Where the two differ
    by more than their errors, one of them is wrong. An estimate from too few temperatures is too low. The covariance of
    a normal that is fitted to the posterior only shapes the moves.

    Parameters
    ----------
    fit, cells
        The fit and some cells of its schema.
    chains
        Independent annealing runs of every cell.
    temperatures, leapfrog
        Steps from prior to posterior, and the mean number of leapfrog steps per move.
    seed, batch_size
        As in ``evidence``.
    progress
        Whether to show how many cells are done, once it has taken 5 seconds.

    Returns
    -------
    DataFrame by cell
        ``log_evidence`` (nats per cell), its standard error ``se``, ``ess`` (of ``chains`` runs) and ``khat`` (infinite
        below 25 runs).

    Raises
    ------
    ModelError
        For the prior Flat, under which no evidence exists, for numbers that are too small, and for arguments of the
        wrong type.
    SchemaError
        If the cells' genes or covariates are not those of the fit.

    Examples
    --------
    >>> annealed = ps.annealed_evidence(fit, test.take(range(2)), chains=4, temperatures=20)
    >>> annealed.columns.tolist()
    ['log_evidence', 'se', 'ess', 'khat']
    """
    require_inputs(fit, cells)
    require_proper(fit.model, "the evidence does not exist")
    require_at_least(2, chains=chains)
    require_at_least(1, temperatures=temperatures, leapfrog=leapfrog, batch_size=batch_size)
    parts = []
    with evaluating(fit.model, fit.guide, seed):
        for x, gamma in over_cells(batches_in_streams(fit, cells, batch_size, seed), cells.n_cells, progress):
            log_weights = annealed_weights(fit.guide, x, gamma, chains, temperatures, leapfrog)
            log_mean, se, ess, khat = evidence_of(log_weights)
            log_mean = log_mean + in_float64(total_term(fit.model, x, gamma))
            parts.append(torch.stack([log_mean, se, ess, khat], -1).cpu().numpy())
    index = pd.Index(cells.cell_names, name="cell")
    table = pd.DataFrame(np.concatenate(parts), columns=["log_evidence", "se", "ess", "khat"], index=index)
    table.attrs[CONDITIONAL] = warn_if_conditional(fit.model)
    return table


def annealed_weights(guide: Guide, x: Tensor, gamma: Tensor, chains: int, temperatures: int, leapfrog: int) -> Tensor:
    """Log weights (chains, cells) in float64."""
    terms = log_terms(guide.model, x, gamma, guide.weights.medians())
    sites = drawn_from_prior(guide, gamma, PILOTS + chains)
    u = guide.coordinates.of(sites)  # (pilots and chains, cells, size)
    wide = u[:PILOTS].var(0).clamp(1e-6, 1e6).reciprocal().diag_embed()
    narrow = torch.cholesky_inverse(normals(guide, x, gamma, steps=STEPS).scale_tril)
    # The fourth power makes small steps near the prior, where the density changes most.
    betas = torch.linspace(0, 1, temperatures + 1).pow(4).tolist()
    log_weights = in_float64(u.new_zeros(u.shape[:2]))
    log_size = torch.full((len(x),), -0.7, dtype=u.dtype, device=u.device)
    for before, beta in pairwise(betas):
        # The weight takes the state before the move, or the estimate would be biased (Neal 2001).
        log_weights += (beta - before) * in_float64(terms(u)[1])
        density = Whitened(_tempered(terms, beta), _metric((1 - beta) * wide + beta * narrow))
        state, error = transition(density, density.at(density.inverse(u)), log_size.exp(), leapfrog)
        u = density.coordinates(state.v)
        accepted = error[:PILOTS].clamp(max=0).exp().mean(0)
        log_size = (log_size + GAIN * (accepted - TARGET)).clamp(-6, 0.7)
    # A run that has diverged gets weight 0.
    return log_weights[PILOTS:].nan_to_num(nan=-torch.inf)


def _tempered(terms: LogTerms, beta: float) -> LogJoint:
    def density(u: Tensor) -> Tensor:
        of_latents, of_x = terms(u)
        return of_latents + beta * of_x

    return density


def _metric(precision: Tensor) -> Proposal:
    tril = put_back(torch.linalg.cholesky(torch.linalg.inv(in_float64(precision))), precision)
    return Proposal(torch.zeros_like(precision[..., 0]), tril)
