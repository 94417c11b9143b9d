"""Draws of the cells of pairs: in their order, each its own, and no cell encoded twice for one batch of draws."""

import numpy as np
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.analysis.differential import matched_pairs
from pyro_scvi.analysis.differential.contrasts import DepthCorrected
from pyro_scvi.analysis.differential.matched_pairs import Groups, MatchedPairs, summary_of_changes
from pyro_scvi.data.minibatches import Minibatches
from pyro_scvi.inference.evaluation import evaluating
from pyro_scvi.inference.samplers import Amortized, Refined
from tests.support.simulate import simulated_counts

ROWS = np.array([7, 3, 7, 7, 0, 59, 3, 7])


def fitted(dispersion, guide=ps.guides.DiagonalNormal):
    cells = ps.Cells.from_counts(simulated_counts())
    model = ps.SCVI(20, 3, n_hidden=16, n_layers=1, likelihood=ps.likelihoods.NB(dispersion))
    guide = guide(model, n_hidden=16, n_layers=1)
    return ps.fit(model, cells, guide, epochs=3, validation=0, device="cpu", progress=False), cells


def side(fit, cells, rows=ROWS, sampler=Amortized(), contrast=DepthCorrected()):
    groups = Groups(fit, cells, Minibatches(cells, fit.device), rows, rows, contrast, sampler)
    with evaluating(fit.model, fit.guide, 0):
        return groups.side(rows)


class Noted:
    """A sampler that notes how many cells it was given and how many draws of each."""

    def __init__(self, sampler):
        self.sampler, self.calls = sampler, []

    def draw(self, guide, x, gamma, samples):
        self.calls.append((len(x), samples))
        return self.sampler.draw(guide, x, gamma, samples)


@pytest.mark.parametrize("dispersion", [ps.likelihoods.PerGene(20), ps.likelihoods.PerCellAndGene()])
def test_every_draw_is_of_its_cell(dispersion):
    """With one point per cell, the draws of any rows are those of the cells by themselves."""
    fit, cells = fitted(dispersion, ps.guides.Point)
    found, alone = side(fit, cells), side(fit, cells, np.arange(60))
    torch.testing.assert_close(found.log_mean, alone.log_mean[ROWS])
    assert alone.log_mean.std(0).min() > 1e-3  # so that cells out of order would be noticed
    assert found.shares_dispersion == isinstance(dispersion, ps.likelihoods.PerGene)
    expected = alone.log_r if found.shares_dispersion else alone.log_r[ROWS]
    torch.testing.assert_close(found.log_r, expected)


@pytest.mark.parametrize("sampler", [Amortized(), Refined(steps=5)])
def test_a_cell_is_encoded_once_and_drawn_as_often_as_it_comes(sampler):
    fit, cells = fitted(ps.likelihoods.PerGene(20))
    noted = Noted(sampler)
    found = side(fit, cells, sampler=noted)
    assert noted.calls == [(4, 4)]  # rows 0, 3, 7 and 59, of which 7 comes four times
    assert len(found.log_mean.unique(dim=0)) == len(ROWS)
    many = side(fit, cells, np.repeat([5, 8], 600), sampler=sampler)
    assert len(many.log_mean.unique(dim=0)) > 400  # Refined takes draws of large weight several times
    one, other = many.log_mean[:600], many.log_mean[600:]
    apart = (one.mean(0) - other.mean(0)).abs() / ((one.var(0) + other.var(0)) / 600).sqrt()
    assert apart.max() > 5  # two cells, not one


def test_more_pairs_use_the_table_of_the_first(monkeypatch):
    fit, cells = fitted(ps.likelihoods.PerGene(20))
    made, rows = [], np.arange(60)
    groups = Groups(fit, cells, Minibatches(cells, fit.device), rows[:30], rows[30:], DepthCorrected(), Amortized())
    less_for = matched_pairs.less_for
    monkeypatch.setattr(matched_pairs, "less_for", lambda side: made.append(side) or less_for(side))
    with evaluating(fit.model, fit.guide, 0):
        found = MatchedPairs(largest_se=0, most_pairs=2500).estimate(groups, np.random.default_rng(0), 0.5)
    assert found.n == 2500
    assert len(made) == 1


def test_a_change_counts_in_its_likelier_direction():
    """Both ways 2/6 and 3/6, up alone, down alone, none beyond delta, all at delta: which is not beyond it."""
    changes = [
        [1.0, 1.0, -1.0, -1.0, -1.0, 0.1],
        [0.6, 0.7, 0.8, 0.9, 0.2, 0.3],
        [-2.0, -3.0, -4.0, -5.0, -6.0, 0.0],
        [0.4, -0.4, 0.1, -0.1, 0.0, 0.2],
        [0.5, 0.5, 0.5, -0.5, -0.5, -0.5],
    ]
    mean, sd, low, high, one_way = summary_of_changes(np.array(changes).T, 0.5)
    np.testing.assert_allclose(one_way, [3 / 6, 4 / 6, 5 / 6, 0, 0])
    np.testing.assert_allclose(mean, np.mean(changes, 1))
    np.testing.assert_allclose(sd, np.std(changes, 1))
    np.testing.assert_allclose([low, high], np.percentile(changes, [2.5, 97.5], axis=1))
