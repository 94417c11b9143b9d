"""Checkpoints: resumed runs equal uninterrupted ones, and damaged or foreign checkpoints are refused."""

import json
import logging
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.errors import CheckpointError, ModelError, PyroScviError
from pyro_scvi.persistence import archive
from pyro_scvi.schedules import CheckpointInterval
from pyro_scvi.training.loop import Trainer
from pyro_scvi.utils.disk.locks import only_writer
from tests.support.mutations import mutate
from tests.support.paths import TESTS

pytestmark = pytest.mark.integration

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler, g++")


class Stopped(Exception):
    pass


def parts(cells, **options):
    model = ps.SCVI(cells.n_genes, 3, cells.n_covariates, n_hidden=16, **options)
    return model, ps.guides.DiagonalNormal(model, n_hidden=16, dropout=0.1)


def run(cells, model=None, guide=None, **options):
    model, guide = (model, guide) if model else parts(cells)
    return ps.fit(model, cells, guide, **{"epochs": 6, "batch_size": 16, "progress": False, "device": "cpu"} | options)


def stop_after(monkeypatch, epochs):
    """Have the run stop like a crash, after so many epochs and some steps."""
    epoch, left = Trainer.epoch, [epochs]

    def counted(self, *args, **kwargs):
        left[0] -= 1
        value = epoch(self, *args, **kwargs)
        if left[0] < 0:
            raise Stopped
        return value

    monkeypatch.setattr("pyro_scvi.training.loop.Trainer.epoch", counted)


def stopped(cells, folder, monkeypatch, ended, **options):
    with monkeypatch.context() as patch:
        stop_after(patch, ended)
        with pytest.raises(Stopped):
            run(cells, checkpoint=folder, **options)


def check_equal(first, second):
    for one, other in ((first.model, second.model), (first.guide, second.guide)):
        states = one.state_dict(), other.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    columns = [c for c in first.history if c != "seconds"]
    assert first.history[columns].equals(second.history[columns])
    # A checkpoint is written before the kept epoch's loss is evaluated by many draws.
    settings = [
        {name: value for name, value in fit.settings.items() if name != "held_out_loss"} for fit in (first, second)
    ]
    assert settings[0] == settings[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"validation": 0},
        {"kl_weight": ps.schedules.WarmUp(4)},
        {"learning_rate": ps.schedules.Constant(0.05), "patience": 3, "epochs": 30},
        {"dtype": torch.float64},
        {"autocast": torch.bfloat16},
        pytest.param({"compiled": True, "validation": 0, "batch_size": 20}, marks=needs_compiler),
    ],
    ids=str,
)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(cells, tmp_path, monkeypatch, options):
    whole = run(cells, **options)
    state = torch.get_rng_state()
    stopped(cells, tmp_path / "run", monkeypatch, 4, **options)
    check_equal(run(cells, checkpoint=tmp_path / "run", resume=True, **options), whole)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "make",
    [
        lambda cells: (model := ps.SCVI(20, 3, n_hidden=16), ps.guides.PerCell(model, cells.n_cells)),
        lambda cells: (model := ps.SCVI(20, 3, prior=ps.priors.VampPrior(20, 3, 4)), ps.guides.DiagonalNormal(model)),
        lambda cells: (
            model := ps.SCVI(20, 3, weight_priors={"decoder.heads.*.weight": ps.weights.NormalWeights()}),
            ps.guides.InverseAutoregressiveFlow(model),
        ),
    ],
    ids=["per cell", "vamp", "weights"],
)
def test_every_kind_of_guide_resumes(cells, tmp_path, monkeypatch, make):
    whole = run(cells, *make(cells), epochs=4)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            run(cells, *make(cells), epochs=4, checkpoint=tmp_path / "run")
    check_equal(run(cells, *make(cells), epochs=4, checkpoint=tmp_path / "run", resume=True), whole)


def test_a_checkpoint_changes_nothing_and_a_finished_run_resumes_at_its_end(cells, tmp_path, monkeypatch):
    whole = run(cells)
    check_equal(run(cells, checkpoint=tmp_path / "run"), whole)
    monkeypatch.setattr("pyro_scvi.training.loop.Trainer.epoch", None)  # no epoch is left to train
    check_equal(run(cells, checkpoint=tmp_path / "run", resume=True), whole)
    loaded = ps.load(tmp_path / "run")
    check_equal(loaded, whole)
    np.testing.assert_array_equal(ps.embed(loaded, cells), ps.embed(whole, cells))


def test_the_checkpoint_of_a_run_that_goes_on_loads_as_a_fit(cells, tmp_path, monkeypatch):
    stopped(cells, tmp_path / "run", monkeypatch, 3)
    loaded = ps.load(tmp_path / "run")
    assert len(loaded.history) == 3
    assert np.isfinite(ps.embed(loaded, cells)).all()
    stopped(cells, tmp_path / "early", monkeypatch, 0)
    with pytest.raises(CheckpointError, match="not finished an epoch"):
        ps.load(tmp_path / "early")


def test_checkpoints_are_written_as_often_as_asked(cells, tmp_path, monkeypatch):
    written, write = [], archive.write
    monkeypatch.setattr(
        archive, "write", lambda path, content, **k: written.append(epochs(content)) or write(path, content, **k)
    )

    def epochs(content):
        return len(content.facts["history"]["epoch"])

    run(cells, checkpoint=tmp_path / "a")
    assert written == [0, 1, 2, 3, 4, 5, 6]
    written.clear()
    run(cells, checkpoint=tmp_path / "b", checkpoint_every=CheckpointInterval(epochs=4))
    assert written == [0, 4, 6]
    written.clear()
    run(cells, checkpoint=tmp_path / "c", checkpoint_every=CheckpointInterval(seconds=1e6))
    assert written == [0, 6]
    with pytest.raises(ModelError, match="epochs >= 1"):
        CheckpointInterval(epochs=0)
    with pytest.raises(ModelError, match="epochs >= 1"):
        CheckpointInterval(seconds=float("nan"))
    with pytest.raises(ModelError, match="CheckpointInterval"):
        run(cells, checkpoint=tmp_path / "d", checkpoint_every=5)


def test_resume_without_a_checkpoint_starts_from_the_beginning_and_says_so(cells, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fit = run(cells, checkpoint=tmp_path / "run", resume=True)
    assert "starts from the beginning" in caplog.text
    check_equal(fit, run(cells))
    with pytest.raises(ModelError, match="checkpoint="):
        run(cells, resume=True)


def test_a_checkpoint_is_not_overwritten_unless_resumed(cells, tmp_path, monkeypatch):
    stopped(cells, tmp_path / "run", monkeypatch, 2)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match="after epoch 2; pass resume=True"):
        run(cells, checkpoint=tmp_path / "run")
    with pytest.raises(CheckpointError, match="a checkpoint"):
        run(cells).save(tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_what_is_no_checkpoint_is_never_overwritten(cells, tmp_path):
    fit = run(cells)
    fit.save(tmp_path / "fit")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, says in (("fit", "a fit"), ("mine", "thesis.txt"), ("file", "not a directory")):
        for resume in (False, True):
            with pytest.raises(CheckpointError, match=says):
                run(cells, checkpoint=tmp_path / name, resume=resume)
    check_equal(ps.load(tmp_path / "fit"), fit)
    assert (tmp_path / "file").read_text() == (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


@pytest.mark.faults
@pytest.mark.parametrize("resume", [False, True])
def test_the_second_of_two_runs_with_one_checkpoint_is_refused(cells, tmp_path, resume):
    alone, refused = run(cells, epochs=2), []

    def meanwhile(*_):
        with pytest.raises(CheckpointError, match="another process is writing"):
            run(cells, checkpoint=tmp_path / "run", resume=resume)
        refused.append(True)

    check_equal(run(cells, epochs=2, checkpoint=tmp_path / "run", callbacks=[meanwhile]), alone)
    assert len(refused) == 2
    check_equal(run(cells, epochs=2, checkpoint=tmp_path / "run", resume=True), alone)  # the first one has ended
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.faults
def test_a_fit_is_not_saved_where_another_process_writes(cells, tmp_path):
    fit = run(cells, epochs=1)
    with only_writer(tmp_path / "fit"), pytest.raises(CheckpointError, match="another process is writing"):
        fit.save(tmp_path / "fit")
    assert list(tmp_path.iterdir()) == []
    fit.save(tmp_path / "fit")
    check_equal(ps.load(tmp_path / "fit"), fit)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": 7}, "epochs was 6, is 7"),
        ({"batch_size": 20}, "batch_size was 16, is 20"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"dtype": torch.float64}, 'dtype was "float32", is "float64"'),
        ({"learning_rate": ps.schedules.OneCycle(0.1)}, "learning_rate.peak was 0.02, is 0.1"),
        ({"kl_weight": ps.schedules.WarmUp(2)}, "kl_weight"),
        ({"patience": 4}, "patience was null, is 4"),
        ({"validation": 0.2}, "validation was 0.1, is 0.2"),
        ({"eps": 1e-6}, "eps was 1e-08, is 1e-06"),
    ],
)
def test_another_run_is_refused_by_what_differs(cells, tmp_path, monkeypatch, options, says):
    stopped(cells, tmp_path / "run", monkeypatch, 2)
    with pytest.raises(CheckpointError, match=says):
        run(cells, checkpoint=tmp_path / "run", resume=True, **options)
    assert len(ps.load(tmp_path / "run").history) == 2


def test_another_model_guide_or_other_cells_are_refused(cells, batched_cells, tmp_path, monkeypatch):
    stopped(cells, tmp_path / "run", monkeypatch, 2)
    model = ps.SCVI(20, 4, n_hidden=16)
    changed = cells.counts.copy()
    changed[np.ix_([5, 6], [3, 4])] += np.array([[1, -1], [-1, 1]])  # cells and genes keep their totals
    assert changed.min() >= 0
    others = {
        "model.n_latent was 3, is 4": (cells, model, ps.guides.DiagonalNormal(model, n_hidden=16, dropout=0.1)),
        "digest of counts": (ps.Cells.from_counts(changed), *parts(cells)),
        "n_cells was 60, is 59": (cells.take(range(59)), *parts(cells)),
        "schema": (batched_cells, *parts(batched_cells)),
        "gene_names": (ps.Cells.from_counts(cells.counts, gene_names=[f"g{i}" for i in range(20)]), *parts(cells)),
    }
    others["guide.part"] = (cells, model := parts(cells)[0], ps.guides.FullRankNormal(model, n_hidden=16))
    for says, (data, law, guide) in others.items():
        before = {name: value.clone() for name, value in law.state_dict().items()}
        with pytest.raises(CheckpointError, match=says):
            run(data, law, guide, checkpoint=tmp_path / "run", resume=True)
        started = {"decoder.heads.log_mean.bias", "library.loc", "library.scale"}  # at the data's, as in any fit
        assert all(torch.equal(v, before[k]) for k, v in law.state_dict().items() if k not in started)


def test_a_users_prior_resumes(cells, tmp_path, monkeypatch):
    def made():
        return parts(cells, prior=lambda: dist.Laplace(torch.zeros(3), torch.ones(3)).to_event(1))

    whole = run(cells, *made())
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            run(cells, *made(), checkpoint=tmp_path / "run")
    check_equal(run(cells, *made(), checkpoint=tmp_path / "run", resume=True), whole)


def weights_of(folder, config="config.json"):
    return folder / json.loads((folder / config).read_text())["weights"]["file"]


@pytest.mark.parametrize("which", ["config", "weights"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_there(cells, tmp_path, monkeypatch, which, damage):
    whole, folder = run(cells), tmp_path / "run"
    stopped(cells, folder, monkeypatch, 3)
    path = folder / "config.json" if which == "config" else weights_of(folder)
    raw = path.read_bytes()
    middle = raw.index(b".", len(raw) // 2) + 1 if which == "config" else len(raw) // 2  # a decimal: it stays JSON
    content = {
        "flipped": raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :],
        "truncated": raw[:middle],
        "empty": b"",
    }
    path.write_bytes(content[damage])
    with pytest.raises(CheckpointError, match="corrupt") as caught:
        ps.load(folder)
    assert path.name in str(caught.value)
    with pytest.raises(CheckpointError, match="corrupt.*after epoch 2, is intact: delete config.json"):
        run(cells, checkpoint=folder, resume=True)
    assert path.read_bytes() == content[damage]
    (folder / "config.json").unlink()
    check_equal(run(cells, checkpoint=folder, resume=True), whole)


def test_a_kill_while_writing_leaves_the_previous_or_the_new_checkpoint(cells, tmp_path, monkeypatch):
    """Stop at every single operation on files of one checkpoint in turn."""
    whole, operations = run(cells, epochs=2), []
    replace = Path.replace
    for n in range(1, 20):
        folder, count = tmp_path / str(n), [0]

        def stop(*args, function, n=n, count=count):
            count[0] += 1
            if count[0] == n:
                raise Stopped
            return function(*args)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", lambda *a, stop=stop: stop(*a, function=replace))
            patch.setattr(Path, "unlink", lambda *a, **k: None)  # a killed process cleans nothing up
            patch.setattr(archive.os, "fsync", lambda *a, stop=stop: stop(*a, function=lambda number: None))
            try:
                run(cells, epochs=2, checkpoint=folder)
                operations.append(n)
            except Stopped:
                pass
        if count[0] >= n:
            check_equal(run(cells, epochs=2, checkpoint=folder, resume=True), whole)
            assert len(list(folder.iterdir())) == 4  # config, previous, and the weights of both
    assert not operations


def check_mutations(cells, tmp_path, monkeypatch, n, seed):
    """Mutate a checkpoint in ``n`` ways: neither loading nor resuming fails with anything but the package's errors."""
    folder, path, other, rng, outcomes = *(tmp_path / x for x in "abc"), np.random.default_rng(seed), Counter()
    stopped(cells, folder, monkeypatch, 2, epochs=2 + 1)
    stopped(cells, other, monkeypatch, 1)
    for _ in range(n):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(folder, path)
        kind, errors = mutate(path, other, rng), []
        current = ("config.json", weights_of(folder).name)  # not what is kept of the checkpoint before
        damaged = kind == "bytes" and any(changed(folder, path, name) for name in current)
        if damaged and not changed(folder, path, "config.json", "previous.json"):
            damaged = False  # the two changed places: the one before is as good as it was
        had_config = (path / "config.json").exists()  # without it the one before goes on
        for attempt in (lambda: ps.load(path), lambda: run(cells, checkpoint=path, resume=True, epochs=3)):
            try:
                attempt()
            except PyroScviError as error:
                errors.append(error)
        assert len(errors) == 2 or not damaged or (errors and not had_config), kind
        outcomes[kind, len(errors)] += 1
    return outcomes


def changed(folder, path, name, other=None):
    files = folder / (other or name), path / name
    return not files[1].exists() or files[0].read_bytes() != files[1].read_bytes()


@pytest.mark.filterwarnings("ignore:the loss was NaN or infinite")
def test_mutated_checkpoints_are_refused(cells, tmp_path, monkeypatch):
    outcomes = check_mutations(cells, tmp_path, monkeypatch, 150, 0)
    assert outcomes["bytes", 2] > 30
    assert outcomes["signed", 1] + outcomes["signed", 2] > 10
    assert outcomes["signed", 0] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the loss was NaN or infinite")
def test_2_000_mutated_checkpoints_are_refused(cells, tmp_path, monkeypatch):
    assert check_mutations(cells, tmp_path, monkeypatch, 2_000, 1).total() == 2_000


def kill(moments, folder, seed):
    script = TESTS / "support" / "kill_checkpoints.py"
    command = [sys.executable, str(script), str(moments), str(folder), str(seed)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_kill_9_at_some_moments(tmp_path):
    counts = kill(4, tmp_path, 0)
    assert counts["killed"] == counts["loaded"] == counts["equal"] == 4


@pytest.mark.slow
def test_kill_9_at_200_moments(tmp_path):
    counts = kill(200, tmp_path, 1)
    assert counts["killed"] == counts["loaded"] == counts["equal"] == 200
