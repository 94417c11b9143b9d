"""Priors of z given columns of gamma: a mean for each category, and a component for each label."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_scvi.errors import ModelError
from pyro_scvi.priors.base import ConditionalPrior
from pyro_scvi.types import Distribution
from pyro_scvi.utils.checks import brief, require_number, require_positive
from pyro_scvi.utils.random_state import seeded

__all__ = ["ByLabel", "Conditional"]


class Conditional(ConditionalPrior):
    r"""A normal whose mean is learned for each category, such as a donor or a time point.

    .. math:: z_n \sim Normal(m_{c(n)}, diag(s_{c(n)}^2)), \qquad
        m_{c(n)} = \gamma_n^T M, \quad \log s_{c(n)} = \gamma_n^T S

    gamma are here the ``columns`` alone, one-hot for a category; a continuous covariate makes m linear in it. The
    decoder leaves these columns out, unless ``decoder_columns`` says otherwise: it could undo what m says. Where all
    of them are zero, m is 0, and s is 1 or ``scale``.

    Parameters
    ----------
    n_latent
        Number of latents.
    columns
        Columns of gamma, such as ``cells.columns["donor"]``.
    scale
        s, the same for all categories and latents; None: learned for each.

    Raises
    ------
    ModelError
        If n_latent is below 1, ``columns`` are no slice of gamma, or scale is no number above 0.

    Examples
    --------
    >>> donors = ps.Cells.from_anndata(adata, batch="donor")
    >>> prior = ps.priors.Conditional(2, columns=donors.columns["donor"])
    >>> model = ps.SCVI(20, 2, donors.n_covariates, prior=prior)
    >>> [name for name, _ in model.prior.named_parameters()]
    ['loc']
    """

    learned = True

    def __init__(self, n_latent: int, columns: slice, scale: float | None = 1.0) -> None:
        super().__init__(n_latent, columns)
        self.loc = nn.Parameter(torch.zeros(self.n_columns, n_latent))
        self.scale = scale
        if scale is None:
            self.log_scale = nn.Parameter(torch.zeros(self.n_columns, n_latent))
        else:
            require_positive(scale, "scale")

    def forward(self, gamma: Tensor) -> Distribution:
        """Normals with the mean of each cell's category; gamma (cells, 1, covariates)."""
        category = gamma[..., self.columns]
        loc = category @ self.loc
        scale = (category @ self.log_scale).exp() if self.scale is None else torch.full_like(loc, self.scale)
        return dist.Normal(loc, scale).to_event(1)


class ByLabel(ConditionalPrior):
    r"""A normal for each label; a cell without a label comes from their mixture.

    .. math:: z_n | c_n \sim Normal(m_{c_n}, diag(s_{c_n}^2)), \qquad P(c_n = c) = \pi_c

    Means and scales are learned. A cell with a label says nothing about pi: its evidence is p(x | label). That of a
    cell without one is p(x), the sum over labels. ``ps.predict_labels`` gives P(label | x). The decoder leaves the
    labels' columns out, unless ``decoder_columns`` says otherwise.

    Few labels would be outvoted: a component settles on whatever group of cells chance has it. So in training mode, as
    in ``ps.fit``, the log density of a cell with a label gets one term more (Kingma, Mohamed, Rezende and Welling 2014,
    Eq. 9):

    .. math:: \log p(z_n | c_n) + a \log P(c_n | z_n)

    with a the ``label_weight``. ``train_loss`` holds this term, while ``held_out_loss``, evidence and every other verb
    do not. It moves means, scales and networks, but not pi.

    Parameters
    ----------
    n_latent
        Number of latents.
    columns
        Columns of gamma with the labels, ``cells.columns["cell_type"]``.
    weights
        None: pi is learned from the cells without a label. "uniform": the same for all labels.
    label_weight
        a, how much a label counts in training; 0: as p(z | c) says and no more.
    seed
        Of the initial means, standard normal; scales start at 1, weights equal.

    Raises
    ------
    ModelError
        If n_latent is below 1, ``columns`` are no slice of gamma, weights is neither, label_weight is below 0, or the
        seed is no integer of 0 or more.

    Examples
    --------
    >>> kinds = ps.Cells.from_anndata(adata, labels="kind")
    >>> prior = ps.priors.ByLabel(2, columns=kinds.columns["kind"])
    >>> ps.SCVI(20, 2, kinds.n_covariates, prior=prior).sites()[0]
    Site(name='z', law='mixture of 2 Normal', shape='cells x 2')
    """

    learned = True

    def __init__(
        self,
        n_latent: int,
        columns: slice,
        weights: str | None = None,
        *,
        label_weight: float = 50.0,
        seed: int = 0,
    ) -> None:
        super().__init__(n_latent, columns)
        require_number(label_weight, "label_weight")
        self.label_weight = label_weight
        if weights not in (None, "uniform"):
            raise ModelError(f'weights must be None, to learn them, or "uniform"; got {brief(weights)}')
        with seeded(seed):
            self.loc = nn.Parameter(torch.randn(self.n_columns, n_latent))
        self.log_scale = nn.Parameter(torch.zeros(self.n_columns, n_latent))
        logits = torch.zeros(self.n_columns)
        if weights is None:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits, persistent=False)

    def forward(self, gamma: Tensor) -> Distribution:
        """The component of each cell's label, or the mixture; gamma (cells, 1, covariates)."""
        label = gamma[..., self.columns]
        known = label.sum(-1, keepdim=True) > 0
        logits = torch.where(known, label.log(), self.logits.log_softmax(-1))  # (cells, 1, labels)
        normals = self.components()
        parts = normals.expand((*logits.shape[:-1], self.n_columns))
        which = dist.Categorical(logits=logits)
        if self.training and self.label_weight:
            # With the values of now: parameters that have a prior of their own are gone once the program has run.
            score = partial(self.label_score, label, normals, self.logits.detach())
            return _Labelled(which, parts).with_score(score)
        return dist.MixtureSameFamily(which, parts)

    def components(self) -> Distribution:
        """The normals of the labels, batch shape (labels,)."""
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)

    def log_prob_of_labels(self, z: Tensor) -> Tensor:
        """Log P(label | z) (..., labels) of cells without a label, at z (..., latents)."""
        return _joint(self.components(), self.logits, z).log_softmax(-1)

    def label_score(self, label: Tensor, normals: Distribution, logits: Tensor, z: Tensor) -> Tensor:
        """Label_weight times log P(label | z) (...), 0 without a label; it does not train the labels' shares."""
        log_p = _joint(normals, logits, z).log_softmax(-1)
        return self.label_weight * (label * log_p).sum(-1)


def _joint(normals: Distribution, logits: Tensor, z: Tensor) -> Tensor:
    return normals.log_prob(z[..., None, :]) + logits.log_softmax(-1)


class _Labelled(dist.MixtureSameFamily):  # type: ignore[misc]
    """The law of z in training: its log density counts labels more than once, so it integrates to one no more."""

    score: Callable[[Tensor], Tensor]

    def with_score(self, score: Callable[[Tensor], Tensor]) -> "_Labelled":
        """Itself, which now knows the score of the labels, a function of z."""
        self.score = score
        return self

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, and the score of the labels."""
        density: Tensor = super().log_prob(value)
        return density + self.score(value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_Labelled":
        """The same for more cells; torch's own would forget the labels."""
        expanded: _Labelled = super().expand(batch_shape, _instance)
        return expanded.with_score(self.score)
