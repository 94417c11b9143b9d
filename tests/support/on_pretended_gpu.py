"""Fits and verbs on a pretended GPU: a process of its own, with the guard's path; it writes what it saw as JSON."""

# ruff: noqa: E402
import ctypes
import json
import sys
import traceback
import warnings
from pathlib import Path
from unittest import mock

GUARD = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # torch asks it while it is imported

import numpy as np
import torch

import pyro_scvi as ps
from tests.support import device_cases as cases
from tests.support import pretended_gpu as gpu
from tests.support.simulate import simulated_counts
from tests.system.test_combinations import make_guide, make_prior

# Numbers of steps that take the pretended device seconds, and say nothing about devices.
SHORTENED = {
    "pyro_scvi.inference.modes": {"STEPS": 2},
    "pyro_scvi.analysis.evidence.annealed": {"STEPS": 2},
    "pyro_scvi.analysis.evidence.evidence": {"CHAINS": 4, "TEMPERATURES": 2, "CELLS_FOR_A_CHECK": 2},
}
OPTIONS = {"epochs": 2, "batch_size": 6, "validation": 0, "progress": False}
DEFAULT = "StandardNormal"


def fitted(prior, likelihood, guide, **options):
    law, cells = getattr(ps.likelihoods, likelihood)(), cases.CELLS
    sizes = {"n_hidden": 8, "n_layers": 1, "initial_sd": 0.1}
    model = ps.SCVI(cases.N_GENES, cases.N_LATENT, prior=make_prior(prior, cells), likelihood=law, **sizes)
    return ps.fit(model, cells, make_guide(guide, model, cells), **OPTIONS | options)


class Steps:
    """Operations and waits at the end of every step of the optimiser."""

    def __enter__(self):
        self.seen, self.step = [], torch.optim.Adam.step

        def step(optimiser, *args, **kwargs):
            self.step(optimiser, *args, **kwargs)
            self.seen.append([sum(counts.values()) for counts in (gpu.Counts.operations, gpu.Counts.waits)])

        torch.optim.Adam.step = step
        return self

    def __exit__(self, *_):
        torch.optim.Adam.step = self.step

    @property
    def last(self):
        """Those of the last step."""
        before, after = self.seen[-2:]
        return [b - a for a, b in zip(before, after, strict=True)]


def tried(made, kind, name, call):
    """Note what a call gives, or the traceback of its error."""
    try:
        made[f"{kind} {name}"] = {"value": call()}
    except Exception:
        made[f"{kind} {name}"] = {"error": traceback.format_exc()[-3000:]}


def default_step():
    """Operations and waits of a step of the default model."""
    cells = ps.Cells.from_counts(simulated_counts(32, 30))
    with gpu.pretended_gpu(), Steps() as steps:
        ps.fit(ps.SCVI(30), cells, **OPTIONS | {"epochs": 1, "batch_size": 8})
    return steps.last


def compared(prior, likelihood, guide, fits):
    """Waits of a step, and the largest difference of the embedding from the CPU's."""
    # Rounding decides the sign of gradients near 0, which Adam takes as it takes others: less often in float64.
    given = prior, likelihood, guide
    options = {"dtype": torch.float32 if prior == DEFAULT else torch.float64}
    on_cpu = ps.embed(fitted(*given, device="cpu", **options), cases.CELLS)
    with gpu.pretended_gpu():
        with Steps() as steps:
            fit = fits[prior] = fitted(*given, **options)
        there = ps.embed(fit, cases.CELLS)
    return {"device": str(fit.device), "waits": steps.last[1], "difference": float(np.abs(there - on_cpu).max())}


def with_library(name, kind="cuda"):
    """The share of finite numbers in the evidence of Poisson counts with this library size."""
    library, cells = cases.LIBRARIES[name]
    with gpu.pretended_gpu(kind):
        law = ps.likelihoods.Poisson()
        model = ps.SCVI(cells.n_genes, 2, cells.n_covariates, library=library(), likelihood=law, n_hidden=8)
        fit = ps.fit(model, cells, **OPTIONS | {"epochs": 1})
        found = ps.evidence(fit, cells.take(range(2)), samples=20, steps=2, rounds=1, progress=False)
    return float(np.isfinite(found.log_evidence).mean())


def draws_by_seed(fit):
    """The largest difference of draws from the CPU's, and the operations that each of some numbers of cells takes."""
    operations, there = [], []
    with gpu.pretended_gpu():
        for cells in (cases.FEW, cases.CELLS):
            before = sum(gpu.Counts.operations.values())
            there.append(drawn(fit, cells))
            operations.append(sum(gpu.Counts.operations.values()) - before)
        here = [drawn(fit.to("cpu"), cells) for cells in (cases.FEW, cases.CELLS)]
    gaps = [abs(one[name] - other[name]).max() for one, other in zip(here, there, strict=True) for name in "zwy"]
    return {"operations": operations, "difference": float(max(gaps))}


def drawn(fit, cells):
    return ps.sample_posterior(fit, cells, samples=3, sites=("z", "w", "y"), sampler=ps.Amortized(), progress=False)


def finite(name, fit, kind="cuda"):
    """The share of finite numbers in what a verb gives; k-hat of few draws is infinite."""
    with gpu.pretended_gpu(kind):
        found = cases.VERBS[name](fit)
    values = (
        [found[column] for column in found] if hasattr(found, "columns") or hasattr(found, "data_vars") else [found]
    )
    return float(np.mean([np.isfinite(np.asarray(v, dtype=float)).mean() for v in values]))


def everything():
    made, fits = {}, {}
    tried(made, "step", "default", default_step)
    for given in cases.FITS:
        tried(made, "fit", given[0], lambda given=given: compared(*given, fits))
    for name in cases.VERBS:
        tried(made, "verb", name, lambda name=name: finite(name, fits[DEFAULT]))
    for prior, names in cases.OF_OTHERS.items():
        tried(made, "prior", prior, lambda prior=prior, names=names: [finite(name, fits[prior]) for name in names])
    tried(made, "seed", "draws", lambda: draws_by_seed(fits["ARDNormal"]))
    for name in cases.LIBRARIES:
        tried(made, "library", name, lambda name=name: with_library(name))
    GUARD.pretend_cuda(False)
    tried(made, "mps library", "ObservedLibrary", lambda: with_library("ObservedLibrary", "mps"))
    with gpu.pretended_gpu("mps"):
        on_mps = fitted(*cases.FITS[0])
    for name in cases.WITHOUT_FLOAT64:
        tried(made, "mps", name, lambda name=name: finite(name, on_mps, "mps"))
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for module, replaced in SHORTENED.items():
        mock.patch.multiple(module, **replaced).start()
    Path(sys.argv[2]).write_text(json.dumps(everything()))
