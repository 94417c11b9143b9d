"""Agreement of Hamiltonian Monte Carlo with Pyro's NUTS on one cell: means and standard deviations of the latents."""

from typing import NamedTuple

import numpy as np
import pyro
import torch
import xarray as xr
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size

import pyro_scvi as ps

Chains = np.ndarray  # (chains, draws, latents)


def nuts(fit: ps.Fit, x: torch.Tensor, gamma: torch.Tensor, *, warmup: int, samples: int) -> tuple[Chains, int]:
    """Sample one cell's latents by Pyro alone; returns the chain and its number of divergent transitions."""
    pyro.set_rng_seed(0)
    with pyro.get_param_store().scope():
        kernel = MCMC(NUTS(fit.model.eval()), num_samples=samples, warmup_steps=warmup, disable_progbar=True)
        kernel.run(x, gamma)
        diverged = kernel.diagnostics()["divergences"]["chain 0"]
    draws = kernel.get_samples(group_by_chain=True)
    columns = [draws["z"].flatten(2)] + ([draws["l"].flatten(2).log()] if "l" in draws else [])
    return torch.cat(columns, -1).double().numpy(), len(diverged)


def hamiltonian(draws: xr.Dataset, cell: int, chains: int) -> Chains:
    """One cell's chains from the draws of all: they are stored draw by draw, chain by chain."""
    one = draws.isel(cell=cell)
    columns = [one["z"].to_numpy()] + ([np.log(one["l"].to_numpy())[:, None]] if "l" in one else [])
    flat = np.concatenate(columns, -1).astype(float)
    return flat.reshape(-1, chains, flat.shape[-1]).swapaxes(0, 1)


class Moments(NamedTuple):
    """Means and standard deviations (latents,) of chains, their standard errors, and the effective draws."""

    mean: np.ndarray
    mean_se: np.ndarray
    sd: np.ndarray
    sd_se: np.ndarray
    ess: np.ndarray


def moments(chains: Chains) -> Moments:
    r"""Mean and sd of every latent; the error of the sd is that of the mean squared deviation v, se(v) / (2 sd)."""
    mean, sd = chains.mean((0, 1)), chains.std((0, 1), ddof=1)
    square = (chains - mean) ** 2
    ess, ess_square = (_effective(values) for values in (chains, square))
    return Moments(mean, sd / np.sqrt(ess), sd, square.std((0, 1)) / np.sqrt(ess_square) / (2 * sd), ess)


def _effective(chains: Chains) -> np.ndarray:
    most = chains.shape[0] * chains.shape[1]
    return effective_sample_size(torch.from_numpy(chains)).numpy().clip(1, most)


def agreement(ours: Moments, theirs: Moments) -> dict[str, float]:
    """Differences of means and sds in units of their Monte Carlo standard errors, over the latents."""
    of_mean = (ours.mean - theirs.mean) / np.hypot(ours.mean_se, theirs.mean_se)
    of_sd = (ours.sd - theirs.sd) / np.hypot(ours.sd_se, theirs.sd_se)
    return {
        "n_latents": len(of_mean),
        "rms_z_mean": float(np.sqrt(np.mean(of_mean**2))),
        "rms_z_sd": float(np.sqrt(np.mean(of_sd**2))),
        "max_z_mean": float(np.abs(of_mean).max()),
        "max_z_sd": float(np.abs(of_sd).max()),
        "max_gap_in_sds": float(np.abs((ours.mean - theirs.mean) / theirs.sd).max()),
        "least_sd_ratio": float((ours.sd / theirs.sd).min()),
        "most_sd_ratio": float((ours.sd / theirs.sd).max()),
        "min_ess": float(ours.ess.min()),
        "nuts_min_ess": float(theirs.ess.min()),
    }
