"""The commands, each in a forked child that is stopped, short of memory or of disk, and what they leave behind."""

import io
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch._dynamo  # what optimisers import when they are made: once here, not in every child
import zarr

import pyro_scvi as ps
from pyro_scvi import cli
from pyro_scvi.cli import fit_report, pipeline
from pyro_scvi.cli import paper as paper_command
from pyro_scvi.cli import training as training_commands
from pyro_scvi.paper.experiment import Experiment
from pyro_scvi.paper.rows import Row
from pyro_scvi.paper.steps import Step
from tests.support.cli_runs import make_adata
from tests.support.cli_runs import run as cli_run

SECONDS = 60  # after which a child counts as hanging
MEGABYTE = 2**20
BLOCK, AS_BLOCK = 20, "cells of a block"
_SHORT = ("--no-progress", "--device", "cpu")


@dataclass(frozen=True)
class Verb:
    """A command, the place of its result, and how the result is read.

    What a stop leaves in ``resumed`` the same command goes on with.
    """

    arguments: tuple[str, ...]
    out: str
    read: object
    resumed: tuple[str, ...] = ()
    ends_early: bool = False  # a signal ends training, and the results are those of the epochs before
    takes_long: bool = False  # for a million counts

    def command(self, folder, block=BLOCK):
        """The command, on the files in a folder, in blocks of so many cells."""
        texts = [str(block) if text is AS_BLOCK else text for text in self.arguments]
        return [str(folder / text[1:]) if text.startswith("@") else text for text in texts]


def _layer(path):
    return anndata.read_h5ad(path).layers["pyro_scvi_expression"]


def _embedding(path):
    return anndata.read_h5ad(path).obsm["X_pyro_scvi"]


def _zarr(path):
    return zarr.open_group(str(path), mode="r")["obsm/X_pyro_scvi"][...]


def _counts(path):
    return ps.Cells.from_store(path)[:][0].numpy()


def _losses(path):
    return ps.load(path / "fit").history["train_loss"].to_numpy()


def _table(path):
    return pd.read_csv(path).select_dtypes("number").to_numpy()


def _page(path):
    if "</html>" not in (path / "index.html").read_text():
        raise ValueError("half a page")
    return _table(path / "table.csv")


def _rows(path):
    return _table(path / "rows.csv")


def _shares(path):
    return anndata.read_h5ad(path).layers["pyro_scvi_normalized"]


def _components(path):
    return anndata.read_h5ad(path).obsm["X_pyro_scvi_expression_pca"]


def _of_all(path):
    found = zarr.open_group(str(path), mode="r")
    return np.column_stack([found["obs/pyro_scvi_log_evidence"][...], found["layers/pyro_scvi_expression"][...]])


def _powers(base):
    return sum(base**n for n in range(2_000)) % 10_007


def _experiment():
    """A table of five steps, in place of one that takes minutes."""
    steps = [Step(_powers, {"base": base}) for base in range(2, 7)]

    def rows(results, budget):
        return [Row("set", "ours", f"step {n}", results.of(step).result) for n, step in enumerate(steps)]

    return Experiment("timing", "Powers", ("Sums of powers.",), lambda budget: steps, rows)


def _infer(out):
    return ("infer", "@fit", "@in.h5ad", "--out", f"@{out}", "--block", AS_BLOCK, *_SHORT)


_DE = ("de", "@fit", "@in.h5ad", "--groupby", "donor", "--device", "cpu")
VERBS = {
    "fit": Verb(
        ("fit", "@in.h5ad", "--out", "@out", "--epochs", "2", "--force", *_SHORT), "out", _losses, ends_early=True
    ),
    "demo": Verb(("demo", "--out", "@demo", "--epochs", "2", "--force", *_SHORT), "demo", _losses, ends_early=True),
    "paper": Verb(("paper", "timing", "--quick", "--no-progress", "--out", "@paper"), "paper", _rows, ("paper",)),
    "embed": Verb(
        ("embed", "@fit", "@in.h5ad", "--space", "latent", "--out", "@o.h5ad", "--device", "cpu"),
        "o.h5ad",
        _embedding,
    ),
    "impute": Verb(("impute", "@fit", "@in.h5ad", "--out", "@i.h5ad", "--device", "cpu"), "i.h5ad", _layer),
    "shares": Verb(
        ("impute", "@fit", "@in.h5ad", "--normalized", "--out", "@n.h5ad", "--device", "cpu"), "n.h5ad", _shares
    ),
    "components": Verb(
        ("embed", "@fit", "@in.h5ad", "--out", "@c.h5ad", "--device", "cpu"),
        "c.h5ad",
        _components,
    ),
    "de": Verb((*_DE, "--out", "@de", "--group-a", "a", "--group-b", "b"), "de", _page),
    "de to a table": Verb((*_DE, "--out", "@t.csv"), "t.csv", _table),
    "infer to .h5ad": Verb(_infer("b.h5ad"), "b.h5ad", _embedding, ("b.h5ad", ".b.h5ad.blocks")),
    "infer to .zarr": Verb(_infer("z.zarr"), "z.zarr", _zarr, ("z.zarr",)),
    "infer all": Verb(
        (*_infer("a.zarr"), "--expression", "--evidence", "--samples", "2"),
        "a.zarr",
        _of_all,
        ("a.zarr",),
        takes_long=True,
    ),
    "store": Verb(("store", "@in.h5ad", "--out", "@s", "--no-progress"), "s", _counts, ("s.partial",)),
}


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code, or minus the number of the signal; what it said; how long it took."""

    code: int
    said: str
    seconds: float

    @property
    def errors(self):
        """The lines that say an error."""
        return [line for line in self.said.splitlines() if line.startswith("error: ")]


def run(command, *, limit=lambda: None, after=None, number=signal.SIGKILL):
    """Run a command in a child, within limits, and send it a signal after some seconds."""
    said, saying = os.pipe()  # not a file, whose size may be limited
    began, child = time.monotonic(), os.fork()
    if not child:
        _as_child(command, saying, limit)
    os.close(saying)
    sent = False
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        passed = time.monotonic() - began
        if after is not None and not sent and passed >= after:
            os.kill(child, number)
            sent = True
        if passed > SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"{command} hangs")
        time.sleep(0.002)
    lasted = time.monotonic() - began
    with open(said, "rb") as pipe:
        return Ended(os.waitstatus_to_exitcode(ended[1]), pipe.read().decode(errors="replace"), lasted)


def _as_child(command, saying, limit):
    code = 70
    try:
        os.dup2(saying, 1)
        os.dup2(saying, 2)
        sys.stdout = sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), line_buffering=True)  # pytest has others
        warnings.resetwarnings()  # pytest makes them errors
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _make_quick()
        limit()
        cli.app(command)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:  # before the command has begun, Python itself says so
        code = 130
    except BaseException as error:
        os.write(2, "".join(traceback.format_exception(error)).encode()[-9000:])
    finally:
        os._exit(code)


def _make_quick():
    """What a page says takes seconds, and so does the demo's data; they are written by the same code as the rest."""
    training_commands.datasets.pbmc68k_reduced = make_adata
    paper_command.EXPERIMENTS = {"timing": _experiment()}
    torch.set_num_threads(1)
    for name in ("numbers", "training"):
        setattr(fit_report, name, lambda *_: "nothing")
    for name in ("predictions", "zeros", "differing_genes"):
        setattr(fit_report, name, lambda *_: ["nothing"])
    fit_report.embedded = lambda *_: "nothing"
    pipeline.plots.project = lambda latent, seed: ps.plots.Projection(latent[:, :2], "PCA")


def memory_limit(megabytes):
    """At most so much more memory than the process has now."""

    def limit():
        has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has + megabytes * MEGABYTE,) * 2)

    return limit


def disk_limit(n_bytes):
    """No file larger than this."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes,) * 2)


def files_limit(more):
    """At most so many more open files than the process has now."""

    def limit():
        has = len(os.listdir("/proc/self/fd")) - 1  # the listing opens one itself
        resource.setrlimit(resource.RLIMIT_NOFILE, (has + more,) * 2)

    return limit


def large_adata(n_cells=2_000, n_genes=500):
    """Cells that take more memory than a process has free that has just begun."""
    rng = np.random.default_rng(0)
    donors = pd.DataFrame({"donor": np.where(np.arange(n_cells) % 2, "a", "b")})
    donors.index = [f"c{number}" for number in range(n_cells)]
    genes = pd.DataFrame(index=[f"g{number}" for number in range(n_genes)])
    return anndata.AnnData(rng.poisson(2.0, (n_cells, n_genes)).astype(np.float32), donors, genes)


def _is_temporary(name):
    """Whether a name is of a file or folder that is not finished; zarr has hidden files of its own."""
    return name.endswith((".partial", ".part", ".lock", ".new")) or "unfinished" in name


class Bench:
    """A folder with a fit and counts, what each command gives undisturbed, and how long it takes."""

    def __init__(self, folder, adata, block=BLOCK):
        self.inputs, self.work, self.block = folder / "inputs", folder / "work", block
        self.inputs.mkdir(parents=True)
        adata.write_h5ad(self.inputs / "in.h5ad")
        cli_run("infer", folder / "nothing", folder, "--out", folder / "a.zarr")  # typer imports what it needs
        made = run(VERBS["fit"].command(self.inputs))
        if made.code:
            raise RuntimeError(made.said)
        (self.inputs / "out" / "fit").rename(self.inputs / "fit")
        shutil.rmtree(self.inputs / "out")
        self.expected, self.lasts = {}, {}

    def undisturbed(self, verb):
        """Seconds that a command takes; it is run once."""
        if verb not in self.expected:
            with self.fresh():
                self.lasts[verb] = self.run(verb).seconds
                self.expected[verb] = VERBS[verb].read(self.work / VERBS[verb].out)
        return self.lasts[verb]

    @contextmanager
    def fresh(self):
        """The inputs in a new folder."""
        shutil.copytree(self.inputs, self.work)
        try:
            yield
        finally:
            shutil.rmtree(self.work)

    def run(self, verb, **options):
        """Run a command there."""
        return run(VERBS[verb].command(self.work, self.block), **options)

    def left(self, verb):
        """What is there beside the inputs, and what the command is known to go on with or to give."""
        known = {"in.h5ad", "fit", *VERBS[verb].resumed, VERBS[verb].out}
        beside = [path.name for path in self.work.iterdir() if path.name not in known]
        within = [path.name for path in (self.work / VERBS[verb].out).glob("**/*") if _is_temporary(path.name)]
        return sorted(beside + within)

    def is_whole_or_absent(self, verb):
        """Whether the result is there and as it should be, or is not there; what is to be resumed may be half done."""
        path = self.work / VERBS[verb].out
        if not path.exists() or VERBS[verb].out in VERBS[verb].resumed:
            return True
        found, expected = VERBS[verb].read(path), self.expected[verb]
        if VERBS[verb].ends_early:
            expected = expected[: max(1, len(found))]
        return np.array_equal(found, expected, equal_nan=True)

    def is_whole_after_the_same_command(self, verb):
        """Whether the same command, once more, gives what it should."""
        path = self.work / VERBS[verb].out
        if path.exists() and not VERBS[verb].resumed and not VERBS[verb].ends_early:
            return self.is_whole_or_absent(verb)
        again = self.run(verb)
        return again.code == 0 and np.array_equal(VERBS[verb].read(path), self.expected[verb], equal_nan=True)
