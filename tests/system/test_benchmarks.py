"""The benchmarks: arithmetic of the harness, systems that should agree, that commands run, and how folders depend."""

import ast
import importlib
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.inference.evaluation import bound_terms, evaluating

pytest.importorskip("benchmarks", reason="the benchmarks are in the repository, not in the package")

import benchmarks
from benchmarks import cli
from benchmarks.choice import beside_peer, defaults, figure, integration
from benchmarks.harness import processes, report, results, simulation, worker
from benchmarks.harness.elbo import held_out_elbo
from benchmarks.harness.exchanged import Laws, Scene, drawn_from
from benchmarks.harness.interleaving import Interleaved, Outcome
from benchmarks.harness.simulation import batch_labels, zinb_counts
from benchmarks.harness.stopwatch import Sample, Stopwatch
from benchmarks.quality import calls, learning_curves
from benchmarks.quality.held_out_scores import our_outputs
from benchmarks.rows import atlas, devices, large_data, time_to_quality
from benchmarks.systems import callers, device_agreement, device_steps, matrix_products, ours_large, pyro_svi
from benchmarks.systems.our_models import matched, matched_constant
from benchmarks.truth import fits, formulas, separated
from benchmarks.truth import table as truth
from benchmarks.truth.finding import Finding


def samples(*cpu, work=100):
    return [Sample(seconds, 2 * seconds, {"work": work}) for seconds in cpu]


# --- lines of the table ---


def test_ratios_are_of_minima_and_of_medians():
    line = results.compared(
        "row", results.CELLS_PER_SECOND, samples(2, 1, 4), samples(9, 6, 3), samples(0.5), bar=results.AtLeast(3)
    )
    assert (line.ours, line.peer, line.limit) == (100, pytest.approx(100 / 3), 200)
    assert (line.ratio_min, line.ratio_median, line.ratio_wall, line.share) == (3, 3, 3, 0.5)
    assert line.met == "yes"


@pytest.mark.parametrize(("theirs", "met"), [((3.1, 3.2, 3.3), "yes"), ((2.9, 3.2, 3.3), "no"), ((3, 2.9, 3), "no")])
def test_a_bar_on_the_ratio_needs_minima_and_medians(theirs, met):
    line = results.compared("row", results.SECONDS, samples(1, 1, 1), samples(*theirs), bar=results.AtLeast(3))
    assert line.met == met


def test_a_bar_on_our_figure_needs_every_round():
    line = results.Line("row", ours=1.0, ours_rounds=[1.0, 1.4])
    assert line.judged(results.AtMost(1.3)).met == "no"
    assert line.judged(results.AtMost(1.5)).met == "yes"


def test_table_has_every_line_and_its_note():
    lines = [results.compared("one", results.SECONDS, samples(1), samples(2)), results.skipped("two", "no data")]
    head, _, one, two, note = report.table(lines).splitlines()
    assert head.split()[:3] == ["row", "unit", "ours"]
    assert one.split() == ["one", "CPU", "s", "0.01", "0.02", "2.00", "(2.00)", "2.00"]
    assert two == "two"
    assert note.strip() == "skipped: no data"


def test_json_keeps_lines(tmp_path):
    lines = [results.compared("one", results.SECONDS, samples(1, 2), samples(2)), results.skipped("two", "no data")]
    lines.append(
        time_to_quality.ratio_line("three", [None], [time_to_quality.Point(1, 2.0, 0.0, 0.0)], results.AtLeast(2), "")
    )
    report.write(tmp_path / "out.json", lines, {"command": "c"}, {"one": {"found": math.inf}})
    assert repr(report.read(tmp_path / "out.json")) == repr(lines)
    assert json.loads((tmp_path / "out.json").read_text())["details"] == {"one": {"found": "inf"}}


@pytest.mark.parametrize(("new", "said"), [((3, 4), "beyond the spread"), ((1.5, 3), "within the spread")])
def test_changes_say_whether_rounds_overlap(new, said):
    old, new = (results.compared("row", results.SECONDS, samples(*cpu, work=1), samples(4)) for cpu in ((1, 2), new))
    text = report.changes([old], [new, results.skipped("other", "")])
    assert said in text
    assert text.startswith(f"row: 1 -> {new.ours:.4g} CPU s, x {new.ours:.2f}")
    assert "other" not in text
    assert report.changes([], [new]) == "no line in common\n"


# --- data and clocks ---


def test_simulated_counts_are_seeded_and_sparse():
    counts = zinb_counts(3000, 300, seed=1)
    assert (counts != zinb_counts(3000, 300, seed=1)).nnz == 0
    assert (counts != zinb_counts(3000, 300, seed=2)).nnz > 0
    assert counts.nnz / 900_000 == pytest.approx(0.12, abs=0.03)
    assert counts.data.min() > 0
    assert counts.dtype == np.int32
    assert set(batch_labels(100)) == {"a", "b"}


def test_stopwatch_pauses():
    watch = Stopwatch()
    with watch:
        pass
    paused = watch.wall
    sum(range(100_000))
    assert watch.wall == paused
    with watch:
        sum(range(100_000))
    assert watch.sample(work=2).facts == {"work": 2}
    assert watch.wall > paused
    assert watch.cpu > 0


def test_gemms_have_the_operations_of_a_step():
    assert matrix_products.flops_per_cell(720) == pytest.approx(1.5e6, rel=0.01)
    assert matrix_products.gemms(30, 16, 64, 2)().facts["work"] == 128


# --- systems that should be the same ---


def test_bound_agrees_with_that_of_the_package(cells):
    model, options = matched(cells, 0)
    fit = ps.fit(model, cells, epochs=3, validation=0, progress=False, device="cpu", **options)
    x, gamma = cells[:]
    found = held_out_elbo(our_outputs(fit), x.double(), samples=200)
    with evaluating(fit.model, fit.guide, 1):
        terms, _ = bound_terms(fit.guide, x, gamma, 200)
    se = math.hypot(found.se, float((terms.var(0).mean() / terms.numel()).sqrt()))
    assert abs(found.value - float(terms.mean())) < 5 * se
    assert se < 0.2


def test_bound_by_hand_trains_as_pyro_does(batched_cells):
    losses = []
    for elbo in (None, pyro_svi.ByHand()):
        model, options = matched_constant(batched_cells, 0)
        options |= {"epochs": 2, "batch_size": 20, "validation": 0, "progress": False, "device": "cpu", "elbo": elbo}
        losses.append(ps.fit(model, batched_cells, **options).history.train_loss)
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_plain_pyro_trains():
    facts = pyro_svi.plain(n_cells=64, n_genes=80, batch_size=32, epochs=1)().facts
    assert facts["work"] == 64
    assert 0 < facts["train_loss"] < 1000


@pytest.mark.filterwarnings("ignore:.* ha(s|ve) no counts")
def test_large_files_load_and_training_ends_after_its_steps(tmp_path):
    path = str(tmp_path / "cells.h5ad")
    assert simulation.write(path, 90, 80)().facts["nnz"] > 0
    facts = ours_large.load_and_train(path, steps=6, batch_size=32)().facts
    assert facts["cpu_seconds_per_epoch"] > 0
    assert 0 < facts["before"] <= facts["loaded"] <= facts["peak"]


# --- processes and rows ---


def test_worker_prepares_measures_and_reports_errors(monkeypatch):
    module = ModuleType("some_tasks")
    module.task = lambda n: lambda: Sample(1.0, 2.0, {"work": n})
    monkeypatch.setitem(sys.modules, "some_tasks", module)
    requests = [{"prepare": ["a", "some_tasks:task", {"n": 3}]}, {"measure": ["a"]}, {"clear": []}, {"measure": ["a"]}]
    replies = io.StringIO()
    worker.serve(map(json.dumps, requests), replies)
    prepared, measured, cleared, failed = map(json.loads, replies.getvalue().splitlines())
    assert prepared == cleared == {}
    assert measured == {"cpu": 1.0, "wall": 2.0, "facts": {"work": 3}}
    assert "KeyError" in failed["error"]


class Scripted:
    """A bench whose peer reaches -10 in 30 s and whose fits of ours reach -20 / epochs after as many seconds."""

    seeds, whole_curves = (0, 1), False

    def file(self, name):
        return name

    def once(self, system):
        if system.side == "scvi-tools":
            return Sample(30.0, 30.0, {"curve": [[1, 15.0, -12.0, 0.1], [2, 30.0, -10.0, 0.1]]})
        epochs = system.options["epochs"]
        return Sample(float(epochs), 1.0, {"value": -20 / epochs, "se": 0.1})


def test_time_to_quality_stops_at_the_first_run_that_is_as_good(monkeypatch):
    monkeypatch.setattr(time_to_quality, "require_packages", lambda names: None)
    peers = (time_to_quality.PeerRun("peer", 2, {}, results.AtLeast(15)),)
    row = time_to_quality.TimeToQuality("row", "cells.h5ad", "matched", "bound", peers)
    (line,), details = row.run(Scripted())
    assert (line.ours, line.peer, line.ratio_min, line.ratio_median, line.met) == (2, 30, 15, 15, "yes")
    assert [point.epochs for point in details["curves"][1]["ours"]] == [1, 2]


def test_a_target_that_is_not_reached_meets_no_bar():
    peer = time_to_quality.Point(20, 30.0, -10.0, 0.1)
    line = time_to_quality.ratio_line(
        "row", [time_to_quality.Point(2, 1.0, -9.0, 0.1), None], [peer, peer], results.AtLeast(10), ""
    )
    assert (line.ratio_min, line.ratio_median, line.met) == (0, 15, "no")


def test_curves_are_drawn(tmp_path):
    points = [[1, 1.0, -12.0, 0.1], [2, 3.0, -10.0, 0.1]]
    kept = {"file": "cells.h5ad", "judge": "bound", "curves": {0: {"peer": points, "ours": points}}}
    (path,) = learning_curves.save(tmp_path, {"row": kept, "other": {}})
    assert path.name == "held-out_ELBO.png"
    assert path.stat().st_size > 1000


def test_rows_are_chosen_by_how_they_begin():
    rows = cli.cpu_rows(quick=True)
    found = [row.name for row in cli.chosen(rows, ["training-1024"])]
    assert sorted(found) == ["training-1024", "training-1024-bfloat16", "training-1024-replayed"]
    assert len(cli.chosen(rows, None)) == len(rows)
    with pytest.raises(SystemExit, match="no row is named nothing"):
        cli.chosen(rows, ["nothing"])


def test_a_row_that_fails_leaves_the_others_be():
    class Failing:
        name = "failing"

        def run(self, bench):
            raise processes.TaskError("Traceback\nValueError: no")

    class Working(Failing):
        name = "working"

        def run(self, bench):
            return Outcome([results.Line("fine")], {})

    failing, working = cli.measured([Failing(), Working()], None).values()
    assert [line.note for line in failing.lines] == ["failed: ValueError: no"]
    assert working.lines[0].title == "fine"


@pytest.fixture
def no_peer(monkeypatch):
    found = processes.importlib.util.find_spec
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None if name == "scvi" else found(name))


@pytest.mark.usefixtures("no_peer")
def test_cpu_runs_without_the_peer(tmp_path, capsys):
    rows = ["training-128", "predictive", "differential-kernel", "bound-cortex"]
    cli.main(["cpu", "--quick", "--rounds", "1", "--out", str(tmp_path / "out.json"), "--rows", *rows])
    printed = capsys.readouterr().out
    assert "the figures mean nothing" in printed
    assert "no peer: scvi is not installed: pip install 'pyro-scvi[peer]'" in printed
    assert "skipped: scvi is not installed" in printed
    lines = {line.title: line for line in report.read(tmp_path / "out.json")}
    assert lines["training at batch 128"].ours > 0
    assert lines["training at batch 128"].share > 0
    assert not any(line.met == "failed" for line in lines.values())


@pytest.mark.usefixtures("no_peer")
def test_gpu_dry_run(capsys):
    cli.main(["gpu", "--dry-run", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert "a dry run" in printed
    assert "launch-bound share at batch 1024" in printed
    assert "epochs with load" in printed
    for title in (
        "products, tf32",
        "ZINB, extreme: log p",
        "annealed_evidence",
        "resumed half-way",
        "waits of the host",
    ):
        assert title in printed
    assert "failed" not in printed


def test_a_verb_that_fails_on_a_device_leaves_the_others_be():
    def verb(fit, cells):
        raise RuntimeError("no kernel\nimage")

    assert device_agreement._difference(verb, None, None, None) == "RuntimeError: no kernel image"
    facts = {"differences": {"embed": "RuntimeError: no kernel image", "impute": 0.01, "evidence": 0.2}}
    bench = SimpleNamespace(once=lambda system: Sample(0.0, 0.0, facts))
    lines = devices.Verbs("cuda", devices.QUICK).run(bench).lines
    assert [line.met for line in lines] == ["failed", "yes", "no"]


def test_differences_are_in_spreads_and_not_finite_entries_must_be_the_same():
    expected = np.array([0.0, 2.0, np.inf])
    assert device_agreement.relative_difference(expected + 0.5, expected) == 0.5
    assert device_agreement.relative_difference(np.array([0.0, 2.0, 1.0]), expected) == math.inf
    table = pd.DataFrame({"name": ["a", "b"], "p": [0.0, 2.0], "q": [0.0, 20.0]})
    assert device_agreement.relative_difference(table.assign(p=[1.0, 2.0]), table) == 0.5


def test_a_step_on_a_device_is_the_median_of_the_second_half():
    facts = device_steps.timed(40, 20, 8, 4, "cpu", tf32=True)().facts
    assert 0 < facts["step"] < 5
    assert facts["peak"] == 0
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_without_a_device_says_so():
    with pytest.raises(SystemExit, match="no CUDA device; --dry-run"):
        cli.main(["gpu"])


# --- calls of genes whose differences are known ---

SECOND = np.arange(40) >= 20  # of the laws


def laws():
    generator = np.random.default_rng(0)
    share = generator.dirichlet(np.full(60, 3.0), 40) * np.exp(generator.normal(0, 0.5, (2, 60)))[SECOND.astype(int)]
    share /= share.sum(1, keepdims=True)
    return Laws(share, np.full(share.shape, 4.0), np.full(share.shape, 0.2))


@pytest.mark.parametrize("depths", [1.0, 4.0, 0.1])
def test_exchanged_genes_do_not_differ_and_the_others_by_what_is_said(depths):
    drawn = drawn_from(laws(), SECOND, 3000.0, Scene("", 6000, depths), seed=1)
    rates = [drawn.counts[drawn.second == side].sum(0) for side in (False, True)]
    a, b = (rate / rate.sum() for rate in rates)
    np.testing.assert_allclose(np.log2(a / b), drawn.lfc, atol=0.12)
    assert (drawn.lfc[drawn.null] == 0).all()
    assert np.abs(drawn.lfc[~drawn.null]).max() > 0.5
    totals = [drawn.counts[drawn.second == side].sum(1).mean() for side in (False, True)]
    assert totals[0] / totals[1] == pytest.approx(depths, rel=0.05)


def test_donors_differ_in_every_gene():
    drawn = drawn_from(laws(), SECOND, 3000.0, Scene("", 4000, n_donors=4), seed=1)
    assert [sorted(set(drawn.donor[drawn.second == side])) for side in (False, True)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    sums = np.stack([drawn.counts[drawn.donor == donor].sum(0) for donor in range(8)])
    shares = sums / sums.sum(1, keepdims=True)
    assert np.log(shares[:, drawn.null]).std(0, ddof=1).mean() == pytest.approx(0.3, abs=0.05)


def test_calls_are_judged_by_what_is_null():
    null = np.array([True, True, False, False, False])
    case = callers.Case(drawn_from(laws(), SECOND, 9.0, Scene("", 5), seed=0)._replace(null=null), None, None, null, 0)
    found = calls.judged(callers.Calls(np.array([0.01, 0.9, 0.05, 0.01, 0.06]), np.arange(5.0)), case)
    assert found == pytest.approx({"false_share": 1 / 3, "power": 2 / 3, "auc": 1.0, "called": 3})


@pytest.mark.filterwarnings("ignore:.*(no counts|depths differ)")
def test_calls_of_every_system_beside_the_truth(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(calls, "source", lambda folder, epochs: (laws(), SECOND, 300.0))
    systems = ["means", "donors", "pairs", "decoded", "linear", "thinned", "log", "wilcoxon"]
    options = ["--cells", "60", "--seeds", "0", "1", "--epochs", "1", "--systems", *systems]
    calls.main([*options, "--out", str(tmp_path / "calls.json")])
    written = json.loads((tmp_path / "calls.json").read_text())
    table = {(row["scene"], row["system"]): row for row in written["over seeds"]}
    assert len(written["rows"]) == 2 * (3 * len(systems) - 2)
    assert len(table) == 3 * len(systems) - 2
    for row in table.values():
        assert 0 <= row["false_share"] <= 1
        assert row["auc"] > 0.45
    means = table["equal", "GroupMeans"]
    assert means["slope"] == pytest.approx(1, abs=0.35)
    assert means["auc"] > 0.6
    assert means["auc_se"] > 0
    assert "covered_se" in capsys.readouterr().out


# --- the atlas ---


@pytest.mark.slow
def test_an_atlas_in_small_runs_from_end_to_end_and_is_not_run_again(tmp_path, capfd):
    source = tmp_path / "real.h5ad"
    anndata.AnnData(simulation.zinb_counts(300, 60).astype(np.float32)).write_h5ad(source)
    sizes = ["--cells", "1200", "--genes", "40", "--batches", "3", "--batch-size", "128"]
    options = ["--folder", str(tmp_path / "atlas"), "--source", str(source), *sizes]
    atlas.main(options)
    rows = {name: json.loads((tmp_path / "atlas" / f"{name}.json").read_text()) for name in atlas.STAGES}
    assert len(rows["train"]["epochs"]) == 2
    assert "SIGKILL" in capfd.readouterr().err  # one process was killed, and the run went on
    assert len(anndata.read_zarr(tmp_path / "atlas" / "embedding.zarr").obsm["X_pyro_scvi"]) == 1200
    assert all(row["peak_mb"] > 100 and row["s"] > 0 for row in rows.values())
    atlas.main(options)
    assert json.loads((tmp_path / "atlas" / "train.json").read_text()) == rows["train"]


# --- the default ---


@pytest.fixture
def tiny_cortex(tmp_path):
    """A folder with a file of 60 cells under the name of the cortex data, and options of a quick run on it."""
    obs = pd.DataFrame({"labels": np.repeat(["a", "b"], 30)}, index=[f"c{i}" for i in range(60)])
    anndata.AnnData(zinb_counts(60, 12), obs=obs).write_h5ad(tmp_path / defaults.FILES["cortex"])
    sizes = ["--data", "cortex", "--epochs", "1", "--cells", "4", "--samples", "10"]
    return ["--folder", str(tmp_path), *sizes, "--out", str(tmp_path / "fits.jsonl")]


def test_variants_of_the_default_go_on_where_they_stopped(tiny_cortex, monkeypatch, capsys):
    monkeypatch.setattr(defaults, "measured", lambda asked, fit, samples, scored: {"evidence": [1.0, 2.0]})
    defaults.main([*tiny_cortex, "--variants", "default"])
    defaults.main([*tiny_cortex, "--variants", "default", "one_layer"])
    assert [line["variant"] for line in defaults.read(Path(tiny_cortex[-1]))] == ["default", "one_layer"]
    monkeypatch.setattr(defaults, "fitted", None)  # nothing is left to fit
    capsys.readouterr()
    defaults.main([*tiny_cortex, "--variants", "default", "one_layer"])
    assert "one_layer" in capsys.readouterr().out


@pytest.mark.slow
def test_a_fit_of_a_variant_is_measured(tiny_cortex):
    defaults.main([*tiny_cortex, "--variants", "default"])
    (line,) = defaults.read(Path(tiny_cortex[-1]))
    assert len(line["evidence"]) == 4
    assert {"bound", "train_bound", "best_epoch", "fit_seconds"} < line.keys()
    assert line["z"].keys() == line["expression"].keys() == {"silhouette", "ari", "nmi", "accuracy"}


def test_variants_are_paired_over_shared_seeds_and_cells():
    lines = [
        {"data": "d", "variant": "default", "seed": 0, "evidence": [1.0, 2.0, 3.0, 90.0]},
        {"data": "d", "variant": "default", "seed": 1, "evidence": [0.0, 0.0, 0.0, 0.0]},
        {"data": "d", "variant": "other", "seed": 0, "evidence": [2.0, 4.0, 6.0]},
        {"data": "d", "variant": "other", "seed": 2, "evidence": [9.0, 9.0, 9.0]},
    ]
    row = defaults.paired(lines).set_index("variant").loc["other"]
    assert (row.seeds, row.nats, row.se) == (1, 2.0, pytest.approx(1 / math.sqrt(3)))
    assert defaults.paired([line for line in lines if line["variant"] == "other"]).variant.empty


def test_the_default_and_its_peer_are_asked_the_same_and_paired(tiny_cortex, monkeypatch, capsys):
    asked = []

    def system(evidence):
        def score(question, seed, samples, epochs):
            asked.append((question.train.totals.sum(), question.held_out.totals.sum(), seed, samples, epochs))
            places = {"z": np.random.default_rng(seed).normal(size=(question.train.n_cells, 2))}
            found = beside_peer.evidence_of(np.array(evidence), np.array([0.1, 0.9]))
            return found | beside_peer.scores_of(question, places, 2.0)

        return score

    monkeypatch.setattr(beside_peer, "SYSTEMS", {"ours": system([5.0, 8.0]), beside_peer.PEER: system([3.0, 3.0])})
    options = [*tiny_cortex, "--systems", "ours", beside_peer.PEER, "--seeds", "0", "1"]
    beside_peer.main(options)
    assert len(asked) == 4
    assert asked[0] == asked[1]
    assert asked[2] == asked[3]
    beside_peer.main(options)
    assert len(asked) == 4  # nothing was left to fit
    pairs, means = capsys.readouterr().out.split("\n\n")[-2:]
    assert "| cortex | ours | 2 | 3.5 | 1.5 |" in pairs
    assert "| cortex | ours | 6.5 (0.0) | 0.500 (0.000) | 2.0 (0.0) |" in means


@pytest.fixture
def tiny_batches(tiny_cortex):
    """The same with two batches."""
    file = Path(tiny_cortex[1]) / defaults.FILES["cortex"]
    adata = anndata.read_h5ad(file)
    adata.obs["batch"] = np.tile(["x", "y"], 30)
    adata.write_h5ad(file)
    return tiny_cortex


def test_for_the_evidence_neither_system_is_told_the_batches(tiny_batches, monkeypatch):
    asked = []

    def score(question, seed, samples, epochs):
        assert len(set(question.batches)) == 2  # places are scored by them nevertheless
        asked.append([*question.train.columns, *question.held_out.columns])
        return {"evidence": [5.0, 8.0], "khat_share": 0.0}

    monkeypatch.setattr(beside_peer, "SYSTEMS", dict.fromkeys((beside_peer.OURS, beside_peer.PEER), score))
    beside_peer.main(tiny_batches)
    assert asked == [[], []]


def test_for_integration_both_systems_are_told_the_batches(tiny_batches, monkeypatch, capsys):
    asked = []

    def placed(question, seed, epochs):
        asked.append(([*question.train.columns], question.batches.tolist()))
        return {"z": np.random.default_rng(seed).normal(size=(question.train.n_cells, 2))}

    monkeypatch.setattr(integration, "SYSTEMS", {"ours": placed, "theirs": placed})
    folder, out = tiny_batches[1], tiny_batches[-1]
    options = ["--folder", folder, "--out", out, "--data", "cortex", "--seeds", "0", "1", "--systems", "ours", "theirs"]
    integration.main(options)
    integration.main(options)  # nothing is left to fit
    assert len(asked) == 4
    assert asked[0] == asked[1] == (["batch"], asked[0][1])
    assert set(asked[0][1]) == {"x", "y"}
    kept = defaults.read(Path(tiny_batches[-1]))
    assert 0 < kept[0]["z"]["entropy"] <= 1
    assert "| cortex | theirs |" in capsys.readouterr().out


def test_points_of_the_figure_are_paired_and_the_peer_is_placed_from_the_default(tmp_path):
    def line(variant, evidence, space, accuracy, seed=0):
        return {"data": "d", "variant": variant, "seed": seed, "evidence": evidence, space: {"accuracy": accuracy}}

    fits = [
        line(figure.EARLIER, [1.0, 3.0], "expression", 0.5),
        line(figure.NOW, [3.0, 7.0], "expression", 0.8),
        line(figure.NOW, [0.0, 0.0], "expression", 0.6, seed=1),  # no pair: not in the evidence
    ]
    peer = [line("pyro-scvi", [5.0, 5.0], "z", 0.1), line(beside_peer.PEER, [4.0, 4.0], "z", 0.4)]
    table = figure.points(fits, peer).set_index("variant")
    assert table.nats.to_dict() == {figure.EARLIER: 0, figure.NOW: 3.0, beside_peer.PEER: 2.0}
    assert table.accuracy.to_dict() == {figure.EARLIER: 0.5, figure.NOW: pytest.approx(0.7), beside_peer.PEER: 0.4}
    assert table.accuracy_sd[figure.NOW] == pytest.approx(0.2 / math.sqrt(2))
    for name, lines in (("fits", fits), ("peer", peer)):
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out.png"
    figure.main(["--fits", str(tmp_path / "fits"), "--peer", str(tmp_path / "peer"), "--out", str(out)])
    assert out.stat().st_size < 100_000


@pytest.mark.parametrize("variant", defaults.VARIANTS)
def test_a_variant_is_a_model_with_a_guide_of_its_own(variant):
    cells = ps.Cells.from_counts(np.ones((20, 6)))
    model, options = defaults.VARIANTS[variant](cells, 0)
    assert options.get("guide") is None or options["guide"].model is model


# --- folders ---

ROOT = Path(benchmarks.__file__).parent
FOLDERS = ["harness", "systems", "quality", "choice", "rows"]  # each imports only from those before it and from itself
COMMANDS = re.findall(r"python -m (benchmarks\.\S+)", benchmarks.__doc__)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_of_a_folder_only_go_forward(folder):
    files = [file for file in (ROOT / folder).glob("*.py") if file.name != "__init__.py"]
    allowed = {f"benchmarks.{name}" for name in FOLDERS[: FOLDERS.index(folder) + 1]}
    for file in files:
        imports = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        found = {".".join(node.module.split(".")[:2]) for node in imports if node.module.startswith("benchmarks")}
        assert found <= allowed, file
    assert len(files) <= 16


def test_every_task_is_a_function_of_its_module():
    rows = [*cli.cpu_rows(quick=True).values(), *cli.gpu_rows(dry=True).values()]
    tasks = {system.task for row in rows if isinstance(row, Interleaved) for system in row.systems.values()}
    tasks |= {f"{side}:{task}" for side in large_data.SIDES.values() for task in ("load_and_train", "epochs")}
    for file in (ROOT / "rows").glob("*.py"):
        tasks |= set(re.findall(r"benchmarks[.\w]+:\w+", file.read_text()))
    assert len(tasks) > 20
    for task in tasks:  # read and not imported, since scvi-tools may be absent
        module, function = task.split(":")
        tree = ast.parse((ROOT.parent / module.replace(".", "/")).with_suffix(".py").read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, task


@pytest.mark.parametrize(("error", "held"), [(0.01, "yes"), (0.03, "**no**"), (math.nan, "**no**")])
def test_a_row_that_does_not_hold_is_said_and_ends_the_command_with_an_error(error, held, monkeypatch, capsys):
    row = Finding("a check", "known", "a result", error, 0.02, "it is .02")
    monkeypatch.setattr(truth, "rows_of", lambda n_cells: [lambda: [row]])
    try:
        cli.main(["truth", "--cells", "20"])
        code = 0
    except SystemExit as ended:
        code = ended.code
    assert code == (held != "yes")
    assert f"| a check | known | a result | {error:.2g} | it is .02 | {held} |" in capsys.readouterr().out


def test_a_bar_in_a_cell_does_not_cut_the_row():
    table = pd.DataFrame([Finding("log p(x | z)", "known", "a result", 0.01, 0.02, "it is .02")]).assign(holds=True)
    assert r"| log p(x \| z) | known |" in truth.printed(table)


@pytest.mark.filterwarnings("ignore:.*genes have no counts")  # in two cells
def test_sums_over_a_grid_have_the_masses_of_a_symmetric_posterior():
    toy = separated.mirrored(separated.CENTRES["4 modes"], 2)
    np.testing.assert_allclose(toy.masses, 0.25, atol=1e-6)
    z = torch.tensor([[0.7, -1.2]])
    log_mean = toy.fit.model.decoder(z, torch.zeros(1, 0))["log_mean"].detach().numpy()
    np.testing.assert_allclose(log_mean[0], 1 + separated.slopes(6, 2) @ [0.7, 1.2], rtol=1e-5)


@pytest.mark.parametrize("check", [formulas.conditionals, formulas.pairs, formulas.weight_priors])
def test_closed_forms_hold(check):
    for row in check():
        assert row.error < row.limit, row


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")  # the decoder is held
def test_the_grid_has_the_evidence_of_the_models_own_density():
    fit, cells = fits.line_fit(), fits.line(3, 1)
    at = torch.as_tensor(fits.GRID).float()[:, None, None, None]
    with torch.no_grad():
        theta = fit.model.decode(at.expand(-1, len(cells.x), 1, 1), None, torch.zeros(len(cells.x), 0))
        own = fit.model.likelihood.marginal(**theta).log_prob(torch.as_tensor(cells.x).float())
    np.testing.assert_allclose(fits.log_density_on_grid(cells.x)[0], own.permute(1, 2, 0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.exp(fits.log_density_on_grid(cells.x)[1]).sum(), 1, atol=1e-6)


def test_processes_that_start_others_import_nothing_large():
    code = "import sys, benchmarks.cli, benchmarks.rows.memory, benchmarks.rows.stores, benchmarks.quality.baselines\n"
    code += "sys.exit(' '.join({'torch', 'scipy', 'anndata', 'matplotlib', 'pyro_scvi'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, stderr=subprocess.PIPE, text=True)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("module", COMMANDS)
def test_commands_have_help(module, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main(["--help"])
    assert ended.value.code == 0
    assert f"usage: python -m {module} " in capsys.readouterr().out


def test_every_module_that_can_run_is_a_documented_command():
    files = [file for file in ROOT.glob("*/*.py") if "__main__" in file.read_text() and file.name != "worker.py"]
    assert {f"benchmarks.{file.parent.name}.{file.stem}" for file in files} == set(COMMANDS)
