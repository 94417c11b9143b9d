"""An atlas of simulated cells: drawn in blocks from a fit to real data, one file for each batch, never whole in memory.

    u ~ the fitted cells, (z, l) ~ q(z, l | x_u), x ~ p(x | z, l exp(b_g))

with b_g normal over the genes of a batch: genes are seen a little better or worse in each.
"""

from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse

import pyro_scvi as ps

LATENTS, EPOCHS = 10, 30
DRAWS = 10  # of the latents of each fitted cell
SD_OF_BATCH = 0.15  # of b, in nats
AT_ONCE = 2000  # cells


def origin(source: Path, n_genes: int, folder: Path) -> None:
    """Fit the default model to real cells and their most variable genes, and keep it with draws of its latents."""
    adata = anndata.read_h5ad(source)
    x = sparse.csr_matrix(adata.X, dtype=np.float64)
    means, squares = (np.asarray(values.mean(0)).ravel() for values in (x, x.multiply(x)))
    spread = (squares - means**2) / np.maximum(means, 1e-9)
    cells = ps.Cells.from_anndata(adata[:, np.sort(np.argsort(-spread)[:n_genes])].copy())
    fit = ps.fit(ps.SCVI(cells.n_genes, LATENTS), cells, epochs=EPOCHS, progress=False)
    fit.save(folder / "origin")
    drawn = ps.sample_posterior(fit, cells, samples=DRAWS, sites=("z", "l"), diagnostics=False, progress=False)
    z, size = (drawn[name].transpose("cell", "sample", ...).to_numpy() for name in ("z", "l"))
    np.savez(folder / "latents.npz", z=z.reshape(-1, LATENTS), l=size.reshape(-1))


class Atlas:
    """The cells of each batch, by its number and the seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.model, self.seed = ps.load(folder / "origin").model, seed
        with np.load(folder / "latents.npz") as latents:
            self.z, self.size = latents["z"], latents["l"]

    def write(self, path: Path, batch: int, n_cells: int) -> int:
        """Write one batch as .h5ad with CSR counts; the number of counts that are not zero."""
        counts = sparse.vstack(list(self._blocks(batch, n_cells)), format="csr")
        names = pd.DataFrame({"batch": f"b{batch:03d}"}, index=[f"b{batch:03d}-{i}" for i in range(n_cells)])
        names["batch"] = names["batch"].astype("category")
        work = path.with_suffix(".partial")
        genes = pd.DataFrame(index=[f"gene_{i}" for i in range(counts.shape[1])])
        anndata.AnnData(counts, names, genes).write_h5ad(work)
        work.rename(path)
        return int(counts.nnz)

    def _blocks(self, batch: int, n_cells: int) -> Iterator[sparse.csr_matrix]:
        of_batch = np.random.default_rng([self.seed, batch])
        change = of_batch.normal(0, SD_OF_BATCH, self.model.n_genes).astype(np.float32)
        for start in range(0, n_cells, AT_ONCE):
            random = np.random.default_rng([self.seed, batch, start])
            rows = random.integers(len(self.z), size=min(AT_ONCE, n_cells - start))
            yield sparse.csr_matrix(self._drawn(rows, change, random))

    def _drawn(self, rows: np.ndarray, change: np.ndarray, random: np.random.Generator) -> np.ndarray:
        z, log_size = torch.from_numpy(self.z[rows])[:, None], torch.from_numpy(np.log(self.size[rows]))[:, None]
        with torch.no_grad():
            theta = self.model.decode(z.float(), log_size.float(), torch.zeros(len(rows), 0))
        values = {name: value.numpy() for name, value in theta.items()}
        r, mean = np.exp(values["log_inverse_dispersion"]), np.exp(values["log_mean"] + change)
        w = random.standard_gamma(np.broadcast_to(r, mean.shape), dtype=np.float32) * (mean / r)
        seen = random.random(w.shape, dtype=np.float32) > 1 / (1 + np.exp(-values["gate_logits"]))
        return np.minimum(random.poisson(w) * seen, np.iinfo(np.uint16).max).astype(np.uint16)
