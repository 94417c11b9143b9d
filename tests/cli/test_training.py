"""The commands that train, in this process on little data: files, page, errors, and what they leave alone."""

import hashlib
import re
import runpy
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.cli import fit_report, options, training
from pyro_scvi.cli.files import write_h5ad
from pyro_scvi.export import html_page
from tests.support.cli_runs import Page, check_table, make_adata, one_line, run, succeed

PICTURES = {"loss.png", "pca.png", "predictive_cells.png", "predictive_genes.png", "program.png", "volcano.png"}


@pytest.fixture(scope="module")
def without_umap():
    with pytest.MonkeyPatch.context() as patch:
        torch.set_num_threads(1)
        patch.setitem(sys.modules, "umap", None)
        yield patch


@pytest.fixture(scope="module")
def demo(without_umap, tmp_path_factory):
    without_umap.setattr(training.datasets, "pbmc68k_reduced", make_adata)
    out = tmp_path_factory.mktemp("demo") / "new" / "out"
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    succeed("demo", "--out", out, "--epochs", 3, "--seed", 5, "--no-progress")
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
    assert {path.name for path in demo.iterdir()} == {
        "demo.h5ad",
        "differential_expression.csv",
        "fit",
        "index.html",
    } | PICTURES
    assert [path.name for path in demo.parent.iterdir()] == ["out"]
    for name in PICTURES:
        assert (demo / name).read_bytes().startswith(b"\x89PNG")


def test_demo_annotates_cells_and_leaves_counts(demo):
    adata, original = anndata.read_h5ad(demo / "demo.h5ad"), make_adata()
    assert (adata.X != original.X).nnz == 0
    assert adata.X.dtype == original.X.dtype
    pd.testing.assert_frame_equal(adata.obs, original.obs)
    assert adata.uns["pyro_scvi"]["X_pyro_scvi"]["version"] == ps.__version__
    assert adata.uns["pyro_scvi"]["X_pyro_scvi"]["seed"] == 5
    assert adata.uns["pyro_scvi"]["X_pyro_scvi"]["settings"]["epochs"] == 3
    assert "X_umap" not in adata.obsm
    loaded, cells = ps.load(demo / "fit"), ps.Cells.from_anndata(original)
    np.testing.assert_allclose(ps.embed(loaded, cells), adata.obsm["X_pyro_scvi"], atol=1e-5)
    space = ps.spaces.from_record(adata)
    placed = ps.embed(loaded, cells, space=space)
    np.testing.assert_allclose(placed, adata.obsm["X_pyro_scvi_expression_pca"], atol=1e-4)
    np.testing.assert_allclose(placed, ps.embed(loaded, cells, space=ps.spaces.Expression()), atol=1e-4)


def test_demo_page_is_self_contained_and_tells_the_numbers(demo):
    text = (demo / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import|<script", text)
    page = Page(text)
    assert page.tags.count("img") == len(PICTURES)
    assert all(link.startswith("data:") for link in page.links)
    loaded = ps.load(demo / "fit")
    for expected in (
        "fitted to 49 of",
        "49 to train, 5 to choose the epoch, 6 held out",
        f"{loaded.settings['held_out_loss']:.1f}",
        "over n = 6 cells",
        "k-hat above 0.7",
        "of bulk_labels in z, not in the picture above: a description, no target of the fit",
        "--epochs 3 --seed 5 --no-progress",
        f"pyro-scvi {ps.__version__}",
        "StandardNormal(n_latent=10)",
        "28 cells of CD19+ B against 28 of Dendritic.",
        "the 6 held-out cells beside their replicas, 39 data sets simulated from the fit",
    ):
        assert expected in page.text


def test_demo_evidence_on_the_page_is_that_of_the_held_out_cells(demo):
    loaded = ps.load(demo / "fit")
    _, test = ps.Cells.from_anndata(make_adata()).split(0.1, seed=5)
    table = ps.evidence(loaded, test, seed=5)
    shown = f"{table.log_evidence.mean():.1f} ± {table.log_evidence.sem():.1f}"
    assert shown in (demo / "index.html").read_text(encoding="utf-8")


def test_demo_tells_what_the_library_says_of_genes_and_zeros(demo):
    cells, loaded = ps.Cells.from_anndata(make_adata()), ps.load(demo / "fit")
    table = ps.differential_expression(
        loaded, cells, groupby="bulk_labels", group_a="CD19+ B", group_b="Dendritic", seed=5
    )
    check_table(demo / "differential_expression.csv", table)
    page = Page.read(demo / "index.html")
    assert f"{(table.q_value <= 0.05).sum()} of 20 genes are called" in page.text
    _, test = cells.split(0.1, seed=5)
    zeros = test[:][0].numpy() == 0
    technical = ps.technical_zero_probability(loaded, test, seed=5)[zeros] > 0.5
    assert f"technical zeros{technical.mean():.1%}of the zeros" in page.text
    observed = ps.check_predictions(loaded, test, seed=5).genes["zero_fraction"]
    outside = ((observed.observed < observed.low) | (observed.observed > observed.high)).sum()
    assert f"Here it is {outside} of 20 (" in page.text


def test_demo_adds_umap_where_it_is_made(without_umap, demo, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_report.plots.projection, "_umap", lambda latent, seed: latent[:, :2])
        succeed("demo", "--out", tmp_path, "--epochs", 1, "--no-progress")
    adata = anndata.read_h5ad(tmp_path / "demo.h5ad")
    np.testing.assert_array_equal(adata.obsm["X_umap"], adata.obsm["X_pyro_scvi_expression_pca"][:, :2])
    assert (tmp_path / "umap.png").is_file()


def test_fit_takes_the_options_and_never_writes_its_input(without_umap, source, tmp_path):
    before = hashlib.sha256(source.read_bytes()).digest()
    asked = "--layer raw --batch donor --covariates age --labels bulk_labels --epochs 2 --batch-size 20 --seed 3"
    parts = "--n-latent 3 --prior student-t --likelihood nb --dispersion gene-batch --library none --guide full-rank"
    succeed("fit", source, "--out", tmp_path, *asked.split(), *parts.split(), "--no-progress")
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
    page = Page(text)
    assert "technical" not in page.text  # a negative binomial has none
    assert "28 cells of Dendritic against 28 of CD19+ B." in page.text


def test_fit_without_options(without_umap, tmp_path):
    adata = make_adata()
    adata.X.data[adata.X.indptr[3] : adata.X.indptr[4]] = 0
    adata.write_h5ad(tmp_path / "plain.h5ad")
    result = succeed("fit", tmp_path / "plain.h5ad", "--out", tmp_path / "out", "--epochs", 1, "--no-progress")
    model = ps.load(tmp_path / "out" / "fit").model
    assert isinstance(model.likelihood, ps.likelihoods.ZINB)
    assert isinstance(model.prior, ps.priors.StandardNormal)
    assert "note: " in result.stderr  # a cell without counts
    page = Page.read(tmp_path / "out" / "index.html")
    assert result.stderr.splitlines()[0].removeprefix("note: ") in page.text
    assert "silhouette" not in page.text
    assert "Genes that differ" not in page.text


@pytest.mark.parametrize("name", options.PRIORS)
def test_priors_by_name(batched_cells, name):
    prior = options.PRIORS[name](batched_cells, 4)
    assert prior().event_shape == (4,)
    ps.SCVI(batched_cells.n_genes, 4, batched_cells.n_covariates, prior=prior)


@pytest.mark.parametrize("likelihood", options.LIKELIHOODS)
@pytest.mark.parametrize("library", options.LIBRARIES)
@pytest.mark.parametrize("guide", options.GUIDES)
def test_models_and_guides_by_name(batched_cells, likelihood, library, guide):
    law, size = options.LIKELIHOODS[likelihood](), options.LIBRARIES[library]()
    model = ps.SCVI(batched_cells.n_genes, 4, batched_cells.n_covariates, likelihood=law, library=size)
    assert options.GUIDES[guide](model, seed=1).model is model


@pytest.mark.parametrize("name", options.DISPERSIONS)
def test_dispersions_by_name(batched_cells, name):
    law = ps.likelihoods.ZINB(options.DISPERSIONS[name](batched_cells))
    ps.SCVI(batched_cells.n_genes, 4, batched_cells.n_covariates, likelihood=law)


def test_a_folder_that_is_not_empty_is_refused(demo):
    page = (demo / "index.html").read_bytes()
    assert "not empty" in one_line(run("demo", "--out", demo))
    assert (demo / "index.html").read_bytes() == page


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pd.Series(["b", "a", "b", None]), {"b": 2, "a": 1}),
        (pd.Series([1.5, 2.5, 3.5]), None),
        (pd.Series(["only"] * 3), None),
        (pd.Series(["a", "b", "c"]), None),
        (None, None),
    ],
)
def test_groups_that_labels_make(labels, expected):
    found = fit_report.categories(labels)
    assert (None if found is None else dict(found)) == expected


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


def test_a_saved_fit_is_no_folder_for_results(demo, source):
    before = {path: path.read_bytes() for path in (demo / "fit").iterdir()}
    assert "holds a fit" in one_line(run("fit", source, "--out", demo / "fit", "--layer", "raw", "--force"))
    assert before == {path: path.read_bytes() for path in (demo / "fit").iterdir()}


def test_every_kind_of_annotation_survives_reading_and_writing(tmp_path):
    adata = make_adata()
    adata.obs["note"] = pd.array(["x", None] * 30, dtype="string")
    adata.obs["stage"] = pd.array([1, None] * 30, dtype="Int64")
    adata.uns["palette"] = {"colours": np.array(["red", "blue"])}
    adata.raw = adata.copy()
    write_h5ad(adata, tmp_path / "a.h5ad")
    once = anndata.read_h5ad(tmp_path / "a.h5ad")
    pd.testing.assert_frame_equal(once.obs, adata.obs)
    write_h5ad(once, tmp_path / "b.h5ad")
    pd.testing.assert_frame_equal(anndata.read_h5ad(tmp_path / "b.h5ad").obs, adata.obs)
    assert list(anndata.read_h5ad(tmp_path / "b.h5ad").uns["palette"]["colours"]) == ["red", "blue"]
    assert (anndata.read_h5ad(tmp_path / "b.h5ad").raw.X != adata.X).nnz == 0


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
    assert "--n-latent >= 2" in one_line(run("fit", source, *out, "--prior", "flow", "--n-latent", 1))


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
    blocks = [risky, html_page.table(rows, ("name", "n", risky), numbers=[1]), html_page.code(risky)]
    text = html_page.page(risky, [(risky, [*blocks, html_page.beside(risky, html_page.picture(b"x", risky, risky))])])
    assert "<script" not in text
    page = Page(text)
    assert page.text.count(risky) == 10
    assert page.tags.count("table") == 1
    assert text.count("class=number") == 3


def test_a_phone_does_not_enlarge_a_picture_beyond_its_own_width():
    text = html_page.page("Fit", [("", [html_page.picture(b"x", "diagram", width=280)])])
    assert "--own: 280px" in text
    assert "width: max(100%, min(34rem, var(--own, 34rem)))" in text


def test_report_page_without_content():
    page = Page(html_page.page("Nothing", []))
    assert "Nothing" in page.text
