"""Inputs that were made to harm: links out of a file, formulas in tables, and bytes that a terminal obeys."""

import json
import os
import shutil
from contextlib import suppress

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi import cli
from pyro_scvi.cli.files import read_h5ad, write_csv
from pyro_scvi.cli.messages import printable
from tests.support.cli_runs import make_adata, one_line, run, succeed

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def fit_folder(tmp_path_factory):
    torch.set_num_threads(1)
    cells = ps.Cells.from_anndata(make_adata())
    path = tmp_path_factory.mktemp("fitted") / "fit"
    ps.fit(ps.SCVI(cells.n_genes, 2, n_hidden=8), cells, epochs=1, progress=False, device="cpu").save(path)
    return path


@pytest.fixture
def place(tmp_path):
    """A folder with counts, and a secret elsewhere."""
    (tmp_path / "in").mkdir()
    adata = make_adata()
    adata.X = adata.X.toarray()
    adata.write_h5ad(tmp_path / "in" / "in.h5ad")
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = np.zeros(adata.shape, np.float32)
        file["table/words"] = "secret"
    (tmp_path / "secret.raw").write_bytes(bytes(4 * adata.n_obs * adata.n_vars))
    return tmp_path


def external(file, target):
    del file["X"]
    file["X"] = h5py.ExternalLink(target, "x")


def hidden(file, target):
    file["uns/deep/deeper"] = h5py.ExternalLink(target, "table")


def virtual(file, target):
    shape, attributes = file["X"].shape, dict(file["X"].attrs)
    del file["X"]
    layout = h5py.VirtualLayout(shape, np.float32)
    layout[:] = h5py.VirtualSource(target, "x", shape)
    file.create_virtual_dataset("X", layout).attrs.update(attributes)


def raw(file, target):
    shape, attributes = file["X"].shape, dict(file["X"].attrs)
    del file["X"]
    size = 4 * int(np.prod(shape))
    outside = [(target.replace(".h5", ".raw"), 0, size)]
    file.create_dataset("X", shape, np.float32, external=outside).attrs.update(attributes)


LINKS = (external, hidden, virtual, raw)


def test_a_link_behind_a_name_that_is_no_text_is_refused(fit_folder, place):
    path = place / "in" / "in.h5ad"
    with h5py.File(path, "r+") as file:
        del file["X"]
        obs = file["obs"]
        obs.id.links.create_external(b"\xff", str(place / "secret.h5").encode(), b"/")
        file.id.links.create_soft(b"X", b"/obs/\xff/x")
    assert "is not text in UTF-8" in one_line(run("embed", fit_folder, path, "--out", place / "out.h5ad"))
    with pytest.raises(ps.errors.DataError, match="is not text in UTF-8"):
        ps.stores.build(path, place / "store", progress=False)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("absolute", [True, False])
def test_links_to_other_folders_are_refused(fit_folder, place, link, absolute):
    path = place / "in" / "in.h5ad"
    with h5py.File(path, "r+") as file:
        link(file, str(place / "secret.h5") if absolute else "../secret.h5")
    for command in (
        ("embed", fit_folder, path, "--out", place / "o.h5ad"),
        ("infer", fit_folder, path, "--out", place / "o.zarr", "--no-progress"),
        ("store", path, "--out", place / "store", "--no-progress"),
        ("fit", path, "--out", place / "out", "--epochs", 1),
    ):
        line = one_line(run(*command))
        assert "is in another file" in line
        assert str(place / "secret") in line
    assert sorted(item.name for item in place.iterdir()) == ["in", "secret.h5", "secret.raw"]


def values_outside(group, target):
    return group.create_dataset("c", (2,), "S16", external=[(target.replace(".h5", ".raw"), 0, 32)])


def virtual_values(group, target):
    layout = h5py.VirtualLayout((2,), "S16")
    layout[:] = h5py.VirtualSource(target, "words", (2,))
    return group.create_virtual_dataset("c", layout)


def group_with_a_link(group, target):
    inner = group.create_group("c")
    inner["values"] = h5py.ExternalLink(target, "words")
    return inner


def old_categories(path, make, target):
    """Columns of categories as anndata wrote them before 0.8: codes with a reference to the categories."""
    with h5py.File(path, "r+") as file:
        group = file.create_group("uns/old")
        group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        made = make(group, target)
        made.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
        obs, n = file["obs"], len(file["obs"][file["obs"].attrs["_index"]])
        obs.create_dataset("old", data=np.arange(n, dtype=np.int8) % 2).attrs["categories"] = made.ref
        obs.attrs.update({"column-order": [*obs.attrs["column-order"], "old"], "encoding-version": "0.1.0"})


def without_its_name(path, group, name):
    """Take the name of an object from the table of its group: only references lead to it then."""
    raw, at = path.read_bytes(), -1
    while (at := raw.find(b"SNOD", at + 1)) >= 0:
        path.write_bytes(raw[: at + 6] + b"\0\0" + raw[at + 8 :])  # a table of no entries
        with suppress(KeyError, RuntimeError, OSError), h5py.File(path) as file:
            if name not in file[group]:
                return
    raise ValueError("the name is in no such table")


@pytest.mark.parametrize("make", [values_outside, virtual_values, group_with_a_link])
def test_what_only_a_reference_reaches_is_looked_at(fit_folder, place, make):
    path = place / "in" / "in.h5ad"
    old_categories(path, make, str(place / "secret.h5"))
    without_its_name(path, "uns/old", "c")
    line = one_line(run("embed", fit_folder, path, "--out", place / "out.h5ad"))
    assert "obs/old by its attribute 'categories'" in line
    assert str(place / "secret") in line
    with pytest.raises(ps.errors.DataError, match="is in another file"):
        ps.stores.build(path, place / "store", progress=False)


@pytest.mark.filterwarnings("ignore:.*ncoding")
def test_categories_that_an_old_file_refers_to_are_read(place):
    path = place / "in" / "in.h5ad"
    old_categories(path, lambda group, _: group.create_dataset("c", data=["one", "two"], dtype=h5py.string_dtype()), "")
    assert list(read_h5ad(path).obs["old"].unique()) == ["one", "two"]


@pytest.fixture
def folder(place):
    """Counts as a zarr folder, in the second format, where each array has a file of its own for each chunk."""
    path = place / "in" / "in.zarr"
    adata = make_adata()
    adata.X = adata.X.toarray()
    with anndata.settings.override(zarr_write_format=2):
        adata.write_zarr(path)
    return path


def linked_chunk(folder, secret):
    (folder / "X" / "0.0").unlink()
    (folder / "X" / "0.0").symlink_to(secret)


def linked_array(folder, secret):
    shutil.move(folder / "obs", secret.parent / "obs")
    (folder / "obs").symlink_to(secret.parent / "obs")


def linked_metadata(folder, secret):
    (folder / "var" / ".zattrs").unlink()
    (folder / "var" / ".zattrs").symlink_to("../../../secret.h5")


def link_to_nowhere(folder, secret):
    (folder / "X" / "0.1").symlink_to("nowhere")


def device(folder, secret):
    (folder / "X" / "0.0").unlink()
    (folder / "X" / "0.0").symlink_to("/dev/zero")


def pipe(folder, secret):
    (folder / "X" / "0.0").unlink()
    os.mkfifo(folder / "X" / "0.0")


def pickled(folder, secret):
    facts = json.loads((folder / "X" / ".zarray").read_bytes())
    (folder / "X" / ".zarray").write_text(json.dumps(facts | {"filters": [{"id": "pickle", "protocol": 5}]}))


FOREIGN = (linked_chunk, linked_array, linked_metadata, link_to_nowhere, device, pipe, pickled)


@pytest.mark.filterwarnings("ignore:.*zarr v2", "ignore:.*Consolidated metadata")
@pytest.mark.parametrize("change", FOREIGN)
def test_a_zarr_folder_with_files_elsewhere_is_refused(folder, place, change):
    change(folder, place / "secret.raw")
    line = one_line(run("store", folder, "--out", place / "store", "--no-progress"))
    assert "not read" in line
    assert str(folder) in line
    assert not (place / "store").exists()


@pytest.mark.filterwarnings("ignore:.*zarr v2", "ignore:.*Consolidated metadata")
def test_links_inside_a_zarr_folder_and_to_it_are_followed(folder, place):
    (folder / "X" / "moved").mkdir()
    (folder / "X" / "0.0").rename(folder / "X" / "moved" / "0")
    (folder / "X" / "0.0").symlink_to("moved/0")
    (place / "link.zarr").symlink_to(folder)
    succeed("store", place / "link.zarr", "--out", place / "store", "--no-progress")
    counts, _ = ps.Cells.from_store(place / "store")[:]
    assert np.array_equal(counts.numpy(), make_adata().X.toarray())


def test_links_to_the_same_folder_are_read_and_told(fit_folder, place):
    path = place / "in" / "in.h5ad"
    anndata.read_h5ad(path).write_h5ad(place / "in" / "part.h5")
    with h5py.File(path, "r+") as file:
        del file["X"]
        file["X"] = h5py.ExternalLink("part.h5", "X")
    result = succeed("embed", fit_folder, path, "--out", place / "o.h5ad")
    assert "note: X of" in result.stderr
    assert "part.h5" in result.stderr
    with h5py.File(place / "in" / "part.h5", "r+") as file:  # and from there out of the folder
        file["uns/more"] = h5py.ExternalLink("../secret.h5", "table")
    assert "secret.h5" in one_line(run("embed", fit_folder, path, "--out", place / "o2.h5ad"))


def test_links_that_lead_nowhere_or_round_in_a_circle(fit_folder, place):
    path, other = place / "in" / "in.h5ad", place / "in" / "other.h5ad"
    anndata.read_h5ad(path).write_h5ad(other)
    for start, target in ((other, "in.h5ad"), (path, "other.h5ad")):
        with h5py.File(start, "r+") as file:
            file["uns/more"] = h5py.ExternalLink(target, "obs")
    assert "other.h5ad" in succeed("embed", fit_folder, path, "--out", place / "o.h5ad").stderr
    other.unlink()
    assert "other.h5ad, which is not read" in one_line(run("embed", fit_folder, path, "--out", place / "o2.h5ad"))


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r=", "a\r="])
def test_text_that_a_spreadsheet_would_calculate(tmp_path, start):
    name = f"{start}1+cmd|' /C calc'!A0"
    table = pd.DataFrame({"x": [-1.5, 2.0], "kind": ["plain", name]}, index=pd.Index([name, "g1"], name="gene"))
    with pytest.warns(UserWarning, match="would be formulas in a spreadsheet"):
        write_csv(table, tmp_path / "a.csv")
    written = pd.read_csv(tmp_path / "a.csv", index_col="gene")
    told = (name if start.startswith("a") else f"'{name}").replace("\r", " ")
    assert list(written.index) == [told, "g1"]
    assert list(written.kind) == ["plain", told]
    assert list(written.x) == [-1.5, 2.0]


def test_tables_without_such_text_are_as_pandas_writes_them(tmp_path):
    for names in (["a"], ["a", "b"]):
        table = pd.DataFrame({name: [-1 / 3, np.nan] for name in names}, index=pd.Index(["g0", "g1"], name="gene"))
        write_csv(table, tmp_path / "a.csv")
        table.to_csv(tmp_path / "b.csv")
        assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


@pytest.mark.parametrize("out", ["de", "de.csv"])
def test_groups_and_genes_that_are_formulas(fit_folder, tmp_path, out):
    adata = make_adata()
    adata.obs["kind"] = np.where(np.arange(60) % 2, "=1+1", "@SUM(A1)")
    adata.write_h5ad(tmp_path / "in.h5ad")
    result = succeed("de", fit_folder, tmp_path / "in.h5ad", "--groupby", "kind", "--out", tmp_path / out)
    assert "would be formulas in a spreadsheet" in result.stderr
    table = (tmp_path / out / "table.csv" if out == "de" else tmp_path / out).read_text()
    assert not any(line.startswith(("=", "@")) for line in table.splitlines())


ESCAPES = {
    "title": "\x1b]0;pwned\x07",
    "colour": "\x1b[31mred",
    "clear": "\x1b[2J",
    "8 bit": "\x9b2J",
    "bell": "\a",
    "backspace": "\b\b\b",
    "carriage return": "\rerror: none",
    "right to left": "\u202egnp.exe",
    "half a pair": "\ud83d",
}


@pytest.mark.parametrize("name", ESCAPES.values(), ids=ESCAPES)
def test_names_do_not_reach_the_terminal_as_commands(name):
    assert printable(f"a{name}é漢 b").isprintable()
    assert printable("é漢 b") == "é漢 b"


@pytest.mark.parametrize("name", [name for name in ESCAPES.values() if name.isascii()])
def test_column_names_are_spelled_out(tmp_path, name):
    adata = make_adata()
    adata.obs[f"x{name}"] = "q"
    adata.write_h5ad(tmp_path / "in.h5ad")
    result = run("fit", tmp_path / "in.h5ad", "--out", tmp_path / "o", "--labels", "nope")
    assert all(line.isprintable() for line in result.output.splitlines())
    assert result.exit_code == 1


def test_errors_are_both_spelled_out_and_worded_as_options(tmp_path):
    adata = make_adata()
    adata.var_names = [f"other\x1b[2J{number}" for number in range(adata.n_vars)]
    some = adata[:, 1:].copy()
    ps.fit(ps.SCVI(20, 2, n_hidden=8), ps.Cells.from_anndata(adata), epochs=1, progress=False).save(tmp_path / "fit")
    some.write_h5ad(tmp_path / "in.h5ad")
    for command in (("embed", "o.h5ad"), ("infer", "o.zarr"), ("impute", "o.h5ad")):
        line = one_line(run(command[0], tmp_path / "fit", tmp_path / "in.h5ad", "--out", tmp_path / command[1]))
        assert "Add --fill-missing-genes" in line
        assert line.isprintable()


def test_infer_says_notes_as_the_other_commands(fit_folder, place):
    path = place / "in" / "in\x1b[2J.h5ad"
    (place / "in" / "in.h5ad").rename(path)
    anndata.read_h5ad(path).write_h5ad(place / "in" / "part.h5")
    with h5py.File(path, "r+") as file:
        file["uns/more"] = h5py.ExternalLink("part.h5", "obs")
    result = succeed("infer", fit_folder, path, "--out", place / "o.zarr", "--no-progress")
    assert result.stderr.startswith("note: uns/more of")
    assert all(line.isprintable() for line in result.output.splitlines())


@pytest.mark.parametrize("out", ["de", "de.csv"])
def test_names_do_not_reach_a_terminal_by_tables_and_pages(fit_folder, tmp_path, out):
    adata = make_adata()
    adata.obs["kind"] = np.where(np.arange(60) % 2, "\x1b[31mred", "\x9b2J\x00")
    adata.write_h5ad(tmp_path / "in.h5ad")
    succeed("de", fit_folder, tmp_path / "in.h5ad", "--groupby", "kind", "--out", tmp_path / out)
    written = [path for path in (tmp_path / out).glob("*.[ch]*")] or [tmp_path / out]
    for path in written:
        text = path.read_text()
        assert r"\x1b[31mred" in text
        assert not {"\x1b", "\x9b", "\0"} & set(text)


@pytest.mark.parametrize("out", ["reference.h5ad", "link.h5ad", "sub/../reference.h5ad"])
def test_a_reference_is_an_input_and_stays(fit_folder, tmp_path, out):
    reference = make_adata()
    (tmp_path / "sub").mkdir()
    reference.write_h5ad(tmp_path / "reference.h5ad")
    (tmp_path / "link.h5ad").symlink_to(tmp_path / "reference.h5ad")
    make_adata().write_h5ad(tmp_path / "in.h5ad")
    before = (tmp_path / "reference.h5ad").read_bytes()
    command = ("embed", fit_folder, tmp_path / "in.h5ad", "--force", "--out", tmp_path / out)
    assert "is the input" in one_line(run(*command, "--beside", tmp_path / "reference.h5ad"))
    assert (tmp_path / "reference.h5ad").read_bytes() == before


@pytest.mark.parametrize("state", ["out", "out/state", "out/fit", ".", "link/state"])
def test_a_checkpoint_that_results_would_replace_is_refused(tmp_path, state):
    make_adata().write_h5ad(tmp_path / "in.h5ad")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    refused = run("fit", tmp_path / "in.h5ad", "--out", tmp_path / "out", "--checkpoint", tmp_path / state)
    assert refused.exit_code == 2
    assert "--checkpoint" in refused.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5ad", "link"]


@pytest.fixture
def inputs(fit_folder, folder, place):
    """A fit, a file, a zarr folder and a store in one place."""
    shutil.copytree(fit_folder, place / "fit")
    shutil.copy(place / "in" / "in.h5ad", place / "in.h5ad")
    shutil.move(folder, place / "in.zarr")
    ps.stores.build(place / "in.h5ad", place / "store", progress=False)
    (place / "fit.link").symlink_to(place / "fit")
    (place / "link.h5ad").symlink_to(place / "in.h5ad")
    os.link(place / "in.h5ad", place / "hard.h5ad")
    (place / "out").mkdir()
    shutil.copytree(fit_folder, place / "out" / "fit")
    for name in ("annotated.h5ad", "table.csv/in.h5ad", "fit/in.h5ad"):
        (place / "out" / name).parent.mkdir(exist_ok=True)
        shutil.copy(place / "in.h5ad", place / "out" / name)
    return place


INSIDE = {  # each with an output in or over an input, by its name, a link, or another path
    "embed": [
        "fit in.h5ad --out in.h5ad --force",
        "fit in.h5ad --out link.h5ad --force",
        "fit in.h5ad --out hard.h5ad --force",
        "fit in.h5ad --out fit/o.h5ad",
        "fit in.h5ad --out fit.link/o.h5ad",
        "fit in.h5ad --out fit/../fit/o.h5ad",
        "out in.h5ad --out out/fit/o.h5ad",
        "fit out/annotated.h5ad --out hard.h5ad --force --space expression --beside link.h5ad",
    ],
    "impute": ["fit in.h5ad --out in.h5ad --force", "fit.link in.h5ad --out fit/o.h5ad"],
    "de": [
        "fit in.h5ad --groupby donor --out fit/o",
        "fit in.h5ad --groupby donor --out fit --force",
        "fit in.h5ad --groupby donor --out fit/o.csv",
        "fit out/table.csv/in.h5ad --groupby donor --out out --force",
    ],
    "infer": [
        "fit in.h5ad --out in.h5ad",
        "fit in.h5ad --out hard.h5ad",
        "fit in.h5ad --out fit/o.zarr",
        "fit store --out store/o.h5ad",
        "fit.link store --out store",
    ],
    "store": [
        "in.zarr --out in.zarr",
        "in.zarr --out in.zarr/store",
        "in.h5ad in.zarr --out in.zarr/X/store --label file --index-unique -",
        "in.h5ad --out in.h5ad",
    ],
    "fit": [
        "in.h5ad --out in.h5ad --epochs 1",
        "out/annotated.h5ad --out out --epochs 1 --force",
        "out/fit/in.h5ad --out out --epochs 1 --force",
    ],
    "paper": ["timing --quick --out data"],
}
WITHOUT_INPUTS = {"demo"}


def test_outputs_of_every_command_are_tried():
    assert INSIDE.keys() | WITHOUT_INPUTS == cli.COMMANDS.keys()


def contents(place):
    return {path: path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


@pytest.mark.filterwarnings("ignore:.*zarr v2", "ignore:.*Consolidated metadata")
@pytest.mark.parametrize("command", INSIDE)
def test_outputs_in_or_over_an_input_are_refused_before_work(inputs, monkeypatch, command):
    monkeypatch.chdir(inputs)
    (inputs / "data").mkdir()
    monkeypatch.setenv("PYRO_SCVI_DATA", str(inputs / "data"))
    before = contents(inputs)
    for arguments in INSIDE[command]:
        assert "never written" in one_line(run(command, *arguments.split())), arguments
        assert contents(inputs) == before, arguments


@pytest.mark.filterwarnings("ignore:.*zarr v2", "ignore:.*Consolidated metadata")
def test_a_store_is_not_built_in_its_input_from_python(inputs):
    with pytest.raises(ps.errors.StoreError, match="is in .*in.zarr, which is only read"):
        ps.stores.build(inputs / "in.zarr", inputs / "in.zarr" / "store", progress=False)
