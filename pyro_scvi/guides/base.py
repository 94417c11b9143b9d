"""Base class of guides q(latents | x)."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import BoolTensor, Tensor

from pyro_scvi.errors import ModelError
from pyro_scvi.guides.coordinates import Coordinates, LocalSite, require_continuous
from pyro_scvi.guides.global_latents import GlobalGuide, global_latents
from pyro_scvi.guides.looks.broadcasting import require_broadcasting
from pyro_scvi.guides.looks.counts_as_data import require_counts_as_data
from pyro_scvi.guides.looks.one_program import require_one_program
from pyro_scvi.guides.program_runs import theta_at
from pyro_scvi.guides.supported import require_supported
from pyro_scvi.guides.tails import heavy_tailed
from pyro_scvi.model import SCVI
from pyro_scvi.nn.component import Component
from pyro_scvi.priors.flat import Flat
from pyro_scvi.program import cells_plate, check_inputs, register
from pyro_scvi.types import Distribution
from pyro_scvi.utils.checks import require_kind

LANDMARKS = 64
"""Number of training cells whose place a fitted guide knows."""


class Guide(Component):
    r"""q(latents | x), with the arguments and site names of the model's program.

    See Lopez et al. (2017), Sec. 2.

    .. math:: q(z, l | x) = \prod_n q(z_n | x_n)\, q(l_n | z_n, x_n)

    A guide takes the latents from the program, when it is made: every latent of the cells, whatever it is called, and
    every global one. It defines how it encodes cells, the distribution :meth:`law` of each latent, and :meth:`start`, a
    normal from which a cell's posterior can be refined. ``amortized``: it can encode cells that it has not seen.
    ``stochastic``: q has a density. ``factorised``: no latent of a cell depends on another. Discrete latents
    that the program sums out have no q. ``heavy_tailed`` (size,): whether the prior
    of each coordinate is. ``landmarks`` (64, size) are coordinates of training cells, zero before a fit:
    modes of other cells are sought there, too.

    Parameters
    ----------
    model
        The model; the guide does not own its parameters.
    global_guide
        What makes q of the global latents (weights, dispersions) of a program that samples these alone: a class of
        ``pyro.infer.autoguide``, or a ``functools.partial`` of one. AutoNormal, AutoDiagonalNormal,
        AutoMultivariateNormal and AutoLowRankMultivariateNormal will do, and AutoDelta in the guide Point. None:
        independent normals in unconstrained coordinates. A fit with one is loaded by ``ps.load(path, model=model,
        guide=guide)``, with a guide made in the same way. In SVI written by hand, take Trace_ELBO: with such a guide,
        Pyro's TraceMeanField_ELBO leaves the change of volume of bounded latents out.
    seed
        Of the initial parameters of ``global_guide``.

    Raises
    ------
    ModelError
        If ``model`` is no SCVI, its program has a site that is not supported or no continuous latent of the cells, its
        prior is Flat and q has a density, or ``global_guide`` makes nothing that will do. When called, if there are no
        counts, or genes, covariates or rows do not agree.

    Examples
    --------
    >>> x, gamma = test[:4]
    >>> trace = pyro.poutine.trace(fit.guide).get_trace(x, gamma)
    >>> trace.nodes["z"]["value"].shape, trace.nodes["l"]["value"].shape
    (torch.Size([4, 1, 2]), torch.Size([4, 1]))
    """

    amortized = True
    stochastic = True
    factorised = True

    def __init__(self, model: SCVI, *, global_guide: GlobalGuide | None = None, seed: int = 0) -> None:
        super().__init__()
        require_kind(model, SCVI, "model", "ps.SCVI(cells.n_genes)")
        self._model = (model,)  # in a tuple, or torch would make it a submodule: parameters have one owner
        self.coordinates = Coordinates(model)
        self.landmarks: Tensor
        self.register_buffer("landmarks", torch.zeros(LANDMARKS, self.coordinates.size))
        self.weights = global_latents(model, global_guide, points=not self.stochastic, seed=seed)
        self.require_prior()
        self.require_supported()
        self.heavy_tailed = heavy_tailed(self.coordinates, model.discovered())

    @property
    def auxiliary(self) -> bool:
        """Whether latents are functions of a draw of an auxiliary site, which the model does not have."""
        return self.weights.auxiliary

    @property
    def model(self) -> SCVI:
        """The model whose posterior this approximates."""
        return self._model[0]

    def require_supported(self) -> None:
        """Refuse what the model has become if it samples other latents than this guide does, or anything beside x.

        Also if densities of draws in a stack, or of cells beside others, are not those of each alone, or depend on the
        counts otherwise than by conditioning, or on how the program is run. Every verb asks anew: training may move a
        slope from 0, behind which nothing was seen.

        Raises
        ------
        ModelError
            Naming the site.
        """
        require_supported(self.model, self.coordinates.latents() | self.weights.latents())
        require_continuous(self.coordinates)
        known = (self.model, self.coordinates, self.weights.medians())
        require_broadcasting(*known)
        require_counts_as_data(*known)
        require_one_program(*known)

    def require_prior(self) -> None:
        """Refuse a prior with which this guide cannot be fitted."""
        if self.stochastic and isinstance(self.model.prior, Flat):
            raise ModelError("the prior Flat has no density to integrate: take the guide Point, or another prior")

    def forward(
        self,
        x: Tensor,
        gamma: Tensor | None = None,
        *,
        marginal: bool = True,
        mask: BoolTensor | bool = True,
        index: Tensor | None = None,
        n_cells: int | None = None,
    ) -> dict[str, Tensor]:
        """Sample the latents of every cell; with ``marginal=False`` also w, y and h, from their exact conditional.

        Parameters
        ----------
        x
            Counts (cells, genes).
        gamma, marginal, mask, index, n_cells
            As in the model.

        Returns
        -------
        dict
            By site: the latents of the cells, such as z (cells, 1, latents) and l (cells, 1), counts per cell, and
            global latents.

        Raises
        ------
        ModelError
            If x is None, genes, covariates or rows do not agree with each other or the model, or with
            ``marginal=False``, if the program sums out a discrete latent, which w, y and h would depend on.
        """
        if x is None:
            raise ModelError("a guide is a distribution given x: pass the counts (cells, genes)")
        register(self)
        gamma = check_inputs(self.model, x, gamma)
        drawn, plate = self.weights(), cells_plate(gamma, index, n_cells)
        with plate:
            drawn |= self.sample(self.encode(x, gamma, index))
        if not marginal:
            self._require_no_enumerated()
            theta = theta_at(self.model, x, gamma, drawn)
            with plate, pyro.plate("genes", self.model.n_genes, dim=-1), pyro.poutine.mask(mask=mask):
                self.model.likelihood.condition(x, theta)
        return drawn

    def _require_no_enumerated(self) -> None:
        if self.coordinates.enumerated:
            raise ModelError(
                f"{list(self.coordinates.enumerated)} is summed out, so w, y and h cannot be drawn given the "
                "other latents alone. Leave marginal=False out, and draw them by ps.sample_posterior"
            )

    def encode(self, x: Tensor, gamma: Tensor, index: Tensor | None) -> Any:
        """What :meth:`law` needs to know of the cells."""
        raise NotImplementedError

    def law(self, site: LocalSite, code: Any, drawn: dict[str, Tensor]) -> Distribution:
        """Q of one latent given x, and those ``drawn`` before it unless ``factorised``; batch shape (..., cells, 1)."""
        raise NotImplementedError

    def start(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale (cells, size) of a normal near the cells' posterior, in unconstrained coordinates."""
        raise NotImplementedError

    @property
    def has_landmarks(self) -> bool:
        """Whether training cells were noted; older saves have none."""
        return bool((self.landmarks != 0).any())

    def landmarks_for(self, loc: Tensor) -> Tensor:
        """Where training cells lie, (landmarks, cells, size), for cells at ``loc`` whose library sizes they take."""
        if not self.has_landmarks:
            return loc.new_zeros(0, *loc.shape)
        points = self.landmarks[:, None].repeat(1, len(loc), 1)
        if self.coordinates.library:
            points[..., self.coordinates.library.place] = loc[:, self.coordinates.library.place]
        return points

    def sample(self, code: Any) -> dict[str, Tensor]:
        """Sample the latents of the cells, inside the plate over cells."""
        drawn = dict[str, Tensor]()
        for site in self._in_order():
            drawn[site.name] = pyro.sample(site.name, self.law(site, code, drawn))
        return drawn

    def draw(self, x: Tensor, gamma: Tensor, samples: int) -> tuple[dict[str, Tensor], Tensor]:
        """Draws of the latents (samples, cells, 1) and their events, and log q of them (samples, cells)."""
        code = self.encode(x, gamma, None)
        sites, log_q = dict[str, Tensor](), x.new_zeros(())
        for site in self._in_order():
            law: Any = self.law(site, code, sites)
            # Unlike sample, rsample passes NaN on to the loss. A law given earlier draws has their number already.
            sites[site.name] = law.rsample((samples, len(x), 1)[: 3 - len(law.batch_shape)])
            log_q = log_q + law.log_prob(sites[site.name])
        return sites, log_q.squeeze(-1)

    def mean(self, site: LocalSite, x: Tensor, gamma: Tensor) -> Tensor:
        """Mean of one latent under q, (cells, 1) and its event; from 200 draws where it has no closed form."""
        law: Any = self.law(site, self.encode(x, gamma, None), {})
        drawn = isinstance(law, dist.TransformedDistribution) and not isinstance(law, dist.LogNormal)
        return law.sample((200,)).mean(0) if drawn else law.mean

    def _in_order(self) -> list[LocalSite]:
        """The latents, where q factorises in the order of the program: its divergences then have closed forms."""
        names = self.coordinates.order if self.factorised else self.coordinates.local
        return [self.coordinates.local[name] for name in names]
