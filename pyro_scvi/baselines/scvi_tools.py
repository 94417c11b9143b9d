"""scvi-tools' SCVI (Lopez et al. 2018) as a baseline; needs the extra ``peer``."""

import copy
import logging
import math
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch import Tensor
from torch.nn import functional as F

from pyro_scvi.baselines.evidence import Evidence, integrate
from pyro_scvi.baselines.inputs import dense_counts, remember_genes, require_fitted
from pyro_scvi.errors import DataError
from pyro_scvi.types import LogJoint
from pyro_scvi.utils.random_state import global_state_kept, seeded

LIBRARY_START_SCALE = 0.1  # of the log library around the observed log total, before refinement
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class SCVITools(BaseEstimator):
    r"""SCVI of scvi-tools with its defaults, scored with its latents integrated out.

    .. math:: z_n \sim N(0, I), \quad \log l_n \sim N(\bar l, s^2), \quad
        x_{ng} | z_n, l_n \sim ZINB(l_n \rho_g(z_n), r_g, \pi_g(z_n))

    (Lopez et al. 2018, Methods; Gayoso et al. 2022). The distribution of l is that of the training cells' totals.

    Settings are the defaults with two exceptions. The length of training is given; its first min(20, epochs / 2) passes
    warm up the Kullback-Leibler term. And all cells are fitted, because without early stopping the validation cells
    would be unused.

    Parameters
    ----------
    n_latent
        Latents of a cell.
    epochs
        Passes through the cells.
    samples
        Draws in every round of the sampler that integrates out the latents.
    seed
        Of the fit and of the sampler.

    Attributes
    ----------
    model_
        The fitted SCVI.
    generative_
        Its :class:`Generative`.

    Examples
    --------
    >>> system = ps.baselines.SCVITools(2, epochs=2, samples=100).fit(counts)
    >>> system.transform(counts).shape
    (60, 2)
    """

    def __init__(self, n_latent: int = 10, *, epochs: int = 400, samples: int = 1000, seed: int = 0) -> None:
        self.n_latent = n_latent
        self.epochs = epochs
        self.samples = samples
        self.seed = seed

    def fit(self, counts: Any, y: None = None) -> Self:
        """Fit to raw counts (cells, genes); ``y`` is ignored.

        Raises
        ------
        DataError
            For counts that are negative or not finite, or cells without counts.
        ImportError
            If scvi-tools is not installed.
        """
        x = dense_counts(counts)
        if (empty := np.flatnonzero(~x.any(1))).size:
            raise DataError(f"{empty.size} cells have no count, the first of them cell {empty[0]}; drop them")
        self.model_ = trained(x, self.epochs, self.seed, self.n_latent)
        self.generative_ = Generative.of(self.model_, x)
        self.n_genes_ = x.shape[1]
        remember_genes(self, counts)
        return self

    def transform(self, counts: Any) -> np.ndarray:
        """Mean of the encoder's q(z | x), (cells, latents).

        Raises
        ------
        ModelError
            Before the fit.
        DataError
            If a count is negative or not finite, or the genes are not those of the fit.
        """
        x = self._counts(counts)
        return self.generative_.start(x)[0][:, :-1].numpy()

    def score_samples(self, counts: Any) -> np.ndarray:
        """Log p(x), with z and the library integrated out by importance sampling, nats per cell (cells,).

        Raises
        ------
        ModelError
            Before the fit.
        DataError
            If a count is negative or not finite, or the genes are not those of the fit.
        """
        return self.evidence(counts, samples=self.samples, seed=self.seed).log_evidence

    def evidence(self, counts: Any, *, samples: int = 1000, seed: int = 0) -> Evidence:
        """Log p(x) as by :meth:`score_samples`, with the sampler's diagnostics.

        Raises
        ------
        ModelError
            Before the fit.
        DataError
            If a count is negative or not finite, or the genes are not those of the fit.
        """
        x = self._counts(counts)
        return integrate(
            lambda rows: self.generative_.log_joint(x[rows]), *self.generative_.start(x), samples=samples, seed=seed
        )

    def _counts(self, counts: Any) -> Tensor:
        require_fitted(self, "generative_")
        return torch.from_numpy(dense_counts(counts, n_genes=self.n_genes_, fitted=self))


class Generative(NamedTuple):
    """Distribution of a fitted SCVI: ``network`` in float64 and eval mode, and a normal log library.

    By default SCVI takes a cell's total as given, which gives no probability of that cell's counts. Here the log
    library is normal with the mean and sd of the log totals of the training cells, which is SCVI's own prior for an
    unobserved library.
    """

    network: Any
    library_loc: float
    library_scale: float

    @classmethod
    def of(cls, model: Any, train: np.ndarray) -> "Generative":
        """From a fitted SCVI and its training cells (cells, genes)."""
        network = copy.deepcopy(model.module).cpu().double().eval().requires_grad_(False)
        log_totals = np.log(train.sum(1, dtype=np.float64))
        return cls(network, float(log_totals.mean()), float(log_totals.std()))

    def log_joint(self, x: Tensor) -> LogJoint:
        r"""Make the function u (samples, cells, latents + 1) -> log p(x, u), (samples, cells), of counts x.

        With z the first latents of u and l the last one, rho = softmax of the decoder's scale head, r per gene,

        .. math:: z \sim N(0, I), \quad l \sim N(\bar l, s^2), \qquad
                  x_g \mid z, l \sim ZINB(e^l \rho_g(z), r_g, \pi_g(z)).

        The likelihood is evaluated here and not by scvi-tools. Theirs adds 1e-8 inside every logarithm, and in float32
        it is off by up to a tenth of a nat per entry where r is large. In float64 the two differ by that addition alone
        (6e-6 nats per cell on the cortex data). The gamma functions depend on x and r only and are computed once.
        """
        log_r = self.network.px_r.detach()
        r = log_r.exp()
        constant = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1)  # (cells, genes)

        def log_joint(u: Tensor) -> Tensor:
            z, library = u[..., :-1], u[..., -1]
            log_mean, gate = self.decode(z, library)
            standardised = torch.cat((z, ((library - self.library_loc) / self.library_scale)[..., None]), -1)
            log_prior = (-0.5 * standardised.square() - _HALF_LOG_2PI).sum(-1) - math.log(self.library_scale)
            return log_prior + log_zinb(x, log_mean - log_r, r, gate, constant).sum(-1)

        return log_joint

    def decode(self, z: Tensor, library: Tensor) -> tuple[Tensor, Tensor]:
        """Log mean and dropout logits, (samples, cells, genes) each, of the fitted generative network.

        The softmax is taken in logarithms; otherwise these are the steps of the decoder's own forward.
        """
        decoder = self.network.decoder
        flat = z.reshape(-1, z.shape[-1])  # its batch norm takes two axes
        hidden = decoder.px_decoder(flat, torch.zeros_like(flat[:, :1]))
        log_scale = F.log_softmax(decoder.px_scale_decoder[0](hidden), -1)
        gate = decoder.px_dropout_decoder(hidden)
        shape = (*z.shape[:-1], -1)
        return library[..., None] + log_scale.reshape(shape), gate.reshape(shape)

    @torch.no_grad()
    def start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale, (cells, latents + 1), of the encoder's z and of the log library around the log total."""
        with seeded(0):  # the encoder also draws z, which is not used
            q, _ = self.network.z_encoder(x.log1p(), torch.zeros_like(x[:, :1]))
        log_total = x.sum(1, keepdim=True).clamp(min=1).log()
        scale = torch.cat([q.scale, torch.full_like(log_total, LIBRARY_START_SCALE)], 1)
        return torch.cat([q.loc, log_total], 1), scale


def log_zinb(x: Tensor, log_odds: Tensor, r: Tensor, gate: Tensor, constant: Tensor) -> Tensor:
    r"""Log probability of counts under the zero-inflated negative binomial, elementwise.

    With :math:`\delta = \log \mu - \log r` (``log_odds``) and :math:`c = \log\Gamma(x + r) - \log\Gamma(r) - \log x!`
    (``constant``),

    .. math:: \log NB(x) = c + x \delta - (x + r) \log(1 + e^\delta), \qquad
              \log p(0) = \log(e^{gate} + NB(0)) - \log(1 + e^{gate}).
    """
    softplus = F.softplus(log_odds, threshold=30.0)  # its default of 20 drops 2e-9, which a large r magnifies
    log_nb = constant + x * log_odds - (x + r) * softplus
    return torch.where(x > 0, log_nb, torch.logaddexp(gate, log_nb)) - F.softplus(gate)


def trained(x: np.ndarray, epochs: int, seed: int, n_latent: int, batch: Any = None, **settings: Any) -> Any:
    """An SCVI fitted to all raw counts (cells, genes) on the CPU, with ``batch`` (cells,) and further ``settings``."""
    try:
        import anndata
        import scvi
    except ImportError as error:
        raise ImportError("scvi-tools is not installed: pip install 'pyro-scvi[peer]' brings it") from error
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    scvi.settings.verbosity = logging.ERROR
    with seeded(seed), global_state_kept():
        scvi.settings.seed = seed
        data = anndata.AnnData(x.astype(np.float32))
        if batch is not None:
            data.obs["batch"] = np.asarray(batch, dtype=str)
        scvi.model.SCVI.setup_anndata(data, batch_key=None if batch is None else "batch")
        model = scvi.model.SCVI(data, n_latent=n_latent, **settings)
        model.train(
            max_epochs=epochs,
            train_size=1.0,
            accelerator="cpu",
            plan_kwargs={"n_epochs_kl_warmup": max(1, min(20, epochs // 2))},
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
        )
    return model
