"""Saves: a loaded fit is the saved one, and damaged, foreign or hostile saves are refused."""

import base64
import copy
import hashlib
import io
import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import safetensors.torch
import torch

import pyro_scvi as ps
from pyro_scvi.errors import CheckpointError
from pyro_scvi.persistence import archive
from tests.support.mutations import mutate


def fitted(cells, **options):
    model = ps.SCVI(cells.n_genes, 3, n_hidden=8, **options)
    return ps.fit(model, cells, epochs=3, progress=False)


@pytest.fixture
def cells():
    return ps.Cells.from_counts(np.random.default_rng(0).poisson(2.0, size=(40, 9)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A save that tests copy."""
    path = tmp_path_factory.mktemp("saved") / "fit"
    fitted(ps.Cells.from_counts(np.random.default_rng(1).poisson(2.0, size=(40, 9)))).save(path)
    return path


VARIANTS = {
    "default": lambda: {},
    "mixture": lambda: {"prior": ps.priors.GaussianMixture(3, components=2)},
    "vamp": lambda: {"prior": ps.priors.VampPrior(9, 3, 4)},
    "flow": lambda: {"prior": ps.priors.Flow(3)},
    "gene dispersion": lambda: {"likelihood": ps.likelihoods.NB(ps.likelihoods.PerGene(9))},
    "library": lambda: {"library": ps.libraries.ObservedLibrary(2.0, 1.0)},
    "norm": lambda: {"norm": ps.networks.LayerNorm(), "n_layers": 1},
    "horseshoe": lambda: {"weight_priors": {"decoder.heads.log_mean.weight": ps.weights.HorseshoeWeights(0.2)}},
}


@pytest.mark.filterwarnings("ignore:with an ObservedLibrary this is")
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_loaded_fit_is_the_saved_one(cells, tmp_path, options):
    fit = fitted(cells, **options())
    fit.save(tmp_path / "fit")
    loaded = ps.load(tmp_path / "fit")
    assert repr(loaded.model) == repr(fit.model)
    assert loaded.schema == fit.schema
    assert loaded.settings == fit.settings
    np.testing.assert_allclose(loaded.history, fit.history)
    np.testing.assert_array_equal(ps.embed(loaded, cells), ps.embed(fit, cells))
    first, second = (ps.evidence(f, cells, samples=400) for f in (fit, loaded))
    np.testing.assert_array_equal(first.log_evidence, second.log_evidence)


@pytest.mark.parametrize(
    "guide", [ps.guides.FullRankNormal, ps.guides.InverseAutoregressiveFlow, ps.guides.Point, ps.guides.DiagonalNormal]
)
def test_every_guide_comes_back(cells, tmp_path, guide):
    model = ps.SCVI(cells.n_genes, 3, n_hidden=8)
    fit = ps.fit(model, cells, guide(model, n_hidden=8, log_input=False), epochs=2, progress=False)
    fit.save(tmp_path / "fit")
    np.testing.assert_array_equal(ps.embed(ps.load(tmp_path / "fit"), cells), ps.embed(fit, cells))


def test_presets_come_back(cells, tmp_path):
    for preset in (ps.presets.seed_2017, ps.presets.nature_methods_2018):
        model, options = preset(cells)
        fit = ps.fit(model, cells, progress=False, **{**options, "epochs": 2})
        fit.save(tmp_path / preset.__name__)
        np.testing.assert_array_equal(ps.embed(ps.load(tmp_path / preset.__name__), cells), ps.embed(fit, cells))


def test_saving_again_replaces_the_save_and_nothing_else(cells, tmp_path):
    fit = fitted(cells)
    fit.save(tmp_path / "fit")
    fit.save(tmp_path / "fit")
    names = sorted(p.name for p in (tmp_path / "fit").iterdir())
    assert names == ["config.json", weights_of(tmp_path / "fit").name]
    assert [p.name for p in tmp_path.iterdir()] == ["fit"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="nothing was overwritten"):
        fit.save(other)
    assert (other / "thesis.txt").read_text() == "mine"


def test_what_looks_like_a_save_is_not_deleted(cells, tmp_path):
    fit = fitted(cells)
    fit.save(tmp_path / "fit")
    (tmp_path / "fit" / "notes.txt").write_text("mine")
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.json").write_text("{}")
    for folder in (tmp_path / "fit", project):
        with pytest.raises(CheckpointError, match="nothing was overwritten"):
            fit.save(folder)
    assert (tmp_path / "fit" / "notes.txt").read_text() == "mine"
    assert (project / "config.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["previous.json", "weights.safetensors"])
def test_files_that_only_bear_our_names_are_not_deleted(cells, tmp_path, name):
    (tmp_path / name).write_text("mine")
    for write in (fitted(cells).save, lambda path: checkpointed(cells, path)):
        with pytest.raises(CheckpointError, match=f"not of a saved.*{name}"):
            write(tmp_path)
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_a_checkpoint_is_not_replaced_by_a_save(cells, tmp_path):
    fit = checkpointed(cells, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(CheckpointError, match="a checkpoint"):
        fit.save(tmp_path / "run")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_a_guide_of_another_model_is_refused(cells, saved):
    model, other = (ps.SCVI(cells.n_genes, 3, n_hidden=8) for _ in range(2))
    with pytest.raises(CheckpointError, match="another model"):
        ps.load(saved, model=model, guide=ps.guides.DiagonalNormal(other, n_hidden=8))


def test_a_load_that_fails_leaves_what_it_was_given(cells, saved):
    model = ps.SCVI(cells.n_genes + 1, 3, n_hidden=8).double()
    guide = ps.guides.DiagonalNormal(model, n_hidden=8).double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError):
        ps.load(saved, model=model, guide=guide)
    assert model.training
    assert guide.training
    assert next(guide.parameters()).dtype == torch.float64
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("path", [None, 3, b"fit", "a\0b", "~no such user/fit"])
def test_what_is_no_path(cells, path):
    for ask in (ps.load, fitted(cells).save):
        with pytest.raises(CheckpointError):
            ask(path)


def checkpointed(cells, folder, **options):
    model = ps.SCVI(cells.n_genes, 3, n_hidden=8)
    return ps.fit(model, cells, checkpoint=folder, progress=False, **{"epochs": 2, **options})


def test_a_part_exchanged_after_construction_is_the_one_saved(cells, tmp_path):
    model = ps.SCVI(cells.n_genes, 3, n_hidden=8)
    model.prior = ps.priors.StudentT(3, df=2.0)
    fit = ps.fit(model, cells, epochs=2, progress=False)
    fit.save(tmp_path / "fit")
    assert ps.load(tmp_path / "fit").model.prior.df == 2.0


def test_numpy_numbers_are_saved_as_numbers(cells, tmp_path):
    model = ps.SCVI(np.int64(9), np.int64(3), library=ps.libraries.LatentLibrary(np.float32(2.0), 1.0), n_hidden=8)
    ps.fit(model, cells, epochs=2, progress=False).save(tmp_path / "fit")
    assert ps.load(tmp_path / "fit").model.n_latent == 3
    options = {"epochs": np.int64(2), "batch_size": np.int32(32), "seed": np.int64(3), "validation": np.float32(0.1)}
    rate = ps.schedules.Constant(np.float32(0.01))
    fit = checkpointed(cells, tmp_path / "run", learning_rate=rate, **options)
    fit.save(tmp_path / "again")
    np.testing.assert_array_equal(ps.embed(ps.load(tmp_path / "again"), cells), ps.embed(fit, cells))


def test_copies_of_a_fit_are_equal(cells):
    fit = fitted(cells)
    np.testing.assert_array_equal(ps.embed(copy.deepcopy(fit), cells), ps.embed(fit, cells))


def test_a_users_part_must_be_passed(cells, tmp_path):
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = torch.nn.Parameter(torch.zeros(3))

        def forward(self):
            return torch.distributions.Independent(dist.Normal(torch.zeros(3), self.log_scale.exp()), 1)

    class Wider(Wide):
        def forward(self):
            return dist.Normal(torch.zeros(3), self.log_scale.exp()).to_event(1)

    fit = fitted(cells, prior=Wider())
    fit.save(tmp_path / "fit")
    with pytest.raises(CheckpointError, match="Wider"):
        ps.load(tmp_path / "fit")
    model = ps.SCVI(cells.n_genes, 3, n_hidden=8, prior=Wider())
    loaded = ps.load(tmp_path / "fit", model=model)
    np.testing.assert_array_equal(ps.embed(loaded, cells), ps.embed(fit, cells))


def config_of(path):
    return json.loads((path / "config.json").read_text())


def weights_of(path):
    return path / config_of(path)["weights"]["file"]


def sign(path, config):
    """Write a config with the digest that it should have."""
    (path / "config.json").write_bytes(archive.signed({k: v for k, v in config.items() if k != "sha256"}))


def sign_weights(path, tensors):
    """Put other weights into the place of the save's own, with the digest that they should have."""
    blob, config = safetensors.torch.save(tensors), config_of(path)
    weights_of(path).write_bytes(blob)
    config["weights"]["sha256"] = hashlib.sha256(blob).hexdigest()
    sign(path, config)


def damage_nothing(path):
    (path / "config.json").unlink()


def damage_weights(path):
    content = weights_of(path).read_bytes()
    weights_of(path).write_bytes(content[: len(content) // 2])


def damage_one_bit(path):
    content = bytearray(weights_of(path).read_bytes())
    content[-3] ^= 4
    weights_of(path).write_bytes(content)


def empty_weights(path):
    weights_of(path).write_bytes(b"")


def remove_weights(path):
    weights_of(path).unlink()


def damage_format(path):
    (path / "config.json").write_text(json.dumps(config_of(path) | {"format": 99}))


def damage_key(path):
    (path / "config.json").write_text(json.dumps(config_of(path) | {"stranger": 1}))


def sign_format(path):
    sign(path, config_of(path) | {"format": 99})


def sign_the_format_without_digests(path):
    sign(path, config_of(path) | {"format": 1})


def sign_key(path):
    sign(path, config_of(path) | {"stranger": 1})


def sign_part(path):
    sign(path, json.loads((path / "config.json").read_text().replace('"SCVI"', '"os.system"')))


def sign_names(path):
    sign_weights(path, safetensors.torch.load_file(weights_of(path)) | {"stranger": torch.zeros(1)})


def sign_shape(path):
    tensors = safetensors.torch.load_file(weights_of(path))
    sign_weights(path, tensors | {"model.library.loc": torch.zeros(2)})


def sign_type(path):
    tensors = safetensors.torch.load_file(weights_of(path))
    sign_weights(path, tensors | {"model.library.loc": tensors["model.library.loc"].double()})


def sign_place(path):
    config = config_of(path)
    sign(path, config | {"weights": config["weights"] | {"file": "../weights-0123456789abcdef.safetensors"}})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_nothing, "no saved fit"),
        (damage_weights, "weights-.* is corrupt"),
        (damage_one_bit, "weights-.* is corrupt"),
        (empty_weights, "weights-.* is corrupt"),
        (remove_weights, "is missing"),
        (damage_format, "config.json is corrupt.*format 99"),
        (damage_key, "config.json is corrupt.*stranger"),
        (sign_format, "format 99, where this version reads 2"),
        (sign_the_format_without_digests, "format 1, where this version reads 2"),
        (sign_key, r"unknown keys \['stranger'\]"),
        (sign_part, "os.system"),
        (sign_names, "stranger"),
        (sign_shape, r"model.library.loc has shape \(2,\)"),
        (sign_type, "float64"),
        (sign_place, "not a file of weights"),
    ],
)
def test_broken_saves_are_refused(saved, tmp_path, damage, says):
    path = tmp_path / "fit"
    shutil.copytree(saved, path)
    damage(path)
    with pytest.raises(CheckpointError, match=says) as caught:
        ps.load(path)
    assert str(path) in str(caught.value)


def test_every_single_byte_counts(saved, tmp_path):
    """Bytes all over both files, altered in one bit: refused as corrupt, naming the file."""
    path, rng = tmp_path / "fit", np.random.default_rng(0)
    shutil.copytree(saved, path)
    for name, step in (("config.json", 5), (weights_of(saved).name, 97)):
        content = (path / name).read_bytes()
        for place in range(0, len(content), step):
            altered = bytearray(content)
            altered[place] ^= 1 << int(rng.integers(8))
            (path / name).write_bytes(altered)
            with pytest.raises(CheckpointError, match="corrupt") as caught:
                ps.load(path)
            assert name in str(caught.value)
        (path / name).write_bytes(content)
    ps.load(path)


def test_a_pickle_payload_is_refused_in_any_slot_and_nothing_runs(saved, tmp_path):
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return (Path.touch, (canary,))

    stream = io.BytesIO()
    torch.save({"model": Payload()}, stream)
    call = {"part": "os.system", "arguments": {"command": f"touch {canary}"}}
    for payload in (pickle.dumps(Payload()), stream.getvalue()):
        for name in ("config.json", weights_of(saved).name):
            path = tmp_path / "whole"
            shutil.copytree(saved, path)
            (path / name).write_bytes(payload)
            if name != "config.json":  # even where the digest is that of the payload
                config = config_of(path)
                config["weights"]["sha256"] = hashlib.sha256(payload).hexdigest()
                sign(path, config)
            with pytest.raises(CheckpointError, match="corrupt"):
                ps.load(path)
            shutil.rmtree(path)
        for slot in ("model", "guide", "schema", "settings", "dtype", "history", "kind", "weights"):
            for value in (payload.hex(), base64.b64encode(payload).decode(), payload.decode("latin1"), call):
                path = tmp_path / "slot"
                shutil.copytree(saved, path)
                sign(path, config_of(path) | {slot: value})
                if slot == "settings" and value is call:  # those are the user's own words, kept as they are
                    assert ps.load(path).settings == call
                else:
                    with pytest.raises(CheckpointError):
                        ps.load(path)
                shutil.rmtree(path)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Payload()))
    assert canary.exists()  # the payload would have worked


def test_saves_of_format_1_are_read_with_a_warning(saved, tmp_path):
    path = tmp_path / "old"
    path.mkdir()
    config = config_of(saved)
    old = {k: v for k, v in config.items() if k not in ("kind", "versions", "weights", "sha256")} | {"format": 1}
    (path / "config.json").write_text(json.dumps(old, indent=1))
    shutil.copy(weights_of(saved), path / "weights.safetensors")
    with pytest.warns(UserWarning, match="format 1, which cannot tell"):
        fit = ps.load(path)
    assert all(torch.equal(a, b) for a, b in zip(states(fit), states(ps.load(saved)), strict=True))
    fit.save(path)
    assert config_of(path)["format"] == 2
    assert len(list(path.iterdir())) == 2
    ps.load(path)


def test_a_failed_write_leaves_the_old_save(cells, saved, tmp_path, monkeypatch):
    path, fit = tmp_path / "fit", fitted(cells)
    shutil.copytree(saved, path)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    for file, says in (("config", 28), ("weights", 28), ("config", 5), ("weights", 30)):

        def full(number, file=file, says=says):
            if file in os.readlink(f"/proc/self/fd/{number}").rpartition("/")[2]:
                raise OSError(says, os.strerror(says))

        with monkeypatch.context() as patch:
            patch.setattr(archive.os, "fsync", full)
            with pytest.raises(CheckpointError, match=rf"could not write .*{os.strerror(says)}.*intact"):
                fit.save(path)
        assert before == {p.name: p.read_bytes() for p in path.iterdir()}
        ps.load(path)


def test_a_full_disk_leaves_the_old_save(cells, saved, tmp_path):
    """No file may grow beyond 1,000 bytes: the system itself refuses to write."""
    resource = pytest.importorskip("resource")
    path, fit = tmp_path / "fit", fitted(cells)
    shutil.copytree(saved, path)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large.*intact"):
            fit.save(path)
        with pytest.raises(CheckpointError, match="File too large"):
            fit.save(tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_a_place_that_cannot_be_written(cells, tmp_path):
    (tmp_path / "file").write_text("mine")
    fit = fitted(cells)
    for place in (tmp_path / "file", tmp_path / "file" / "fit"):
        with pytest.raises(CheckpointError, match="file"):
            fit.save(place)
    assert (tmp_path / "file").read_text() == "mine"


def states(fit):
    return [value for part in (fit.model, fit.guide) for value in part.state_dict().values()]


def check_mutations(saved, other, path, n, seed):
    """Mutate a save in ``n`` ways: each is refused, or, where its digests are right, gives the weights in the file."""
    rng, outcomes = np.random.default_rng(seed), Counter()
    for _ in range(n):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(saved, path)
        kind = mutate(path, other, rng)
        try:
            fit = ps.load(path)
        except CheckpointError:
            outcomes[kind, "refused"] += 1
            continue
        assert kind == "signed", "a save loaded that was altered without its digest"
        held = safetensors.torch.load_file(weights_of(path))
        read = {f"{side}.{k}": v for side in ("model", "guide") for k, v in getattr(fit, side).state_dict().items()}
        assert held.keys() == read.keys()
        assert all(torch.equal(held[name], read[name]) for name in held)
        outcomes[kind, "loaded"] += 1
    return outcomes


def test_mutated_saves_are_refused_or_hold_their_weights(saved, cells, tmp_path):
    other = tmp_path / "other"
    fitted(cells).save(other)
    outcomes = check_mutations(saved, other, tmp_path / "fit", 300, 0)
    assert outcomes.total() == 300
    assert outcomes["signed", "loaded"] > 5
    assert outcomes["signed", "refused"] > 20


@pytest.mark.slow
def test_10_000_mutated_saves_are_refused_or_hold_their_weights(saved, cells, tmp_path):
    other = tmp_path / "other"
    fitted(cells).save(other)
    outcomes = check_mutations(saved, other, tmp_path / "fit", 10_000, 1)
    assert outcomes.total() == 10_000
