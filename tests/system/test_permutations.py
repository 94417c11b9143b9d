"""For a fixed fit, the answer of every verb to permuted rows and genes of named inputs is the permuted answer.

Cells have random streams by their names, and random pairs of cells are drawn in the order of their names, so this holds
to rounding.
"""

from functools import partial

import anndata
import numpy as np
import pandas as pd
import pytest
import xarray as xr

import pyro_scvi as ps
from pyro_scvi import baselines
from pyro_scvi.analysis.differential.labels import groups_of
from pyro_scvi.analysis.predictive.imputation import mean_given_no_dropout
from pyro_scvi.errors import DataError, SchemaError
from tests.support.simulate import simulated_counts

N_CELLS, N_GENES = 30, 12
SEEDS = [0, 1]
CLOSE = {"rtol": 2e-4, "atol": 2e-5}  # sums of float32 in another order


def made():
    """Counts with names, two donors, an age and a kind of each cell."""
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {
            "donor": np.where(rng.random(N_CELLS) < 0.5, "p", "q"),
            "age": rng.normal(50, 9, N_CELLS),
            "kind": np.where(np.arange(N_CELLS) % 2, "b", "a"),
        },
        index=[f"cell-{letter}{i}" for i, letter in enumerate("xy" * (N_CELLS // 2))],
    )
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(N_GENES)])
    return anndata.AnnData(simulated_counts(N_CELLS, N_GENES).astype(np.float32), obs, var)


ADATA = made()
CELLS = ps.Cells.from_anndata(ADATA, batch="donor", covariates=["age"])


def fitted(guide, **options):
    model = ps.SCVI(N_GENES, 2, CELLS.n_covariates, n_hidden=8, n_layers=1, **options)
    q = guide(model, n_hidden=8, n_layers=1)
    return ps.fit(model, CELLS, q, epochs=4, batch_size=10, progress=False, device="cpu")


@pytest.fixture(scope="module")
def normal():
    return fitted(ps.guides.DiagonalNormal)


@pytest.fixture(scope="module")
def point():
    likelihood = ps.likelihoods.ZINB(ps.likelihoods.PerGene(N_GENES))
    return fitted(ps.guides.Point, likelihood=likelihood)


@pytest.fixture(params=SEEDS)
def shuffled(request):
    return shuffled_by(request.param)


@pytest.fixture(scope="module")
def shuffled_once():
    return shuffled_by(2)


def shuffled_by(seed):
    """The same data with cells, genes and columns of obs in another order, and a further gene."""
    rng = np.random.default_rng(seed)
    adata = ADATA[rng.permutation(N_CELLS), rng.permutation(N_GENES)].copy()
    adata.obs = adata.obs[rng.permutation(adata.obs.columns)]
    more = adata[:, :1].copy()
    more.var_names = ["new"]
    return anndata.concat([more, adata], axis=1, merge="same")


def read(adata, fit):
    return ps.Cells.from_anndata(adata, schema=fit.schema)


def by_name(values, cells):
    """Rows in the order in which the fit's own cells are."""
    return np.asarray(values)[cells.obs.index.get_indexer(ADATA.obs_names)]


def test_reading_matches_all_by_name(shuffled, normal):
    cells = read(shuffled, normal)
    assert list(cells.gene_names) == list(CELLS.gene_names)
    for found, expected in ((cells.counts, CELLS.counts), (cells.covariates, CELLS.covariates)):
        np.testing.assert_allclose(by_name(found, cells), expected, **CLOSE)
    frame, obs = shuffled.to_df(), ADATA.obs
    for table in (frame, frame.sort_index()):
        found = ps.Cells.from_counts(table, obs=obs, schema=normal.schema)
        np.testing.assert_array_equal(by_name(found.counts, found), CELLS.counts)
        np.testing.assert_allclose(by_name(found.covariates, found), CELLS.covariates, **CLOSE)


def test_embeddings_and_deterministic_results(shuffled, normal, point):
    for fit in (normal, point):
        cells = read(shuffled, fit)
        np.testing.assert_allclose(by_name(ps.embed(fit, cells), cells), ps.embed(fit, CELLS), **CLOSE)
    verbs = {
        "expression": lambda of: ps.impute(point, of, samples=2),
        "mean": lambda of: ps.impute(point, of, samples=2, quantity=mean_given_no_dropout),
        "batches": lambda of: ps.impute(point, of, samples=2, quantity=mean_given_no_dropout, batches=["q", "p"]),
        "zeros": lambda of: ps.technical_zero_probability(point, of, samples=2),
        "z": lambda of: ps.sample_posterior(point, of, samples=2, sites=["z"], progress=False).z.mean("sample"),
    }
    for name, verb in verbs.items():
        np.testing.assert_allclose(by_name(verb(read(shuffled, point)), cells), verb(CELLS), err_msg=name, **CLOSE)


def test_samples_keep_the_names_of_their_cells_and_genes(shuffled, point):
    cells = read(shuffled, point)
    for verb in (
        lambda of: ps.sample_posterior(point, of, samples=20, sites=["w"], seed=1, progress=False).w,
        lambda of: ps.posterior_predictive(point, of, samples=20, seed=1),
    ):
        found, expected = verb(cells), verb(CELLS)
        ours = found.sel(cell=list(CELLS.cell_names), gene=list(CELLS.gene_names)).transpose(*expected.dims)
        assert float(np.isclose(ours, expected, rtol=1e-3).mean()) > 0.999  # rounding may turn a count to the next


SAMPLERS = {
    "amortized": ps.Amortized(),
    "refined": ps.Refined(steps=2),
    "importance": ps.Importance(steps=2, rounds=1, proposals=30),
    "hmc": ps.HMC(chains=2, warmup=2, steps=2, rounds=1, leapfrog=2, least=4),
}
QUIET = {"batch_size": 2, "progress": False}
BY_CELL = {  # verbs that draw latents, each (fit, cells) -> rows of the cells
    "embed": ps.embed,
    "evidence": partial(ps.evidence, samples=30, steps=2, rounds=1, **QUIET),
    "annealed_evidence": partial(ps.annealed_evidence, chains=3, temperatures=4, **QUIET),
    "impute": partial(ps.impute, samples=3, batch_size=2),
    "impute in another batch": partial(
        ps.impute, samples=3, batch_size=2, batches=["q"], quantity=mean_given_no_dropout
    ),
    "technical_zero_probability": partial(ps.technical_zero_probability, samples=3, batch_size=2),
    "normalized_expression": partial(ps.normalized_expression, samples=3, batch_size=2),
    "quantiles": partial(ps.normalized_expression, samples=3, batch_size=2, quantiles=[0.1, 0.9]),
    "components": lambda fit, cells: ps.embed(fit, cells, space=ps.spaces.Expression(2).fitted(fit, CELLS)),
    "transfer_labels": lambda fit, cells: ps.transfer_labels(fit, CELLS, cells, "kind", neighbors=3).iloc[:, 1:],
    **{
        f"sample_posterior {name}": lambda fit, cells, sampler=sampler: ps.sample_posterior(
            fit, cells, samples=4, sites=("z", "w", "y", "h"), sampler=sampler, **QUIET
        ).transpose("cell", ...)
        for name, sampler in SAMPLERS.items()
    },
}


@pytest.mark.filterwarnings("ignore")  # so few draws are told
@pytest.mark.parametrize("verb", BY_CELL.values(), ids=BY_CELL)
def test_answers_for_cells_do_not_depend_on_their_order(verb, shuffled_once, normal):
    cells = read(shuffled_once, normal)
    chosen = ADATA.obs_names[:3]
    found = verb(normal, cells.take(np.flatnonzero(np.isin(cells.cell_names, chosen))))
    expected = verb(normal, CELLS.take(np.arange(3)))
    assert_permuted(found, expected, [name for name in cells.cell_names if name in chosen], list(chosen))


@pytest.mark.filterwarnings("ignore")
def test_compared_models_do_not_depend_on_the_order_of_cells(normal):
    cells = CELLS.take(np.arange(2))
    orders = cells.take(np.array([1, 0])), cells
    found, expected = (ps.compare({"normal": normal}, of, samples=300, pointwise=True, progress=False) for of in orders)
    assert "log_evidence" in found.to_string(max_cols=2)  # pandas compares what is in attrs
    assert len(pd.concat([found, expected])) == 2
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4)
    by_cell = found.attrs["pointwise"].loc[cells.cell_names]
    np.testing.assert_allclose(by_cell, expected.attrs["pointwise"], rtol=1e-4)


def assert_permuted(found, expected, names, own):
    if isinstance(found, xr.Dataset):
        for name, values in expected.items():
            if "cell" in values.dims:
                assert_permuted(found[name].to_numpy(), values.to_numpy(), names, own)
        return
    ours = np.asarray(found, float)[pd.Index(names).get_indexer(own)]
    np.testing.assert_allclose(ours, np.asarray(expected, float), rtol=5e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_trees_and_left_out_entries_do_not_depend_on_the_order_of_cells(shuffled_once, normal):
    cells = read(shuffled_once, normal)
    own = ADATA.obs_names[:3]
    names = [name for name in cells.cell_names if name in own]
    mixed = cells.take(np.flatnonzero(np.isin(cells.cell_names, own)))
    options = {"samples": 30, "sampler": SAMPLERS["refined"], "log_likelihood": True, "batch_size": 2}
    trees = [ps.to_datatree(normal, of, sites=("z", "l", "w"), **options) for of in (mixed, CELLS.take(np.arange(3)))]
    for group in trees[0].children:
        found, expected = (tree[group].to_dataset().transpose("cell", ...) for tree in trees)
        assert_permuted(found, expected, names, list(own))
    left_out = [
        ps.leave_one_out(normal, of, samples=20, sampler=SAMPLERS["refined"], **QUIET)
        for of in (mixed, CELLS.take(np.arange(3)))
    ]
    found, expected = (of.transpose("cell", ...) for of in left_out)
    assert_permuted(found, expected, names, list(own))


ORDERS = ("rows", "genes", "both")
CHOSEN = ADATA.obs_names[:5]


@pytest.fixture(scope="module")
def labelled():
    cells = ps.Cells.from_anndata(ADATA, batch="donor", covariates=["age"], labels="kind")
    prior = ps.priors.ByLabel(2, columns=cells.columns["kind"])
    model = ps.SCVI(N_GENES, 2, cells.n_covariates, n_hidden=8, n_layers=1, prior=prior)
    return ps.fit(model, cells, epochs=2, batch_size=10, validation=0, progress=False, device="cpu")


@pytest.fixture(params=ORDERS)
def ordered(request):
    """Five cells in the order of the fit, and with rows, genes or both in another."""
    rng, few = np.random.default_rng(5), ADATA[CHOSEN].copy()
    rows = np.arange(5) if request.param == "genes" else rng.permutation(5)
    genes = np.arange(N_GENES) if request.param == "rows" else rng.permutation(N_GENES)
    return few, few[rows, genes].copy()


def calibrated(fit, adata):
    """Ranks under both sources; the numbers of simulated cells are their names."""
    cells = read(adata, fit)
    sources = ps.calibration.Prior(cells), ps.calibration.AggregatePosterior(cells, sampler=ps.Amortized())
    options = {"sampler": ps.Amortized(), "draws": 19, "thin": 1, "progress": False}
    return pd.concat([ps.calibrate(fit, 6, source=source, **options).ranks for source in sources])


def mapped(fit, adata):
    """Rates of genes after a new batch was learnt."""
    new = adata.copy()
    new.obs["donor"] = "r"
    query = ps.Cells.from_anndata(new, schema=fit.schema, allow_new_batches=True)
    found = ps.map_query(fit, query, epochs=3, batch_size=2, progress=False)
    return ps.normalized_expression(found, read(new, found), samples=2, seed=1)


def tree(fit, adata):
    return ps.to_datatree(
        fit, read(adata, fit), samples=60, batch_size=2, posterior_predictive=True, prior_predictive=True
    )


def predictive_groups(fit, adata):
    """Counts by cell, with the rest behind."""
    groups = [tree(fit, adata)[name].to_dataset().x for name in ("prior_predictive", "posterior_predictive")]
    return pd.concat([pd.DataFrame(of.stack(rest=("draw", "gene"))[0].to_numpy(), of.cell) for of in groups], axis=1)


def left_out_places(fit, adata):
    of = ps.leave_one_out(fit, read(adata, fit), samples=20, sampler=ps.Amortized(), batch_size=2, progress=False)
    return of.pit.to_pandas()


def replicas(fit, adata):
    of = ps.posterior_predictive(fit, read(adata, fit), samples=4, batch_size=2)
    return pd.DataFrame(of.transpose("cell", ...).to_numpy().reshape(len(of.cell), -1), of.cell)


def sensitivities(fit, adata):
    table = ps.prior_sensitivity(tree(fit, adata))
    return table.unstack().loc[adata.obs_names]


def label_probabilities(fit, adata):
    return ps.predict_labels(fit, read(adata, fit), samples=5, batch_size=2, progress=False)


NAMED = {  # (fit, adata) -> a table with a row for each cell
    "calibrate": calibrated,
    "map_query": mapped,
    "to_datatree": predictive_groups,
    "leave_one_out": left_out_places,
    "posterior_predictive": replicas,
    "prior_sensitivity": sensitivities,
    "predict_labels": label_probabilities,
}


@pytest.mark.filterwarnings("ignore")  # so few draws and cells are told
@pytest.mark.parametrize("verb", NAMED.values(), ids=NAMED)
def test_named_rows_and_genes_give_the_permuted_answer(verb, ordered, normal, labelled):
    fit = labelled if verb is label_probabilities else normal
    ours, theirs = (verb(fit, adata) for adata in ordered)
    if verb is not calibrated:
        assert list(ours.index) == list(ordered[0].obs_names)
        assert list(theirs.index) == list(ordered[1].obs_names)
        theirs = theirs.loc[ours.index]
    assert np.isfinite(ours.to_numpy()).any(axis=0).all()
    np.testing.assert_allclose(theirs, ours, rtol=2e-3, atol=1e-4)


def test_density_takes_cells_in_any_order(normal):
    order = np.random.default_rng(0).permutation(N_CELLS)
    u = np.random.default_rng(1).normal(size=(2, N_CELLS, 3)).astype(np.float32)
    found = ps.log_density(normal, CELLS.take(order))(u[:, order])
    np.testing.assert_allclose(found, ps.log_density(normal, CELLS)(u)[:, order], rtol=1e-5)


@pytest.mark.parametrize("block", [2, N_CELLS])
def test_blocks_of_permuted_cells(block, shuffled_once, normal, point, tmp_path):
    """What draws nothing is the same in blocks of any size; of what draws, the order within a block does not matter."""
    cells = read(shuffled_once, normal)
    for name, of in (("ours", CELLS), ("theirs", cells)):
        ps.shards.write(point, of, tmp_path / f"{name}.h5ad", {"z": ps.embed}, block=block, progress=False)
    ours, theirs = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("ours", "theirs"))
    np.testing.assert_allclose(theirs[ours.obs_names].obsm["z"], ours.obsm["z"], **CLOSE)
    if block == N_CELLS:
        verbs = {"w": partial(ps.impute, samples=2)}
        for name, of in (("our_w", CELLS), ("their_w", cells)):
            ps.shards.write(normal, of, tmp_path / f"{name}.h5ad", verbs, block=block, progress=False)
        ours, theirs = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("our_w", "their_w"))
        np.testing.assert_allclose(theirs[ours.obs_names].layers["w"], ours.layers["w"], **CLOSE)


@pytest.mark.parametrize("guide", ["point", "normal"])
def test_checks_do_not_depend_on_the_order_of_cells(guide, shuffled_once, request):
    fit = request.getfixturevalue(guide)
    found, expected = (ps.check_predictions(fit, of, samples=19) for of in (read(shuffled_once, fit), CELLS))
    for ours, theirs in ((found.genes.loc[expected.genes.index], expected.genes), (found.cells, expected.cells)):
        np.testing.assert_allclose(ours.loc[theirs.index], theirs, rtol=1e-3, atol=1e-4)
    known = [(name, "observed") for name in ("mean", "zero_fraction", "variance")]
    assert set(found.genes.index) == set(expected.genes.index)
    assert all(name in found.genes for name in known)


def test_random_pairs_do_not_depend_on_the_order_of_cells(shuffled, point):
    """Groups are given in every way that has names, and in the order of the cells without names."""
    cells = read(shuffled, point)
    kind = ADATA.obs["kind"]
    pairs = ps.differential.RandomPairs(largest_se=0.01)
    options = {"group_a": "a", "group_b": "b", "estimand": pairs, "seed": 3}
    expected = ps.differential_expression(point, CELLS, groupby="kind", **options)
    first = None
    as_they_are = ("kind", kind, kind.iloc[::-1], shuffled.obs["kind"].to_numpy(), kind.to_frame(), kind.to_dict())
    for groupby in as_they_are:
        found = ps.differential_expression(point, cells, groupby=groupby, **options)
        first = found if first is None else first
        pd.testing.assert_frame_equal(found, first)
    np.testing.assert_allclose(first.loc[expected.index], expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(DataError, match="no row for"):
        groups_of(cells, kind.rename(lambda name: f"other-{name}"))


def means_of_groups(fit, cells):
    means = ps.differential.GroupMeans(min_molecules=1)
    return ps.differential_expression(fit, cells, groupby="kind", estimand=means).drop(columns="tested")


def means_of_donors(fit, cells):
    means = ps.differential.GroupMeans(replicates=donors_of(cells), min_molecules=1, samples=1)
    return ps.differential_expression(fit, cells, groupby="kind", group_a="a", estimand=means).drop(columns="tested")


def abundance(fit, cells):
    return ps.differential_abundance(fit, cells, "kind", donors_of(cells), permutations=30, batch_size=7)


def donors_of(cells):
    return cells.obs["kind"] + pd.Series([str(int(name[6:]) // 2 % 7) for name in cells.cell_names], cells.cell_names)


OF_GROUPS = {
    "GroupMeans": means_of_groups,
    "GroupMeans by donor": means_of_donors,
    "differential_abundance": abundance,
}


@pytest.mark.filterwarnings("ignore")  # so few cells and draws are told
@pytest.mark.parametrize("verb", OF_GROUPS.values(), ids=OF_GROUPS)
def test_what_is_said_of_groups_does_not_depend_on_the_order_of_cells(verb, shuffled_once, normal):
    expected, found = verb(normal, CELLS), verb(normal, read(shuffled_once, normal))
    assert np.isfinite(expected.to_numpy(float)).any(axis=0).all()
    found = found.loc[expected.index]
    assert list(found.columns) == list(expected.columns)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_stacked_models_do_not_depend_on_the_order_of_cells():
    rng = np.random.default_rng(3)
    by_cell = pd.DataFrame(rng.normal(size=(N_CELLS, 3)), index=ADATA.obs_names, columns=["a", "b", "c"])
    by_cell.index = ["twice", *by_cell.index[1:-1], "twice"]
    tables = [pd.DataFrame(index=by_cell.columns) for _ in range(2)]
    for table, rows in zip(tables, (by_cell, by_cell.sample(frac=1, random_state=1)), strict=True):
        table.attrs["pointwise"] = rows
    found, expected = (ps.stacking_weights(table, draws=10) for table in tables)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_annotated_data_keep_their_own_order(shuffled, point):
    ours, theirs = ADATA.copy(), shuffled.copy()
    for adata in (ours, theirs):
        ps.annotate(adata, point, expression=True, technical_zeros=True, samples=2)
    back = theirs[ours.obs_names, ours.var_names]
    np.testing.assert_allclose(back.obsm["X_pyro_scvi"], ours.obsm["X_pyro_scvi"], **CLOSE)
    for layer in ("pyro_scvi_expression", "pyro_scvi_technical_zero"):
        np.testing.assert_allclose(back.layers[layer], ours.layers[layer], **CLOSE)
        assert np.isnan(theirs[:, "new"].layers[layer]).all()
    table = ps.differential_expression(
        point, CELLS, groupby="kind", estimand=ps.differential.RandomPairs(largest_se=0.1)
    )
    mixed = table.sample(frac=1.0, random_state=1)  # rows of a table have names, too
    for adata, of in ((ours, table), (theirs, mixed)):
        ps.add_rank_genes_groups(adata, of, "kind")
    for group in ("a", "b"):
        scores = [
            dict(
                zip(
                    a.uns["rank_genes_groups"]["names"][group], a.uns["rank_genes_groups"]["scores"][group], strict=True
                )
            )
            for a in (ours, theirs)
        ]
        assert scores[0] == scores[1]


def test_cells_are_taken_by_the_names_of_a_mask(shuffled, normal):
    cells = read(shuffled, normal)
    mask = ADATA.obs["age"] > 50
    assert set(cells.take(mask).cell_names) == set(mask.index[mask])
    with pytest.raises(DataError, match="no row for"):
        cells.take(mask.rename(lambda name: f"other-{name}"))


def test_other_names_are_refused_and_not_taken_by_position(shuffled, normal):
    shuffled.var_names = [f"{name}-" for name in shuffled.var_names]
    with pytest.raises(SchemaError, match="gene"):
        read(shuffled, normal)
    cells = ps.Cells.from_anndata(ADATA[:, ::-1].copy(), batch="donor", covariates=["age"])
    with pytest.raises(SchemaError, match="or are in another order"):
        ps.embed(normal, cells)


# --- baselines ---


@pytest.mark.parametrize("make", [lambda: baselines.PCA(2), lambda: baselines.FactorAnalysis(2)], ids=["PCA", "FA"])
def test_fitted_baselines_take_columns_by_name(shuffled, make):
    method = make().fit(ADATA.to_df())
    frame = shuffled.to_df()[[name for name in shuffled.var_names if name != "new"]]
    found = pd.DataFrame(method.transform(frame), index=frame.index).loc[ADATA.obs_names]
    np.testing.assert_allclose(found, method.transform(ADATA.to_df()), rtol=1e-6, atol=1e-8)
    with pytest.raises(DataError, match="genes"):
        method.transform(shuffled.to_df())


@pytest.mark.parametrize("make", [baselines.Wilcoxon, baselines.MAST], ids=["Wilcoxon", "MAST"])
def test_tests_of_two_groups_match_labels_by_name(shuffled, make):
    kind, frame = ADATA.obs["kind"], shuffled.to_df().drop(columns="new")
    expected = make().test(ADATA.to_df(), kind)
    for labels in (kind, kind.iloc[::-1], kind.astype("category"), frame.index.map(kind)):
        found = make().test(frame, labels)
        pd.testing.assert_frame_equal(found.loc[expected.index], expected, rtol=1e-6)
    with pytest.raises(DataError, match="no row for"):
        make().test(frame, kind.rename(lambda name: f"other-{name}"))


def test_normalisations_match_metrics_labels_and_controls_by_name():
    frame, age = ADATA.to_df().iloc[::-1, ::-1], ADATA.obs[["age"]]
    given = {"batch": ADATA.obs["donor"], "bio": ADATA.obs["kind"], "qc": age.assign(squared=age.age**2)}
    housekeeping = pd.Series(np.arange(N_GENES) < 4, index=ADATA.var_names)
    found = baselines.SCONE().fit(frame, negative_controls=housekeeping, **given)
    plain = {name: values.loc[frame.index].to_numpy() for name, values in given.items()}
    by_position = baselines.SCONE().fit(frame, negative_controls=housekeeping[frame.columns].to_numpy(), **plain)
    pd.testing.assert_frame_equal(found.table_, by_position.table_)


def test_scores_of_two_methods_are_matched_by_gene():
    rng = np.random.default_rng(2)
    signal = np.r_[rng.normal(3, 1, 60), rng.normal(0, 1, 140)]
    genes = [f"GENE{i}" for i in range(200)]
    first, second = (pd.Series(signal + rng.normal(0, 0.3, 200), index=genes) for _ in range(2))
    expected = baselines.idr(first, second)
    found = baselines.idr(first, second.iloc[rng.permutation(200)])
    np.testing.assert_array_equal(found.local_idr, expected.local_idr)
    with pytest.raises(DataError, match="score_2 has no row for"):
        baselines.idr(first, second.rename(lambda name: f"other-{name}"))
