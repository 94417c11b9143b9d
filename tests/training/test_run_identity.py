"""A checkpoint is resumed with the counts of its run only, in memory and on disk, in whatever form they are stored."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import pyro_scvi as ps
from pyro_scvi.errors import CheckpointError
from pyro_scvi.persistence import archive
from tests.training.test_checkpoint import check_equal, parts, run, stopped

pytestmark = pytest.mark.integration


@pytest.fixture
def adata(cells):
    return ad.AnnData(cells.counts.astype(np.float32) + 1, var=pd.DataFrame(index=cells.gene_names))


def on_disk(adata, folder, name):
    adata.write_h5ad(folder / f"{name}.h5ad")
    return ps.stores.build(folder / f"{name}.h5ad", folder / f"{name}.store", progress=False)


def with_equal_sums(adata):
    """Other counts whose cells and genes have the same totals."""
    other = adata.copy()
    other.X[np.ix_([5, 6], [3, 4])] += np.array([[1, -1], [-1, 1]], np.float32)
    return other


def test_counts_on_disk_of_equal_sums_are_refused(adata, tmp_path, monkeypatch):
    for name, given in {"first": adata, "other": with_equal_sums(adata)}.items():
        on_disk(given, tmp_path, name)
    stopped(ps.Cells.from_store(tmp_path / "first.store"), tmp_path / "run", monkeypatch, 2)
    backed = ps.Cells.from_anndata(ad.read_h5ad(tmp_path / "other.h5ad", backed="r"), backed=True)
    for others in (
        ps.Cells.from_store(tmp_path / "other.store"),
        backed,
        ps.Cells.from_anndata(with_equal_sums(adata)),
    ):
        with pytest.raises(CheckpointError, match="digest of counts and covariates was"):
            run(others, checkpoint=tmp_path / "run", resume=True)


@pytest.mark.filterwarnings("ignore:cells of validation= are among the training cells")
def test_validation_cells_of_equal_sums_are_refused(adata, tmp_path, monkeypatch):
    cells = ps.Cells.from_anndata(adata)
    first, other = (
        ps.Cells.from_store(on_disk(given[:20].copy(), tmp_path, name), schema=cells.schema)
        for name, given in {"first": adata, "other": with_equal_sums(adata)}.items()
    )
    stopped(cells, tmp_path / "run", monkeypatch, 2, validation=first)
    with pytest.raises(CheckpointError, match="validation.digest of counts and covariates was"):
        run(cells, checkpoint=tmp_path / "run", resume=True, validation=other)
    assert len(run(cells, checkpoint=tmp_path / "run", resume=True, validation=first).history) == 6


def test_the_same_counts_in_another_form_go_on(adata, tmp_path, monkeypatch):
    on_disk(adata, tmp_path, "in")
    whole, of_integers = run(ps.Cells.from_anndata(adata)), adata.copy()
    of_integers.X = sparse.csr_matrix(adata.X.astype(int))
    forms = [
        ps.Cells.from_anndata(of_integers),
        ps.Cells.from_store(tmp_path / "in.store"),
        ps.Cells.from_anndata(ad.read_h5ad(tmp_path / "in.h5ad", backed="r"), backed=True),
    ]
    for i, form in enumerate(forms):
        stopped(ps.Cells.from_anndata(adata), tmp_path / f"{i}", monkeypatch, 3)
        check_equal(run(form, checkpoint=tmp_path / f"{i}", resume=True), whole)


def test_sums_of_earlier_versions_are_not_taken_for_the_counts(adata, tmp_path, monkeypatch):
    cells = ps.Cells.from_store(on_disk(adata, tmp_path, "in"))
    stopped(cells, tmp_path / "run", monkeypatch, 2)
    config = tmp_path / "run" / "config.json"
    facts = json.loads(config.read_text())
    facts["run"]["cells"]["digest of counts and covariates"] = "0" * 16
    facts.pop("sha256")
    config.write_bytes(archive.signed(facts))
    with pytest.raises(CheckpointError, match="digest of counts and covariates was"):
        run(cells, *parts(cells), checkpoint=tmp_path / "run", resume=True)
