"""Results written block by block: the same from one process, several shards, ranks, and after an interruption."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.data.reading import layer_names
from pyro_scvi.errors import DataError, ModelError
from tests.support.cli_runs import one_line, run, succeed
from tests.support.simulate import simulated_counts
from tests.training.test_distributed import RANKS, TORCHRUN, python

VERBS = {"z": ps.embed, "w": partial(ps.impute, samples=3), "p": partial(ps.evidence, samples=30, steps=2)}
OPTIONS = {"block": 16, "seed": 4, "progress": False}


@pytest.fixture(scope="module")
def cells():
    obs = pd.DataFrame({"donor": np.arange(101) % 3}, index=[f"c{i}" for i in range(101)])
    return ps.Cells.from_counts(simulated_counts(101), obs=obs)


@pytest.fixture(scope="module")
def fit(cells):
    torch.manual_seed(0)
    return ps.fit(ps.SCVI(cells.n_genes, 3, n_hidden=16), cells, epochs=2, progress=False, device="cpu")


@pytest.fixture(scope="module")
def alone(fit, cells, tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "out.zarr"
    assert ps.shards.write(fit, cells, path, VERBS, **OPTIONS) == 0
    return ad.read_zarr(path)


def assert_same(found, expected):
    pd.testing.assert_frame_equal(found.obs, expected.obs)
    np.testing.assert_array_equal(found.obsm["z"], expected.obsm["z"])
    np.testing.assert_array_equal(found.layers["w"], expected.layers["w"])


def test_what_is_written_is_what_the_verbs_say(alone, fit, cells):
    np.testing.assert_allclose(alone.obsm["z"], ps.embed(fit, cells), atol=1e-6)
    assert list(alone.obs.index) == list(cells.cell_names)
    assert list(alone.var_names) == list(cells.gene_names)
    np.testing.assert_allclose(alone.layers["w"], ps.impute(fit, cells, samples=3, seed=4), rtol=1e-4)
    evidence = ps.evidence(fit, cells, samples=30, steps=2, seed=4)
    assert list(alone.obs) == ["donor", *(f"p_{name}" for name in evidence)]
    # Rounding may decide which of a cell's attempts is kept.
    assert np.median(np.abs(alone.obs.p_log_evidence - evidence.log_evidence)) < 1e-3


def test_shards_in_any_order_write_the_same(alone, fit, cells, tmp_path):
    path = tmp_path / "out.zarr"
    left = [ps.shards.write(fit, cells, path, VERBS, shard=(i, 3), **OPTIONS) for i in (2, 0, 1)]
    assert left == [5, 2, 0]
    assert_same(ad.read_zarr(path), alone)


def test_ranks_write_the_same(fit, tmp_path):
    fit.save(tmp_path / "fit")
    counts = ps.Cells.from_counts(simulated_counts(101))
    assert ps.shards.write(fit, counts, tmp_path / "alone.zarr", VERBS, **OPTIONS) == 0
    alone = ad.read_zarr(tmp_path / "alone.zarr")
    python(*TORCHRUN, RANKS, tmp_path, "inferred")
    found = ad.read_zarr(tmp_path / "out.zarr")
    np.testing.assert_array_equal(found.obsm["z"], alone.obsm["z"])
    np.testing.assert_array_equal(found.layers["w"], alone.layers["w"])
    assert list(found.obs.index) == list(counts.cell_names)


def test_h5ad_and_counts_on_disk_give_the_same(alone, fit, cells, tmp_path):
    adata = ad.AnnData(cells.counts.astype(np.float32), obs=cells.obs, var=pd.DataFrame(index=cells.gene_names))
    adata.write_h5ad(tmp_path / "in.h5ad")
    stored = ps.Cells.from_store(ps.stores.build([tmp_path / "in.h5ad"], tmp_path / "store", progress=False))
    assert ps.shards.write(fit, stored, tmp_path / "out.h5ad", VERBS, **OPTIONS) == 0
    assert_same(ad.read_h5ad(tmp_path / "out.h5ad"), alone)


def test_an_interrupted_run_goes_on_where_it_stopped(alone, fit, cells, tmp_path):
    asked = []

    def failing(fit, cells, seed):
        asked.append(cells.cell_names[0])
        if len(asked) == 4:  # the first asks for the shape
            raise KeyboardInterrupt
        return ps.embed(fit, cells, seed=seed)

    with pytest.raises(KeyboardInterrupt):
        ps.shards.write(fit, cells, tmp_path / "out.zarr", {"z": failing}, **OPTIONS)
    partly = ad.read_zarr(tmp_path / "out.zarr").obsm["z"]
    assert np.isfinite(partly[:32]).all()
    assert np.isnan(partly[32:]).all()
    assert ps.shards.write(fit, cells, tmp_path / "out.zarr", {"z": failing}, **OPTIONS) == 0
    assert asked == ["c0", "c0", "c16", "c32", "c0", "c32", "c48", "c64", "c80", "c96"]
    np.testing.assert_array_equal(ad.read_zarr(tmp_path / "out.zarr").obsm["z"], alone.obsm["z"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda adata: adata[::-1].copy(), "obs_names"),
        (lambda adata: adata[:50].copy(), "obs_names, obsm/z"),
        (lambda adata: adata.obsm.update(z=adata.obsm["z"][:, :2]), "began: obsm/z"),
        (lambda adata: adata.obsm.pop("z"), "something else"),
        (lambda adata: adata.uns.pop("pyro_scvi_blocks"), "something else"),
    ],
)
@pytest.mark.parametrize("name", ["out.h5ad", "out.zarr"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_a_half_done_file_that_somebody_changed_is_not_continued(name, change, named, fit, cells, tmp_path):
    path, write = tmp_path / name, {".h5ad": "write_h5ad", ".zarr": "write_zarr"}[Path(name).suffix]
    ps.shards.write(fit, cells, path, {"z": ps.embed}, **OPTIONS)
    adata = ad.read_h5ad(path) if name == "out.h5ad" else ad.read_zarr(path)
    changed = change(adata)
    getattr(changed if isinstance(changed, ad.AnnData) else adata, write)(path)
    with pytest.raises(DataError, match=named):
        ps.shards.write(fit, cells, path, {"z": ps.embed}, **OPTIONS)


def test_a_half_done_file_in_pieces_is_not_continued(fit, cells, tmp_path):
    path = tmp_path / "out.h5ad"
    ps.shards.write(fit, cells, path, {"z": ps.embed}, **OPTIONS)
    ad.read_h5ad(path).write_h5ad(path, compression="gzip")
    with pytest.raises(DataError, match="was changed after its run began: obsm/z"):
        ps.shards.write(fit, cells, path, {"z": ps.embed}, **OPTIONS)


def test_results_of_another_run_are_left_alone(fit, cells, tmp_path):
    path = tmp_path / "out.zarr"
    ps.shards.write(fit, cells, path, {"z": ps.embed}, **OPTIONS)
    other = ps.fit(ps.SCVI(cells.n_genes, 3, n_hidden=16, seed=1), cells, epochs=1, progress=False, device="cpu")
    for fitted, of, verbs, options, named in (
        (other, cells, {"z": ps.embed}, {}, "fit"),
        (fit, cells.take(np.arange(50)), {"z": ps.embed}, {}, "n_cells, cell names, counts, obs column .donor."),
        (fit, cells.take(np.arange(101)[::-1]), {"z": ps.embed}, {}, "cell names, counts, obs column .donor."),
        (fit, cells, {"zz": ps.embed}, {}, "arrays, verb 'zz'"),
        (fit, cells, {"z": ps.embed}, {"seed": 5}, "seed"),
        (fit, cells, {"z": ps.embed}, {"block": 8}, "block"),
    ):
        with pytest.raises(DataError, match=f"another run: {named} differ"):
            ps.shards.write(fitted, of, path, verbs, **(OPTIONS | options))
    for name in ("a.zarr", "a.h5ad"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(DataError, match="something else"):
            ps.shards.write(fit, cells, tmp_path / name, {"z": ps.embed}, **OPTIONS)
        assert (tmp_path / name).read_text() == "mine"
    (tmp_path / "folder.zarr").mkdir()
    (tmp_path / "folder.zarr" / "mine").write_text("mine")
    with pytest.raises(DataError, match="something else"):
        ps.shards.write(fit, cells, tmp_path / "folder.zarr", {"z": ps.embed}, **OPTIONS)
    assert (tmp_path / "folder.zarr" / "mine").read_text() == "mine"


def table(cells, names):
    return pd.DataFrame(np.ones((len(cells), len(names))), columns=names)


def of_other_samples(fit, cells, seed):
    return ps.impute(fit, cells, samples=3, seed=seed)


@pytest.mark.parametrize(
    "other",
    [
        partial(ps.impute, samples=4),
        partial(ps.impute, samples=3, sampler=ps.Importance(proposals=20)),
        partial(ps.technical_zero_probability, samples=3),
        of_other_samples,
        lambda fit, cells, seed: of_other_samples(fit, cells, seed),
    ],
)
def test_another_question_of_the_same_name_is_refused(fit, cells, tmp_path, other):
    path, options = tmp_path / "out.zarr", {"shard": (0, 2), **OPTIONS}
    ps.shards.write(fit, cells, path, {"w": partial(ps.impute, samples=3)}, **options)
    with pytest.raises(DataError, match="another run: verb 'w' differ"):
        ps.shards.write(fit, cells, path, {"w": other}, **options)
    again = partial(partial(ps.impute), samples=3)
    assert ps.shards.write(fit, cells, path, {"w": again}, **(options | {"shard": (1, 2)})) == 0


def test_cells_as_if_of_another_batch_are_other_cells(tmp_path):
    obs = pd.DataFrame({"donor": np.array(["x", "y"])[np.arange(40) % 2]}, index=[f"c{i}" for i in range(40)])
    cells = ps.Cells.from_counts(simulated_counts(40), obs=obs, batch="donor")
    model = ps.SCVI(cells.n_genes, 3, cells.n_covariates, n_hidden=16)
    fit = ps.fit(model, cells, epochs=1, progress=False, device="cpu")
    verbs = {"w": partial(ps.impute, samples=2)}
    ps.shards.write(fit, cells.with_batch("x"), tmp_path / "out.zarr", verbs, **OPTIONS)
    with pytest.raises(DataError, match="another run: covariates differ"):
        ps.shards.write(fit, cells.with_batch("y"), tmp_path / "out.zarr", verbs, **OPTIONS)


@pytest.mark.parametrize(
    "changing",
    [
        lambda fit, cells, seed: np.full(len(cells), 1e300) if len(cells) > 1 else np.ones(1, np.float32),
        lambda fit, cells, seed: np.ones((len(cells), 2 if len(cells) > 1 else 3)),
        lambda fit, cells, seed: np.ones((len(cells), len(cells))),
        lambda fit, cells, seed: table(cells, ["a", "b"] if len(cells) > 1 else ["a"]),
        lambda fit, cells, seed: table(cells, ["a"] if len(cells) > 1 else ["a", "b"]),
    ],
)
def test_what_is_not_the_same_for_every_block_is_refused(fit, cells, tmp_path, changing):
    with pytest.raises(ModelError, match="'q' must give the same for every block"):
        ps.shards.write(fit, cells, tmp_path / "out.zarr", {"q": changing}, **OPTIONS)


def test_numpy_integers_are_integers(fit, cells, tmp_path):
    verbs, path = {"z": ps.embed}, tmp_path / "out.zarr"
    given = {"block": np.int64(16), "seed": np.int32(4), "shard": (np.int64(0), np.int64(2)), "progress": False}
    assert ps.shards.write(fit, cells, path, verbs, **given) == 3
    assert ps.shards.write(fit, cells, path, verbs, **OPTIONS) == 0


@pytest.mark.parametrize("name", ["out.zarr", "out.h5ad"])
def test_strings_with_missing_values_are_kept_and_mixed_ones_refused(fit, tmp_path, name):
    names = [f"c{i}" for i in range(40)]
    kind = pd.Series(["a", None, np.nan, "b"] * 10, index=names, dtype=object)  # pandas 3 has a type for strings, too
    obs = pd.DataFrame({"kind": kind, "note": ["é", None] * 20, "seen": [True, None] * 20}, index=names)
    given = obs.copy()
    cells = ps.Cells.from_counts(simulated_counts(40), obs=obs)
    ps.shards.write(fit, cells, tmp_path / name, {"z": ps.embed}, **OPTIONS)
    found = (ad.read_zarr if name.endswith("zarr") else ad.read_h5ad)(tmp_path / name).obs
    assert found.kind.iloc[[0, 3]].tolist() == ["a", "b"]
    assert found.kind.isna().tolist() == [False, True, True, False] * 10
    assert found.seen.isna().tolist() == [False, True] * 20
    assert found.note.iloc[2] == "é"
    assert found.note.isna().tolist() == [False, True] * 20
    pd.testing.assert_frame_equal(obs, given)
    mixed = ps.Cells.from_counts(simulated_counts(40), obs=obs.assign(kind=["a", 1] * 20))
    with pytest.raises(DataError, match="column 'kind' of obs holds values of several kinds"):
        ps.shards.write(fit, mixed, tmp_path / f"mixed-{name}", {"z": ps.embed}, **OPTIONS)
    assert [item.name for item in tmp_path.iterdir()] == [name]


KILLED = """
import os, signal, sys
from functools import partial
import pyro_scvi as ps
from tests.support.simulate import simulated_counts

asked = []

def killed(fit, cells, seed):
    asked.append(1)
    if len(asked) == 5:  # the first asks for the shape
        os.kill(os.getpid(), signal.SIGKILL)
    return ps.embed(fit, cells, seed=seed)

killed.__module__, killed.__qualname__ = ps.embed.__module__, "embed"
fit, cells = ps.load(sys.argv[1] + "/fit"), ps.Cells.from_counts(simulated_counts(101))
verbs = {"z": killed, "p": partial(ps.evidence, samples=30, steps=2)}
for name in sys.argv[2:]:  # a child for each file: only the first process imports anything
    child = os.fork()
    if not child:
        ps.shards.write(fit, cells, sys.argv[1] + "/" + name, verbs, block=16, seed=4, progress=False)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


@pytest.fixture(scope="module")
def killed(fit, tmp_path_factory):
    """A folder with results in both formats whose processes were killed in the fourth block."""
    folder = tmp_path_factory.mktemp("killed")
    fit.save(folder / "fit")
    python("-c", KILLED, folder, "out.zarr", "out.h5ad")
    return folder


@pytest.mark.parametrize("name", ["out.zarr", "out.h5ad"])
def test_a_killed_process_loses_one_block(killed, fit, cells, name):
    asked, read = [], ad.read_zarr if name.endswith("zarr") else ad.read_h5ad

    def noting(fit, cells, seed):
        asked.append(cells.cell_names[0])
        return ps.embed(fit, cells, seed=seed)

    noting.__module__, noting.__qualname__ = ps.embed.__module__, "embed"
    plain = ps.Cells.from_counts(simulated_counts(101))
    assert ps.shards.write(fit, plain, killed / name, {"z": noting, "p": VERBS["p"]}, **OPTIONS) == 0
    assert asked[1:] == [f"cell_{i}" for i in (48, 64, 80, 96)]
    np.testing.assert_allclose(read(killed / name).obsm["z"], ps.embed(fit, cells), atol=1e-6)


def test_a_file_that_is_locked_or_not_ours_says_which(fit, cells, tmp_path):
    path, verbs = tmp_path / "out.h5ad", {"z": ps.embed}
    ps.shards.write(fit, cells, path, verbs, **OPTIONS)
    program = "import h5py, sys; file = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(DataError, match="cannot be opened: .*lock"):
            ps.shards.write(fit, cells, path, verbs, **OPTIONS)
        other.stdin.close()
    assert ps.shards.write(fit, cells, path, verbs, **OPTIONS) == 0
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="something else than results .*truncated"):
        ps.shards.write(fit, cells, path, verbs, **OPTIONS)


@pytest.mark.parametrize(
    ("path", "verbs", "options", "message"),
    [
        ("out.txt", {"z": ps.embed}, {}, "must end in .zarr or .h5ad, got .*out.txt"),
        (3, {"z": ps.embed}, {}, "got 3"),
        ("out.h5ad", {"z": ps.embed}, {"shard": (0, 2)}, "one writer; with 2 shards"),
        ("out.zarr", {"z": ps.embed}, {"shard": (2, 2)}, "0 <= i < n, got"),
        ("out.zarr", {"z": ps.embed}, {"shard": 3}, "0 <= i < n, got 3"),
        ("out.zarr", {"z": ps.embed}, {"block": 0}, "block"),
        ("out.zarr", {}, {}, "functions by name"),
        ("out.zarr", ps.embed, {}, "functions by name"),
        ("out.zarr", {"z": "embed"}, {}, "functions by name"),
        ("out.zarr", {"n": lambda fit, cells, seed: np.ones(3)}, {}, "'n' must give real numbers, a row for each of 1"),
        ("out.zarr", {"n": lambda fit, cells, seed: [1] * len(cells)}, {}, "got int64"),
        ("out.zarr", {"donor": lambda fit, cells, seed: np.ones(len(cells))}, {}, "the columns .*donor"),
        ("out.zarr", {"": ps.embed}, {}, "names of verbs become names of arrays"),
        ("out.zarr", {"..": ps.embed}, {}, "names of verbs become names of arrays"),
        ("out.zarr", {".zarray": ps.embed}, {}, "not begin with"),  # zarr's own file about a folder
        ("out.h5ad", {"__z": ps.embed}, {}, "not begin with"),
        ("out.zarr", {"zarr.json": ps.embed}, {}, "not begin with"),
        ("out.zarr", {"a\\b": ps.embed}, {}, "without '/', got .*a"),
        ("out.h5ad", {"z\0": ps.embed}, {}, "without '/', got .*z"),
        ("out.h5ad", {"_index": lambda fit, cells, seed: np.ones(len(cells))}, {}, "the columns .*_index"),
        ("out.zarr", {1: ps.embed}, {}, "names of verbs become names of arrays, .*got 1"),
        ("out.zarr", {"a/b": ps.embed}, {}, "without '/', got .*a/b"),
        ("out.zarr", {"p": lambda fit, cells, seed: table(cells, ["a/b"])}, {}, "without '/', got .*p_a/b"),
        ("out.zarr", {"p": lambda fit, cells, seed: table(cells, ["q", "q"])}, {}, "give .*obs/p_q.* more than once"),
        (
            "out.zarr",
            {"p": lambda fit, cells, seed: table(cells, ["q"]), "p_q": lambda fit, cells, seed: np.ones(len(cells))},
            {},
            "give .*obs/p_q.* more than once",
        ),
        ("out.zarr", {"p": lambda fit, cells, seed: table(cells, ["q"]).astype(str) + "x"}, {}, "'p' must give real"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(fit, cells, tmp_path, path, verbs, options, message):
    with pytest.raises((DataError, ModelError), match=message):
        ps.shards.write(fit, cells, tmp_path / path if isinstance(path, str) else path, verbs, **(OPTIONS | options))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def files(fit, cells, tmp_path):
    """A saved fit, an .h5ad file with its genes in another order, and a store of that."""
    fit.save(tmp_path / "fit")
    adata = ad.AnnData(cells.counts.astype(np.float32), obs=cells.obs, var=pd.DataFrame(index=cells.gene_names))
    adata[:, ::-1].copy().write_h5ad(tmp_path / "in.h5ad")
    ps.stores.build([tmp_path / "in.h5ad"], tmp_path / "store", progress=False)
    return tmp_path


def test_jobs_of_the_command_line_share_a_file(files, fit, cells):
    command = ["infer", files / "fit", files / "store", "--out", files / "out.zarr", "--block", 32, "--no-progress"]
    extra = ["--expression", "--technical-zeros", "--evidence", "--samples", 2]
    first = succeed(*command, *extra, "--shard", "2/2")
    assert "2 blocks of" in first.output
    assert "still missing" in first.output
    assert "wrote" in succeed(*command, *extra, "--shard", "1/2").output
    found = ad.read_zarr(files / "out.zarr")
    np.testing.assert_allclose(found.obsm["X_pyro_scvi"], ps.embed(fit, cells), atol=1e-6)
    assert set(layer_names(found)) == {"pyro_scvi_expression", "pyro_scvi_technical_zero"}
    assert np.isfinite(found.obs.pyro_scvi_log_evidence).all()


def test_the_command_line_reads_h5ad_in_place(files, fit, cells):
    succeed("infer", files / "fit", files / "in.h5ad", "--out", files / "out.h5ad", "--no-progress")
    np.testing.assert_allclose(ad.read_h5ad(files / "out.h5ad").obsm["X_pyro_scvi"], ps.embed(fit, cells), atol=1e-6)


def test_errors_of_the_command_line_are_one_line(files):
    (files / "broken.h5ad").write_text("nothing")
    assert "cannot read it" in one_line(run("infer", files / "fit", files / "broken.h5ad", "--out", files / "o.zarr"))
    layer = run("infer", files / "fit", files / "store", "--out", files / "o.zarr", "--layer", "raw")
    assert "leave out --layer" in one_line(layer)
    wrong = run("infer", files / "fit", files / "store", "--out", files / "o.zarr", "--shard", "0/2")
    assert wrong.exit_code == 2
    assert "I/N" in wrong.output


@pytest.mark.parametrize("name", ["out.zarr", "out.h5ad"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_results_without_columns_are_results(fit, cells, tmp_path, name, shape):
    verbs = {"none": lambda fit, cells, seed: np.ones((len(cells), *shape)), "z": ps.embed}
    verbs |= {"table": lambda fit, cells, seed: pd.DataFrame(index=range(len(cells)))}
    for _ in range(2):
        assert ps.shards.write(fit, cells, tmp_path / name, verbs, **OPTIONS) == 0
    found = (ad.read_zarr if name.endswith("zarr") else ad.read_h5ad)(tmp_path / name)
    assert found.obsm["none"].shape == (101, *shape)
    assert list(found.obs) == ["donor"]
    np.testing.assert_allclose(found.obsm["z"], ps.embed(fit, cells), atol=1e-6)


@pytest.mark.parametrize("name", ["out.zarr", "out.h5ad"])
@pytest.mark.parametrize("kind", ["<U3", object, "S3"])
def test_words_are_no_results(fit, cells, tmp_path, name, kind):
    for shape in ((), (0,), (2,)):
        verbs = {"words": lambda fit, cells, seed, shape=shape: np.full((len(cells), *shape), "abc", kind)}
        with pytest.raises(ModelError, match="'words' must give real numbers, a row for each of 1 cells, got"):
            ps.shards.write(fit, cells, tmp_path / name, verbs, **OPTIONS)
    assert not list(tmp_path.iterdir())
