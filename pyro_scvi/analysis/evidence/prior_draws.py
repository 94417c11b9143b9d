"""A check of the evidence of programs of one's own by draws from the prior, which see spikes and funnels.

A proposal that was fitted to one part of such a posterior may never meet the rest: its k-hat is then low.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from pyro_scvi.analysis.evidence.totals import total_term
from pyro_scvi.analysis.inputs import batches_in_streams
from pyro_scvi.data.cells import Cells
from pyro_scvi.guides.base import Guide
from pyro_scvi.guides.log_joint import log_terms
from pyro_scvi.guides.packaged import is_packaged
from pyro_scvi.inference.evaluation import drawn_from_prior, draws_at_once, undisturbed
from pyro_scvi.inference.importance import KHAT_LIMIT, evidence_of
from pyro_scvi.utils.checks import warn
from pyro_scvi.utils.precision import in_float64

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

DRAWS = 1000  # of the prior, of each cell
FEWEST = 20.0  # of these that must count: with many latents none comes near the posterior, and nothing is said


def check_by_prior(fit: Fit, cells: Cells, table: pd.DataFrame, seed: int, batch_size: int) -> None:
    """Warn if draws from the prior find more mass than the proposals; for programs of this package nothing is done."""
    if is_packaged(fit.model):
        return
    with undisturbed(seed, fit.model, fit.guide):
        try:
            found = [_of_batch(fit.guide, x, gamma) for x, gamma in batches_in_streams(fit, cells, batch_size, seed)]
        except NotImplementedError:  # a law that has a density and no draws
            return
    value, se, ess = np.concatenate(found, 1)
    excess = value - table.log_evidence
    missed = excess[(excess > 3 * np.hypot(se, table.se) + 0.1) & (ess > FEWEST) & (table.khat <= KHAT_LIMIT)]
    if len(missed):
        warn(
            f"draws from the prior find up to {missed.max():.1f} nats more for {len(missed)} cells, "
            f"{list(missed.index[:3])}: the proposals miss a part of their posteriors, such as a spike or the wide end "
            "of a funnel, which k-hat cannot tell; sample such a latent as its scale times a standard one, sum out "
            "which part it is of, or see ps.annealed_evidence"
        )


def _of_batch(guide: Guide, x: torch.Tensor, gamma: torch.Tensor) -> np.ndarray:
    """Log p(x) by the mean over draws from the prior, its standard error and effective draws, (3, cells)."""
    u = guide.coordinates.of(drawn_from_prior(guide, gamma, DRAWS))
    terms = log_terms(guide.model, x, gamma, guide.weights.medians())
    log_p = in_float64(torch.cat([terms(part)[1] for part in u.split(draws_at_once(x))])).nan_to_num(-torch.inf)
    value, se, ess, _ = evidence_of(log_p)
    return torch.stack([value + in_float64(total_term(guide.model, x, gamma)), se, ess]).cpu().numpy()
