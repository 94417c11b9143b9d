"""The commands that ask a saved fit: what they add to a copy, what they say, and what they leave alone."""

import hashlib
import os
import subprocess
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.cli import de, genes
from pyro_scvi.data.reading import layer_names
from tests.support.cli_runs import Page, check_table, make_adata, one_line, run, succeed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the folder of a saved fit as the fit command leaves it, batches and all."""
    torch.set_num_threads(1)
    cells = ps.Cells.from_anndata(make_adata(), batch="donor")
    model = ps.SCVI(cells.n_genes, 4, cells.n_covariates)
    path = tmp_path_factory.mktemp("fitted")
    ps.fit(model, cells, epochs=3, progress=False).save(path / "fit")
    return path


@pytest.fixture
def query(tmp_path):
    """Other cells than the fit's: genes reversed, two that it does not know, and everything a file can hold."""
    adata = make_adata()[10:40].copy()
    more = adata[:, :2].copy()
    more.var_names = ["new1", "new2"]
    adata = anndata.concat([adata[:, ::-1], more], axis=1, merge="same")
    adata.obs["cluster"] = np.where(np.arange(30) < 12, 1, 2)
    adata.obs["text"] = [f"cell {i % 3}" for i in range(30)]
    adata.obsm["X_mine"] = np.arange(60.0).reshape(30, 2)
    adata.uns["mine"] = {"note": "kept"}
    adata.var["mine"] = np.arange(22)
    adata.obs["donor"] = adata.obs["donor"].astype("category")
    path = tmp_path / "in" / "query.h5ad"
    path.parent.mkdir()
    adata.write_h5ad(path, convert_strings_to_categoricals=False)
    return path


@pytest.fixture
def cells(folder, query):
    return ps.Cells.from_anndata(anndata.read_h5ad(query), schema=ps.load(folder / "fit").schema)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_kept(path, query):
    """All that the input held is in the copy, as it was."""
    copy, original = anndata.read_h5ad(path), anndata.read_h5ad(query)
    assert (copy.X != original.X).nnz == 0
    assert (copy.layers["raw"] != original.layers["raw"]).nnz == 0
    pd.testing.assert_frame_equal(copy.obs, original.obs)
    pd.testing.assert_frame_equal(copy.var[list(original.var)], original.var)
    np.testing.assert_array_equal(copy.obsm["X_mine"], original.obsm["X_mine"])
    assert copy.uns["mine"] == original.uns["mine"]
    return copy


def test_embed_adds_the_latents_to_a_copy(folder, query, cells, tmp_path):
    before = digest(query)
    for fit_folder in (folder, folder / "fit"):
        succeed("embed", fit_folder, query, "--out", tmp_path / "new" / "out.h5ad", "--force")
        copy = check_kept(tmp_path / "new" / "out.h5ad", query)
        np.testing.assert_array_equal(copy.obsm["X_pyro_scvi"], ps.embed(ps.load(folder / "fit"), cells))
    assert copy.uns["pyro_scvi_embed"] == {"version": ps.__version__, "fit": str(folder / "fit"), "seed": 0}
    assert digest(query) == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.h5ad"]


def test_embed_adds_components_of_expression_and_lays_a_query_beside_a_reference(folder, query, cells, tmp_path):
    fit, reference = ps.load(folder / "fit"), make_adata()
    reference.write_h5ad(tmp_path / "ref.h5ad")
    placed, alone, beside = (tmp_path / f"{name}.h5ad" for name in ("placed", "alone", "beside"))
    succeed("embed", folder, tmp_path / "ref.h5ad", "--out", placed)
    succeed("embed", folder, query, "--out", alone)
    succeed("embed", folder, query, "--out", beside, "--beside", placed)
    known = ps.Cells.from_anndata(reference, schema=fit.schema)
    space = ps.spaces.Expression().fitted(fit, known)
    key = "X_pyro_scvi_expression_pca"
    np.testing.assert_allclose(anndata.read_h5ad(placed).obsm[key], ps.embed(fit, known, space=space), atol=1e-4)
    found = check_kept(beside, query)
    np.testing.assert_allclose(found.obsm[key], ps.embed(fit, cells, space=space), atol=1e-4)
    np.testing.assert_allclose(
        anndata.read_h5ad(alone).obsm[key], ps.embed(fit, cells, space=ps.spaces.Expression()), atol=1e-4
    )
    np.testing.assert_array_equal(found.obsm["X_pyro_scvi"], ps.embed(fit, cells))
    assert ps.spaces.from_record(found).batches == ("a", "b")
    refused = run("embed", folder, query, "--out", tmp_path / "no.h5ad", "--beside", query)
    assert "query.h5ad" in one_line(refused)
    assert "no axes" in refused.stderr
    latent = run("embed", folder, query, "--out", tmp_path / "no.h5ad", "--space", "latent", "--beside", placed)
    assert latent.exit_code == 2
    assert "leave --space latent out" in latent.output


def test_embed_by_latents_alone_leaves_no_components_of_another_embedding(folder, query, tmp_path):
    succeed("embed", folder, query, "--out", tmp_path / "both.h5ad")
    for given in (query, tmp_path / "both.h5ad"):
        found = run("embed", folder, given, "--out", tmp_path / "z.h5ad", "--space", "latent", "--force")
        assert found.exit_code == 0, found.stderr
        copy = check_kept(tmp_path / "z.h5ad", query)
        assert "X_pyro_scvi" in copy.obsm
        assert "X_pyro_scvi_expression_pca" not in copy.obsm
        assert "X_pyro_scvi_expression_pca" not in copy.uns.get("pyro_scvi", {})
    assert "'X_pyro_scvi_expression_pca' was there already; it is left out of the copy" in found.stderr
    assert "X_pyro_scvi" not in copy.uns.get("pyro_scvi", {})


def test_gene_order_does_not_matter(folder, tmp_path):
    """The same cells with their genes reversed have the same embedding and expression, gene by gene."""
    adata = make_adata()
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata[:, ::-1].copy().write_h5ad(tmp_path / "b.h5ad")
    for name in "ab":
        succeed("embed", folder, tmp_path / f"{name}.h5ad", "--out", tmp_path / f"{name}1.h5ad")
        succeed("impute", folder, tmp_path / f"{name}1.h5ad", "--out", tmp_path / f"{name}2.h5ad", "--seed", 3)
    a, b = (anndata.read_h5ad(tmp_path / f"{name}2.h5ad") for name in "ab")
    np.testing.assert_array_equal(a.obsm["X_pyro_scvi"], b.obsm["X_pyro_scvi"])
    layer = "pyro_scvi_expression"
    assert not np.array_equal(a.layers[layer], b.layers[layer])
    np.testing.assert_array_equal(a.layers[layer], b[:, a.var_names].layers[layer])


def test_impute_lines_up_with_the_genes_of_the_file(folder, query, cells, tmp_path):
    arguments = ("--technical-zeros", "--samples", 4, "--seed", 2)
    result = succeed("impute", folder, query, "--out", tmp_path / "out.h5ad", *arguments)
    assert "2 of 22 genes are unknown to the fit: NaN" in result.stderr
    copy, fit = check_kept(tmp_path / "out.h5ad", query), ps.load(folder / "fit")
    expected = {
        "pyro_scvi_expression": ps.impute(fit, cells, samples=4, seed=2),
        "pyro_scvi_technical_zero": ps.technical_zero_probability(fit, cells, samples=4, seed=2),
    }
    assert set(layer_names(copy)) == {"raw", *expected}
    unknown = ["new1", "new2"]
    assert list(copy.var_names[~copy.var["pyro_scvi_modelled"]]) == unknown
    for name, values in expected.items():
        layer = copy.to_df(layer=name)
        assert set(layer.dtypes) == {np.dtype(np.float32)}
        np.testing.assert_array_equal(layer[cells.gene_names], values)
        assert layer[unknown].isna().all(axis=None)
    assert copy.uns["pyro_scvi_impute"]["sampler"] == "Amortized()"


def test_impute_without_dropout_and_as_of_other_batches(folder, query, cells, tmp_path):
    fit, mean = ps.load(folder / "fit"), ps.imputation.mean_given_no_dropout
    sampler = ("--samples", 2, "--sampler", "refined")
    succeed("impute", folder, query, "--out", tmp_path / "1.h5ad", "--no-dropout", *sampler)
    swap = ("--batch-as", "a", "--batch-as", "b")
    succeed("impute", folder, tmp_path / "1.h5ad", "--out", tmp_path / "2.h5ad", "--no-dropout", *swap)
    copy = check_kept(tmp_path / "2.h5ad", query)
    known = copy.to_df(layer="pyro_scvi_no_dropout")[cells.gene_names]
    np.testing.assert_array_equal(known, ps.impute(fit, cells, quantity=mean, samples=2, sampler=ps.Refined()))
    swapped = copy.to_df(layer="pyro_scvi_no_dropout_batch_swapped")[cells.gene_names]
    np.testing.assert_array_equal(swapped, ps.impute(fit, cells, quantity=mean, batches=["a", "b"]))
    assert not np.allclose(known, swapped)


def test_impute_normalized_and_cells_of_new_batches(folder, query, tmp_path):
    adata, fit = anndata.read_h5ad(query), ps.load(folder / "fit")
    adata.obs["donor"] = adata.obs["donor"].astype(str).replace("b", "new")
    adata.write_h5ad(query, convert_strings_to_categoricals=False)
    cells = ps.Cells.from_anndata(adata, schema=fit.schema, allow_new_batches=True)
    new, out = "--allow-new-batches", ("--out", tmp_path / "out.h5ad", "--force")
    assert "'new'" in run("embed", folder, query, *out).stderr
    succeed("embed", folder, query, *out, new)
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_allclose(found.obsm["X_pyro_scvi"], ps.embed(fit, cells), rtol=1e-5)
    succeed("impute", folder, query, *out, new, "--normalized", "--samples", "3", "--batch-as", "a")
    layer = anndata.read_h5ad(tmp_path / "out.h5ad").to_df("pyro_scvi_normalized_batch_swapped")
    expected = ps.normalized_expression(fit, cells, batches=["a"], samples=3)
    np.testing.assert_allclose(layer[cells.gene_names], expected, rtol=1e-5)
    assert "--no-dropout" in run("impute", folder, query, *out, "--normalized", "--no-dropout").stderr


def test_impute_refuses_what_the_fit_cannot_say(folder, query, tmp_path):
    result = run("impute", folder, query, "--out", tmp_path / "o.h5ad", "--batch-as", "a")
    assert result.exit_code == 2
    assert "--no-dropout" in result.stderr
    swap = ("--no-dropout", "--batch-as", "nope")
    assert "its batches are 'a', 'b'" in one_line(run("impute", folder, query, "--out", tmp_path / "o.h5ad", *swap))
    cells = ps.Cells.from_anndata(make_adata())
    plain = ps.fit(ps.SCVI(20, likelihood=ps.likelihoods.NB()), cells, epochs=1, progress=False)
    plain.save(tmp_path / "nb")
    asked = ("--out", tmp_path / "o.h5ad", "--technical-zeros")
    assert "no zero is technical" in one_line(run("impute", tmp_path / "nb", query, *asked))
    assert not (tmp_path / "o.h5ad").exists()


def test_missing_genes_are_named_or_filled(folder, query, tmp_path):
    anndata.read_h5ad(query)[:, 3:].copy().write_h5ad(tmp_path / "few.h5ad")
    out = tmp_path / "out.h5ad"
    for command in ("embed", "impute"):
        line = one_line(run(command, folder, tmp_path / "few.h5ad", "--out", out))
        assert "17 of the 20 genes of the schema" in line
        assert "'g17', 'g18', 'g19'" in line
    result = succeed("impute", folder, tmp_path / "few.h5ad", "--out", out, "--fill-missing-genes")
    assert "3 are filled with zeros" in result.stderr
    copy = anndata.read_h5ad(out)
    assert copy.shape == (30, 19)
    assert np.isfinite(copy[:, "g0"].layers["pyro_scvi_expression"]).all()


def test_other_batches_are_named(folder, query, tmp_path):
    adata = anndata.read_h5ad(query)
    adata.obs["donor"] = "z"
    adata.write_h5ad(tmp_path / "z.h5ad")
    line = one_line(run("embed", folder, tmp_path / "z.h5ad", "--out", tmp_path / "out.h5ad"))
    assert "'z'" in line
    assert "its batches are 'a', 'b'" in line
    adata.obs = adata.obs.drop(columns="donor")
    adata.write_h5ad(tmp_path / "none.h5ad")
    line = one_line(run("embed", folder, tmp_path / "none.h5ad", "--out", tmp_path / "out.h5ad"))
    assert "no column 'donor'" in line


def test_layers_can_be_named(folder, query, tmp_path):
    adata = anndata.read_h5ad(query)
    adata.X = adata.X * 0.5
    adata.write_h5ad(tmp_path / "half.h5ad")
    out = ("--out", tmp_path / "out.h5ad")
    assert "raw integer counts" in one_line(run("embed", folder, tmp_path / "half.h5ad", *out))
    assert "the layers are: 'raw'" in one_line(run("embed", folder, tmp_path / "half.h5ad", *out, "--layer", "no"))
    succeed("embed", folder, tmp_path / "half.h5ad", *out, "--layer", "raw")


@pytest.mark.parametrize("command", ["embed", "impute"])
def test_nothing_is_overwritten_unless_asked(folder, query, tmp_path, command):
    out = tmp_path / "out.h5ad"
    out.write_text("mine")
    assert "exists; pass another --out, or --force" in one_line(run(command, folder, query, "--out", out))
    assert out.read_text() == "mine"
    succeed(command, folder, query, "--out", out, "--force")
    result = succeed(command, folder, out, "--out", tmp_path / "again.h5ad")
    assert "was there already" in result.stderr


def test_the_input_is_never_written(folder, query, tmp_path):
    link, hard, before = tmp_path / "link.h5ad", tmp_path / "hard.h5ad", digest(query)
    link.symlink_to(query)
    hard.hardlink_to(query)
    for out in (query, link, hard):
        assert "is the input" in one_line(run("embed", folder, query, "--out", out, "--force"))
        assert "is the input" in one_line(run("impute", folder, link, "--out", out, "--force"))
    assert digest(query) == before
    assert link.is_symlink()
    dangling = tmp_path / "dangling.h5ad"
    dangling.symlink_to(tmp_path / "nowhere.h5ad")
    assert "exists" in one_line(run("embed", folder, query, "--out", dangling))


def test_an_error_keeps_what_was_there(folder, query, tmp_path):
    """A failed run with --force leaves the earlier result, and no temporary file."""
    out = tmp_path / "out" / "out.h5ad"
    succeed("embed", folder, query, "--out", out)
    before = digest(out)
    (tmp_path / "bad.h5ad").write_bytes(query.read_bytes()[:3000])
    assert "cannot read it as h5ad" in one_line(run("embed", folder, tmp_path / "bad.h5ad", "--out", out, "--force"))
    assert digest(out) == before
    assert list(out.parent.iterdir()) == [out]


def test_errors_are_one_line(folder, query, tmp_path):
    out = ("--out", tmp_path / "out.h5ad")
    assert "there is no file" in one_line(run("embed", folder, tmp_path / "none.h5ad", *out))
    assert "there is no file" in one_line(run("embed", folder, tmp_path, *out))
    assert "is no saved fit" in one_line(run("embed", tmp_path, query, *out))
    assert "is no saved fit" in one_line(run("embed", tmp_path / "nowhere", query, *out))
    assert "is no saved fit" in one_line(run("embed", query, query, *out))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    (tmp_path / "torn" / "weights.safetensors").write_text("")
    assert "corrupt" in one_line(run("embed", tmp_path / "torn", query, *out))
    (tmp_path / "folder.h5ad").mkdir()
    assert "is a folder" in one_line(run("embed", folder, query, "--out", tmp_path / "folder.h5ad", "--force"))
    assert not (tmp_path / "out.h5ad").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("embed", "--out", "out.txt"), ".h5ad"),
        (("embed", "--out", "fit/config.json"), ".h5ad"),
        (("embed", "--out", "out.h5ad", "--device", "abacus"), "abacus"),
        (("impute", "--out", "out.h5ad", "--sampler", "tarot"), "refined"),
        (("impute", "--out", "out.h5ad", "--samples", "0"), "--samples"),
        (("de", "--out", "out"), "--groupby"),
    ],
)
def test_wrong_usage_exits_with_2(folder, query, arguments, named):
    result = run(arguments[0], folder, query, *arguments[1:])
    assert result.exit_code == 2, result.output
    assert named in result.stderr


def test_de_of_two_groups_writes_table_picture_and_page(folder, query, cells, tmp_path):
    groups = ("--groupby", "bulk_labels", "--group-a", "CD19+ B", "--group-b", "Dendritic")
    succeed("de", folder, query, *groups, "--out", tmp_path / "de", "--seed", 4)
    out = tmp_path / "de"
    assert {path.name for path in out.iterdir()} == {"table.csv", "volcano.png", "index.html"}
    fit = ps.load(folder / "fit")
    expected = ps.differential_expression(
        fit, cells, groupby="bulk_labels", group_a="CD19+ B", group_b="Dendritic", seed=4
    )
    check_table(out / "table.csv", expected)
    page = Page.read(out / "index.html")
    assert page.tags.count("img") == 1
    assert all(link.startswith("data:") for link in page.links)
    called = expected[expected.q_value <= 0.05]
    assert f"genes called{len(called)}" in page.text
    assert f"of these higher in{(called.lfc > 0).sum()}CD19+ B" in page.text
    for text in ("15 cells of CD19+ B against 15 of Dendritic.", "--seed 4", "GroupMeans(", *called.index):
        assert text in page.text


def test_de_of_every_group_against_the_rest(folder, query, cells, tmp_path):
    """Groups are numbers in the file; cells without a group belong to every rest."""
    adata = anndata.read_h5ad(query)
    adata.obs.loc[adata.obs_names[:2], "bulk_labels"] = np.nan
    adata.write_h5ad(tmp_path / "nan.h5ad")
    succeed(
        "de", folder, tmp_path / "nan.h5ad", "--groupby", "bulk_labels", "--out", tmp_path / "1", "--min-molecules", 5
    )
    table = pd.read_csv(tmp_path / "1" / "table.csv", index_col=["group", "gene"])
    assert set(table.index.unique("group")) == {"CD19+ B", "Dendritic"}
    page = Page.read(tmp_path / "1" / "index.html")
    assert "Each group of bulk_labels against the rest of 30 cells." in page.text
    assert not (tmp_path / "1" / "volcano.png").exists()
    succeed("de", folder, query, "--groupby", "cluster", "--out", tmp_path / "2.csv")
    names = cells.obs["cluster"].map(str)
    expected = ps.differential_expression(ps.load(folder / "fit"), cells, groupby=names)
    check_table(tmp_path / "2.csv", expected)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pd.Series(pd.Categorical(["b", None, "a"])), ["b", None, "a"]),
        (pd.Series(pd.array(["b", None, "a"], dtype="string")), ["b", None, "a"]),
        (pd.Series(pd.array([1, None, 2], dtype="Int64")), ["1", None, "2"]),
        (pd.Series([True, False, True]), ["True", "False", "True"]),
    ],
)
def test_groups_have_names_that_can_be_typed(labels, expected):
    assert [None if pd.isna(name) else name for name in genes.named(labels)] == expected
    assert not any(name is pd.NA for name in genes.named(labels))  # which numpy can compare with nothing


@pytest.mark.parametrize(
    ("labels", "group", "expected"),
    [
        ([1.0, 2.5, np.nan], "1", "1.0"),
        ([1.0, 2.5], "1.0", "1.0"),
        ([1.0, 2.5], "2.50", "2.5"),
        ([1, 2], "1.0", "1"),
        (["1", "1.0"], "1", "1"),  # two groups
        (["1.0", "01"], "1", "1"),  # no saying which
        (["a", "b"], "A", "A"),
        ([1.0, 2.0], None, None),
    ],
)
def test_a_number_may_be_typed_in_any_form(labels, group, expected):
    assert genes.typed(genes.named(pd.Series(labels)), group) == expected


def test_de_finds_groups_of_a_column_of_floats(folder, query, cells, tmp_path):
    """As a missing value makes it of a column of integers."""
    adata = anndata.read_h5ad(query)
    adata.obs["cluster"] = adata.obs["cluster"].astype(str).astype(float)
    adata.write_h5ad(tmp_path / "floats.h5ad")
    column = ("--groupby", "cluster", "--group-a", "1")
    succeed("de", folder, tmp_path / "floats.h5ad", *column, "--out", tmp_path / "t.csv")
    check_table(
        tmp_path / "t.csv", ps.differential_expression(ps.load(folder / "fit"), cells, groupby="cluster", group_a=1)
    )


def test_de_hands_its_options_on(folder, query, cells, tmp_path):
    asked = ("--pairs", "--depth-laden", "--delta", 1.5, "--within-batch", "--seed", 6)
    group = ("--groupby", "cluster", "--group-a", "2")
    succeed("de", folder, query, *group, *asked, "--out", tmp_path / "t.csv")
    expected = ps.differential_expression(
        ps.load(folder / "fit"),
        cells,
        groupby="cluster",
        group_a=2,
        estimand=ps.differential.RandomPairs(contrast=ps.differential.Uncorrected(), delta=1.5, within_batch=True),
        seed=6,
    )
    check_table(tmp_path / "t.csv", expected)


def test_pages_tell_which_group_a_gene_is_higher_in():
    columns = {"p_lfc": [0.99, 1.0, 0.99, 0.2], "lfc": [1.0, -2.0, 3.0, -0.1]}
    columns |= {"expected_false_share": [0.01, 0.0, 0.01, 0.4]}
    columns |= {"lfc_low": [-9.0] * 4, "lfc_high": [9.0] * 4, "mean_a": [1.0] * 4, "mean_b": [2.0] * 4, "se": [0.1] * 4}
    table = pd.DataFrame(columns, index=["a_less", "b_most", "a_more", "neither"])
    found = genes.compared(table, ["A", "B", np.nan, "A", "B", "C", "A"], "A", "B", genes.OfPairs(0.5))
    assert genes.sides(found) == "3 cells of A against 2 of B."
    assert list(found.called.index) == ["b_most", "a_more", "a_less"]
    assert "b_mostB-2.00-9.00 to +9.001.00001.002.00\na_moreA+3.00" in Page(genes.top(found, 2)).text
    assert "a_less" not in genes.top(found, 2)
    assert [row[1] for row in genes.counted(found)] == ["4", "3", "2", "1", "0.1000"]
    rest = genes.compared(table, ["A", "B", np.nan], "A", None, genes.OfPairs(0.5))
    assert (rest.b, rest.n_b) == ("the rest", 2)
    assert Page(genes.by_group([rest])).text.strip().endswith("A132a_more, a_less")
    none = genes.compared(table.tail(1), ["A", "B"], "A", "B", genes.OfPairs(0.5))
    assert "none" in Page(genes.top(none, 2)).text


def test_de_errors_name_what_exists(folder, query, tmp_path, monkeypatch):
    out = ("--out", tmp_path / "out")
    line = one_line(run("de", folder, query, "--groupby", "nope", *out))
    assert "no column 'nope' for --groupby" in line
    assert "bulk_labels" in line
    column = ("--groupby", "cluster")
    line = one_line(run("de", folder, query, *column, "--group-a", "1", "--group-b", "nope", *out))
    assert "the groups are ['1', '2']" in line
    assert "name two of" in one_line(run("de", folder, query, *column, "--group-a", "1", "--group-b", "1", *out))
    assert "--group-b without --group-a" in one_line(run("de", folder, query, *column, "--group-b", "1", *out))
    monkeypatch.setattr(de, "MOST_GROUPS", 20)
    assert "30 groups" in one_line(run("de", folder, query, "--groupby", "age", *out))
    assert not (tmp_path / "out").exists()


def test_de_overwrites_neither_folders_nor_fits(folder, query, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    groups = ("--groupby", "cluster", "--group-a", "1")
    assert "not empty" in one_line(run("de", folder, query, *groups, "--out", tmp_path / "out"))
    succeed("de", folder, query, *groups, "--out", tmp_path / "out", "--force")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    for out, why in ((folder, "holds a fit"), (folder / "fit", "is the input, which is never written")):
        assert why in one_line(run("de", folder, query, *groups, "--out", out, "--force"))
    assert {path.name for path in folder.iterdir()} == {"fit"}


def test_global_random_state_is_untouched(folder, query, tmp_path):
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    succeed("impute", folder, query, "--out", tmp_path / "1.h5ad")
    succeed("de", folder, query, "--groupby", "cluster", "--out", tmp_path / "1.csv")
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002


def test_as_a_process(folder, query, tmp_path):
    """Nothing but the messages on the screen; an error without a traceback."""
    command = [sys.executable, "-m", "pyro_scvi", "embed", str(folder), str(query), "--out", str(tmp_path / "out.h5ad")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"embedding 30 cells\nwrote {tmp_path / 'out.h5ad'}\n"
    said = one_line(run(*command[3:]))
    assert said == f"{tmp_path / 'out.h5ad'} exists; pass another --out, or --force to replace it"
