"""Which combinations of variants every run of the tests takes, and which only the slow tests take."""

import itertools

import pytest


def pairs_first(first, second, third):
    """Cases of every first x second x third, where those that no pair of values needs are slow.

    A fault lies in one variant, or where two meet. By the Latin square every two values meet in a case that is not
    slow, provided that ``third`` is the shortest list.
    """
    every = itertools.product(*map(enumerate, (first, second, third)))
    return [_case(a, b, c, slow=(i + j) % len(third) != k) for (i, a), (j, b), (k, c) in every]


def crossed(first, second):
    """Cases of every first x second, where those without the head of either list are slow."""
    return [_case(a, b, slow=i and j) for (i, a), (j, b) in itertools.product(enumerate(first), enumerate(second))]


def _case(*values, slow):
    return pytest.param(*values, marks=pytest.mark.slow if slow else ())
