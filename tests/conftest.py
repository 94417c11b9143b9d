"""Shared state and data: every test starts from one seed, one thread, validation on and an empty parameter store."""

import sys

import numpy as np
import pandas as pd
import pyro
import pytest
import torch

from pyro_scvi.data.cells import Cells
from tests.support.paths import DATA, GOLDEN, TESTS
from tests.support.simulate import simulated_counts

torch.set_num_threads(1)  # also for fixtures that outlive a test


# Folders whose tests run several parts together, on a model that was fitted for them.
INTEGRATION = ("analysis", "cli", "export", "paper", "system", "training")


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their marks
def pytest_collection_modifyitems(items):
    """Mark what is neither slow nor integration, by its own mark or by its folder, as fast."""
    for item in items:
        if any(item.iter_markers("slow")) or any(item.iter_markers("integration")):
            continue
        folder = item.path.relative_to(TESTS).parts[0]
        item.add_marker("integration" if folder in INTEGRATION else "fast")


@pytest.fixture(autouse=True)
def clean_state():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    pyro.clear_param_store()
    with pyro.validation_enabled(True):
        yield
    pyro.clear_param_store()
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def data_path():
    """Path of a file of the shared data folder; skips the test where it is not there."""

    def path(name):
        if not (DATA / name).is_file():
            pytest.skip(f"{name} is not in {DATA}; set PYRO_SCVI_DATA to the folder that holds it")
        return DATA / name

    return path


@pytest.fixture
def golden():
    """Arrays by name of a file of what original implementations gave; skips the test where it is not there."""

    def arrays(name):
        if not (GOLDEN / name).is_file():
            pytest.skip(f"{name} is not in {GOLDEN}; set PYRO_SCVI_GOLDEN to the folder that holds it")
        with np.load(GOLDEN / name) as file:
            return dict(file)

    return arrays


@pytest.fixture(scope="session")
def cells():
    """60 cells x 20 genes without covariates."""
    return Cells.from_counts(simulated_counts())


@pytest.fixture(scope="session")
def batched_cells():
    """60 cells x 20 genes with a batch of two levels and one continuous covariate."""
    counts = simulated_counts()
    obs = pd.DataFrame({"donor": np.where(np.arange(60) % 3 == 0, "a", "b"), "age": np.linspace(20.0, 50.0, 60)})
    return Cells.from_counts(counts, obs=obs, batch="donor", covariates=["age"])


@pytest.fixture
def float64():
    """Default dtype float64 for one test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
