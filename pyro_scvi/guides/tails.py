"""Which latents have priors with tails so heavy that a proposal needs to reach for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_scvi.discovery import TracedSite
from pyro_scvi.guides.coordinates import Coordinates, LocalSite
from pyro_scvi.utils.random_state import seeded

LIGHT = 8.0  # power of the distance by which a density falls off, from which on tails are light: Student-t's of df 7
NEAR, FAR = 10.0, 40.0  # interquartile ranges from the median, between which that is measured
DRAWS = 200  # of a law, from which its median and quartiles are taken


def heavy_tailed(coordinates: Coordinates, found: list[TracedSite]) -> Tensor:
    """Whether the tails of each coordinate's law are heavy, (size,), by laws as one run of the program met them."""
    laws = {site.name: site.law for site in found}
    return torch.cat([_of_site(site, laws[site.name]) for site in coordinates.local.values()])


@torch.no_grad()
def _of_site(site: LocalSite, law: Any) -> Tensor:
    """Those of one latent, by its law for the first of the cells."""
    try:
        with seeded(0):
            u = site.coordinates(law.sample((DRAWS,)))[:, 0]
        low, middle, high = u.quantile(u.new_tensor([0.25, 0.5, 0.75]), dim=0)
        away = torch.cat([(high - low).diag(), (low - high).diag()])
        near, far = (_density(site, law, middle + distance * away) for distance in (NEAR, FAR))
    except (RuntimeError, ValueError):  # an improper law has no draws, and a bounded one may refuse so far a value
        return torch.zeros(site.size, dtype=torch.bool)
    power = (near - far) / torch.tensor(FAR / NEAR).log()
    return (power < LIGHT).reshape(2, -1).any(0).cpu()  # not where either is no number


def _density(site: LocalSite, law: Any, u: Tensor) -> Tensor:
    """Log density of the coordinates u (points, size) for the first of the cells, (points,)."""
    points = u[:, None].expand(-1, law.batch_shape[0], -1)
    log_p: Tensor = law.log_prob(site.value(points)).squeeze(-1) + site.log_abs_det(points)
    return log_p[:, 0]
