"""The commands in this process, on little data: files, page, errors, and what they leave alone."""

import hashlib
import re
import runpy
import sys
from html.parser import HTMLParser

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from conftest import simulated_counts
from scipy import sparse
from typer.testing import CliRunner

import pyro_scvi as ps
from pyro_scvi import cli, report

PICTURES = {"loss.png", "pca.png", "program.png"}


def make_adata():
    counts = simulated_counts()
    kinds = pd.Categorical(np.where(np.arange(60) % 2, "B & T", "<i>NK</i>"))
    obs = pd.DataFrame(
        {"bulk_labels": kinds, "donor": ["a", "b", "b"] * 20, "age": np.linspace(20.0, 50.0, 60)},
        index=[f"c{i}" for i in range(60)],
    )
    adata = AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(20)]))
    adata.layers["raw"] = adata.X.copy()
    return adata


def run(*arguments):
    return CliRunner().invoke(cli.app, [*map(str, arguments)])


def one_line(result):
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("error: ")


@pytest.fixture(scope="module")
def without_umap():
    with pytest.MonkeyPatch.context() as patch:
        torch.set_num_threads(1)
        patch.setitem(sys.modules, "umap", None)
        yield patch


@pytest.fixture(scope="module")
def demo(without_umap, tmp_path_factory):
    without_umap.setattr(cli.datasets, "pbmc68k_reduced", make_adata)
    out = tmp_path_factory.mktemp("demo") / "new" / "out"
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    result = run("demo", "--out", out, "--epochs", 3, "--seed", 5, "--no-progress")
    assert result.exit_code == 0, result.output
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "my <cells>.h5ad"
    adata = make_adata()
    adata.X = adata.X * 0.5
    adata.write_h5ad(path)
    return path


def test_demo_writes_its_files_and_nothing_else(demo):
    assert {path.name for path in demo.iterdir()} == {"demo.h5ad", "fit", "index.html"} | PICTURES
    assert [path.name for path in demo.parent.iterdir()] == ["out"]
    for name in PICTURES:
        assert (demo / name).read_bytes().startswith(b"\x89PNG")


def test_demo_annotates_cells_and_leaves_counts(demo):
    adata, original = anndata.read_h5ad(demo / "demo.h5ad"), make_adata()
    assert (adata.X != original.X).nnz == 0
    assert adata.X.dtype == original.X.dtype
    pd.testing.assert_frame_equal(adata.obs[["donor", "age"]].astype(str), original.obs[["donor", "age"]].astype(str))
    assert adata.uns["pyro_scvi"]["version"] == ps.__version__
    assert adata.uns["pyro_scvi"]["seed"] == 5
    assert adata.uns["pyro_scvi"]["settings"]["epochs"] == 3
    assert "X_umap" not in adata.obsm
    loaded = ps.load(demo / "fit")
    np.testing.assert_allclose(ps.embed(loaded, ps.Cells.from_anndata(original)), adata.obsm["X_pyro_scvi"], atol=1e-5)


class Checker(HTMLParser):
    """Collects tags, text and attributes; every element must be closed."""

    VOID = {"meta", "link", "img"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_demo_page_is_self_contained_and_tells_the_numbers(demo):
    text = (demo / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import|<script", text)
    page = Checker(text)
    assert page.tags.count("img") == 3
    assert all(link.startswith("data:") for link in page.links)
    loaded = ps.load(demo / "fit")
    for expected in (
        "fitted to 49 of",
        "49 to train, 5 to choose the epoch, 6 held out",
        f"{loaded.history.held_out_loss.min():.1f}",
        "over n = 6 cells",
        "k-hat above 0.7",
        "of bulk_labels in the embedding: a description, no target of the fit",
        "--epochs 3 --seed 5 --no-progress",
        f"pyro-scvi {ps.__version__}",
        "StandardNormal(n_latent=10)",
    ):
        assert expected in page.text


def test_demo_evidence_on_the_page_is_that_of_the_held_out_cells(demo):
    loaded = ps.load(demo / "fit")
    _, test = ps.Cells.from_anndata(make_adata()).split(0.1, seed=5)
    table = ps.evidence(loaded, test, seed=5)
    shown = f"{table.log_evidence.mean():.1f} ± {table.log_evidence.sem():.1f}"
    assert shown in (demo / "index.html").read_text(encoding="utf-8")


def test_demo_adds_umap_where_it_is_made(without_umap, demo, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.plots, "_umap", lambda latent, seed: latent[:, :2])
        result = run("demo", "--out", tmp_path, "--epochs", 1, "--no-progress")
    assert result.exit_code == 0, result.output
    adata = anndata.read_h5ad(tmp_path / "demo.h5ad")
    np.testing.assert_array_equal(adata.obsm["X_umap"], adata.obsm["X_pyro_scvi"][:, :2])
    assert (tmp_path / "umap.png").is_file()


def test_fit_takes_the_options_and_never_writes_its_input(without_umap, source, tmp_path):
    before = hashlib.sha256(source.read_bytes()).digest()
    options = "--layer raw --batch donor --covariates age --labels bulk_labels --epochs 2 --batch-size 20 --seed 3"
    parts = "--n-latent 3 --prior student-t --likelihood nb --dispersion gene-batch --library none --guide full-rank"
    result = run("fit", source, "--out", tmp_path, *options.split(), *parts.split(), "--no-progress")
    assert result.exit_code == 0, result.output
    assert hashlib.sha256(source.read_bytes()).digest() == before
    assert [path.name for path in source.parent.iterdir()] == [source.name]
    loaded = ps.load(tmp_path / "fit")
    model, law = loaded.model, loaded.model.likelihood
    assert isinstance(model.prior, ps.priors.StudentT)
    assert isinstance(law, ps.likelihoods.NB)
    assert isinstance(law.dispersion, ps.likelihoods.PerGeneAndBatch)
    assert isinstance(model.library, ps.libraries.NoLibrary)
    assert isinstance(loaded.guide, ps.guides.FullRankNormal)
    assert (model.n_latent, model.n_covariates) == (3, 3)
    assert (loaded.settings["batch_size"], loaded.settings["epochs"], loaded.settings["seed"]) == (20, 2, 3)
    adata = anndata.read_h5ad(tmp_path / "annotated.h5ad")
    assert adata.obsm["X_pyro_scvi"].shape == (60, 3)
    assert (adata.X != make_adata().X * 0.5).nnz == 0
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "my <cells>" not in text
    assert "my &lt;cells&gt;.h5ad" in text
    Checker(text)


def test_fit_without_options(without_umap, tmp_path):
    adata = make_adata()
    adata.X.data[adata.X.indptr[3] : adata.X.indptr[4]] = 0
    adata.write_h5ad(tmp_path / "plain.h5ad")
    result = run("fit", tmp_path / "plain.h5ad", "--out", tmp_path / "out", "--epochs", 1, "--no-progress")
    assert result.exit_code == 0, result.output
    model = ps.load(tmp_path / "out" / "fit").model
    assert isinstance(model.likelihood, ps.likelihoods.ZINB)
    assert isinstance(model.prior, ps.priors.StandardNormal)
    assert "note: " in result.stderr  # a cell without counts
    page = Checker((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert result.stderr.splitlines()[0].removeprefix("note: ") in page.text
    assert "silhouette" not in page.text


@pytest.mark.parametrize("name", cli.PRIORS)
def test_priors_by_name(batched_cells, name):
    prior = cli.PRIORS[name](batched_cells, 4)
    assert prior().event_shape == (4,)
    ps.SCVI(batched_cells.n_genes, 4, batched_cells.n_covariates, prior=prior)


@pytest.mark.parametrize("likelihood", cli.LIKELIHOODS)
@pytest.mark.parametrize("library", cli.LIBRARIES)
@pytest.mark.parametrize("guide", cli.GUIDES)
def test_models_and_guides_by_name(batched_cells, likelihood, library, guide):
    law, size = cli.LIKELIHOODS[likelihood](), cli.LIBRARIES[library]()
    model = ps.SCVI(batched_cells.n_genes, 4, batched_cells.n_covariates, likelihood=law, library=size)
    assert cli.GUIDES[guide](model, seed=1).model is model


@pytest.mark.parametrize("name", cli.DISPERSIONS)
def test_dispersions_by_name(batched_cells, name):
    law = ps.likelihoods.ZINB(cli.DISPERSIONS[name](batched_cells))
    ps.SCVI(batched_cells.n_genes, 4, batched_cells.n_covariates, likelihood=law)


def test_a_folder_that_is_not_empty_is_refused(demo):
    page = (demo / "index.html").read_bytes()
    assert "not empty" in one_line(run("demo", "--out", demo))
    assert (demo / "index.html").read_bytes() == page


def test_force_replaces_own_files_only(without_umap, source, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "index.html").write_text("old")
    command = ("fit", source, "--out", tmp_path, "--layer", "raw", "--no-progress", "--force", "--epochs")
    for epochs in (1, 2):
        assert run(*command, epochs).exit_code == 0
        assert len(ps.load(tmp_path / "fit").history) == epochs
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert "held-out evidence" in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert [path for path in tmp_path.parent.iterdir() if path.name.startswith(f".{tmp_path.name}")] == []


def test_force_spares_the_input_and_foreign_folders(source, tmp_path):
    (tmp_path / "annotated.h5ad").write_bytes(source.read_bytes())
    result = run("fit", tmp_path / "annotated.h5ad", "--out", tmp_path, "--layer", "raw", "--force")
    assert "is the input" in one_line(result)
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit" / "thesis.tex").write_text("years")
    assert "no saved fit" in one_line(run("fit", source, "--out", tmp_path, "--layer", "raw", "--force"))
    assert (tmp_path / "fit" / "thesis.tex").read_text() == "years"


def test_an_error_leaves_nothing_behind(source, tmp_path):
    out = tmp_path / "out"
    assert "raw integer counts" in one_line(run("fit", source, "--out", out))
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_line(source, tmp_path):
    out = ("--out", tmp_path / "out", "--layer", "raw")
    assert "there is no file" in one_line(run("fit", tmp_path / "none.h5ad", *out))
    (tmp_path / "bad.h5ad").write_text("no HDF5")
    assert "cannot read it as h5ad" in one_line(run("fit", tmp_path / "bad.h5ad", *out))
    assert "is a file" in one_line(run("fit", source, "--out", tmp_path / "bad.h5ad"))
    assert "for --labels" in one_line(run("fit", source, *out, "--labels", "nope"))
    assert "no column 'nope'" in one_line(run("fit", source, *out, "--batch", "nope"))
    assert "pass --batch" in one_line(run("fit", source, *out, "--dispersion", "gene-batch"))
    assert "n_latent >= 2" in one_line(run("fit", source, *out, "--prior", "flow", "--n-latent", 1))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--prior", "cauchy"),
        ("--epochs", "0"),
        ("--device", "abacus"),
        ("--likelihood", "poisson", "--dispersion", "gene"),
        ("--colour", "red"),
    ],
)
def test_wrong_usage_exits_with_2(source, tmp_path, arguments):
    result = run("fit", source, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert arguments[-2] in result.stderr
    assert not (tmp_path / "out").exists()


def test_module_runs_and_help_names_every_choice(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pyro_scvi", "fit", "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("pyro_scvi", run_name="__main__")
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "python -m pyro_scvi fit" in shown
    for name in ("student-t", "zinb", "gene-batch", "observed", "full-rank"):
        assert name in shown


def test_report_escapes_text_but_not_its_own_markup():
    risky = '<script>alert("x")</script> & co'
    rows = [(risky, "1", risky), ("b", "2", "c")]
    blocks = [risky, report.table(rows, ("name", "n", risky), numbers=[1]), report.code(risky)]
    text = report.page(risky, [(risky, [*blocks, report.beside(risky, report.picture(b"x", risky, risky))])])
    assert "<script" not in text
    page = Checker(text)
    assert page.text.count(risky) == 10
    assert page.tags.count("table") == 1
    assert text.count("class=number") == 3


def test_report_page_without_content():
    page = Checker(report.page("Nothing", []))
    assert "Nothing" in page.text
