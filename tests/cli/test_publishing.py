"""Publishing of results: a stop or an error at any step loses neither the new ones nor the earlier ones."""

import errno
import io
import os
import signal
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.cli import fit_report, messages, page, pipeline, workspace
from pyro_scvi.export import pictures
from pyro_scvi.utils import progress_bars
from pyro_scvi.utils.disk import locks
from pyro_scvi.utils.disk.publishing import NotRolledBack, publish, rescue, signals_deferred
from tests.support.cli_runs import make_adata, one_line, run, succeed
from tests.support.faults import DISK_ERRORS, disk_error, failing, file_size_limit

pytestmark = pytest.mark.faults

NAMES = ("fit", "index.html", "table.csv", "volcano.png")


def content(folder):
    """Every file by its path, without what publishing keeps for itself."""
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def results(folder, version, names=NAMES):
    folder.mkdir(parents=True)
    for name in names:
        if name == "fit":
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(version)
        else:
            (folder / name).write_text(version)
    return content(folder)


@pytest.fixture
def places(tmp_path):
    """New results, and a folder with earlier ones, of which one has no successor and one no predecessor."""
    new = results(tmp_path / "out" / "temporary" / "new", "new", NAMES[:3])
    results(tmp_path / "earlier", "old", ("fit", "index.html", "volcano.png"))
    for item in (tmp_path / "earlier").iterdir():
        item.rename(tmp_path / "out" / item.name)
    (tmp_path / "earlier").rmdir()
    old = {name: text for name, text in content(tmp_path / "out").items() if text == "old"}
    return tmp_path / "out", new, old


def published(out):
    return {name: text for name, text in content(out).items() if not name.startswith("temporary")}


def test_publishing_replaces_and_keeps_what_is_not_replaced(places):
    out, new, old = places
    publish(out / "temporary" / "new", out, out / "temporary")
    assert published(out) == old | new


STEPS = 5  # renames: two of each result that replaces one, one of a result that does not


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), MemoryError(), *map(disk_error, DISK_ERRORS)])
@pytest.mark.parametrize("after", range(STEPS))
def test_a_stop_at_any_step_is_rolled_back(places, error, after):
    out, new, old = places
    with failing(Path, "rename", error, after=after, again=False) as calls, pytest.raises(type(error)):
        publish(out / "temporary" / "new", out, out / "temporary")
    assert len(calls) > after
    assert published(out) == old
    assert content(out / "temporary" / "new") == new


@pytest.mark.parametrize("after", range(STEPS))
def test_a_stop_just_after_any_step_is_rolled_back(places, after, monkeypatch):
    out, new, old = places
    calls, rename = [], Path.rename

    def late(path, target):
        rename(path, target)
        calls.append(path)
        if len(calls) == after + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(KeyboardInterrupt):
        publish(out / "temporary" / "new", out, out / "temporary")
    assert published(out) == old
    assert content(out / "temporary" / "new") == new


@pytest.mark.parametrize("after", range(1, STEPS))
def test_where_nothing_can_be_moved_back_everything_is_kept_and_named(places, after):
    out, new, old = places
    with failing(Path, "rename", disk_error(5), after=after), pytest.raises(NotRolledBack) as raised:
        publish(out / "temporary" / "new", out, out / "temporary")
    everything = {(Path(name).name, text) for name, text in content(out).items()}
    assert everything == {(Path(name).name, text) for name, text in [*new.items(), *old.items()]}
    for named in (out, out / "temporary" / "new", out / "temporary" / "replaced"):
        assert str(named) in str(raised.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_wait_until_publishing_has_ended(places, number, monkeypatch):
    out, new, old = places
    rename, received = Path.rename, []

    def interrupted(path, target):
        os.kill(os.getpid(), number)
        return rename(path, target)

    before = signal.signal(number, lambda *_: received.append(published(out)))
    try:
        monkeypatch.setattr(Path, "rename", interrupted)
        publish(out / "temporary" / "new", out, out / "temporary")
    finally:
        signal.signal(number, before)
    assert received == [old | new]


def test_signals_are_as_before_afterwards():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="inside"), signals_deferred():
        raise ValueError("inside")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_rescued_result_takes_a_free_name(tmp_path):
    for version in ("first", "second"):
        (tmp_path / "fit").mkdir(exist_ok=True)
        (tmp_path / "fit-2").mkdir(exist_ok=True)
        (tmp_path / version).mkdir()
        (tmp_path / version / "fit").write_text(version)
    assert rescue(tmp_path / "first" / "fit", tmp_path) == tmp_path / "fit-3"
    assert rescue(tmp_path / "second" / "fit", tmp_path) == tmp_path / "fit-4"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("source") / "in.h5ad"
    make_adata().write_h5ad(path)
    return path


@pytest.fixture
def quick(monkeypatch):
    """A command ``fit`` whose evaluation costs nothing: only what is written, and in which order, is asked here."""
    for name in ("numbers", "training"):
        monkeypatch.setattr(fit_report, name, lambda *_: "nothing")
    for name in ("predictions", "zeros", "differing_genes"):
        monkeypatch.setattr(fit_report, name, lambda *_: ["nothing"])
    monkeypatch.setattr(fit_report, "embedded", lambda *_: "nothing")
    monkeypatch.setattr(pipeline.plots, "project", lambda latent, seed: ps.plots.Projection(latent[:, :2], "PCA"))


def fitted(source, out, *more):
    return run("fit", source, "--out", out, "--epochs", 1, "--no-progress", "--device", "cpu", *more)


FAULTS = {
    "Ctrl-C": KeyboardInterrupt(),
    "a full disk": disk_error(28),
    "no memory": MemoryError("no memory"),
    "a fault": RuntimeError("a fault"),
}


@pytest.mark.parametrize("error", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("owner", [pipeline, pipeline.html_page], ids=["table", "page"])
def test_a_finished_fit_stays_whatever_comes_after(quick, source, tmp_path, error, owner):
    out, name = tmp_path / "out", {pipeline: "write_h5ad", pipeline.html_page: "page"}[owner]
    with failing(owner, name, error):
        result = fitted(source, out)
    assert result.exit_code != 0
    assert f"the fit is finished and in {out / 'fit'}" in result.stderr
    assert len(ps.load(out / "fit").history) == 1
    assert [path.name for path in out.iterdir()] == ["fit"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_with_force_the_earlier_results_stay_beside_the_new_fit(quick, source, tmp_path):
    out = tmp_path / "out"
    assert fitted(source, out).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    digest = ps.load(out / "fit").settings["seed"]
    for number in (2, 3):
        with failing(pipeline, "write_h5ad", KeyboardInterrupt()):
            result = fitted(source, out, "--force", "--seed", number)
        assert f"the new fit is finished and in {out / f'fit-{number}'}" in result.stderr
        assert ps.load(out / f"fit-{number}").settings["seed"] == number
    assert ps.load(out / "fit").settings["seed"] == digest
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("place", ["a link", "a folder whose parent is another disk"])
def test_results_go_to_another_disk(quick, source, tmp_path, place, monkeypatch):
    """Every rename from one folder of tmp_path to another fails here, as it does between disks."""
    real, out = tmp_path / "disk" / "real", tmp_path / "out"
    real.mkdir(parents=True)
    if place == "a link":
        out.symlink_to(real)
    rename = Path.rename

    def across(path, target):
        if (real in path.resolve().parents) != (real in Path(target).resolve().parents):
            raise disk_error(18)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", across)
    result = fitted(source, out if place == "a link" else real)
    assert result.exit_code == 0, result.output
    assert {path.name for path in real.iterdir()} == {"fit", "annotated.h5ad", "index.html"}


def no_training(*_, **__):
    raise AssertionError("training began")


def test_places_are_tried_before_training(source, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "fit", no_training)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "leads nowhere" in one_line(fitted(source, tmp_path / "link"))
    (tmp_path / "closed").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(workspace.os, "access", lambda place, mode: not mode & os.W_OK or "closed" not in str(place))
        assert "cannot be written" in one_line(fitted(source, tmp_path / "closed"))
    with failing(workspace, "new_temporary", disk_error(30)):
        assert "Read-only" in one_line(fitted(source, tmp_path / "out"))
    (tmp_path / "held").mkdir()
    with locks.only_writer(tmp_path / "held"):
        assert "another process is writing" in one_line(fitted(source, tmp_path / "held"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "held", "link"]


def test_the_second_of_two_runs_to_one_place_is_refused(quick, source, tmp_path):
    out = tmp_path / "out"
    beside = []

    def while_the_page_is_made(*_):
        beside.extend(one_line(fitted(source, out, *more)) for more in ((), ("--force",)))
        return "page"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.html_page, "page", while_the_page_is_made)
        assert fitted(source, out).exit_code == 0
    assert ["not empty" in beside[0], "another process is writing" in beside[1]] == [True, True]
    assert sorted(path.name for path in out.iterdir()) == ["annotated.h5ad", "fit", "index.html"]


def test_what_came_meanwhile_is_not_replaced(quick, source, tmp_path):
    out = tmp_path / "out"

    def somebody(*_):
        (out / "index.html").write_text("mine")
        return "page"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.html_page, "page", somebody)
        assert "not empty" in fitted(source, out).stderr
    assert (out / "index.html").read_text() == "mine"
    assert len(ps.load(out / "fit").history) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("owner", [pipeline.html_page, pipeline], ids=["page", "before training"])
def test_a_signal_leaves_no_litter(quick, source, tmp_path, number, code, owner):
    name = {pipeline.html_page: "page", pipeline: "number_held_out"}[owner]
    child = os.fork()
    if not child:
        for default in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(default, signal.SIG_DFL)
        setattr(owner, name, lambda *_: (os.kill(os.getpid(), number), time.sleep(9)))
        os._exit(fitted(source, tmp_path / "out").exit_code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_dir()}
    assert found == ({"out", "out/fit"} if owner is pipeline.html_page else set())
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


class Gone(io.StringIO):
    """A stream that nobody can read: a closed terminal, a full log, a pipe without an end."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        raise disk_error(self.number)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EPIPE])
def test_messages_that_nobody_can_read_cost_no_results(quick, source, tmp_path, monkeypatch, number):
    monkeypatch.setattr(progress_bars, "EVERY", 0.0)
    monkeypatch.setattr(messages.typer, "echo", lambda *_, **__: Gone(number).write(""))
    monkeypatch.setattr(progress_bars.sys, "stderr", Gone(number))
    result = run("fit", source, "--out", tmp_path / "out", "--epochs", 1, "--device", "cpu")
    assert result.exit_code == 0, result.exception
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"fit", "annotated.h5ad", "index.html"}


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EPIPE])
@pytest.mark.parametrize("redraws", [False, True])
def test_bars_that_nobody_can_read_stop_nothing(monkeypatch, number, redraws):
    monkeypatch.setattr(progress_bars.sys, "stderr", Gone(number))
    monkeypatch.setattr(progress_bars, "_redraws", lambda _: redraws)
    assert list(progress_bars.each([1, 2, 3], "step", True)) == [1, 2, 3]


@pytest.mark.parametrize("name", ["link", "real/../real", "real/."])
def test_another_name_of_a_place_has_the_same_lock(tmp_path, name):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with locks.only_writer(tmp_path / "real"), pytest.raises(BlockingIOError), locks.only_writer(tmp_path / name):
        pass


MEMORY = (
    "MPS backend out of memory (MPS allocated: 9 GB)",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)",
    "[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
)


@pytest.mark.parametrize("text", MEMORY)
def test_every_text_of_torch_without_memory_is_one_line(capsys, text):
    with pytest.raises(messages.typer.Exit), messages.errors_in_one_line():
        raise RuntimeError(text)
    assert "there is not enough memory; lower --batch-size" in capsys.readouterr().err


def test_torch_without_memory_is_one_line(quick, source, tmp_path):
    with failing(pipeline, "evaluate", RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes\nmore")):
        result = fitted(source, tmp_path / "out")
    assert "error: there is not enough memory; lower --batch-size" in result.stderr
    assert "the fit is finished" in result.stderr
    with failing(pipeline, "train", torch.OutOfMemoryError("CUDA out of memory")):
        assert "there is not enough memory" in one_line(fitted(source, tmp_path / "out2"))
    with failing(pipeline, "train", RuntimeError("a fault of ours")):
        assert isinstance(fitted(source, tmp_path / "out3").exception, RuntimeError)


@pytest.mark.parametrize("exists", [False, True])
def test_a_killed_run_is_found_and_its_fit_named(quick, source, tmp_path, exists):
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    child = os.fork()
    if not child:
        pipeline.html_page.page = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        workspace.Workspace.keep = lambda *_: None  # as if it had been killed before
        fitted(source, out)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    result = fitted(source, out)
    assert result.exit_code == 0, result.output
    note = next(line for line in result.stderr.splitlines() if "left by a run that was stopped" in line)
    place = Path(note.split("its fit is in ")[1].split(";")[0])
    assert len(ps.load(place).history) == 1
    assert {"fit", "annotated.h5ad", "index.html"} <= {path.name for path in out.iterdir()}


def test_a_label_that_is_no_formula_is_drawn_as_it_is(source, tmp_path):
    adata = make_adata()
    adata.obs["bulk_labels"] = adata.obs["bulk_labels"].cat.rename_categories({"Dendritic": r"$\frac{A$"})
    axes = ps.plots.embedding(np.zeros((60, 2)), adata.obs["bulk_labels"], pictures.new_axes(4, 3))
    pictures.save(axes, tmp_path / "a.png", "a")
    axes = ps.plots.embedding(np.zeros((60, 2)), pd.Series(np.arange(60.0), name="$x_{$"), pictures.new_axes(4, 3))
    pictures.save(axes, tmp_path / "b.png", "b")


def test_a_part_of_the_page_that_fails_is_told(quick, source, tmp_path):
    with failing(fit_report, "zeros", ValueError("no\nzeros")):
        result = fitted(source, tmp_path / "out")
    assert result.exit_code == 0
    assert "note: Zeros could not be shown: no zeros" in result.stderr
    assert "Zeros could not be shown: no zeros" in (tmp_path / "out" / "index.html").read_text()
    with pytest.raises(OSError, match="space"):
        page.made_or_told("Zeros", lambda: (_ for _ in ()).throw(disk_error(28)))


@pytest.fixture(scope="module")
def fit_folder(source, tmp_path_factory):
    cells = ps.Cells.from_anndata(anndata.read_h5ad(source))
    path = tmp_path_factory.mktemp("fitted") / "fit"
    ps.fit(ps.SCVI(cells.n_genes, 2, n_hidden=8), cells, epochs=1, progress=False, device="cpu").save(path)
    return path


COMMANDS = {
    "embed": ("embed", "out.h5ad"),
    "impute": ("impute", "out.h5ad", "--samples", 1),
    "de": ("de", "out.csv", "--groupby", "donor"),
    "page": ("de", "out", "--groupby", "donor", "--group-a", "a"),
}


FULL = [(name, limit) for name in ("embed", "impute", "page") for limit in (0, 2_000, 20_000)] + [
    ("de", 0),
    ("de", 1_000),
]


@pytest.mark.parametrize(("name", "limit"), FULL)
def test_a_full_disk_leaves_what_was_there(source, fit_folder, tmp_path, name, limit):
    command, out, *more = COMMANDS[name]
    call = (command, fit_folder, source, "--out", tmp_path / out, *more, "--force")
    with file_size_limit(limit):
        assert "File too large" in one_line(run(*call))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [0, 300, 3_000, 15_000])
def test_a_store_on_a_full_disk_goes_on(source, tmp_path, limit):
    call = ("store", source, "--out", tmp_path / "store", "--no-progress")
    with file_size_limit(limit):
        assert "File too large" in one_line(run(*call))
    succeed(*call)
    assert ps.Cells.from_store(tmp_path / "store").n_cells == 60
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("name", ["embed", "page"])
def test_a_full_disk_leaves_earlier_results(source, fit_folder, tmp_path, name):
    command, out, *more = COMMANDS[name]
    call = (command, fit_folder, source, "--out", tmp_path / out, *more, "--force")
    succeed(*call)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with file_size_limit(500):
        assert "File too large" in one_line(run(*call))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
