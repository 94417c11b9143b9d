"""Averages over draws of the global latents, in the place of their medians."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyro_scvi.analysis.posterior_samples import weighed_global_draws
from pyro_scvi.errors import ModelError
from pyro_scvi.utils.checks import require_at_least

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit


def at_draws(fit: Fit, n: int | None, seed: int) -> list[Fit]:
    """The fit with its global latents at each of n draws from the guide; the fit itself, at the medians, for None.

    Raises
    ------
    ModelError
        If n is below 1, or the model has no global latents.
    """
    if n is None:
        return [fit]
    require_at_least(1, global_draws=n)
    if not fit.guide.weights.supports:
        raise ModelError("global_draws is for models with global latents, and this one has none: leave it out")
    drawn, _ = weighed_global_draws(fit, n, seed)
    return [fit.with_globals({name: value[i : i + 1] for name, value in drawn.items()}) for i in range(n)]


def seeds_of(seed: int, n: int) -> list[int]:
    """A seed for each of n draws: the seed itself if there is one."""
    return [seed] if n == 1 else [int(s.generate_state(1)[0]) for s in np.random.SeedSequence(seed).spawn(n)]


def shares(samples: int, n: int) -> list[int]:
    """How many of the samples each of n draws gets: as evenly as possible.

    Raises
    ------
    ModelError
        If there are fewer samples than draws.
    """
    if samples < n:
        raise ModelError(
            f"samples must be at least global_draws, because the draws are divided among them; got {samples} and {n}"
        )
    return [samples // n + (place < samples % n) for place in range(n)]
