"""Figures of results: what is drawn, read off the axes, against the tables that they were drawn from."""

import random
import warnings

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from matplotlib import pyplot
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy.stats import binom

import pyro_scvi as ps
from pyro_scvi import plots
from pyro_scvi.analysis.differential import expected_false_share
from pyro_scvi.analysis.predictive.calibration import Calibration
from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.plots import canvas, uniformity
from tests.support.short_evidence import compared
from tests.support.simulate import simulated_counts


def models(n=4):
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"difference": -np.sort(rng.gamma(2.0, 3.0, n)), "difference_se": rng.gamma(4.0, 0.2, n)})
    table["refit_sd"] = np.where(np.arange(n) % 2, rng.gamma(4.0, 0.3, n), np.nan)
    table["khat_bad"] = np.linspace(0.02, 0.3, n)
    table.index = pd.Index([f"model {i}" for i in range(n)], name="model")
    table.iloc[0, :2] = 0
    return table


def calibrated(n=200, draws=99, quantities=4, seed=0):
    rng = np.random.default_rng(seed)
    ranks = rng.integers(0, draws + 1, (n, quantities))
    return Calibration(pd.DataFrame(ranks, columns=[f"z_{i}" for i in range(quantities)]), pd.DataFrame(), draws)


def statistic(n=40, spread=1.0):
    rng = np.random.default_rng(0)
    median = np.exp(rng.normal(0, spread, n))
    table = pd.DataFrame({"observed": median * rng.uniform(0.7, 1.3, n), "median": median})
    return table.assign(low=0.8 * median, high=1.2 * median, p=0.5)


def genes(n=60):
    rng = np.random.default_rng(0)
    change = rng.normal(0, 2, n)
    table = pd.DataFrame({"lfc": change, "p_lfc": np.round(1 - np.exp(-np.abs(change)), 3)})
    table.index = pd.Index([f"GENE{i}" for i in range(n)], name="gene")
    return table.assign(expected_false_share=expected_false_share(table.p_lfc.to_numpy()))


FIGURES = {
    "comparison": (plots.comparison, models),
    "calibration": (plots.calibration, calibrated),
    "pit": (plots.pit, lambda n=300: np.random.default_rng(0).uniform(size=n)),
    "predictive": (plots.predictive, statistic),
    "volcano": (plots.volcano, genes),
}
TABLES = {
    "comparison": (plots.comparison, models, "difference_se", "compare"),
    "predictive": (plots.predictive, statistic, "median", r"check_predictions.*checks\.genes\['zero_fraction'\]"),
    "volcano": (plots.volcano, genes, "p_lfc", "differential_expression"),
}


def axes():
    return Figure(layout="constrained").subplots()


def dots(ax):
    return [drawn for drawn in ax.collections if isinstance(drawn, PathCollection)]


def bars(ax):
    return [drawn for drawn in ax.collections if isinstance(drawn, LineCollection)]


def hexes(colours):
    return [to_hex(colour) for colour in colours]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def shown(result):
    """All numbers of a result: some say only what matters of them."""
    return repr(tuple(result)) if isinstance(result, Calibration) else repr(result)


@pytest.mark.parametrize(("draw", "table"), FIGURES.values(), ids=FIGURES)
def test_every_figure_draws_into_the_axes_given_and_leaves_the_rest(draw, table):
    whole = table()
    before = shown(whole)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    settings = dict(mpl.rcParams)
    ax = axes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw(whole, ax) is ax
        ax.figure.canvas.draw()
    assert not pyplot.get_fignums()
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert states[2] == random.getstate()
    assert settings == dict(mpl.rcParams)
    assert shown(whole) == before


@pytest.mark.parametrize(("draw", "table"), FIGURES.values(), ids=FIGURES)
def test_every_figure_of_one_row(draw, table):
    ax = draw(table(1))
    ax.figure.canvas.draw()
    assert pyplot.get_fignums() == [ax.figure.number]


@pytest.mark.parametrize(("draw", "table"), FIGURES.values(), ids=FIGURES)
def test_no_legend_or_label_is_cut_off(draw, table):
    ax = draw(table())
    ax.figure.draw_without_rendering()
    low, high = ax.get_tightbbox().get_points()
    assert (low >= 0).all()
    assert (high <= ax.figure.bbox.get_points()[1]).all()
    if ax.get_legend() is not None:
        assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1


@pytest.mark.parametrize(("draw", "table", "column", "verb"), TABLES.values(), ids=TABLES)
def test_missing_columns_are_named_with_the_verb_that_makes_them(draw, table, column, verb):
    with pytest.raises(DataError, match=rf"columns \['{column}'\] are missing.*{verb}"):
        draw(table().drop(columns=column))
    with pytest.raises(DataError, match=f"no rows.*{verb}"):
        draw(table().iloc[:0])
    with pytest.raises(DataError, match=f"are missing.*{verb}"):
        draw(np.ones((3, 4)))


@pytest.mark.parametrize(("draw", "table"), [FIGURES["predictive"], FIGURES["volcano"]], ids=["predictive", "volcano"])
def test_tables_of_nothing_but_nan_are_refused(draw, table):
    with pytest.raises(DataError, match="NaN"):
        draw(table() * np.nan)


def test_comparison_places_models_by_their_difference_best_on_top():
    table = models()
    ax = plots.comparison(table, axes())
    (points,) = dots(ax)
    np.testing.assert_allclose(points.get_offsets(), np.stack([table.difference, np.arange(4)], 1))
    assert [label.get_text() for label in ax.get_yticklabels()] == list(table.index)
    assert ax.transData.transform((0, 0))[1] > ax.transData.transform((0, 3))[1]
    assert "log evidence" in ax.get_xlabel()
    assert "nats per cell" in ax.get_xlabel()


def test_comparison_bars_span_two_errors_and_two_sd_of_refits_where_there_are_any():
    table = models()
    pale, paired = bars(plots.comparison(table, axes()))
    for drawn, halves in ((pale, table.refit_sd.dropna()), (paired, table.difference_se)):
        rows, centres = [table.index.get_loc(name) for name in halves.index], table.difference[halves.index]
        expected = np.stack([np.stack([centres - 2 * halves, rows], 1), np.stack([centres + 2 * halves, rows], 1)], 1)
        np.testing.assert_allclose(drawn.get_segments(), expected)
    assert pale.get_linewidth()[0] > 3 * paired.get_linewidth()[0]
    assert np.mean(pale.get_color()[0]) > np.mean(paired.get_color()[0])


def test_comparison_explains_only_what_it_draws():
    table = models().assign(khat_bad=0.1)
    assert "refits" in plots.comparison(table, axes()).get_xlabel()
    label = plots.comparison(table.assign(refit_sd=np.nan), axes()).get_xlabel()
    assert "refits" not in label
    assert "hollow" not in label
    assert "hollow" in plots.comparison(models(), axes()).get_xlabel()


def test_comparison_shows_where_the_evidence_is_in_doubt():
    table = models(5).assign(khat_bad=[0.0, 0.1, 0.104, 0.5, np.nan])
    ax = plots.comparison(table, axes())
    (points,) = dots(ax)
    full = canvas.TRAIN
    assert hexes(points.get_facecolors()) == [full, full, "#ffffff", "#ffffff", full]
    assert set(hexes(points.get_edgecolors())) == {full}
    header, *shares = ax.texts
    assert "k" in header.get_text()
    assert "0.7" in header.get_text()
    assert [share.get_text() for share in shares] == ["0.0 %", "10.0 %", "10.4 %", "50.0 %", "–"]
    ax.figure.draw_without_rendering()
    for row, share in enumerate(shares):
        box = share.get_window_extent()
        assert box.x0 > ax.get_window_extent().x1
        assert box.y0 < ax.transData.transform((0, row))[1] < box.y1


def test_comparison_of_unknown_differences_keeps_the_rows():
    table = models(3)
    table.loc["model 1", ["difference", "difference_se"]] = np.nan
    ax = plots.comparison(table, axes())
    ax.figure.canvas.draw()
    assert len(ax.get_yticks()) == 3
    assert [len(drawn.get_segments()) for drawn in bars(ax)] == [0, 2]
    plots.comparison(table * np.nan, axes()).figure.canvas.draw()


def test_comparison_draws_what_compare_returns(cells):
    fit = ps.fit(ps.SCVI(cells.n_genes, n_latent=2, n_hidden=8), cells, epochs=1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large k-hats after one epoch
        table = compared({"one": [fit, fit], "two": fit}, cells.take(slice(0, 8)), samples=100)
    assert len(dots(plots.comparison(table, axes()))[0].get_offsets()) == 2


def test_calibration_draws_the_gap_between_the_ecdf_and_the_uniform():
    result = calibrated(n=37, draws=19)
    ax = plots.calibration(result, axes())
    middle, *lines = ax.lines
    assert set(middle.get_ydata()) == {0}
    assert [line.get_label() for line in lines] == list(result.ranks.columns)
    for line, ranks in zip(lines, result.ranks.to_numpy().T, strict=True):
        u = line.get_xdata()
        np.testing.assert_allclose(u, np.arange(21) / 20)
        ecdf = ((ranks[:, None] + 0.5) / 20 <= u).mean(0)
        np.testing.assert_allclose(line.get_ydata(), ecdf - u, atol=1e-12)


def test_calibration_thins_many_draws():
    result = calibrated(draws=999)
    line = plots.calibration(result, axes()).lines[-1]
    u = line.get_xdata()
    assert len(u) == 102
    ecdf = ((result.ranks.to_numpy()[:, -1, None] + 0.5) / 1000 <= u).mean(0)
    np.testing.assert_allclose(line.get_ydata(), ecdf - u, atol=1e-12)


@pytest.mark.parametrize(("n", "draws"), [(50, 19), (200, 99)])
def test_the_band_holds_calibrated_ranks_altogether(n, draws):
    u = np.arange(1, draws + 1) / (draws + 1)
    low, high = uniformity.uniform_band(n, u)
    rng, repeats = np.random.default_rng(7), 20_000
    ranks = rng.multinomial(n, np.full(draws + 1, 1 / (draws + 1)), size=repeats)
    counts = ranks[:, :-1].cumsum(1)  # of ranks 0 to k - 1
    inside = ((low <= counts) & (counts <= high)).all(1).mean()
    error = np.sqrt(0.05 * 0.95 * (1 / repeats + 1 / uniformity.SIMULATIONS))
    assert 0.95 - 3 * error < inside < 0.955 + 3 * error  # 0.005: tails of counts come in steps
    pointwise = binom.cdf(high, n, u) - binom.cdf(low - 1, n, u)
    assert pointwise.min() > 0.97
    np.testing.assert_allclose(low, n - high[::-1])


def test_calibration_draws_its_band():
    result = calibrated(n=50, draws=19)
    ax = plots.calibration(result, axes())
    u = np.arange(1, 20) / 20
    low, high = uniformity.uniform_band(50, u)
    drawn = ax.collections[0].get_paths()[0].vertices
    for edge in (low / 50 - u, high / 50 - u):
        for point in zip(u, edge, strict=True):
            assert np.abs(drawn - point).max(1).min() < 1e-12


def test_calibration_names_what_leaves_the_band_either_way():
    result = calibrated()
    rng = np.random.default_rng(1)
    shifted = {"low": np.arange(200) * 7 // 20, "high": 99 - np.arange(200) * 7 // 20}  # never on the other side
    mixed = {"narrow": rng.binomial(99, rng.beta(0.5, 0.5, 200))}
    ax = plots.calibration(result._replace(ranks=result.ranks.assign(**shifted, **mixed)), axes())
    lines = {line.get_label(): line for line in ax.lines[1:]}
    colours = {name: to_hex(line.get_color()) for name, line in lines.items()}
    strong = {colours.pop(name) for name in ("low", "high", "narrow")}
    assert set(colours.values()) == {canvas.CALM}
    assert len(strong - {canvas.CALM}) == 3
    assert legend(ax) == ["95 % band, all u at once", "low", "high", "narrow", "4 inside the band"]
    narrow = lines["narrow"].get_ydata()
    assert narrow[:40].max() > 0.05
    assert narrow[60:].min() < -0.05
    assert lines["low"].get_ydata().max() > 0.1 > -0.1 > lines["high"].get_ydata().min()
    assert legend(plots.calibration(result, axes())) == ["95 % band, all u at once", "4 inside the band"]


def test_calibration_leaves_out_what_has_no_rank():
    result = calibrated(n=30, draws=19)
    ranks = result.ranks.astype(float).assign(never=np.nan)
    ranks.iloc[:4, 0] = np.nan
    ax = plots.calibration(result._replace(ranks=ranks), axes())
    whole = plots.calibration(result._replace(ranks=result.ranks.iloc[4:]), axes())
    assert len(ax.lines) == len(whole.lines)
    for line, expected in zip(ax.lines, whole.lines, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), expected.get_ydata())


def test_calibration_refuses_what_are_no_ranks_among_the_draws():
    result = calibrated(draws=19)
    with pytest.raises(DataError, match=r"'ranks' and 'draws' are missing.*calibrate, got DataFrame"):
        plots.calibration(result.ranks)
    with pytest.raises(DataError, match="0 to draws = 9, got 0 to 19"):
        plots.calibration(result._replace(draws=9))
    with pytest.raises(DataError, match="got -1 to 18"):
        plots.calibration(result._replace(ranks=result.ranks - 1))
    for nothing in (result.ranks.iloc[:0], result.ranks * np.nan):
        with pytest.raises(DataError, match="no ranks"):
            plots.calibration(result._replace(ranks=nothing))


def extent(patch):
    """The lowest and the highest y of a bar or a band, which is a polygon before matplotlib 3.9."""
    box = patch.get_patch_transform().transform_path(patch.get_path()).get_extents()
    return [box.y0, box.y1]


def test_pit_draws_densities_and_colours_bars_outside_the_band():
    values = np.r_[(np.arange(380) + 0.5) / 380, np.full(40, 0.525)]
    ax = plots.pit(values, axes())
    *bars_drawn, band = ax.patches
    heights = np.array([bar.get_height() for bar in bars_drawn])
    counts = np.full(20, 19.0)
    counts[10] += 40
    np.testing.assert_allclose(heights, counts * 20 / 420)
    np.testing.assert_allclose([bar.get_x() for bar in bars_drawn], np.arange(20) / 20)
    low, high = binom.ppf([0.025, 0.975], 420, 1 / 20) * 20 / 420
    np.testing.assert_allclose(extent(band), [low, high])
    colours = hexes(bar.get_facecolor() for bar in bars_drawn)
    assert colours[10] == canvas.STRONG
    assert set(colours[:10] + colours[11:]) == {canvas.SHADE}
    assert legend(ax) == ["95 % band of uniform,\neach bar by itself", "outside"]
    assert legend(plots.pit(np.linspace(0, 1, 400), axes())) == ["95 % band of uniform,\neach bar by itself"]


@pytest.mark.parametrize(("n", "bins"), [(1, 5), (160, 8), (10_000, 20)])
def test_pit_has_as_many_bars_as_values_allow(n, bins):
    assert len(plots.pit(np.linspace(0, 1, n), axes()).patches) == bins + 1


def test_pit_takes_arrays_of_any_shape_with_nan():
    values = np.random.default_rng(0).uniform(size=(20, 30))
    holed = np.where(values < 0.3, np.nan, values)
    flat = plots.pit(holed[~np.isnan(holed)], axes())
    for given in (holed, xr.DataArray(holed, dims=("cell", "gene")), pd.DataFrame(holed), torch.tensor(holed)):
        ax = plots.pit(given, axes())
        assert [extent(bar) for bar in ax.patches] == [extent(bar) for bar in flat.patches]


@pytest.mark.parametrize("values", [[], [np.nan, np.nan]])
def test_pit_needs_values(values):
    with pytest.raises(DataError, match="at least one value"):
        plots.pit(values)


@pytest.mark.parametrize("values", ["a", ["a"], [[0.5], [0.1, 0.2]], plots])
def test_pit_needs_numbers(values):
    with pytest.raises(DataError, match=r"pit takes numbers in \[0, 1\], such as leave_one_out.*got"):
        plots.pit(values)


@pytest.mark.parametrize("wrong", [-0.1, 1.5, np.inf])
def test_pit_refuses_values_that_are_no_probabilities(wrong):
    with pytest.raises(DataError, match=rf"in \[0, 1\], got values from .*{wrong}"):
        plots.pit([0.5, wrong])


def test_predictive_places_entries_bands_and_the_identity():
    table = statistic()
    ax = plots.predictive(table, axes(), name="mean")
    off = (table.observed < table.low) | (table.observed > table.high)
    assert 0 < off.sum() < len(table)
    for points, rows, colour in zip(dots(ax), (~off, off), (canvas.TRAIN, canvas.STRONG), strict=True):
        np.testing.assert_allclose(points.get_offsets(), table.loc[rows, ["median", "observed"]])
        assert set(hexes(points.get_facecolors())) == {colour}
    (bands,) = bars(ax)
    for segment, row in zip(bands.get_segments(), table.itertuples(), strict=True):
        np.testing.assert_allclose(segment, [(row.median, row.low), (row.median, row.high)])
    (identity,) = ax.lines
    np.testing.assert_array_equal(identity.get_xdata(), identity.get_ydata())
    assert identity.get_xdata()[0] < table[["observed", "low"]].to_numpy().min()
    assert identity.get_xdata()[1] > table[["observed", "high"]].to_numpy().max()
    assert ax.get_xlim() == ax.get_ylim()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("mean, median of replicas", "mean, observed")
    share = f"outside ({off.sum()}, {100 * off.mean():.1f} %)"
    assert legend(ax) == ["band of the replicas", f"inside ({(~off).sum()})", share]


def test_predictive_without_a_name_and_at_the_edge_of_the_band():
    table = pd.DataFrame({"observed": [1.0, 3.0, 3.1], "low": 1.0, "median": 2.0, "high": 3.0})
    ax = plots.predictive(table, axes())
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("median of replicas", "observed")
    assert legend(ax)[1:] == ["inside (2)", "outside (1, 33.3 %)"]


def test_predictive_chooses_scales_by_what_is_drawn():
    wide = pd.DataFrame(dict.fromkeys(statistic(), np.geomspace(1, 110, 40)))
    for table, scale in (
        (wide, "log"),
        (wide.clip(upper=90), "linear"),
        (wide.assign(observed=wide.observed.where(wide.index > 0, 0.0)), "linear"),
        (wide.assign(low=wide.low.where(wide.index > 0, 0.0)), "log"),  # only a band reaches 0
        (wide.assign(median=-wide["median"]), "linear"),
    ):
        ax = plots.predictive(table, axes())
        ax.figure.canvas.draw()
        assert (ax.get_xscale(), ax.get_yscale()) == (scale, scale)
        assert ax.get_xlim() == ax.get_ylim()


def test_predictive_of_equal_values_and_of_nan():
    one = pd.DataFrame({"observed": [0.0], "low": [0.0], "median": [0.0], "high": [0.0]})
    assert plots.predictive(one, axes()).get_xlim() == (-0.5, 0.5)
    holed = statistic()
    holed.iloc[3, 0] = np.nan
    np.testing.assert_array_equal(
        np.concatenate([points.get_offsets() for points in dots(plots.predictive(holed, axes()))]).shape, (39, 2)
    )


@pytest.mark.parametrize("n", [100, 3000])
def test_predictive_of_many_entries_is_drawn_as_pixels(n):
    ax = plots.predictive(statistic(n), axes())
    assert [drawn.get_rasterized() for drawn in ax.collections] == [n > 2000] * 3


def test_predictive_draws_what_check_predictions_returns(cells):
    fit = ps.fit(ps.SCVI(cells.n_genes, n_latent=2, n_hidden=8), cells, epochs=1, progress=False)
    checks = ps.check_predictions(fit, cells, samples=4)
    with pytest.raises(DataError, match=r"checks\.genes\['zero_fraction'\]"):
        plots.predictive(checks.genes)
    for table in (checks.genes["zero_fraction"], checks.genes["variance"], checks.cells["total"]):
        assert len(bars(plots.predictive(table, axes()))[0].get_segments()) == len(table)


def test_volcano_places_genes_and_colours_those_called():
    table = genes()
    ax = plots.volcano(table, axes(), level=0.2)
    called, up = table.expected_false_share <= 0.2, table.lfc > 0
    assert 0 < called.sum() < len(table)
    odds = np.log10(table.p_lfc / (1 - table.p_lfc))
    groups = ((~called, canvas.MISSING), (called & up, canvas.TRAIN), (called & ~up, canvas.HELD_OUT))
    for points, (rows, colour) in zip(dots(ax), groups, strict=True):
        expected = np.stack([table.lfc[rows], odds[rows]], 1)
        found = points.get_offsets()
        np.testing.assert_allclose(found[found[:, 0].argsort()], expected[expected[:, 0].argsort()])
        assert set(hexes(points.get_facecolors())) == {colour}
    counts = [f"{name} ({rows.sum()})" for name, (rows, _) in zip(NAMES, groups, strict=True)]
    assert legend(ax) == [*counts, "expected false share 0.2"]
    assert ax.lines[-1].get_ydata()[0] == pytest.approx(odds[called].min())
    assert odds[~called].max() < odds[called].min()


NAMES = ("not called", "higher in a", "higher in b")


def test_volcano_without_calls_labels_nothing_and_draws_no_line():
    ax = plots.volcano(genes().assign(expected_false_share=0.5), axes())
    assert legend(ax) == ["not called (60)", "higher in a (0)", "higher in b (0)"]
    assert not ax.texts
    assert len(ax.lines) == 1


@pytest.mark.parametrize(("others", "half"), [([0.5, 0.3], 0.0005), ([0.9998, 0.3], 0.0001), ([0.0004, 0.5], 0.0002)])
def test_volcano_moves_certainties_by_half_of_what_the_table_resolves(others, half):
    table = pd.DataFrame({"lfc": [1.0, -1.0, 0.1, 0.0], "p_lfc": [1.0, 0.0, *others], "expected_false_share": 1.0})
    found = np.concatenate([points.get_offsets() for points in dots(plots.volcano(table, axes()))])
    y = dict(found)
    assert y[1.0] == pytest.approx(np.log10((1 - half) / half))
    assert y[-1.0] == pytest.approx(-np.log10((1 - half) / half))
    assert y[0.1] == pytest.approx(np.log10(others[0] / (1 - others[0])))


@pytest.mark.parametrize("names", [0, 1, 7])
def test_volcano_labels_the_most_certain_genes_called(names):
    table = genes()
    table.iloc[:3, table.columns.get_loc("p_lfc")] = 1.0  # ties: the larger change first
    ax = plots.volcano(table, axes(), level=0.9, names=names)
    order = table.assign(size=table.lfc.abs()).sort_values(["p_lfc", "size"], ascending=False)
    labels = [text for text in ax.texts if text.get_text()]
    assert [text.get_text() for text in labels] == list(order.index[:names])
    for text in labels:
        assert text.xy[0] == table.lfc[text.get_text()]


@pytest.mark.parametrize("width", [4.0, 9.0])
def test_volcano_labels_overlap_neither_each_other_nor_their_points(width):
    table = genes(300).assign(expected_false_share=0.0)
    table["p_lfc"] = table.p_lfc.where(table.p_lfc < 0.98, 1.0)  # many on one line
    ax = plots.volcano(table, Figure((width, 4), layout="constrained").subplots(), names=25)
    ax.figure.draw_without_rendering()
    labels = [text for text in ax.texts if text.get_text()]
    assert len(labels) > 8
    boxes = [text.get_window_extent() for text in labels]
    assert not any(box.count_overlaps(boxes[:i]) for i, box in enumerate(boxes))
    points = ax.transData.transform([text.xy for text in labels])
    assert not any(box.contains(*point) for box in boxes for point in points)
    frame = ax.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and box.y1 <= frame.y1 for box in boxes)
    lines = [text for text in ax.texts if not text.get_text()]
    far = {(text.xy, text.get_position()) for text in labels if np.hypot(*text.get_position()) > 5.1}
    assert far
    assert far == {(line.xy, line.get_position()) for line in lines}


def test_volcano_of_genes_with_nan_or_the_same_name():
    table = genes().set_index(pd.Index(["TWIN"] * 60))
    table.iloc[:5, 0] = np.nan
    ax = plots.volcano(table, axes(), level=0.5)
    assert sum(len(points.get_offsets()) for points in dots(ax)) == 55
    assert {text.get_text() for text in ax.texts} <= {"TWIN", ""}


def means_table():
    """Six genes of GroupMeans: two called, two not, one not tested, one without a count."""
    nan = np.nan
    columns = {"lfc": [2.0, -1.0, 0.1, 0.2, nan, nan], "p_value": [1e-5, 0.0, 0.4, 0.5, nan, nan]}
    columns |= {"q_value": [1e-4, 0.0, 0.5, 0.5, nan, nan], "mean_a": [4.0, 1.0, 1.0, 1.0, 0.01, 0.0]}
    return pd.DataFrame(columns | {"mean_b": [1.0, 2.0, 1.0, 1.0, 0.02, 0.0]}, index=list("abcdef"))


@pytest.mark.parametrize(
    ("name", "shown"),
    [("NK $cells", "NK $cells"), ("x\ny", "x y"), ("long " * 20, "long long long long long..."), (7, "7")],
)
@pytest.mark.parametrize("draw", [plots.volcano, plots.ma])
def test_groups_are_named_where_the_table_names_them(draw, name, shown):
    table = means_table()
    table.attrs = {"group_a": name, "group_b": "the rest"}
    ax = draw(table, axes())
    assert legend(ax)[2:4] == [f"higher in {shown} (1)", "higher in the rest (1)"]
    assert f"log2 fold change, {shown} over the rest" in {ax.get_xlabel(), ax.get_ylabel()}
    ax.figure.canvas.draw()


@pytest.mark.parametrize("draw", [plots.volcano, plots.ma])
def test_tested_and_untested_genes_of_group_means_are_shown(draw):
    ax = draw(means_table(), axes())
    untested, other, up, down = (points.get_offsets() for points in dots(ax))
    names = ["not tested (1)", "not called (2)", "higher in a (1)", "higher in b (1)"]
    assert legend(ax)[:4] == names
    change = np.log2(0.01 + 1e-4) - np.log2(0.02 + 1e-4)
    if draw is plots.volcano:
        np.testing.assert_allclose(untested, [[change, 0]])
        np.testing.assert_allclose(up, [[2, 5]])
        np.testing.assert_allclose(down, [[-1, -np.log10(np.finfo(float).tiny)]])
        assert legend(ax)[4] == "q value 0.05"
    else:
        np.testing.assert_allclose(untested, [[np.log10(0.015), change]])
        np.testing.assert_allclose(up, [[np.log10(2.5), 2]])
    assert len(other) == 2
    assert {text.get_text() for text in ax.texts} <= {"a", "b", ""}


def test_ma_needs_means_and_one_comparison():
    with pytest.raises(DataError, match="mean_a"):
        plots.ma(genes())
    both = pd.concat({"B": means_table(), "T": means_table()}, names=["group"])
    with pytest.raises(DataError, match=r"ma draws one comparison, this table holds 2"):
        plots.ma(both)
    with pytest.raises(DataError, match="every gene has NaN"):
        plots.ma(means_table().iloc[5:])


def test_volcano_draws_one_comparison_at_a_time():
    both = pd.concat({"B cells": genes(), "T cells": genes()}, names=["group"])
    with pytest.raises(DataError, match=r"holds 2: select a group, as in table\.loc\['B cells'\]"):
        plots.volcano(both)
    assert len(dots(plots.volcano(both.loc["B cells"], axes()))) == 3


@pytest.mark.parametrize("fdr", [0, 1, 5, "'small'", None])
def test_volcano_refuses_what_is_no_rate(fdr):
    with pytest.raises(DataError, match=f"between 0 and 1.*got {fdr}"):
        plots.volcano(genes(), level=fdr.strip("'") if isinstance(fdr, str) else fdr)


@pytest.mark.parametrize("names", [-1, 2.5, "all"])
def test_volcano_labels_a_number_of_genes(names):
    with pytest.raises(ModelError, match="names must be an integer of 0 or more"):
        plots.volcano(genes(), names=names)


def test_volcano_colours_follow_the_direction_of_the_table():
    cells = ps.Cells.from_counts(simulated_counts())
    fit = ps.fit(ps.SCVI(cells.n_genes, n_latent=2, n_hidden=8), cells, epochs=1, progress=False)
    labels = np.where(np.arange(60) % 2, "b", "a")
    table = ps.differential_expression(fit, cells, groupby=labels, group_a="a", group_b="b")
    ax = plots.volcano(table.assign(q_value=0.0), axes())
    _, up, down = dots(ax)
    assert (down.get_offsets()[:, 0] < 0).all()
    assert (up.get_offsets()[:, 0] > 0).all()
    assert len(down.get_offsets()) + len(up.get_offsets()) == cells.n_genes
