"""Fits of one model object do not know of each other: training and loading take copies."""

import functools
import multiprocessing
import threading
import weakref

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import pyro_scvi as ps
from pyro_scvi.errors import CheckpointError, ModelError
from pyro_scvi.training.copying import copied
from pyro_scvi.training.loop import Trainer
from tests.support.fits_alone import (
    CELLS,
    DONORS,
    alone,
    alone_with_a_query,
    pair,
    pair_of_donors,
    results,
    results_of_a_query,
    trained,
    trained_on_donors,
)

SHARED = {  # kinds of model and guide in which parts refer to each other
    "normal": {},
    "guide with the prior's encoder": {"prior": ps.priors.VampPrior(20, 2, 4, n_hidden=8)},
    "latent weights": {"weight_priors": {"decoder.heads.log_mean.weight": ps.weights.HorseshoeWeights()}},
}


def everything(*parts):
    """All tensors with their kinds, gradients and modes; whether a model was trained, and Pyro's names."""
    found = []
    for part in parts:
        tensors = part.state_dict(keep_vars=True)
        found += [(name, t.detach().clone(), t.dtype, t.requires_grad, t.grad is None) for name, t in tensors.items()]
        found += [(name, torch.tensor(module.training)) for name, module in part.named_modules()]
        found.append((part.pyro_name, torch.tensor(getattr(part, "trained", False))))
    return found


def same(first, second):
    return all(
        one[0] == other[0] and torch.equal(one[1], other[1]) and one[2:] == other[2:]
        for one, other in zip(first, second, strict=True)
    )


@pytest.mark.filterwarnings("ignore:k-hat is above")
def test_fits_of_one_model_are_those_of_separate_processes(tmp_path):
    """Whatever is done between them, in whatever order."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        elsewhere = pool.apply_async(alone, (1,))
        expected = [alone(seed) for seed in range(3)]
        model, guide = pair()
        fits = {2: trained(model, guide, seed=2)}
        fits[2].save(tmp_path / "two")
        fits[0] = trained(model, guide, seed=0)
        ps.differential_expression(fits[0], CELLS, groupby=np.arange(CELLS.n_cells) % 2)
        ps.compare({"first": [fits[2], fits[0]]}, CELLS.take(np.arange(2)), samples=200)
        loaded = ps.load(tmp_path / "two", model=model, guide=guide)
        trained(loaded.model, loaded.guide, seed=5)
        fits[1] = trained(model, guide, seed=1, checkpoint=tmp_path / "run")
        assert expected[1] == elsewhere.get(timeout=120)
    assert [results(fits[seed]) for seed in range(3)] == expected
    assert results(loaded) == expected[2]
    assert len(set(expected)) == 3


@pytest.mark.filterwarnings("ignore:k-hat is above", "ignore:genes are named by numbers")
def test_queries_comparisons_and_loads_between_fits_of_one_model_change_neither(tmp_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        elsewhere = pool.apply_async(alone_with_a_query, (1,))
        expected = [alone_with_a_query(seed) for seed in range(2)]
        model, guide = pair_of_donors()
        one = trained_on_donors(model, guide, 1)
        results_of_a_query(one)
        one.save(tmp_path / "one")
        other, few = trained_on_donors(model, guide, 0), DONORS.take(np.arange(2))
        refits = ps.compare({"refits": [one, other]}, few, samples=200, progress=False)
        loaded = ps.load(tmp_path / "one", model=model, guide=guide)
        ps.load(tmp_path / "one", model=other.model, guide=other.guide)
        ps.differential_expression(other, DONORS, groupby=np.arange(40) % 4 < 2)
        assert expected[1] == elsewhere.get(timeout=300)
    assert [results_of_a_query(fit) for fit in (other, one)] == expected
    assert results_of_a_query(loaded) == expected[1]
    again = ps.compare({"refits": [loaded, other]}, few, samples=200, progress=False)
    assert (
        refits.drop(columns="seconds", errors="ignore").to_numpy(object).tolist()
        == again.drop(columns="seconds", errors="ignore").to_numpy(object).tolist()
    )
    assert expected[0] != expected[1]


class Shifted(ps.guides.DiagonalNormal):
    """A guide of a user's own: z is moved by what it learns."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.shift = nn.Parameter(torch.zeros(2))

    def law(self, site, code, drawn):
        loc = code.loc[site.name]
        return site.normal(loc + self.shift if site.name == "z" else loc, code.scale[site.name])


def by_hand():
    model, _ = pair()
    return model, Shifted(model, n_hidden=8)


VARIANTS = {  # how model and guide are made, and options of fit
    "weight priors": (lambda: pair(weight_priors={"decoder.heads.log_mean.weight": ps.weights.NormalWeights()}), {}),
    "a guide of one's own": (by_hand, {}),
    "a prior with the guide's encoder": (lambda: pair(prior=ps.priors.VampPrior(20, 2, 4, n_hidden=8)), {}),
    "float64": (pair, {"dtype": torch.float64}),
}


@pytest.mark.filterwarnings("ignore:k-hat is above")
@pytest.mark.parametrize(("make", "options"), VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_of_fits_of_one_model_are_those_of_new_objects(make, options, tmp_path):
    """Also where one is resumed from its checkpoint, after others."""
    expected = [results(trained(*make(), seed=seed, **options)) for seed in (0, 1)]
    model, guide = make()
    fits = [trained(model, guide, seed=0, checkpoint=tmp_path / "run", **options)]
    ps.compare({"one": fits[0]}, CELLS.take(np.arange(1)), samples=200, progress=False)
    fits.append(trained(model, guide, seed=1, **options))
    ps.differential_expression(fits[1], CELLS, groupby=np.arange(CELLS.n_cells) % 2)
    resumed = trained(model, guide, seed=0, checkpoint=tmp_path / "run", resume=True, **options)
    assert [results(fit) for fit in fits] == expected
    assert results(resumed) == expected[0]


@pytest.mark.parametrize("options", SHARED.values(), ids=SHARED.keys())
def test_what_is_given_stays_bit_for_bit(options, tmp_path):
    model, guide = pair(**options)
    next(guide.parameters()).grad = torch.ones_like(next(guide.parameters()))
    before = everything(model, guide)
    fit = trained(model, guide, dtype=torch.float64)
    assert fit.guide.model is fit.model is not model
    assert fit.guide.arguments["model"] is fit.model
    fit.save(tmp_path / "fit")
    loaded = ps.load(tmp_path / "fit", model=model, guide=guide)
    assert loaded.guide.model is loaded.model is not model
    assert same(before, everything(model, guide))
    assert results(loaded) == results(fit)
    names = [
        part.pyro_name
        for of in (model, guide, fit.model, fit.guide, loaded.model, loaded.guide)
        for part in of.modules()
        if hasattr(part, "pyro_name")
    ]
    own = [part for of in (model, guide) for part in of.modules() if hasattr(part, "pyro_name")]
    assert len(set(names)) == 3 * len({id(part) for part in own})


def test_a_fit_goes_on_where_its_copies_are_passed():
    model, guide = pair()
    first = trained(model, guide)
    before = everything(first.model, first.guide)
    more = trained(first.model, first.guide, learning_rate=ps.schedules.Constant(0.005), epochs=4)
    assert more.history.train_loss.iloc[0] < first.history.train_loss.iloc[0] - 1
    assert same(before, everything(first.model, first.guide))


def test_a_failed_or_interrupted_run_leaves_what_it_was_given():
    model, guide = pair()
    model.stray = nn.Parameter(torch.zeros(1))
    before = everything(model, guide)
    with pytest.raises(ModelError, match="stray"):
        trained(model, guide)
    assert same(before, everything(model, guide))


def test_parametrised_weights_are_copied():
    model, guide = pair()
    parametrizations.weight_norm(model.decoder.heads["log_mean"])
    before = everything(model, guide)
    fit = trained(model, guide)
    assert same(before, everything(model, guide))
    assert not torch.equal(fit.model.decoder.heads["log_mean"].weight, model.decoder.heads["log_mean"].weight)


class Keeping(ps.priors.StandardNormal):
    """A prior that keeps what its last call computed."""

    def __init__(self, n_latent):
        super().__init__(n_latent)
        self.scale = nn.Parameter(torch.ones(n_latent))

    def forward(self):
        self.last = [self.scale.exp()]
        return dist.Normal(torch.zeros_like(self.scale), self.last[0]).to_event(1)


def test_results_of_earlier_calls_are_copied_without_their_gradients():
    model, guide = pair(prior=Keeping(2))
    model(None, torch.zeros(3, 0))
    fit = trained(model, guide)
    assert not torch.equal(fit.model.prior.scale, model.prior.scale)


def test_hooks_of_parameters_act_on_the_copies():
    """As where a part of a weight matrix is kept as it is, by a hook on its gradient."""
    model, guide = pair()
    weight, mask = model.decoder.heads["log_mean"].weight, torch.zeros(20, 1)
    mask[3:] = 1.0
    weight.register_hook(functools.partial(torch.mul, mask))
    seen = []
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(id(parameter)))
    fit = trained(model, guide)
    changed = (fit.model.decoder.heads["log_mean"].weight != weight).any(1)
    assert changed.tolist() == [False] * 3 + [True] * 17
    assert set(seen) == {id(fit.model.decoder.heads["log_mean"].weight)}


def closure(model):
    layer = model.decoder.heads["log_mean"]
    model.likelihood.shift = lambda: layer.bias.sum()


def weak(model):
    owner = weakref.ref(model)
    model.likelihood.shift = lambda: owner().decoder


def a_default(model):
    def shift(bias=model.decoder.heads["log_mean"].bias):
        return bias

    model.prior.shift = shift


def frozen_closure(model):
    """Not trained, but its running statistics would be changed."""
    layers = model.decoder.requires_grad_(False)
    model.prior.shift = [lambda z: layers(z)]


def a_hook(model):
    model.decoder.register_forward_pre_hook(lambda layer, given: model.library.loc.add_(1) and None)


def gradient_hook(model):
    bias = model.decoder.heads["log_mean"].bias
    bias.register_hook(lambda gradient: gradient * bias.detach())


class Uncopied(ps.priors.StandardNormal):
    def __deepcopy__(self, memo):
        return self


def itself(model):
    model.prior = Uncopied(2)


REACHING = [closure, weak, a_default, frozen_closure, a_hook, gradient_hook, itself]


@pytest.mark.parametrize("change", REACHING, ids=[change.__name__ for change in REACHING])
def test_code_that_reaches_the_given_model_is_refused(change):
    model, guide = pair()
    change(model)
    with pytest.raises(ModelError, match=r"still refers to the model that was given.*self\.model"):
        trained(model, guide)


def test_a_guide_whose_code_knows_the_given_model_is_refused():
    model, _ = pair()

    class Knowing(ps.guides.DiagonalNormal):
        def law(self, site, code, drawn):
            return site.normal(code.loc[site.name] * model.n_genes, code.scale[site.name])

    with pytest.raises(ModelError, match=r"guide -> model: still refers to the model that was given"):
        trained(model, Knowing(model, n_hidden=8))


def a_lock(model):
    model.likelihood.lock = threading.Lock()
    return r"model.likelihood.lock cannot be copied.*__deepcopy__"


def a_view(model):
    head = model.decoder.heads["log_mean"]
    head.register_buffer("first", head.weight.data[0])
    return r"model.decoder.heads.log_mean.first and .*weight share memory|weight and .*first share memory"


def tied_data(model):
    first, second = (model.decoder.heads[name] for name in ("log_mean", "gate_logits"))
    first.weight.data = second.weight.data
    return r"heads.*weight and .*heads.*weight share memory"


@pytest.mark.parametrize("change", [a_lock, a_view, tied_data], ids=["lock", "view", "tied data"])
def test_what_has_no_copy_is_refused_by_name(change, tmp_path):
    model, guide = pair()
    trained(model, guide).save(tmp_path / "fit")
    told = change(model)
    with pytest.raises(ModelError, match=told):
        trained(model, guide)
    if "first" not in told:
        with pytest.raises(CheckpointError, match=told):
            ps.load(tmp_path / "fit", model=model, guide=guide)


def test_a_parameter_in_two_places_is_one_in_the_copy():
    model, guide = pair()
    heads = model.decoder.heads
    heads["gate_logits"].weight = heads["log_mean"].weight
    copy, guide_of_copy = copied(model, guide)
    assert copy.decoder.heads["gate_logits"].weight is copy.decoder.heads["log_mean"].weight
    assert guide_of_copy.model is copy


class Heavy(nn.Module):
    """A part whose copy takes more memory than there is."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def __deepcopy__(self, memo):
        raise self.error


WITHOUT_MEMORY = (
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
)


@pytest.mark.parametrize("error", WITHOUT_MEMORY)
def test_a_copy_for_which_there_is_no_memory_says_what_to_lower(error):
    model = ps.SCVI(20, 2)
    model.decoder.more = Heavy(error)
    with pytest.raises(MemoryError, match=r"not enough memory; lower batch_size=, .* fewer cells") as raised:
        ps.fit(model, CELLS, epochs=1, progress=False)
    assert "copied" not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", WITHOUT_MEMORY)
def test_training_for_which_there_is_no_memory_says_what_to_lower(error, monkeypatch):
    def train(self):
        raise error

    monkeypatch.setattr(Trainer, "train", train)
    with pytest.raises(MemoryError, match=r"not enough memory; lower batch_size="):
        ps.fit(ps.SCVI(20, 2), CELLS, epochs=1, progress=False)


@pytest.mark.parametrize("error", WITHOUT_MEMORY)
def test_a_save_for_which_there_is_no_memory_is_not_called_inconsistent(error, tmp_path):
    model = ps.SCVI(20, 2)
    ps.fit(model, CELLS, epochs=1, progress=False).save(tmp_path / "fit")
    model.prior.more = Heavy(error)
    with pytest.raises(type(error)):
        ps.load(tmp_path / "fit", model=model, guide=ps.guides.DiagonalNormal(model))
