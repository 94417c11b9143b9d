"""What evidence means where a program gives the counts a continuous distribution."""

from __future__ import annotations

from pyro_scvi.discovery import Kind
from pyro_scvi.distributions.supports import is_discrete
from pyro_scvi.model import SCVI
from pyro_scvi.utils.checks import warn

DENSITY = "density"
"""Name in the table's ``attrs``."""


def is_density(model: SCVI) -> bool:
    """Whether the evidence is a density of x and no probability: it can be above 0 nats, and changes with the unit."""
    observed = [site for site in model.discovered() if site.kind is Kind.OBSERVED]
    return any(not is_discrete(site.law) for site in observed)


def warn_if_density(model: SCVI) -> bool:
    """Say that evidence is a density, if it is; returns whether."""
    density = is_density(model)
    if density:
        warn(
            "x has a continuous distribution in this model, so this is the log density of x, which is no log "
            "probability of counts. Compare it with models of the same kind only, or take a distribution of counts"
        )
    return density
