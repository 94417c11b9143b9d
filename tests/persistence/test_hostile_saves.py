"""Saves with right checksums and hostile content: refused in one line, at no cost, or loaded and usable."""

import hashlib
import os
import resource
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import _SIZE as WRITTEN

import pyro_scvi as ps
from pyro_scvi.errors import CheckpointError, FitError, PyroScviError
from pyro_scvi.persistence import archive
from pyro_scvi.training.loading import NUMBERS
from pyro_scvi.training.state import HISTORY
from pyro_scvi.utils.allocation_limit import AllocationLimit
from tests.support.hostile_saves import content, forge, paths, put
from tests.support.simulate import simulated_counts

pytestmark = pytest.mark.faults

SECONDS, MEGABYTES = 15, 200  # of a processor, 3 where it has nothing else to do, and of memory, for any one save
EVERY = 3  # one of so many pairs of a place and a value is tried: each place and each value come up all the same
NO_SIZES = ("seed", "initial_sd", "head_sd")  # which may be as large as they like
VALUES = (0, -1, 20_000, 10**9, 2**63, 10**30, 1.5, float("nan"), "3", None, True, [3], {"tensor": [[1.0]]})


@pytest.fixture(scope="module")
def cells():
    obs = pd.DataFrame({"donor": np.array(["a", "b"])[np.arange(40) % 2], "age": np.linspace(20, 50, 40)})
    return ps.Cells.from_counts(simulated_counts(40), obs=obs, batch="donor", covariates=["age"])


@pytest.fixture(scope="module")
def saved(cells, tmp_path_factory):
    """Facts and tensors of a fit with many sizes."""
    torch.manual_seed(0)
    model = ps.SCVI(cells.n_genes, 3, cells.n_covariates, n_hidden=8, prior=ps.priors.Flow(3))
    guide = ps.guides.InverseAutoregressiveFlow(model, n_hidden=8)
    folder = tmp_path_factory.mktemp("saved") / "fit"
    ps.fit(model, cells, guide, epochs=1, progress=False, device="cpu").save(folder)
    return content(folder)


def check(folder, cells):
    """Refused by name, or usable; quick, and without much memory. Returns what was said."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        fit = ps.load(folder)
        assert np.isfinite(ps.embed(fit, cells)).all()
        repr(fit)
        fit._repr_html_()
        said = "usable"
    except PyroScviError as error:
        said = str(error)
        assert len(said) < 2_000
    assert time.process_time() - began < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1024
    return said


def test_any_value_at_any_place_of_model_and_guide(saved, cells, tmp_path):
    facts, tensors = saved
    places = [path for part in ("model", "guide") for path in paths(facts[part], (part,))]
    assert len(places) >= 8
    for number, (path, value) in enumerate(list(product(places, VALUES))[::EVERY]):
        said = check(forge(tmp_path / str(number), put(facts, path, value), tensors), cells)
        if isinstance(value, int) and value >= 20_000 and path[-1] not in NO_SIZES:
            assert said != "usable", (path, value)


def test_any_value_at_any_place_of_schema_history_and_settings(saved, cells, tmp_path):
    facts, tensors = saved
    parts = ("schema", "history", "settings", "dtype")
    places = [path for part in parts for path in paths(facts[part], (part,))]
    places = [path for path in places if path[0] == "schema" and path[-1] in (0, "batch", "layer")]
    places += [("schema",), ("history",), ("settings",), ("dtype",), ("history", "epoch"), ("history", "kl", 0)]
    for number, (path, value) in enumerate(list(product(places, VALUES[::4]))[::EVERY]):
        check(forge(tmp_path / str(number), put(facts, path, value), tensors), cells)


@pytest.mark.parametrize("column", ["epoch", *HISTORY])
def test_a_history_without_a_column(saved, cells, tmp_path, column):
    facts, tensors = saved
    history = {name: values for name, values in facts["history"].items() if name != column}
    check(forge(tmp_path / "fit", facts | {"history": history}, tensors), cells)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(saved, cells, tmp_path, value):
    facts, tensors = saved
    for number, name in enumerate(sorted(tensors)[::16]):
        if tensors[name].is_floating_point() and tensors[name].numel():
            lost = tensors[name].clone()
            lost.view(-1)[-1] = value
            said = check(forge(tmp_path / str(number), facts, tensors | {name: lost}), cells)
            assert f"1 of its weights hold NaN or infinity: {name}" in said


def test_variances_below_zero(saved, cells, tmp_path):
    """Of a norm: its root would be NaN in every result."""
    facts, tensors = saved
    name = next(name for name in sorted(tensors) if name.endswith("running_var"))
    said = check(forge(tmp_path / "fit", facts, tensors | {name: -tensors[name]}), cells)
    assert f"1 of its variances are below 0: {name}" in said


@pytest.mark.parametrize(
    "other",
    [
        lambda tensor: tensor[None],
        lambda tensor: tensor.double(),
        lambda tensor: tensor.half(),
        pytest.param(
            lambda tensor: tensor.to(torch.complex64),
            marks=pytest.mark.skipif(torch.complex64 not in WRITTEN, reason="old safetensors cannot write it"),
        ),
        lambda tensor: torch.zeros(0),
        lambda tensor: tensor.repeat(1000, *[1] * (tensor.ndim - 1)) if tensor.ndim else tensor.repeat(1000),
    ],
)
def test_weights_of_other_shapes_and_types(saved, cells, tmp_path, other):
    facts, tensors = saved
    for number, name in enumerate(sorted(tensors)[::16]):
        changed = tensors | {name: other(tensors[name]).contiguous()}
        assert check(forge(tmp_path / str(number), facts, changed), cells) != "usable"


def test_a_wide_layer_that_a_small_file_makes_possible(saved, cells, tmp_path):
    """A vector as long as the size in the JSON: the size is one of the weights', its square is not."""
    facts, tensors = saved
    long = {**tensors, "more": torch.zeros(100_000)}
    for number, path in enumerate(path for part in ("model", "guide") for path in paths(facts[part], (part,))):
        value = facts
        for key in path:
            value = value[key]
        if type(value) is int and path[-1] != "seed":
            said = check(forge(tmp_path / str(number), put(facts, path, 100_000), long), cells)
            assert said != "usable"
            assert torch.is_grad_enabled()  # torch makes weights without gradients, and must come out of that


@pytest.mark.parametrize("depth", [50, 500, 5_000, 50_000])
def test_descriptions_in_descriptions(saved, cells, tmp_path, depth):
    facts, tensors = saved
    deep = '{"mapping": {"a": ' * depth + "1" + "}}" * depth
    folder = forge(tmp_path / "fit", facts | {"guide": "here"}, tensors)
    body = (folder / archive.CONFIG).read_bytes().split(b',\n "sha256": "')
    body = b',\n "sha256": "'.join(body[:-1]).replace(b'"here"', deep.encode())
    end = f',\n "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'
    (folder / archive.CONFIG).write_bytes(body + end.encode())
    assert check(folder, cells) != "usable"


@pytest.mark.parametrize("count", [100, 2_000])
def test_many_parts(saved, cells, tmp_path, count):
    facts, tensors = saved
    part = {"part": "Flow", "arguments": {"n_latent": 3}}
    many = put(facts, ("model", "arguments", "prior"), [part] * count)
    assert check(forge(tmp_path / "fit", many, tensors), cells) != "usable"


@pytest.mark.parametrize("n_elements", [0, 1])
def test_many_small_tensors_allow_no_more_layers(saved, cells, tmp_path, n_elements):
    """They cost a file some bytes each, and a layer of a flow is seven tensors and hundreds of calls."""
    facts, tensors = saved
    many = tensors | {f"more.{number}": torch.zeros(n_elements) for number in range(4_000)}
    deep = put(facts, ("model", "arguments", "prior", "arguments", "layers"), 4_000)
    said = check(forge(tmp_path / "fit", deep, many), cells)
    assert "it asks for far more memory or time than its weights need" in said


@pytest.mark.parametrize("place", [("model", "arguments", "n_layers"), ("model", "arguments", "n_covariates")])
def test_sizes_of_tensors_without_elements_are_none(saved, cells, tmp_path, place):
    """A tensor of shape (10**9, 0) costs a file nothing, and a list of 10**9 layers 8 GB."""
    facts, tensors = saved
    said = check(forge(tmp_path / "fit", put(facts, place, 10**9), tensors | {"more": torch.zeros(10**9, 0)}), cells)
    assert f"{place[-1]} is 1000000000, more than any size of its weights" in said


def test_names_of_tensors_are_told_in_short(saved, cells, tmp_path):
    facts, tensors = saved
    said = check(forge(tmp_path / "fit", facts, tensors | {"n\n\x1b[31m" * 1_000: torch.zeros(1)}), cells)
    assert r"its weights differ from the model's: n\n\x1b[31mn" in said
    assert len(said) < 400


def test_many_parts_that_are_no_tensors(saved, cells, tmp_path):
    facts, tensors = saved
    parts = [{"part": "ConstantKL", "arguments": {}}] * 20_000
    said = check(forge(tmp_path / "fit", put(facts, ("guide", "arguments", "n_hidden"), parts), tensors), cells)
    assert "it is made of more than 500 parts" in said


STRANGE = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a device that never ends": lambda path: os.symlink("/dev/zero", path),
    "a device that is empty": lambda path: os.symlink("/dev/null", path),
    "a terminal": lambda path: os.symlink("/dev/tty", path),
    "a link to itself": lambda path: os.symlink(path, path),
    "a link that leads nowhere": lambda path: os.symlink("nowhere", path),
}


@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("which", ["config", "weights"])
def test_what_is_no_file_is_not_read(saved, cells, tmp_path, make, which):
    folder = forge(tmp_path / "fit", *saved)
    path = folder / archive.CONFIG if which == "config" else next(folder.glob("weights-*"))
    path.unlink()
    make(path)
    assert "there is no saved fit or checkpoint, or a part of it is missing" in check(folder, cells)
    with pytest.raises(CheckpointError, match="holds files that are not of"):
        archive.check_replaceable(folder, "fit")


def test_the_limit_counts_what_is_asked_for_before_it_is_made():
    for ask in (
        lambda: torch.zeros(10**5, 10**5),
        lambda: torch.empty([10**12]),
        lambda: torch.eye(10**5),
        lambda: torch.ones(10**5)[:, None] * torch.ones(10**5),
        lambda: torch.ones(10**5, 1) @ torch.ones(1, 10**5),
        lambda: torch.ones(10**4).repeat(10**4),
        lambda: [torch.zeros(10) for _ in range(2_000)],
        lambda: torch.nn.Linear(10**5, 10**5),
    ):
        with pytest.raises(CheckpointError, match="far more memory or time"), AllocationLimit(10**6, 10**6, 1_000):
            ask()
    with AllocationLimit(10**6, 10**6, 1_000):
        assert torch.nn.Linear(100, 100)(torch.ones(5, 100)).shape == (5, 100)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_checkpoints_whose_tensors_are_no_numbers(cells, tmp_path, value):
    """Training would go on with them, and Adam would spread one NaN over all weights in a step."""

    def trained(folder, **options):
        model = ps.SCVI(cells.n_genes, 2, cells.n_covariates, n_hidden=4, n_layers=1)
        return ps.fit(model, cells, epochs=2, progress=False, device="cpu", checkpoint=folder, **options)

    trained(tmp_path / "run")
    facts, tensors = content(tmp_path / "run")
    floats = sorted(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel())
    some = {name.split("/")[0].split(".")[0]: name for name in floats}  # one of each kind: weights, moments
    for number, name in enumerate([*some.values(), *floats[::20]]):
        lost = tensors[name].clone()
        lost.view(-1)[-1] = value
        folder = forge(tmp_path / str(number), facts, tensors | {name: lost})
        with pytest.raises(CheckpointError, match=f"1 of its weights hold NaN or infinity: {name}"):
            trained(folder, resume=True)
    assert len(trained(tmp_path / "run", resume=True).history) == 2


@pytest.mark.parametrize("value", ["3", None, True, [3], {"tensor": [[1.0]]}])
def test_settings_that_are_no_numbers(saved, cells, tmp_path, value):
    facts, tensors = saved
    for name in NUMBERS:
        changed = facts | {"settings": facts["settings"] | {name: value}}
        said = check(forge(tmp_path / name, changed, tensors), cells)
        assert f"as {name}, which is not a number" in said


ONE = "decoder.layers.linear.0.weight"


@pytest.fixture(scope="module")
def plain():
    """Facts and tensors of a fit with the default parts, and its cells."""
    made = ps.Cells.from_counts(simulated_counts(40))
    fit = ps.fit(ps.SCVI(20, 3, n_hidden=8), made, epochs=1, progress=False, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        fit.save(f"{folder}/fit")
        return *content(Path(folder) / "fit"), made


@pytest.mark.parametrize("value", [1e38, -1e38, 1e20, 1e5])
def test_weights_that_no_training_leaves(plain, tmp_path, value):
    facts, tensors, _ = plain
    huge = {name: torch.full_like(tensor, value) for name, tensor in tensors.items() if name.endswith("weight")}
    with pytest.raises(CheckpointError, match="cannot come from training: .* would be NaN or infinite"):
        ps.load(forge(tmp_path / "fit", facts, tensors | huge))


HUGE = ("guide.library.bias", "guide.own_encoder.loc.bias", "guide.own_encoder.log_scale.bias", "model.library.loc")


@pytest.mark.parametrize("name", HUGE)
def test_one_array_of_weights_that_no_training_leaves(plain, tmp_path, name):
    facts, tensors, _ = plain
    with pytest.raises(CheckpointError, match="would be NaN or infinite"):
        ps.load(forge(tmp_path / "fit", facts, tensors | {name: torch.full_like(tensors[name], 1e38)}))


@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_scales_of_library_sizes_that_are_none(plain, tmp_path, value):
    facts, tensors, _ = plain
    scale = {"model.library.scale": torch.full_like(tensors["model.library.scale"], value)}
    with pytest.raises(CheckpointError, match="scale of its library sizes is not above 0"):
        ps.load(forge(tmp_path / "fit", facts, tensors | scale))


def test_no_verb_gives_nan_without_a_word(plain, tmp_path):
    facts, tensors, made = plain
    name = f"model.{ONE}"  # finite at the mean of z, and not at its draws
    fit = ps.load(forge(tmp_path / "fit", facts, tensors | {name: torch.full_like(tensors[name], 1e38)}))
    groups = list("ab") * 20
    for verb in (ps.impute, ps.technical_zero_probability, ps.normalized_expression):
        with pytest.warns(UserWarning, match="NaN or infinite for some of these cells"):
            assert np.isnan(np.asarray(verb(fit, made))).any()
    with pytest.raises(FitError, match="NaN or infinite"):
        ps.differential_expression(fit, made, groupby=groups, group_a="a", group_b="b")
    with pytest.raises(FitError, match="NaN or infinite"):
        ps.sample_posterior(fit, made, samples=3, sites=("z", "w", "h"))


def test_a_place_that_is_no_number_is_told(plain, tmp_path):
    facts, tensors, made = plain
    fit = ps.load(forge(tmp_path / "fit", facts, tensors))
    with torch.no_grad():
        fit.guide.own_encoder.loc.bias[0] = torch.nan
    with pytest.warns(UserWarning, match="NaN or infinite for some of these cells"):
        ps.embed(fit, made)
    with pytest.warns(UserWarning, match="NaN or infinite for some of these cells"):
        ps.sample_posterior(fit, made, samples=2, sites=("z",))
