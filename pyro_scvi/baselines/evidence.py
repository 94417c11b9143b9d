"""Log p(x) of a baseline, by the importance sampler that also scores this package's models."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_scvi.inference.importance import ImportanceResult, SamplingBudget, adaptive_importance, persistent_importance
from pyro_scvi.types import LogJoint
from pyro_scvi.utils.random_state import seeded

STEPS, ROUNDS = 100, 3  # of evidence(): whatever error the sampler has left is on every side of a comparison
AT_ONCE = 32  # cells that are integrated together
_BLOCK = 50  # draws that are evaluated together


class Evidence(NamedTuple):
    """Integrated log probability of each cell's counts with the sampler's diagnostics, all (cells,).

    ``log_evidence`` in nats per cell, ``se`` its Monte Carlo standard error, ``ess`` the effective number of draws,
    ``khat`` the Pareto tail index of the weights (above 0.7 the value is unreliable).
    """

    log_evidence: np.ndarray
    se: np.ndarray
    ess: np.ndarray
    khat: np.ndarray


def integrate(
    log_joint_of: Callable[[Tensor], LogJoint],
    loc: Tensor,
    scale: Tensor,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> Evidence:
    """Integrate out the latents of every cell, with the refinement and repeated attempts of ``ps.evidence``.

    Parameters
    ----------
    log_joint_of
        For rows of cells the function u (samples, rows, latents) -> log p(x, u), (samples, rows).
    loc, scale
        Centre and standard deviation of the starting proposal, (cells, latents) each.
    samples, seed
        Draws of the sampler, and its seed.
    """

    def run(rows: Tensor, budget: SamplingBudget) -> ImportanceResult:
        draw = int(torch.randint(2**31, ()))
        return adaptive_importance(
            log_joint_of(rows), loc[rows], scale[rows], **budget._asdict(), seed=draw, block=_BLOCK
        )

    with seeded(seed):
        budget = SamplingBudget(samples, STEPS, ROUNDS)
        parts = [persistent_importance(run, rows, budget) for rows in torch.arange(len(loc)).split(AT_ONCE)]
    columns = zip(*((part.log_evidence, part.se, part.ess, part.khat) for part in parts), strict=True)
    return Evidence(*(torch.cat(column).cpu().numpy() for column in columns))
