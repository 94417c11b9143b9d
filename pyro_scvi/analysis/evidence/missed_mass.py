"""What is left of a posterior without one count, from weighted draws, or from the prior where these miss mass."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_scvi.guides.base import Guide
from pyro_scvi.guides.log_joint import log_terms
from pyro_scvi.inference.evaluation import drawn_from_prior, entries_given_others
from pyro_scvi.inference.importance import evidence_of
from pyro_scvi.inference.pareto_khat import pareto_smoothed
from pyro_scvi.utils.precision import in_float64, put_back

FIRST_DRAWS, PRIOR_DRAWS = 100, 1000  # of the prior for a cell: to look for missed mass, and to say what is left
MARGIN = 0.1  # nats by which the prior's evidence must be higher
AT_FIRST, IN_THE_END = (1.0, 0.03), (3.0, 0.1)  # standard errors beside that; effective share of the prior's draws
WITH_ENTRY = 0.03  # effective share with the entry; with less k-hat is infinite
KHAT = 2  # row of the results


class Entries(NamedTuple):
    """Draws for entries, each (draws, entries): log weights, log p of the entry, and whether x' < x for a replica."""

    log_weights: Tensor
    log_p: Tensor
    below: Tensor

    def without(self) -> Tensor:
        """Log weights without the entry; a draw under which it is impossible has none, as nothing is known of it."""
        return (self.log_weights - self.log_p).masked_fill(self.log_p == -torch.inf, -torch.inf)


def left_out(log_weights: Tensor, log_p: Tensor, below: Tensor, uniform: Tensor) -> Tensor:
    """Elpd, its standard error, k-hat and PIT (4, entries).

    From log p(x | z) and x' < x at weighted draws, each (draws, entries), and random parts of PIT (entries,).
    """
    smoothed, khat = pareto_smoothed(Entries(log_weights, log_p, below).without())
    spread = log_p.amax(0) - log_p.amin(0)
    elpd = (smoothed + log_p).masked_fill(log_p == -torch.inf, -torch.inf).logsumexp(0)
    weights, samples = smoothed.exp(), len(log_p)
    se = ((weights * ((log_p - elpd).exp() - 1)).square().sum(0) * samples / max(samples - 1, 1)).sqrt()
    smaller = (weights * below).sum(0).clamp(max=1)
    # Counts are discrete: the random part makes PIT values uniform (Czado et al. 2009, Sec. 2).
    pit = smaller + uniform * torch.minimum(elpd.exp(), 1 - smaller)
    return torch.stack([elpd, se, torch.where(spread < 1e-6, 0.0, khat), pit])


def from_prior(guide: Guide, x: Tensor, gamma: Tensor, draws: int) -> Entries:
    """Draws from the prior, weighted by the probability of the cell's counts."""
    sites = drawn_from_prior(guide, gamma, draws)
    _, of_x = log_terms(guide.model, x, gamma, guide.weights.medians())(guide.coordinates.of(sites))
    log_p, below = entries_given_others(guide, x, gamma, sites)
    weights = of_x[..., None].expand(log_p.shape)
    return Entries(weights.flatten(1), log_p.flatten(1), below.flatten(1))


def with_missed_mass(
    found: Tensor, drawn: Entries, prior: Callable[[int], Entries], uniform: Tensor, *, weighted: bool
) -> Tensor:
    """The results ``found`` (4, entries) from ``drawn``, exchanged where the prior shows more mass without the entry.

    If one count alone tells on which side a latent lies, the posterior has one mode with it and two without. Draws of
    the first miss the other side, and their k-hat does not show it. K-hat is infinite where the prior's draws show such
    mass, but hardly make the count itself. Where draws are not ``weighted``, but follow the posterior, mass is relative
    to the evidence with the entry. ``prior`` makes so many draws of it.
    """
    seen = _missed(drawn, prior(FIRST_DRAWS), *AT_FIRST, weighted=weighted)
    if not bool(seen.any()):
        return found
    more = prior(PRIOR_DRAWS)
    # Of both looks: the second is made where any cell of the batch needs it, and must not change other cells.
    missed = (seen & _missed(drawn, more, *IN_THE_END, weighted=weighted)).to(found.device)
    some = Entries(*(put_back(of, found)[:, missed] for of in more))
    told = left_out(*some, uniform[missed])
    _, _, ess, _ = evidence_of(in_float64(some.log_weights))
    told[KHAT, ess < WITH_ENTRY * PRIOR_DRAWS] = torch.inf  # too few draws make such a count: not to be trusted
    return found.masked_scatter(missed, told)


def _missed(drawn: Entries, prior: Entries, errors: float, least: float, *, weighted: bool) -> Tensor:
    """Of which entries the prior's draws show mass that the others miss, beyond errors and with enough draws."""
    (ours, our_se, _, _), (theirs, se, ess, _) = (evidence_of(in_float64(one.without())) for one in (drawn, prior))
    if not weighted:
        whole, whole_se, whole_ess, _ = evidence_of(in_float64(prior.log_weights))
        theirs, se, ess = theirs - whole, torch.hypot(se, whole_se), torch.minimum(ess, whole_ess)
    return (theirs - ours > errors * torch.hypot(se, our_se) + MARGIN) & (ess > least * len(prior.log_p))
