"""Devices other than the CPU, pretended: nothing that a CUDA tensor refuses, no wait of the host that can be spared.

One process of its own runs all of it, on tensors that lie on the CPU and say that they are on a device.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.support.device_cases import FITS, LIBRARIES, OF_OTHERS, VERBS, WITHOUT_FLOAT64
from tests.support.paths import ROOT
from tests.support.pretended_gpu import build_guard

MOST_OPERATIONS, MOST_WAITS = 310, 1  # of a step of the default model, not compiled
OF_LIBRARIES = {"StudentT": 2, "Dirichlet": 17}  # torch's chi square and Pyro's autoregressive transform wait, too


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What happened on the pretended devices, by kind and name."""
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler, with which torch is told of a device")
    if torch.backends.cuda.is_built() or sys.platform != "linux":
        pytest.skip("this torch has a device of its own, beside which none can be pretended")
    folder = tmp_path_factory.mktemp("guard")
    guard, out = build_guard(compiler, folder), folder / "seen.json"
    command = [sys.executable, "-m", "tests.support.on_pretended_gpu", guard, str(out)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def value_of(seen, case):
    assert "error" not in seen[case], seen[case]["error"]
    return seen[case]["value"]


def test_a_step_of_the_default_model(seen):
    operations, waits = value_of(seen, "step default")
    assert operations <= MOST_OPERATIONS
    assert waits <= MOST_WAITS


@pytest.mark.parametrize("prior", [prior for prior, _, _ in FITS])
def test_fits_equal_those_on_the_cpu(prior, seen):
    made = value_of(seen, f"fit {prior}")
    assert made["device"] == "cuda:0"
    assert made["difference"] < 1e-6
    assert made["waits"] <= OF_LIBRARIES.get(prior, MOST_WAITS)


@pytest.mark.parametrize("verb", VERBS)
def test_verbs(verb, seen):
    assert value_of(seen, f"verb {verb}") > 0.5


@pytest.mark.parametrize("prior", OF_OTHERS)
def test_verbs_of_other_priors(prior, seen):
    assert all(share > 0.5 for share in value_of(seen, f"prior {prior}"))


@pytest.mark.parametrize("verb", WITHOUT_FLOAT64)
def test_verbs_without_float64(verb, seen):
    """On MPS, what is double is computed on the CPU."""
    assert value_of(seen, f"mps {verb}") > 0.5


def test_draws_equal_those_on_the_cpu_in_as_many_operations_for_any_number_of_cells(seen):
    made = value_of(seen, "seed draws")
    assert made["difference"] < 1e-5
    few, many = made["operations"]
    assert few == many


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries(library, seen):
    assert value_of(seen, f"library {library}") == 1


def test_an_observed_library_without_float64(seen):
    assert value_of(seen, "mps library ObservedLibrary") == 1
