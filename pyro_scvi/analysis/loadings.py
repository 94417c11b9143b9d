"""loadings: the weights of genes on latents of a linear decoder, with errors where they are random."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
import pyro
import torch
from torch import Tensor

from pyro_scvi.analysis.inputs import require_fit
from pyro_scvi.errors import ModelError
from pyro_scvi.inference.evaluation import undisturbed
from pyro_scvi.utils.checks import require_at_least

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit


def loadings(fit: Fit, *, head: str = "log_mean", samples: int = 200, seed: int = 0) -> pd.DataFrame:
    r"""Loadings W of genes on latents of a linear decoder.

    .. math:: \eta_n = W z_n + C \gamma_n + b

    Parameters
    ----------
    fit
        A fit whose model has ``decoder=ps.networks.LinearDecoder()``, or a decoder of your own with a method
        ``loadings(head)`` that returns (genes, latents).
    head
        Parameter of the likelihood: "log_mean", "log_inverse_dispersion" or "gate_logits".
    samples, seed
        Draws of W under the guide, if W has a prior, and their seed.

    Returns
    -------
    DataFrame
        By gene, with columns ("loading", latent) and ("sd", latent): posterior mean and standard deviation of W. Where
        W has no prior, it is the trained value, and sd is NaN.

    Raises
    ------
    ModelError
        If the decoder has no loadings or no such head, or an argument is of the wrong kind.

    Examples
    --------
    >>> model = ps.SCVI(20, 2, decoder=ps.networks.LinearDecoder())
    >>> linear = ps.fit(model, cells, epochs=1, progress=False)
    >>> ps.loadings(linear)["loading"].shape
    (20, 2)
    """
    require_fit(fit)
    require_at_least(2, samples=samples)
    _require_head(fit.model.decoder, head)
    with undisturbed(seed, fit.model, fit.guide):
        drawn = fit.guide.weights.draws(samples)
        plain = _at(fit, head, fit.guide.weights.medians())
        every = torch.stack([_at(fit, head, {k: v[i] for k, v in drawn.items()}) for i in range(samples)])
    random = bool((every != every[0]).any())
    parts = {"loading": every.mean(0) if random else plain, "sd": every.std(0) if random else plain * torch.nan}
    tables = {name: pd.DataFrame(value.cpu().numpy(), fit.schema.gene_names) for name, value in parts.items()}
    return pd.concat(tables, axis=1, names=["statistic", "latent"]).rename_axis("gene")


def _require_head(decoder: Any, head: str) -> None:
    if not callable(getattr(decoder, "loadings", None)):
        raise ModelError(
            f"the decoder {type(decoder).__name__} has no loadings: make the model with "
            "decoder=ps.networks.LinearDecoder()"
        )
    if head not in getattr(decoder, "heads", (head,)):
        raise ModelError(f"the decoder has no head {head!r}; its heads are {list(decoder.heads)}")


def _at(fit: Fit, head: str, values: dict[str, Tensor]) -> Tensor:
    """W (genes, latents) at given global latents."""
    model: Any = fit.model
    with pyro.poutine.block(), pyro.poutine.condition(data=values), model.weights.drawn_into(model):
        found: Tensor = model.decoder.loadings(head).detach().clone()
    return found
