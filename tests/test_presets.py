"""Presets: their models and options are those of the papers."""

import numpy as np
import pytest
import torch

import pyro_scvi as ps


def test_the_default_is_what_comes_without_options(cells):
    model, options = ps.presets.default(cells)
    assert repr(model.likelihood) == repr(ps.SCVI(cells.n_genes).likelihood)
    assert isinstance(model.library, ps.libraries.LatentLibrary)
    assert options == {"seed": 0}


def test_a_batch_without_cells_has_the_law_of_all(batched_cells):
    only_b = batched_cells.take(np.flatnonzero(batched_cells.obs.donor == "b"))
    model, _ = ps.presets.nature_methods_2018(only_b)
    assert torch.isfinite(model.library.loc).all()
    assert torch.allclose(model.library.loc[0], model.library.loc[1])


def test_seed_2017_is_the_papers_model(cells):
    model, options = ps.presets.seed_2017(cells)
    assert isinstance(model.library, ps.libraries.NoLibrary)
    assert model.likelihood.heads == ("log_mean", "log_inverse_dispersion", "gate_logits")
    assert [layer.out_features for layer in model.decoder.layers.linear] == [128, 128]
    assert options["guide"].encoder.log_input is False
    assert (options["epochs"], options["eps"], options["learning_rate"].rate) == (150, 0.01, 0.005)


def test_nature_methods_2018_has_a_library_per_batch(batched_cells):
    model, options = ps.presets.nature_methods_2018(batched_cells)
    log_totals = np.log(batched_cells.totals)
    for batch, name in enumerate(batched_cells.schema.batches):
        group = log_totals[(batched_cells.obs.donor == name).to_numpy()]
        assert float(model.library.loc[batch]) == pytest.approx(group.mean(), rel=1e-5)
        assert float(model.library.scale[batch]) == pytest.approx(group.std(), rel=1e-5)
    assert model.likelihood.dispersion.log_inverse_dispersion.shape == (batched_cells.n_genes,)
    assert options["kl_weight"].value == 0


@pytest.mark.parametrize("preset", [ps.presets.seed_2017, ps.presets.nature_methods_2018])
def test_presets_fit_as_documented_and_keep_their_start(batched_cells, preset):
    model, options = preset(batched_cells)
    start = model.decoder.heads["log_mean"].bias.detach().clone()
    frozen = options | {"learning_rate": ps.schedules.Constant(0.0), "epochs": 1}
    started = ps.fit(model, batched_cells, progress=False, **frozen).model
    assert torch.equal(started.decoder.heads["log_mean"].bias, start)
    fit = ps.fit(model, batched_cells, progress=False, **options | {"epochs": 20})
    assert fit.history.train_loss.iloc[-1] < fit.history.train_loss.iloc[0]
