"""Figures: what is drawn, read off the axes; the picture of the program is that of the model."""

import os
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from pyro_scvi import SCVI, Cells, likelihoods, plots, priors
from pyro_scvi.errors import DataError
from pyro_scvi.likelihoods import library_size
from pyro_scvi.plots import canvas, diagram, projection
from pyro_scvi.priors import weights
from pyro_scvi.training.fit import fit
from tests.support.paths import ROOT
from tests.support.simulate import simulated_counts

PROGRAMS = {
    "zinb": ({}, {"z->h", "z->w", "l->w", "w->y", "h->x", "y->x"}),
    "nb": ({"likelihood": likelihoods.NB()}, {"z->w", "l->w", "w->y", "y->x"}),
    "poisson": ({"likelihood": likelihoods.Poisson()}, {"z->w", "l->w", "w->y", "y->x"}),
    "zip": ({"likelihood": likelihoods.ZIP()}, {"z->h", "z->w", "l->w", "w->y", "h->x", "y->x"}),
    "no library": ({"library": library_size.NoLibrary()}, {"z->h", "z->w", "w->y", "h->x", "y->x"}),
    "covariates": (
        {"library": library_size.NoLibrary(), "n_covariates": 2},
        {"z->h", "z->w", "gamma->h", "gamma->w", "w->y", "h->x", "y->x"},
    ),
    "library by batch": (
        {"library": library_size.LatentLibrary([6.0, 7.0], [0.3, 0.3]), "n_covariates": 2},
        {"z->h", "z->w", "gamma->h", "gamma->w", "gamma->l", "l->w", "w->y", "h->x", "y->x"},
    ),
    "flat": ({"prior": priors.Flat(3)}, {"z->h", "z->w", "l->w", "w->y", "h->x", "y->x"}),
    "simplex": ({"prior": priors.Dirichlet(3)}, {"z->h", "z->w", "l->w", "w->y", "h->x", "y->x"}),
    "weights": (
        {"weight_priors": {"decoder.heads.log_mean.*": weights.ARDWeights()}},
        {"theta->w", "z->h", "z->w", "l->w", "w->y", "h->x", "y->x"},
    ),
}


@pytest.fixture(scope="module")
def fitted():
    torch.set_num_threads(1)
    cells = Cells.from_counts(simulated_counts())
    return fit(SCVI(cells.n_genes, n_latent=3, n_hidden=8), cells, epochs=12, progress=False)


def axes():
    return Figure(layout="constrained").subplots()


def drawn(ax, kind):
    """Artists by name, of nodes, edges or plates."""
    named = {patch.get_gid(): patch for patch in ax.patches if patch.get_gid()}
    return {name.removeprefix(kind): patch for name, patch in named.items() if name.startswith(kind)}


def centre(patch):
    return np.array(patch.center if isinstance(patch, Circle) else patch.get_center())


@pytest.fixture(params=PROGRAMS)
def picture(request):
    options, edges = PROGRAMS[request.param]
    ax = plots.program(SCVI(5, n_latent=3, n_hidden=4, **options), axes())
    return ax, edges


def test_program_draws_the_dependencies_of_the_model(picture):
    ax, edges = picture
    assert drawn(ax, "edge:").keys() == edges
    assert drawn(ax, "node:").keys() == {name for edge in edges for name in edge.split("->")}


def test_program_arrows_go_from_border_to_border_past_every_other_site(picture):
    ax, _ = picture
    nodes = drawn(ax, "node:")
    for name, arrow in drawn(ax, "edge:").items():
        start, end = (nodes[node] for node in name.split("->"))
        path = arrow.get_path().vertices
        tail, tip = path[0], path[np.linalg.norm(path - centre(end), axis=1).argmin()]
        for node, point in ((start, tail), (end, tip)):
            gap = np.abs(point - centre(node)).max() if isinstance(node, Rectangle) else None
            reach = np.linalg.norm(point - centre(node)) if gap is None else gap
            assert reach == pytest.approx(diagram.RADIUS if gap is None else 0.8 * diagram.RADIUS, abs=0.03), name
        line = tail + np.linspace(0, 1, 200)[:, None] * (tip - tail)
        for other, node in nodes.items():
            if node not in (start, end):
                assert np.linalg.norm(line - centre(node), axis=1).min() > diagram.RADIUS, (name, other)


def test_program_plates_hold_their_sites_and_nothing_overlaps(picture):
    ax, _ = picture
    nodes = {name: centre(node) for name, node in drawn(ax, "node:").items()}
    held = {}
    for plate, frame in drawn(ax, "plate:").items():
        box = frame.get_bbox().padded(-diagram.RADIUS)
        held[plate] = {name for name, place in nodes.items() if box.contains(*place)}
    assert held["genes"] == nodes.keys() & {"w", "y", "h", "x"}
    assert held["cells"] == nodes.keys() - {"theta"}
    places = np.array(list(nodes.values()))
    distances = np.linalg.norm(places[:, None] - places, axis=-1) + 9 * np.eye(len(places))
    assert distances.min() > 2.5 * diagram.RADIUS


def test_program_shades_what_is_observed_and_doubles_what_is_deterministic():
    for likelihood, doubles in ((likelihoods.ZINB(), 0), (likelihoods.Poisson(), 1)):
        ax = plots.program(SCVI(5, n_latent=3, n_hidden=4, likelihood=likelihood), axes())
        nodes = drawn(ax, "node:")
        shaded = {name for name, node in nodes.items() if mpl.colors.to_hex(node.get_facecolor()) == canvas.SHADE}
        assert shaded == {"x"}
        rings = [patch for patch in ax.patches if isinstance(patch, Circle) and not patch.get_gid()]
        assert [ring.center for ring in rings] == [nodes["w"].center] * doubles


def test_program_letters_and_sizes():
    ax = plots.program(SCVI(33694, n_latent=3, n_hidden=4, n_covariates=1), axes(), n_cells=1306127)
    texts = {text.get_text() for text in ax.texts}
    letters = {"$z_{n}$", r"$\ell_{n}$", r"$\gamma_{n}$", "$w_{ng}$", "$y_{ng}$", "$h_{ng}$", "$x_{ng}$"}
    assert texts == letters | {"33,694 genes", "1,306,127 cells"}
    assert isinstance(drawn(ax, "node:")["gamma"], Rectangle)
    ax.figure.draw_without_rendering()
    for text in ax.texts[:2]:  # a size may be longer than the sites of its plate are wide
        box = text.get_window_extent()
        assert any(
            frame.get_window_extent().x0 < box.x0 and box.x1 < frame.get_window_extent().x1
            for frame in drawn(ax, "plate:").values()
        )
    assert "cells" in {text.get_text() for text in plots.program(SCVI(5, n_hidden=4), axes()).texts}


def test_program_names_global_latents():
    model = SCVI(5, n_hidden=4, weight_priors={"decoder.*": weights.NormalWeights()})
    texts = [text.get_text() for text in plots.program(model, axes()).texts]
    assert any(text.startswith("decoder.") and text.endswith("more") for text in texts)


def test_program_leaves_model_and_session_as_they_were():
    model = SCVI(5, n_hidden=4).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    plots.program(model, axes())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not list(pyro.get_param_store().keys())


def test_loss_draws_the_history(fitted):
    ax = axes()
    assert plots.loss(fitted, ax) is ax
    for line, column in zip(ax.lines, ("train_loss", "held_out_loss"), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), fitted.history.index)
        np.testing.assert_array_equal(line.get_ydata(), fitted.history[column])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "loss, nats per cell")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["training cells", "held-out cells"]


@pytest.mark.parametrize("epochs", [1, 3])
def test_loss_without_held_out_cells(cells, epochs):
    alone = fit(SCVI(cells.n_genes, n_hidden=8), cells, epochs=epochs, validation=0, progress=False)
    ax = plots.loss(alone)
    assert len(ax.lines) == 1
    ax.figure.canvas.draw()


def test_project_keeps_two_latents():
    z = np.arange(8.0).reshape(4, 2)
    assert plots.project(z).coordinates is z
    assert plots.embedding(z, ax=axes()).get_xlabel() == "latent 1"


@pytest.mark.parametrize("latents", [1, 5])
def test_project_without_umap_takes_principal_components(monkeypatch, latents):
    monkeypatch.setitem(sys.modules, "umap", None)
    z = np.random.default_rng(0).normal(size=(40, latents)) * np.arange(1, latents + 1)
    points, method = plots.project(z)
    assert (method, points.shape) == (projection.PCA, (40, 2))
    spectrum = np.append(np.sort(np.linalg.eigvalsh(np.cov(z.T).reshape(latents, latents)))[::-1], 0)[:2]
    np.testing.assert_allclose(np.cov(points.T), np.diag(spectrum), atol=1e-10)
    assert plots.embedding(z, ax=axes()).get_ylabel() == "PCA 2"


def check_umap():
    """UMAP repeats itself, keeps groups apart, and leaves the state of the process alone, the threads of torch, too."""
    from tests.system.test_reproducibility import changed, global_state

    z = np.repeat(np.eye(3) * 20, 20, axis=0) + np.random.default_rng(0).normal(size=(60, 3))
    before = global_state()
    points, method = plots.project(z, seed=3)
    assert (method, points.shape) == (projection.UMAP, (60, 2))
    np.testing.assert_array_equal(points, plots.project(z, seed=3).coordinates)
    centres = points.reshape(3, 20, 2).mean(1)
    spread = points.reshape(3, 20, 2).std(1).max()
    assert min(np.linalg.norm(centres[a] - centres[b]) for a, b in ((0, 1), (0, 2), (1, 2))) > 3 * spread
    plots.project(np.random.default_rng(0).normal(size=(700, 10)))
    assert set(changed(before, global_state())) <= {"threads"}  # the one of tqdm, which watches UMAP's bars


@pytest.mark.integration
def test_umap_in_a_process_of_its_own():
    """There the environment alone sets the number of threads; UMAP's compiler takes too long to run it here as well."""
    pytest.importorskip("umap")
    command = [sys.executable, "-W", "ignore", "-c", "from tests.plots.test_plots import check_umap; check_umap()"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "latent", [np.ones(3), np.ones((0, 2)), np.array([[0.0, np.nan]]), [["a", "b"]], [[None, 1.0]], "z", None]
)
def test_project_refuses_what_is_no_embedding(latent):
    with pytest.raises(DataError, match="finite matrix"):
        plots.project(latent)


def colour_by_point(ax):
    cloud = ax.collections[0]
    return {
        tuple(point): tuple(colour) for point, colour in zip(cloud.get_offsets(), cloud.get_facecolors(), strict=True)
    }


@pytest.mark.parametrize("n_labels", [3, 15, 30])
def test_embedding_colours_categories(n_labels):
    z = np.random.default_rng(0).normal(size=(90, 2))
    labels = [f"type {i % n_labels}" for i in range(90)]
    ax = plots.embedding(z, labels, ax=axes())
    found = colour_by_point(ax)
    by_label = pd.Series([found[tuple(point)] for point in z]).groupby(labels).unique()
    assert by_label.map(len).eq(1).all()
    assert len({colours[0] for colours in by_label}) == n_labels
    legend = {text.get_text() for text in ax.get_legend().get_texts()}
    assert legend == set(labels)
    for text, dot in zip(ax.get_legend().get_texts(), ax.get_legend().legend_handles, strict=True):
        np.testing.assert_allclose(dot.get_color()[:3], by_label[text.get_text()][0][:3])


def test_embedding_legend_lies_beside_the_points():
    ax = plots.embedding(np.random.default_rng(0).normal(size=(50, 2)), list("abcde") * 10, ax=axes())
    ax.figure.draw_without_rendering()
    assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1
    assert ax.get_legend().get_window_extent().x1 <= ax.figure.bbox.x1


def test_embedding_missing_and_absent_labels():
    z = np.random.default_rng(0).normal(size=(6, 2))
    labels = pd.Series(["a", None, "b", "a", None, "b"], dtype="category").cat.add_categories("never")
    ax = plots.embedding(z, labels, ax=axes())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b", "missing"]
    np.testing.assert_allclose(colour_by_point(ax)[tuple(z[1])][:3], mpl.colors.to_rgb(canvas.MISSING))
    ax = plots.embedding(z, [True, False] * 3, ax=axes())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["False", "True"]
    assert plots.embedding(z, ax=axes()).get_legend() is None


def test_embedding_continuous_labels_get_a_scale():
    z = np.random.default_rng(0).normal(size=(8, 2))
    ax = plots.embedding(z, pd.Series(np.arange(8.0), name="depth"), ax=axes())
    values = {tuple(p): v for p, v in zip(ax.collections[0].get_offsets(), ax.collections[0].get_array(), strict=True)}
    assert [values[tuple(point)] for point in z] == list(range(8))
    assert ax.figure.axes[1].get_ylabel() == "depth"
    assert ax.get_legend() is None


@pytest.mark.parametrize(
    "labels",
    [
        pd.Series(np.linspace(0, 1, 40), dtype=object),
        pd.Series([None, *np.linspace(0, 1, 39)], dtype=object),
        pd.Series([pd.NA, *range(39)], dtype="Int64"),
        pd.Series([*range(40)], dtype=object),
    ],
)
def test_numbers_in_a_column_of_objects_get_a_scale(labels):
    ax = plots.embedding(np.random.default_rng(0).normal(size=(40, 2)), labels)
    assert ax.get_legend() is None
    shown = np.sort(np.ma.filled(ax.collections[0].get_array().astype(float), np.nan))
    np.testing.assert_allclose(shown, np.sort(pd.to_numeric(labels).to_numpy(float, na_value=np.nan)))


def test_embedding_needs_a_label_for_each_cell():
    with pytest.raises(DataError, match="each of the 8 cells, got 3"):
        plots.embedding(np.random.default_rng(0).normal(size=(8, 2)), ["a", "b", "c"])


def test_without_axes_a_new_pyplot_figure_and_no_other_setting_changes(fitted, monkeypatch):
    monkeypatch.setattr(pyplot, "show", lambda *_: pytest.fail("show was called"))
    settings = dict(mpl.rcParams)
    found = [plots.loss(fitted), plots.program(fitted.model), plots.embedding(np.eye(2))]
    assert len({ax.figure.number for ax in found}) == 3
    assert settings == dict(mpl.rcParams)
