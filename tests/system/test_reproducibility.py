"""One seed gives one result in any process, and no public name touches state that the whole process shares."""

import inspect
import json
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from functools import cache

import matplotlib
import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from anndata import AnnData
from matplotlib import pyplot as plt
from scipy import sparse

import pyro_scvi as ps
from pyro_scvi.analysis.differential import expected_false_share
from pyro_scvi.guides.global_latents import GlobalNormal
from pyro_scvi.priors.base import require_proper
from tests.support.paths import ROOT
from tests.support.short_evidence import compared
from tests.support.simulate import simulated_counts

# --- fresh processes ---

SCRIPT = """
import hashlib, json, sys
import numpy as np, torch
import pyro_scvi as ps

torch.set_num_threads(1)
counts = np.random.default_rng(0).poisson(3.0, size=(60, 12)) + 1
cells, found = ps.Cells.from_counts(counts), {}
for name in sys.argv[1:]:
    prior = {"normal": ps.priors.StandardNormal, "student": ps.priors.StudentT}[name](3)
    model = ps.SCVI(12, 3, prior=prior, n_hidden=16)
    fit = ps.fit(model, cells, epochs=3, batch_size=16, seed=7, progress=False, device="cpu")
    state = {**fit.model.state_dict(), **{f"guide.{k}": v for k, v in fit.guide.state_dict().items()}}
    digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest()
    table = ps.differential_expression(fit, cells, groupby=[0, 1] * 30, group_a=0, group_b=1, seed=3)
    found[name] = [digest, table.to_csv(), fit.history.drop(columns="seconds").to_csv()]
print(json.dumps(found))
"""


def in_a_process(*names):
    """Digest of all parameters, table of differential expression and history of fits in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "random"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, env=environment, check=True
    )
    return json.loads(done.stdout)


def test_one_seed_gives_the_same_parameters_and_tables_in_two_processes():
    """Alone in one, after another model in the other."""
    alone, after = in_a_process("student"), in_a_process("normal", "student")
    assert alone["student"] == after["student"]
    assert after["normal"] != after["student"]


# --- global state ---


def global_state():
    """Everything of this process that a call might change for others."""
    legacy = np.random.get_state()  # noqa: NPY002 - the global state is what must not change
    return {
        "random": random.getstate(),
        "numpy": (legacy[1].tolist(), *legacy[2:]),
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "threads of torch": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "validation": (
            pyro.infer.util.is_validation_enabled(),
            pyro.poutine.util.is_validation_enabled(),
            torch.distributions.Distribution._validate_args,
            pyro.distributions.is_validation_enabled(),
        ),
        "parameter store": sorted(pyro.get_param_store().keys()),
        "handlers of Pyro": len(pyro.poutine.runtime._PYRO_STACK),
        "settings of Pyro": pyro.settings.get(),
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "numpy errors": np.geterr(),
        "matplotlib": dict(matplotlib.rcParams),
        "figures": plt.get_fignums(),
        "threads": threading.active_count(),
        "folder": os.getcwd(),
        "environment": dict(os.environ),
    }


def changed(before, after):
    return sorted(name for name in before if before[name] != after[name])


N, GENES = 30, 8
QUICK = ps.Importance(steps=2, rounds=1, proposals=40)
CHAINS = ps.HMC(chains=2, warmup=2, steps=2, leapfrog=1, least=4)


@cache
def cells():
    obs = pd.DataFrame({"batch": ["a", "b"] * 15, "kind": ["B", "T", "NK"] * 10})
    return ps.Cells.from_counts(simulated_counts(N, GENES), obs=obs, batch="batch")


def model(**options):
    return ps.SCVI(GENES, 2, 2, n_hidden=8, n_layers=1, **options)


@cache
def fit():
    return ps.fit(model(), cells(), epochs=1, progress=False, device="cpu")


@cache
def random_weights():
    priors = {"decoder.heads.log_mean.bias": ps.weights.NormalWeights()}
    return ps.fit(model(weight_priors=priors), cells(), epochs=1, progress=False, device="cpu")


@cache
def tree():
    return ps.to_datatree(fit(), cells().take(range(4)), samples=100, sampler=ps.Refined(steps=2))


def few():
    return cells().take(range(6))


def loaded(folder):
    fit().save(folder / "fit")
    return ps.load(folder / "fit")


def annotated():
    x = cells()
    obs = x.obs.set_index(x.obs.index.astype(str))
    adata = AnnData(x.counts.copy(), obs=obs, var=pd.DataFrame(index=x.gene_names))
    ps.annotate(adata, fit(), space=ps.spaces.Expression(3), expression=True, samples=2)
    every = ps.differential_expression(fit(), x, groupby="kind")
    ps.add_rank_genes_groups(adata, every, "kind")


def stored(folder):
    obs = cells().obs.set_index(cells().obs.index.astype(str))
    AnnData(sparse.csr_matrix(cells().counts), obs=obs).write_h5ad(folder / "a.h5ad")
    ps.stores.build(folder / "a.h5ad", folder / "store")
    ps.Cells.from_store(folder / "store")[:]


def guide_of(kind):
    return lambda: ps.fit(model(), cells(), kind(), epochs=1, validation=0, progress=False, device="cpu")


def drawn(sampler):
    return lambda: ps.sample_posterior(fit(), few(), samples=8, sites=("z", "l", "w", "y", "h"), sampler=sampler)


def prior(make):
    """A model with that prior, drawn from."""
    return lambda: ps.prior_predictive(model(prior=make()), 3, gamma=np.eye(2)[[0, 1, 0]])


def law(make):
    return lambda: ps.prior_predictive(model(likelihood=make()), 3, gamma=np.eye(2)[[0, 1, 0]])


def weighed(make):
    """A fit with that prior on weights: it is sampled in training."""

    def run():
        random_weights = model(weight_priors={"decoder.heads.log_mean.weight": make()})
        return ps.fit(random_weights, cells(), epochs=1, progress=False, device="cpu")

    return run


def scheduled(**options):
    return lambda: ps.fit(model(), cells(), epochs=3, progress=False, device="cpu", **options)


def drawing(plot):
    """A figure, closed again: that pyplot holds figures is what pyplot is for."""

    def run():
        figure, ax = plt.subplots()
        plot(ax)
        plt.close(figure)

    return run


def baseline(method):
    """Fit a baseline where its package is there."""
    return lambda: method().fit(np.asarray(cells().counts))


def two_groups(method):
    return lambda: method().test(np.asarray(cells().counts), ["x", "y"] * 15)


def table():
    return ps.differential_expression(fit(), cells(), groupby="kind", group_a="B", group_b="T")


baselines, plots = ps.baselines, ps.plots


def all_pairs():
    per_gene = model(likelihood=ps.likelihoods.ZINB(ps.likelihoods.PerGene(GENES)))
    made = ps.fit(per_gene, cells(), epochs=1, progress=False, device="cpu")
    pairs = ps.differential.RandomPairs(pairing=ps.differential.AllPairs(samples=30))
    return ps.differential_expression(made, cells(), groupby="kind", group_a="B", estimand=pairs)


def joined():
    with ps.distributed.joined() as ranks:
        return ps.fit(model(), cells(), epochs=2, batch_size=8, seed=3, progress=False, device="cpu", ranks=ranks)


CASES = {
    "SCVI": lambda: model(seed=3),
    "Cells": lambda: cells().split(0.2, seed=1)[0].with_batch("a")[:],
    "Schema": lambda: ps.Schema.from_dict(cells().schema.to_dict()),
    "Fit": lambda: repr(fit()) + fit()._repr_html_(),
    "fit": lambda: ps.fit(model(), cells(), epochs=2, batch_size=8, seed=3, progress=True, device="cpu"),
    "distributed.SingleProcess": lambda: ps.distributed.SingleProcess().batch_sizes(10, 4),
    "distributed.joined": joined,
    "load": loaded,
    "stores.build": stored,
    "embed": lambda: ps.embed(fit(), cells()),
    "evidence": lambda: ps.evidence(fit(), few(), samples=30, steps=2, rounds=1),
    "annotate": annotated,
    "add_rank_genes_groups": annotated,
    "spaces.Latent": lambda: ps.embed(fit(), cells(), space=ps.spaces.Latent()),
    "spaces.Expression": lambda: ps.embed(fit(), cells(), space=ps.spaces.Expression(3)),
    "spaces.Hidden": lambda: ps.embed(fit(), cells(), space=ps.spaces.Hidden(3)),
    "normalized_expression": lambda: ps.normalized_expression(fit(), few(), samples=2, seed=1),
    "transfer_labels": lambda: ps.transfer_labels(fit(), cells(), few(), "kind", neighbors=3),
    "log_density": lambda: ps.log_density(fit(), few())(
        torch.zeros(1, few().n_cells, ps.log_density(fit(), few()).size)
    ),
    "networks.MLPDecoder": lambda: ps.SCVI(8, 2, decoder=ps.networks.MLPDecoder(n_hidden=4), seed=3),
    "networks.LinearDecoder": lambda: ps.SCVI(8, 2, decoder=ps.networks.LinearDecoder(), seed=3),
    "annealed_evidence": lambda: ps.annealed_evidence(fit(), few(), chains=2, temperatures=2, leapfrog=1),
    "compare": lambda: compared({"a": fit(), "b": [fit(), fit()]}, few(), samples=30),
    "leave_one_out": lambda: ps.leave_one_out(fit(), few(), samples=30, sampler=QUICK),
    "sample_posterior": drawn(ps.Amortized()),
    "Amortized": drawn(ps.Amortized()),
    "Refined": drawn(ps.Refined(steps=2)),
    "Importance": drawn(QUICK),
    "HMC": drawn(CHAINS),
    "impute": lambda: ps.impute(fit(), cells(), quantiles=(0.1, 0.9)),
    "technical_zero_probability": lambda: ps.technical_zero_probability(fit(), cells()),
    "differential_abundance": lambda: ps.differential_abundance(
        fit(), cells(), ["x", "y"] * 15, list("abcd" * 7) + ["a", "b"]
    ),
    "differential_expression": lambda: table(),
    "prior_predictive": lambda: ps.prior_predictive(fit().model, 4, gamma=cells()[:4][1]),
    "posterior_predictive": lambda: ps.posterior_predictive(fit(), cells()),
    "check_predictions": lambda: ps.check_predictions(fit(), cells(), samples=5),
    "criticism.NewLatents": lambda: ps.check_predictions(fit(), cells(), samples=5, sampler=ps.criticism.NewLatents()),
    "calibrate": lambda: ps.calibrate(fit(), 6, source=ps.calibration.Prior(cells()), sampler=QUICK, draws=19, thin=1),
    "to_datatree": lambda: ps.to_datatree(
        fit(), few(), samples=8, sampler=CHAINS, log_likelihood=True, posterior_predictive=True, prior_predictive=True
    ),
    "prior_sensitivity": lambda: ps.prior_sensitivity(tree()),
    "calibration.Prior": lambda: ps.calibration.Prior(cells()),
    "calibration.AggregatePosterior": lambda: ps.calibrate(
        fit(), 6, source=ps.calibration.AggregatePosterior(cells(), sampler=QUICK), sampler=QUICK, draws=19, thin=1
    ),
    "datasets.pbmc68k_reduced": ps.datasets.pbmc68k_reduced,
    "datasets.recover_counts": lambda: ps.datasets.recover_counts(np.zeros((2, 2)), np.ones(2)),
    "differential.AllPairs": all_pairs,
    "differential.DepthCorrected": ps.differential.DepthCorrected,
    "differential.EveryOther": lambda: ps.differential_expression(
        fit(), cells(), groupby="kind", against=ps.differential.EveryOther()
    ),
    "differential.GroupMeans": lambda: ps.differential.GroupMeans(min_detected=0.1),
    "differential.RandomPairs": lambda: ps.differential_expression(
        fit(), cells(), groupby="kind", group_a="B", estimand=ps.differential.RandomPairs(most_pairs=50)
    ),
    "differential.TheRest": ps.differential.TheRest,
    "differential.Uncorrected": ps.differential.Uncorrected,
    "differential.expected_false_share": lambda: expected_false_share(np.array([0.1, 0.9])),
    "imputation.expression": lambda: ps.impute(fit(), few(), quantity=ps.imputation.expression),
    "imputation.mean_given_no_dropout": lambda: ps.impute(
        fit(), few(), quantity=ps.imputation.mean_given_no_dropout, batches=["a", "b"]
    ),
    "guides.DiagonalNormal": guide_of(lambda: ps.guides.DiagonalNormal(model())),
    "presets.default": lambda: ps.presets.default(cells()),
    "presets.seed_2017": lambda: ps.presets.seed_2017(cells()),
    "presets.nature_methods_2018": lambda: ps.presets.nature_methods_2018(cells()),
}


def _guides():
    """Every guide, fitted to its own model."""
    for name in ("DiagonalNormal", "FullRankNormal", "InverseAutoregressiveFlow", "Point"):

        def run(name=name):
            own = model()
            guide = getattr(ps.guides, name)(own, n_hidden=8)
            ps.embed(ps.fit(own, cells(), guide, epochs=1, progress=False, device="cpu"), few())

        yield f"guides.{name}", run

    def per_cell():
        own = model()
        made = ps.fit(own, cells(), ps.guides.PerCell(own, N), epochs=1, progress=False, device="cpu")
        ps.embed(made, few())

    yield "guides.PerCell", per_cell
    yield "guides.GlobalNormal", lambda: GlobalNormal(model())


CASES |= dict(_guides())
CASES |= {
    "priors.StandardNormal": prior(lambda: ps.priors.StandardNormal(2)),
    "priors.ARDNormal": prior(lambda: ps.priors.ARDNormal(2)),
    "priors.StudentT": prior(lambda: ps.priors.StudentT(2)),
    "priors.Laplace": prior(lambda: ps.priors.Laplace(2)),
    "priors.GaussianMixture": prior(lambda: ps.priors.GaussianMixture(2)),
    "priors.VampPrior": prior(lambda: ps.priors.VampPrior(GENES, 2, 3)),
    "priors.Flow": prior(lambda: ps.priors.Flow(2)),
    "priors.LogisticNormal": prior(lambda: ps.priors.LogisticNormal(2)),
    "priors.Dirichlet": prior(lambda: ps.priors.Dirichlet(2)),
    "priors.Flat": lambda: model(prior=ps.priors.Flat(2)),
    "priors.require_proper": lambda: require_proper(ps.SCVI(GENES, 2, prior=ps.priors.Flow(2)), "nothing"),
    "likelihoods.ZINB": law(ps.likelihoods.ZINB),
    "likelihoods.NB": law(ps.likelihoods.NB),
    "likelihoods.ZIP": law(ps.likelihoods.ZIP),
    "likelihoods.Poisson": law(ps.likelihoods.Poisson),
    "likelihoods.PerCellAndGene": law(lambda: ps.likelihoods.NB(ps.likelihoods.PerCellAndGene())),
    "likelihoods.PerGene": law(lambda: ps.likelihoods.NB(ps.likelihoods.PerGene(GENES))),
    "likelihoods.PerGeneAndBatch": law(lambda: ps.likelihoods.NB(ps.likelihoods.PerGeneAndBatch(GENES, 2))),
    "libraries.NoLibrary": lambda: model(library=ps.libraries.NoLibrary()),
    "libraries.LatentLibrary": lambda: model(library=ps.libraries.LatentLibrary(2.0, 1.0)),
    "libraries.ObservedLibrary": lambda: ps.prior_predictive(
        model(library=ps.libraries.ObservedLibrary(2.0, 1.0)), 2, gamma=np.eye(2)
    ),
    "networks.BatchNorm": lambda: model(norm=ps.networks.BatchNorm()),
    "networks.LayerNorm": lambda: model(norm=ps.networks.LayerNorm()),
    "fit, bfloat16": scheduled(autocast=torch.bfloat16),
    "elbos.ImportanceWeighted": scheduled(elbo=ps.elbos.ImportanceWeighted(3)),
    "sample_globals": lambda: ps.sample_globals(random_weights(), cells(), samples=30, cell_samples=3, seed=1),
    "schedules.OneCycle": scheduled(learning_rate=ps.schedules.OneCycle(0.01)),
    "schedules.Constant": scheduled(learning_rate=ps.schedules.Constant(0.01)),
    "schedules.CheckpointInterval": lambda: ps.schedules.CheckpointInterval(epochs=2),
    "schedules.ConstantKL": scheduled(kl_weight=ps.schedules.ConstantKL(0.5)),
    "schedules.WarmUp": scheduled(kl_weight=ps.schedules.WarmUp(2)),
    "weights.NormalWeights": weighed(ps.weights.NormalWeights),
    "weights.ARDWeights": weighed(ps.weights.ARDWeights),
    "weights.HorseshoeWeights": weighed(ps.weights.HorseshoeWeights),
    "weights.LaplaceWeights": weighed(ps.weights.LaplaceWeights),
    "weights.HierarchicalWeights": weighed(ps.weights.HierarchicalWeights),
    "plots.project": lambda: plots.project(np.random.default_rng(0).normal(size=(20, 3)), seed=3),  # UMAP: test_plots
    "plots.Projection": lambda: plots.Projection(np.zeros((2, 2)), "PCA"),
    "plots.embedding": drawing(lambda ax: plots.embedding(ps.embed(fit(), cells()), cells().obs["kind"], ax=ax)),
    "plots.loss": drawing(lambda ax: plots.loss(fit(), ax)),
    "plots.pit": drawing(lambda ax: plots.pit(np.linspace(0, 1, 50), ax)),
    "plots.program": drawing(lambda ax: plots.program(fit().model, ax, n_cells=N)),
    "plots.ma": drawing(lambda ax: plots.ma(table(), ax=ax)),
    "plots.volcano": drawing(lambda ax: plots.volcano(table(), ax=ax)),
    "plots.predictive": drawing(
        lambda ax: plots.predictive(ps.check_predictions(fit(), few(), samples=5).genes["mean"], ax)
    ),
    "plots.comparison": drawing(lambda ax: plots.comparison(compared({"a": fit()}, few(), samples=30), ax)),
    "plots.calibration": drawing(lambda ax: plots.calibration(calibrated(), ax)),
    "baselines.FactorAnalysis": baseline(lambda: baselines.FactorAnalysis(2)),
    "baselines.PCA": baseline(lambda: baselines.PCA(2)),
    "baselines.ZIFA": baseline(lambda: baselines.ZIFA(2)),
    "baselines.ZINBWaVE": baseline(lambda: baselines.ZINBWaVE(2, tol=1e-2)),
    "baselines.CommonDispersion": baselines.CommonDispersion,
    "baselines.GenewiseDispersion": baselines.GenewiseDispersion,
    "baselines.MAGIC": baseline(baselines.MAGIC),
    "baselines.SCONE": baseline(baselines.SCONE),
    "baselines.Normalisation": baseline(baselines.SCONE),
    "baselines.LeidenClusters": baseline(lambda: baselines.LeidenClusters(n_components=3, n_neighbors=5)),
    "baselines.DESeq2": two_groups(baselines.DESeq2),
    "baselines.MAST": two_groups(baselines.MAST),
    "baselines.Wilcoxon": two_groups(baselines.Wilcoxon),
    "baselines.Mixture": lambda: baselines.Mixture(0.5, 0.5, 1.0, 1.0),
    "baselines.idr": lambda: baselines.idr(np.arange(50.0), np.arange(50.0)[::-1] % 7 + np.arange(50.0)),
    **{
        f"baselines.{name}": lambda name=name: getattr(baselines, name)()(simulated_counts(N, GENES).astype(float))
        for name in ("RLE", "TMM", "FullQuantile", "NoScaling", "TotalScaling", "UpperQuartile")
    },
}

COVERED_BY = {
    "shards.write": "tests/export/test_blocks.py",
    "distributed.ProcessGroup": "tests/training/test_distributed.py",
    "networks.running_statistics": "tests/training/test_distributed.py",
    "calibration.calibrate": "calibrate",
    "stores.CountStore": "stores.build",
    "criticism.prior_predictive": "prior_predictive",
    "criticism.posterior_predictive": "posterior_predictive",
    "criticism.check_predictions": "check_predictions",
    "differential.differential_expression": "differential_expression",
    "imputation.impute": "impute",
    "imputation.technical_zero_probability": "technical_zero_probability",
    "networks.Layers": "SCVI",
    "networks.Decoder": "SCVI",
    "networks.Encoder": "fit",
    "networks.initialise": "presets.seed_2017",
    "weights.RandomWeights": "weights.NormalWeights",
    "baselines.SCVITools": "test_scvi_tools.py: needs a package of its own",
    "datasets.read_cortex": "test_datasets.py: reads a file",
    "datasets.read_10x": "test_datasets.py: reads a file",
    "calibrate_globals": "tests/analysis/predictive/test_global_calibration.py",
    "Given": "tests/analysis/test_own_draws.py",
    "libraries.SizeFactor": "tests/likelihoods/test_size_factor.py",
    "priors.ByLabel": "tests/priors/test_conditional.py",
    "priors.Conditional": "tests/priors/test_conditional.py",
    "predict_labels": "tests/priors/test_conditional.py",
    "loadings": "tests/nn/test_decoders.py",
    "map_query": "tests/analysis/integration/test_queries.py",
    "spaces.FittedSpace": "tests/analysis/integration/test_spaces.py",
    "spaces.from_record": "tests/analysis/integration/test_spaces.py",
    "stacking_weights": "tests/analysis/evidence/test_stacking.py",
    "weights.RandomWalkWeights": "tests/priors/test_weight_priors.py",
}
"""Public names that are the same as another, part of it, or tested in another module."""

WITHOUT_CODE = {
    "calibration.Source",
    "calibration.Calibration",
    "criticism.Checks",
    "distributed.Processes",
    "guides.Guide",
    "guides.Code",
    "guides.AmortizedGuide",
    "likelihoods.Likelihood",
    "likelihoods.GammaPoisson",
    "networks.Encoded",
    "priors.Prior",
    "baselines.IDRResult",
}
"""Bases, protocols and tuples of results."""


@cache
def calibrated():
    return ps.calibrate(fit(), 20, source=ps.calibration.Prior(cells()), sampler=QUICK, draws=19, thin=1)


def public_callables():
    """Callables among the public names, and those that public modules list or define, errors apart."""
    found = {name for name in ps.__all__ if callable(getattr(ps, name))}
    for room in (name for name in ps.__all__ if inspect.ismodule(getattr(ps, name)) and name != "errors"):
        module = getattr(ps, room)
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        names = getattr(module, "__all__", None) or [name for name in own if not name.startswith("_")]
        found |= {f"{room}.{name}" for name in names if callable(getattr(module, name))}
    return found


def test_every_public_callable_has_a_case():
    assert public_callables() - set(CASES) - set(COVERED_BY) - WITHOUT_CODE == set()
    assert {name for name in COVERED_BY.values() if ".py" not in name} <= set(CASES)


PACKAGES = {
    "datasets.pbmc68k_reduced": "scanpy",
    "prior_sensitivity": "arviz_stats",
    "baselines.MAGIC": "magic",
    "baselines.LeidenClusters": "igraph",
    "baselines.DESeq2": "inmoose.deseq2",
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:k-hat is above", "ignore:sampler_khat is above", "ignore:no start")
@pytest.mark.filterwarnings("ignore:no parametric trend", "ignore:mixture_weight is above")
def test_global_state_is_left_alone(name, tmp_path):
    if name in PACKAGES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of their own dependencies
            pytest.importorskip(PACKAGES[name], exc_type=ImportError)
    fit(), cells(), tree(), calibrated()  # made before the state is looked at, whichever test comes first
    np.random.seed(3), random.seed(3), torch.manual_seed(3)  # noqa: NPY002
    before = global_state()
    CASES[name](*([tmp_path] if CASES[name] in (loaded, stored) else []))
    assert changed(before, global_state()) == []
