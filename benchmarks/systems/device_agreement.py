"""What a device computes beside the CPU: the likelihood, the verbs on one fit, and fits that should be alike."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import pyro_scvi as ps
from benchmarks.harness.accelerator import synchronise, tensor_cores
from benchmarks.harness.data import simulated
from benchmarks.harness.stopwatch import Sample, Stopwatch
from benchmarks.systems.our_models import as_cells

PARTS = "log p", "gradient by log mean", "gradient by log r", "gradient by the gate"
SPREADS = {"usual": 2.0, "extreme": 12.0}  # standard deviation of log mean, log r and the gate's logit
LAYERS: dict[str, Any] = {"n_hidden": 16, "n_layers": 1}
LAUNCHES = 20_000
QUICK = ps.Importance(steps=5, rounds=1, proposals=100)
CHAINS = ps.HMC(chains=2, warmup=4, steps=5, rounds=0, leapfrog=2, least=4)

Verb = Callable[[ps.Fit, ps.Cells], Any]
VERBS: dict[str, Verb] = {
    "embed": ps.embed,
    "evidence": lambda fit, cells: ps.evidence(fit, cells, samples=200, progress=False).log_evidence.to_numpy(),
    "annealed_evidence": lambda fit, cells: ps.annealed_evidence(
        fit, cells.take(range(8)), chains=4, temperatures=20, leapfrog=2, progress=False
    ).log_evidence.to_numpy(),
    "draws of the guide": lambda fit, cells: _drawn(fit, cells, ps.Amortized()),
    "draws of a refined guide": lambda fit, cells: _drawn(fit, cells, ps.Refined(steps=20)),
    "weighted draws": lambda fit, cells: _drawn(fit, cells, QUICK),
    "chains": lambda fit, cells: _drawn(fit, cells, CHAINS),
    "impute": lambda fit, cells: ps.impute(fit, cells, samples=20),
    "technical_zero_probability": lambda fit, cells: ps.technical_zero_probability(fit, cells, samples=20),
    "differential_expression": lambda fit, cells: ps.differential_expression(
        fit, cells, groupby=np.arange(cells.n_cells) % 2, group_a=0, group_b=1
    ),
    "posterior_predictive": lambda fit, cells: ps.posterior_predictive(fit, cells, samples=3).to_numpy(),
    "check_predictions": lambda fit, cells: ps.check_predictions(fit, cells, samples=4).genes["mean"].to_numpy(),
}


def law_errors(n_cells: int, n_genes: int, device: str) -> Callable[[], Sample]:
    """Largest |error| / (1 + |value|) of the ZINB in float32 on the device, by float64 on the CPU."""

    def measure() -> Sample:
        generator = torch.Generator().manual_seed(0)
        x = torch.poisson(20 * torch.rand(n_cells, n_genes, generator=generator), generator=generator)
        facts = {}
        with Stopwatch() as watch:
            for name, spread in SPREADS.items():
                given = [spread * torch.randn(x.shape, generator=generator) for _ in range(3)]
                exact, found = _law_and_gradients(x, given, "cpu", torch.float64), _law_and_gradients(x, given, device)
                gaps = (float(((a - b).abs() / (1 + a.abs())).max()) for a, b in zip(exact, found, strict=True))
                facts |= {f"{name}: {part}": gap for part, gap in zip(PARTS, gaps, strict=True)}
        return watch.sample(work=x.numel(), errors=facts)

    return measure


def _law_and_gradients(
    x: torch.Tensor, given: list[torch.Tensor], device: str, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    at = [value.to(device, dtype).requires_grad_() for value in given]
    value = ps.likelihoods.ZINB().marginal(*at).log_prob(x.to(device, dtype))
    return [found.detach().cpu().double() for found in (value, *torch.autograd.grad(value.sum(), at))]


def verbs(n_cells: int, n_genes: int, device: str) -> Callable[[], Sample]:
    """Differences of every verb's result on the device from that of the same fit on the CPU, or its error's text."""
    cells = as_cells(simulated(n_cells, n_genes))
    there = _fitted(cells, device)
    here = copy.deepcopy(there).to("cpu")

    def measure() -> Sample:
        with Stopwatch() as watch:
            differences = {name: _difference(verb, there, here, cells) for name, verb in VERBS.items()}
        return watch.sample(work=len(VERBS), differences=differences)

    return measure


def _difference(verb: Verb, there: ps.Fit, here: ps.Fit, cells: ps.Cells) -> float | str:
    try:
        return relative_difference(verb(there, cells), verb(here, cells))
    except Exception as error:  # what fails on a device is what is asked for; the other verbs go on
        return " ".join(f"{type(error).__name__}: {error}".split())


def relative_difference(found: Any, expected: Any) -> float:
    """Mean |difference| over the mean absolute deviation of what is expected; the largest over its columns.

    Infinite where other entries are finite than expected.
    """
    return max(_of_arrays(*pair) for pair in zip(_columns(found), _columns(expected), strict=True))


def _of_arrays(found: np.ndarray, expected: np.ndarray) -> float:
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(found)):
        return float("inf")
    a, b = found[finite].astype(float), expected[finite].astype(float)
    if not len(b):
        return 0.0
    return float(np.abs(a - b).mean() / max(np.abs(b - b.mean()).mean(), np.finfo(np.float32).eps))


def _columns(result: Any) -> list[np.ndarray]:
    if isinstance(result, np.ndarray):
        return [result]
    table = result.select_dtypes("number") if isinstance(result, pd.DataFrame) else result
    return [np.asarray(table[name]) for name in table]


def _drawn(fit: ps.Fit, cells: ps.Cells, sampler: Any) -> np.ndarray:
    return np.asarray(ps.sample_posterior(fit, cells, samples=10, sampler=sampler, progress=False)["z"])


def alike(n_cells: int, n_genes: int, device: str) -> Callable[[], Sample]:
    """Largest differences of the embedding: of a second fit, of one saved and loaded on the CPU, of a resumed one."""
    cells = as_cells(simulated(n_cells, n_genes))

    def measure() -> Sample:
        with Stopwatch() as watch, tempfile.TemporaryDirectory() as folder:
            first = _fitted(cells, device)
            first.save(Path(folder) / "fit")
            others = {
                "a second fit": _fitted(cells, device),
                "saved, and loaded on the CPU": ps.load(Path(folder) / "fit").to("cpu"),
                "resumed half-way": _resumed(cells, device, Path(folder) / "run"),
            }
            z = ps.embed(first, cells)
            gaps = {name: float(np.abs(ps.embed(other, cells) - z).max()) for name, other in others.items()}
        return watch.sample(work=n_cells, differences=gaps)

    return measure


class HalfWayError(RuntimeError):
    """Ends a fit that is resumed."""


def _resumed(cells: ps.Cells, device: str, checkpoint: Path) -> ps.Fit:
    def stop(epoch: int, *_: Any) -> None:
        if epoch == 2:
            raise HalfWayError

    try:
        _fitted(cells, device, checkpoint=checkpoint, callbacks=[stop])
    except HalfWayError:
        return _fitted(cells, device, checkpoint=checkpoint, resume=True)
    raise RuntimeError("the fit did not stop half-way")


def _fitted(cells: ps.Cells, device: str, **options: Any) -> ps.Fit:
    model = ps.SCVI(cells.n_genes, 5, cells.n_covariates, **LAYERS)
    guide = ps.guides.DiagonalNormal(model, **LAYERS)
    return ps.fit(model, cells, guide, epochs=4, batch_size=64, device=device, progress=False, **options)


def speed(size: int, device: str) -> Callable[[], Sample]:
    """TFLOP/s of float32 products of matrices of this size, without and with tensor cores; seconds of a launch."""

    def measure() -> Sample:
        x, tiny = torch.randn(size, size, device=device), torch.zeros(10, device=device)
        products = {}
        for name, used in (("float32", False), ("tf32", True)):
            with tensor_cores(used=used):
                products[name] = 2e-12 * size**3 / _seconds_of(lambda: x @ x, 5, device)
        with Stopwatch() as watch:
            launch = _seconds_of(lambda: tiny.add_(1), LAUNCHES, device)
        return watch.sample(work=LAUNCHES, products=products, launch=launch)

    return measure


def _seconds_of(call: Callable[[], Any], times: int, device: str) -> float:
    call()
    synchronise(device)
    with Stopwatch() as watch:
        for _ in range(times):
            call()
        synchronise(device)
    return watch.wall / times
