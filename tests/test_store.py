import copy
import json

import numpy as np
import pytest
import safetensors.torch
import torch

import pyro_scvi as ps
from pyro_scvi.errors import CheckpointError


def fitted(cells, **options):
    model = ps.SCVI(cells.n_genes, 3, n_hidden=8, **options)
    return ps.fit(model, cells, epochs=3, progress=False)


@pytest.fixture
def cells():
    return ps.Cells.from_counts(np.random.default_rng(0).poisson(2.0, size=(40, 9)))


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
    assert sorted(p.name for p in (tmp_path / "fit").iterdir()) == ["config.json", "weights.safetensors"]
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


def test_copies_of_a_fit_are_equal(cells):
    fit = fitted(cells)
    np.testing.assert_array_equal(ps.embed(copy.deepcopy(fit), cells), ps.embed(fit, cells))


def test_a_users_part_must_be_passed(cells, tmp_path):
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = torch.nn.Parameter(torch.zeros(3))

        def forward(self):
            return torch.distributions.Independent(ps.priors.dist.Normal(torch.zeros(3), self.log_scale.exp()), 1)

    class Wider(Wide):
        def forward(self):
            return ps.priors.dist.Normal(torch.zeros(3), self.log_scale.exp()).to_event(1)

    fit = fitted(cells, prior=Wider())
    fit.save(tmp_path / "fit")
    with pytest.raises(CheckpointError, match="Wider"):
        ps.load(tmp_path / "fit")
    model = ps.SCVI(cells.n_genes, 3, n_hidden=8, prior=Wider())
    loaded = ps.load(tmp_path / "fit", model=model)
    np.testing.assert_array_equal(ps.embed(loaded, cells), ps.embed(fit, cells))


def damage_nothing(path):
    (path / "config.json").unlink()


def damage_weights(path):
    content = (path / "weights.safetensors").read_bytes()
    (path / "weights.safetensors").write_bytes(content[: len(content) // 2])


def damage_format(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"format": 99}))


def damage_part(path):
    (path / "config.json").write_text((path / "config.json").read_text().replace('"SCVI"', '"os.system"'))


def damage_names(path):
    tensors = safetensors.torch.load_file(path / "weights.safetensors")
    tensors["stranger"] = torch.zeros(1)
    safetensors.torch.save_file(tensors, path / "weights.safetensors")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_nothing, "no saved fit"),
        (damage_weights, "corrupt"),
        (damage_format, "format"),
        (damage_part, "os.system"),
        (damage_names, "stranger"),
    ],
)
def test_broken_saves_are_refused(cells, tmp_path, damage, says):
    fitted(cells).save(tmp_path / "fit")
    damage(tmp_path / "fit")
    with pytest.raises(CheckpointError, match=says):
        ps.load(tmp_path / "fit")
