"""Commands that are stopped at any moment, short of memory or of disk: the result is whole or absent, in one line."""

import signal

import numpy as np
import pytest
import torch

from tests.support.cli_runs import make_adata
from tests.support.verb_faults import VERBS, Bench, disk_limit, files_limit, large_adata, memory_limit

pytestmark = [pytest.mark.faults, pytest.mark.integration]

KILLS, SIGNALS = 25, 6  # of each command, and of each of two signals
MEGABYTES = (1, 4, 10, 25, 60)
BYTES = (1, 4_000, 14_000, 30_000)
FILES = (3, 5, 8)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    torch.set_num_threads(1)
    return Bench(tmp_path_factory.mktemp("bench") / "bench", make_adata())


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    torch.set_num_threads(1)
    return Bench(tmp_path_factory.mktemp("large") / "bench", large_adata(), block=500)


def killed(bench, verb, share):
    """SIGKILL after a share of the time that the command takes: the same command gives what it should."""
    lasts = bench.undisturbed(verb)
    with bench.fresh():
        bench.run(verb, after=lasts * share)
        assert bench.is_whole_or_absent(verb)
        assert bench.is_whole_after_the_same_command(verb)


def stopped(bench, verb, share, number):
    """SIGINT or SIGTERM: nothing but the result is left."""
    lasts = bench.undisturbed(verb)
    with bench.fresh():
        ended = bench.run(verb, after=lasts * share, number=number)
        # SIGTERM ends Python before and after the command, and training before its first epoch as SIGINT does.
        assert ended.code in (0, 1, 130, 128 + number, -number), ended
        assert bench.left(verb) == [], ended
        assert bench.is_whole_or_absent(verb)
        assert bench.is_whole_after_the_same_command(verb)


def limited(bench, verb, limit):
    """Within a limit the command succeeds, or says in one line what is lacking, and leaves nothing."""
    bench.undisturbed(verb)
    with bench.fresh():
        ended = bench.run(verb, limit=limit)
        assert "Traceback" not in ended.said, ended.said
        assert (ended.code, len(ended.errors)) in ((0, 0), (1, 1)), ended
        assert bench.left(verb) == [], ended
        assert bench.is_whole_or_absent(verb)
        assert bench.is_whole_after_the_same_command(verb)


def test_a_stop_a_kill_and_a_full_disk(bench):
    """One of each; the others are slow."""
    stopped(bench, "embed", 0.6, signal.SIGTERM)
    killed(bench, "infer to .h5ad", 0.7)
    limited(bench, "store", disk_limit(8_000))


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_kill_9_at_random_moments(bench, verb):
    for share in np.random.default_rng(sorted(VERBS).index(verb)).uniform(0, 1, KILLS):
        killed(bench, verb, share)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("verb", VERBS)
def test_signals_at_random_moments(bench, verb, number):
    for share in np.random.default_rng(100 + sorted(VERBS).index(verb)).uniform(0, 1, SIGNALS):
        stopped(bench, verb, share, number)


@pytest.mark.slow
@pytest.mark.parametrize("n_bytes", BYTES)
@pytest.mark.parametrize("verb", VERBS)
def test_full_disks(bench, verb, n_bytes):
    limited(bench, verb, disk_limit(n_bytes))


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", MEGABYTES)
@pytest.mark.parametrize("verb", VERBS)
def test_memory_limits(bench, large, verb, megabytes):
    limited(bench if VERBS[verb].takes_long else large, verb, memory_limit(megabytes))


@pytest.mark.slow
@pytest.mark.parametrize("more", FILES)
@pytest.mark.parametrize("verb", VERBS)
def test_few_open_files(bench, verb, more):
    limited(bench, verb, files_limit(more))
