"""Callbacks of fit: what they are told, and that they change nothing."""

import numpy as np
import pyro
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.errors import ModelError


def fitted(cells, callbacks=(), **options):
    model = ps.SCVI(cells.n_genes, 2, n_hidden=8, dropout=0.1)
    return ps.fit(model, cells, progress=False, callbacks=callbacks, **{"epochs": 4} | options)


def test_they_are_told_of_every_epoch(cells):
    told, fits = [], []
    made = fitted(cells, [lambda epoch, row, fit: told.append((epoch, row)), lambda *given: fits.append(given[2])])
    assert [epoch for epoch, _ in told] == [1, 2, 3, 4]
    for epoch, row in told:
        assert row == made.history.loc[epoch].to_dict()
    assert [len(fit.history) for fit in fits] == [1, 2, 3, 4]
    assert not np.allclose(ps.embed(fits[0], cells), ps.embed(fits[3], cells))  # a copy each
    best = int(np.nanargmin(made.history.held_out_loss))
    np.testing.assert_array_equal(ps.embed(fits[best], cells), ps.embed(made, cells))


def test_training_goes_on_as_without_them(cells):
    def disturb(epoch, row, fit):
        torch.manual_seed(epoch)
        torch.rand(7)
        pyro.param("left", torch.zeros(1))
        row.clear()
        with torch.no_grad():
            for parameter in fit.model.parameters():
                parameter.zero_()
        ps.sample_posterior(fit, cells, samples=2, progress=False)

    plain, disturbed = fitted(cells), fitted(cells, [disturb])
    columns = ["train_loss", "held_out_loss", "kl"]
    np.testing.assert_array_equal(disturbed.history[columns], plain.history[columns])
    np.testing.assert_array_equal(ps.embed(disturbed, cells), ps.embed(plain, cells))
    assert "left" not in pyro.get_param_store()


def test_a_resumed_run_may_have_others(cells, tmp_path):
    told = []
    options = {"checkpoint": tmp_path / "run", "epochs": 3}
    fitted(cells, **options)
    fitted(cells, [lambda epoch, row, fit: told.append(epoch)], resume=True, **options)
    assert told == []  # all epochs had ended


def test_an_error_in_one_ends_training(cells):
    def fail(epoch, row, fit):
        raise RuntimeError(f"no disk in epoch {epoch}")

    with pytest.raises(RuntimeError, match="no disk in epoch 1"):
        fitted(cells, [fail])


@pytest.mark.parametrize("wrong", [print, [dict], ["tensorboard"], None])
def test_what_is_no_list_of_functions_is_refused(cells, wrong):
    with pytest.raises(ModelError, match=r"callbacks must be functions of \(epoch, row, fit\) in a list"):
        fitted(cells, wrong)
