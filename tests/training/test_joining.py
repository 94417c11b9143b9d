"""Ranks that cannot join, hang or are lost: forked children with the environment that torchrun gives."""

import json
import os
import signal
import socket
import time
from types import SimpleNamespace

import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.errors import FitError
from pyro_scvi.training.signals import sigterm_raises
from tests.support.simulate import simulated_counts

pytestmark = [pytest.mark.faults, pytest.mark.integration]

SECONDS = 40


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def as_rank(monkeypatch, rank, port, size=2):
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in (told | {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "False"}).items():
        monkeypatch.setenv(name, str(value))


def ranks(task, folder, monkeypatch, size=2):
    """What every rank says: the text of its error, or the result; None of one that was killed."""
    port, children = free_port(), []
    for rank in range(size):
        child = os.fork()
        if not child:
            as_rank(monkeypatch, rank, port, size)
            _run(task, folder / str(rank))
        children.append(child)
    end = time.monotonic() + SECONDS
    while children and time.monotonic() < end:
        children = [child for child in children if not os.waitpid(child, os.WNOHANG)[0]]
        time.sleep(0.01)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not children, "a rank hangs"
    said = (folder / str(rank) for rank in range(size))
    return [json.loads(path.read_text()) if path.exists() else None for path in said]


def _run(task, path):
    try:
        torch.set_num_threads(1)
        try:
            said = task()
        except FitError as error:
            said = str(error)
        except Exception as error:
            said = f"not worded: {error!r}"
        path.write_text(json.dumps(said))
    finally:
        os._exit(0)


def fit(joined, n_cells=60, **options):
    cells = ps.Cells.from_counts(simulated_counts(n_cells))
    model = ps.SCVI(cells.n_genes, 2, n_hidden=8, n_layers=1)
    return ps.fit(model, cells, epochs=3, progress=False, device="cpu", ranks=joined, **options)


class Ends(ps.schedules.ConstantKL):
    """A weight by which the second rank does something in its second epoch, or where weights are checked."""

    def __init__(self, rank, act):
        super().__init__()
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "act", act)

    def at(self, epoch, epochs):
        if self.rank == 1 and epoch == 1 and epochs == 3:
            self.act()
        return super().at(epoch, epochs)


def training(act, timeout):
    def task():
        with ps.distributed.joined(timeout=timeout) as joined:
            return len(fit(joined, kl_weight=Ends(joined.rank, act)).history)

    return task


@pytest.mark.slow
def test_a_killed_rank_ends_the_others(tmp_path, monkeypatch):
    first, second = ranks(training(lambda: os.kill(os.getpid(), signal.SIGKILL), 20), tmp_path, monkeypatch)
    assert "rank 0 of 2 lost contact with the others" in first
    assert second is None


@pytest.mark.slow
def test_a_hanging_rank_ends_the_others_after_the_time_limit(tmp_path, monkeypatch):
    began = time.monotonic()
    first, second = ranks(training(lambda: time.sleep(8), 2), tmp_path, monkeypatch)
    assert "rank 0 of 2 lost contact with the others" in first
    assert "resume=True" in first
    assert "rank 1 of 2 lost contact" in second  # once it goes on, the first has left
    assert time.monotonic() - began < 30


def test_other_cells_on_a_rank(tmp_path, monkeypatch):
    def task():
        with ps.distributed.joined(timeout=20) as joined:
            return len(fit(joined, 60 + 10 * joined.rank).history)

    first, second = ranks(task, tmp_path, monkeypatch)
    assert first == second
    assert "all ranks must call fit with the same model, cells and options" in first


def on_each_rank(make):
    """What a run is told whose second rank has cells that ``make(True)`` gives, and the first ``make(False)``."""

    def task():
        with ps.distributed.joined(timeout=20) as joined:
            cells, options = make(joined.rank == 1)
            return len(ps.fit(ps.SCVI(20, 2), cells, epochs=3, progress=False, device="cpu", ranks=joined, **options))

    return task


def mirrored(other):
    counts = simulated_counts()
    return ps.Cells.from_counts(counts[:, ::-1].copy() if other else counts), {}


def two_genes_swapped(other):
    counts = simulated_counts()
    return ps.Cells.from_counts(counts[:, [1, 0, *range(2, 20)]] if other else counts), {}


def names_in_another_order(other):
    names = [f"g{number}" for number in range(20)]
    return ps.Cells.from_counts(simulated_counts(), gene_names=names[::-1] if other else names), {}


def validation_mirrored(other):
    counts = simulated_counts()
    held_out = ps.Cells.from_counts(counts[:40, ::-1].copy() if other else counts[:40])
    return ps.Cells.from_counts(counts), {"validation": held_out}


@pytest.mark.parametrize("make", [mirrored, two_genes_swapped, names_in_another_order, validation_mirrored])
def test_cells_of_the_same_totals_in_another_order_of_genes(make, tmp_path, monkeypatch):
    first, second = ranks(on_each_rank(make), tmp_path, monkeypatch)
    assert first == second
    assert "all ranks must call fit with the same model, cells and options" in first


def test_a_rank_that_never_comes(tmp_path, monkeypatch):
    def task():
        if os.environ["RANK"] == "1":
            return "elsewhere"
        with ps.distributed.joined(timeout=1):
            return "joined"

    first, _ = ranks(task, tmp_path, monkeypatch)
    assert "the ranks could not join" in first
    assert "--standalone" in first


def test_a_port_in_use(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        as_rank(monkeypatch, 0, taken.getsockname()[1])
        with (
            pytest.raises(FitError, match=r"the ranks could not join .*torchrun --standalone"),
            ps.distributed.joined(),
        ):
            pass


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR"])
def test_a_broken_environment(monkeypatch, name):
    as_rank(monkeypatch, 0, free_port(), 1)
    monkeypatch.delenv(name)
    with pytest.raises(FitError, match="the ranks could not join"), ps.distributed.joined():
        pass


@pytest.mark.parametrize("text", ["one", "-1", "0.5", "", "\u0661"])
@pytest.mark.parametrize("name", ["LOCAL_RANK", "MASTER_PORT", "RANK", "WORLD_SIZE"])
def test_numbers_of_the_environment_that_are_none(monkeypatch, name, text):
    as_rank(monkeypatch, 0, free_port(), 1)
    monkeypatch.setenv(name, text)
    with pytest.raises(FitError, match=f"{name} is {text!r}, and must be an integer"), ps.distributed.joined():
        pass


@pytest.mark.parametrize(
    ("name", "number", "ends"), [("RANK", 2, "from 0 to 1"), ("WORLD_SIZE", 0, "of 1 or more")], ids=str
)
def test_ranks_that_cannot_be(monkeypatch, name, number, ends):
    """Of a third rank of two torch waits for half an hour."""
    as_rank(monkeypatch, 0, free_port())
    monkeypatch.setenv(name, str(number))
    with pytest.raises(FitError, match=f"{name} is '{number}', and must be an integer {ends}"), ps.distributed.joined():
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_rank_that_waits_for_another(monkeypatch, number):
    """While torch waits, Python's own handlers are not called."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        # A process that was started by nohup ignores SIGHUP, and one in the background SIGINT.
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        as_rank(monkeypatch, 0, free_port())
        join = torch.distributed.init_process_group
        monkeypatch.setattr(
            torch.distributed, "init_process_group", lambda *a, **k: (os.write(writing, b"."), join(*a, **k))
        )
        with sigterm_raises(), ps.distributed.joined():
            os._exit(0)
    os.read(reading, 1)
    time.sleep(0.5)
    os.kill(child, number)
    end = time.monotonic() + 20
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.05)
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert os.WIFSIGNALED(ended[1])
    assert os.WTERMSIG(ended[1]) == number


def test_handlers_are_those_of_before_once_the_ranks_have_joined(monkeypatch):
    as_rank(monkeypatch, 0, free_port(), 1)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ps.distributed.joined():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("port", ["0", "65536", "9" * 5000])
def test_ports_that_cannot_be(monkeypatch, port):
    as_rank(monkeypatch, 0, free_port(), 1)
    monkeypatch.setenv("MASTER_PORT", port)
    says = "MASTER_PORT is '.*must be an integer from 1 to 65535"
    with pytest.raises(FitError, match=says), ps.distributed.joined():
        pass


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_time_limits_that_are_none(monkeypatch, timeout):
    as_rank(monkeypatch, 0, free_port(), 1)
    with pytest.raises(FitError, match="timeout must be seconds above 0"), ps.distributed.joined(timeout=timeout):
        pass


def test_two_ranks_on_one_gpu_are_refused_in_both(tmp_path, monkeypatch):
    """When they train there: only then is known where."""
    join = torch.distributed.init_process_group
    of_cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda number: None,
        "get_device_properties": lambda device: SimpleNamespace(uuid="the only one"),
    }
    for name, value in of_cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **given: join("gloo", **given))
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")

    def task():
        with ps.distributed.joined(timeout=20) as joined:
            fit(joined)  # on the CPU they may
            joined.require_own_gpus(torch.device("cuda", 0))

    first, second = ranks(task, tmp_path, monkeypatch)
    assert first == second
    assert "ranks 0, 1 of 2 do not have a GPU each" in first
    assert "CUDA_VISIBLE_DEVICES=" in first


def test_a_checkpoint_stays_where_it_began(cells, tmp_path, monkeypatch):
    """Also where the process changes its working directory meanwhile."""
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)

    class Moves(ps.schedules.ConstantKL):
        def at(self, epoch, epochs):
            if (tmp_path / "run").exists():
                os.chdir(tmp_path / "there")
            return super().at(epoch, epochs)

    model = ps.SCVI(cells.n_genes, 2, n_hidden=8, n_layers=1)
    made = ps.fit(model, cells, epochs=2, kl_weight=Moves(), progress=False, device="cpu", checkpoint="run")
    assert len(ps.load(tmp_path / "run").history) == 2
    assert os.getcwd() == str(tmp_path / "there")
    assert os.listdir() == []
    made.save("fit")
    assert ps.load(tmp_path / "there" / "fit").history.equals(made.history)
