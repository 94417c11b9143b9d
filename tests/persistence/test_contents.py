"""Contents of values: another for any other content, the same for equal ones, in every process."""

import os
import subprocess
import sys
import threading
from collections import deque
from functools import partial
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from pyro_scvi.persistence.contents import content_of, content_of_parts


class Slotted:
    __slots__ = ("values",)

    def __init__(self, values):
        self.values = values


class Plain:
    def __init__(self, values):
        self.values = values

    def method(self):
        """Of an object with content."""


def linked(values):
    made = Plain(values)
    made.own = made
    return made


KINDS = {
    "array": np.asarray,
    "masked array": lambda values: np.ma.masked_array(values, values > 4000),
    "objects": lambda values: values.astype(object),
    "sparse matrix": sparse.csr_matrix,
    "tensor": torch.tensor,
    "sparse tensor": lambda values: torch.tensor(values).to_sparse(),
    "half precision": lambda values: torch.tensor(values - np.arange(5000)).bfloat16(),
    "column": pd.Series,
    "categories": pd.Categorical,
    "table with one name twice": lambda values: pd.DataFrame(np.stack([values, 0 * values], 1), columns=["x", "x"]),
    "AnnData": lambda values: anndata.AnnData(values[:, None]),
    "namespace": lambda values: SimpleNamespace(values=values),
    "deque": lambda values: deque([values]),
    "dict": lambda values: {"values": values},
    "partial in partial": lambda values: partial(ps.embed, given=partial(ps.embed, values)),
    "distribution": lambda values: torch.distributions.Normal(torch.tensor(values), 1.0),
    "generator": lambda values: np.random.default_rng(int(values[2500])),
    "torch's generator": lambda values: torch.Generator().manual_seed(int(values[2500])),
    "set": lambda values: {"a", f"{values[2500]}"},
    "slots": Slotted,
    "attributes": Plain,
    "method": lambda values: Plain(values).method,
    "an object that holds itself": linked,
}


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize("kind", KINDS)
def test_one_number_makes_another_content_and_a_copy_the_same(kind):
    values = np.arange(5000.0)
    other = values + (values == 2500)
    assert content_of(KINDS[kind](values)) != content_of(KINDS[kind](other))
    assert content_of(KINDS[kind](values)) == content_of(KINDS[kind](values.copy()))


@pytest.mark.parametrize(
    ("one", "same"),
    [
        (np.int64(25), 25),
        (partial(ps.embed), ps.embed),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (ps.Importance(), ps.Importance(proposals=1000)),
    ],
)
def test_two_ways_to_write_one_thing_are_one(one, same):
    assert content_of(one) == content_of(same)


def test_sets_have_one_content_in_every_process():
    code = "from pyro_scvi.persistence.contents import content_of; print(content_of({'a', 'b', 'c', 'd'}))"
    environments = [os.environ | {"PYTHONHASHSEED": seed} for seed in "12"]
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, env=env) for env in environments]
    assert runs[0].stdout == runs[1].stdout != b""


def test_what_has_no_content_is_refused():
    lock = threading.Lock()
    with pytest.raises(ModelError, match="_thread.lock has no content"):
        content_of(lock)


class Moved(ps.priors.StandardNormal):
    def __init__(self, n_latent, at):
        super().__init__(n_latent)
        self.at = at


def test_constants_of_a_component_of_ones_own_are_told_apart():
    first, same, other = (ps.SCVI(5, 2, prior=Moved(2, torch.tensor([0.0, at]))) for at in (1.0, 1.0, 5.0))
    assert content_of_parts(first) == content_of_parts(same)
    assert content_of_parts(first) != content_of_parts(other)
    assert content_of_parts(ps.SCVI(5)) == ""


def test_bytes_between_values_are_no_content():
    records = np.zeros(2, np.dtype("i1, f8", align=True))
    same, other = records.copy(), records.copy()
    same.view(np.uint8).reshape(2, -1)[:, 1:8] = 3
    other["f1"] = 1
    assert content_of(records) == content_of(same) != content_of(other)


def test_numbers_of_any_precision_have_a_content():
    third = np.longdouble(1) / 3
    assert content_of(third) == content_of(+third) != content_of(third * 2)
