"""Random streams of cells: independent of the other cells, and distributed as asked for."""

import pyro.distributions as dist
import pytest
import torch

from pyro_scvi.utils.cell_streams import alone, cell_streams, narrowed, per_cell

NAMES = [f"cell_{i}" for i in range(6)]
LOGITS = torch.tensor([0.0, 1.0, -1.0])


def repeated(law, lead):
    return law.expand(torch.Size(lead))


DRAWS = {
    "normal": lambda n: torch.randn(20, n, 3),
    "uniform, cells first": lambda n: torch.rand(n, 1)[None],
    "gamma": lambda n: torch._standard_gamma(torch.full((20, n, 4), 0.7)),
    "bernoulli": lambda n: torch.bernoulli(torch.full((20, n, 4), 0.3)),
    "poisson": lambda n: torch.poisson(torch.full((20, n, 4), 2.0)),
    "dirichlet": lambda n: dist.Dirichlet(torch.ones(3)).expand([20, n, 1]).sample(),
    "student": lambda n: dist.StudentT(torch.tensor(4.0)).expand([20, n, 1]).sample(),
    "categorical": lambda n: dist.Categorical(logits=LOGITS.expand(20, n, 3)).sample(),
    "exponential": lambda n: torch.empty(20, n).exponential_(),
    "flattened": lambda n: torch.randn(20 * n, 1, 2).reshape(20, n, 2),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_the_draws_of_a_cell_do_not_depend_on_the_others(draw):
    with cell_streams(3, NAMES), per_cell():
        every = draw(6)
    for rows in ([5, 1, 2, 0], [2]):
        with cell_streams(3, [NAMES[i] for i in rows]), per_cell():
            assert torch.equal(draw(len(rows)), every[:, rows])
    with cell_streams(3, NAMES), narrowed(torch.tensor([4, 2])), per_cell():
        assert torch.equal(draw(2), every[:, [4, 2]])
    with cell_streams(4, NAMES), per_cell():
        assert not torch.equal(draw(6), every)
    assert len({tuple(every[:, i].flatten().tolist()) for i in range(6)}) > 1


def test_moments_are_those_of_the_law():
    with cell_streams(0, NAMES), per_cell():
        normal, gamma, uniform = (
            torch.randn(4000, 6),
            torch._standard_gamma(torch.full((4000, 6), 2.5)),
            torch.rand(4000, 6),
        )
    for drawn, mean, sd in ((normal, 0, 1), (gamma, 2.5, 2.5**0.5), (uniform, 0.5, 12**-0.5)):
        torch.testing.assert_close(drawn.mean(0), torch.full((6,), float(mean)), atol=5 * sd / 4000**0.5, rtol=0)
        torch.testing.assert_close(drawn.std(0), torch.full((6,), float(sd)), atol=0.1 * sd, rtol=0)
    assert torch.corrcoef(normal.T).fill_diagonal_(0).abs().max() < 0.08


def test_a_cell_that_occurs_twice_goes_on_with_its_stream_and_what_is_shared_starts_anew():
    with cell_streams(0, NAMES):
        with narrowed(torch.tensor([1, 1])), per_cell():
            twice = torch.randn(3, 2)
            count = torch.randint(1000, ())
        with narrowed(torch.tensor([0])), per_cell():
            again = torch.randint(1000, ())
    assert not torch.equal(twice[:, 0], twice[:, 1])
    assert torch.equal(count, again)


def test_without_streams_the_global_generator_draws():
    torch.manual_seed(0)
    plain = torch.randn(3, 2)
    torch.manual_seed(0)
    with per_cell():
        assert torch.equal(torch.randn(3, 2), plain)


def test_a_cell_alone_draws_the_same_in_any_shape_and_nothing_of_its_other_stream():
    with cell_streams(3, NAMES):
        with alone(2):
            first = torch.randn(4, 7)
            assert not torch.equal(torch.rand(2), torch.rand(2))
        with per_cell():
            beside = torch.randn(28, 6)[:, 2]
    with torch.random.fork_rng(), cell_streams(3, NAMES[2:]), alone(0), per_cell():
        assert torch.equal(torch.randn(4, 7), first)
    assert len(set(first.flatten().tolist()) & set(beside.tolist())) == 0
