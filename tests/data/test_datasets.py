"""Datasets: what the readers of public files give, and files that they refuse."""

import gzip
import re
import sys

import h5py
import numpy as np
import pytest
from scipy import io, sparse

from pyro_scvi.data import datasets
from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import DataError

COUNTS = np.array([[0, 3, 0, 1], [2, 0, 0, 0], [0, 0, 7, 4]])  # (cells, genes)
CELLS = ["AAAC-1", "AAAG-1", "AAAT-1"]
IDS = ["ENSG1", "ENSG2", "ENSG3", "ENSG4"]
SYMBOLS = ["CD8A", "NA", "CD8A", "MS4A1"]
KINDS = ["Gene Expression", "Gene Expression", "Gene Expression", "Antibody Capture"]


@pytest.fixture(scope="module")
def adata():
    return datasets.pbmc68k_reduced()


class TestPbmc68kReduced:
    def test_holds_integer_counts_of_every_gene(self, adata):
        assert adata.shape == (700, 765)
        assert adata.X.format == "csr"
        assert adata.X.dtype.kind == "i"
        assert adata.X.sum() == 486_651
        assert adata.X.max() == 259
        assert adata.X.nnz == 174_400
        assert adata.X.data.min() == 1

    def test_counts_fit_the_recorded_totals(self, adata):
        totals = np.asarray(adata.X.sum(axis=1)).ravel()
        assert (totals <= adata.obs["n_counts"]).all()
        assert (np.diff(adata.X.indptr) <= adata.obs["n_genes"]).all()

    def test_has_labels_and_quality_covariates(self, adata):
        assert adata.obs["bulk_labels"].nunique() == 10
        assert adata.obs["bulk_labels"].value_counts()["Dendritic"] == 240
        assert {"percent_mito", "n_genes", "phase"} <= set(adata.obs)

    def test_is_accepted_as_cells(self, adata):
        cells = Cells.from_anndata(adata, batch="phase", covariates=["percent_mito"])
        assert (cells.n_cells, cells.n_genes, cells.n_covariates) == (700, 765, 4)


def stored(counts, totals, decimals=3):
    return sparse.csr_matrix(np.round(np.log1p(counts * 1e4 / totals[:, None]), decimals))


def test_counts_are_recovered_from_rounded_logarithms():
    rng = np.random.default_rng(0)
    counts = rng.negative_binomial(0.3, 0.01, size=(50, 40))
    totals = counts.sum(axis=1) + 100.0
    recovered = datasets.recover_counts(stored(counts, totals), totals)
    np.testing.assert_array_equal(recovered.toarray(), counts)


def test_values_that_are_no_counts_are_refused():
    totals = np.full(3, 5000.0)
    with pytest.raises(DataError, match="not those of integer counts"):
        datasets.recover_counts(stored(COUNTS + 0.4 * (COUNTS > 0), totals), totals)
    with pytest.raises(DataError, match="not those of integer counts"):
        datasets.recover_counts(stored(COUNTS, totals), totals * 1.1)
    with pytest.raises(DataError, match="cannot be recovered exactly"):
        datasets.recover_counts(stored(COUNTS * 1000, totals), totals)


def test_missing_scanpy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scanpy", None)
    with pytest.raises(ImportError, match=r"pyro-scvi\[demo\]"):
        datasets.pbmc68k_reduced()


def cortex_text(counts=COUNTS):
    annotations = {
        "tissue": ["sscortex", "sscortex", "ca1hippocampus"],
        "group #": [1, 1, 2],
        "total mRNA mol": [21580, 21748, 31642],
        "well": [11, 95, 33],
        "sex": [1, -1, 0],
        "age": [21, 20, 26],
        "diameter": [0, 9.56, 11.1],
        "cell_id": ["1772071015_C02", "1772071017_G12", "1772071017_A05"],
        "level1class": ["interneurons", "interneurons", "pyramidal CA1"],
        "level2class": ["Int10", "Int10", "(none)"],
    }
    lines = [["", name, *values] for name, values in annotations.items()]
    lines.append([""] * (2 + len(counts)))
    lines += [
        [name, 1, *column] for name, column in zip(["Tspan12", "NA", "Rik_loc1", "Rik_loc2"], counts.T, strict=True)
    ]
    return "\n".join("\t".join(map(str, line)) for line in lines) + "\n"


class TestCortex:
    def test_reads_counts_and_annotations(self, tmp_path):
        path = tmp_path / "expression_mRNA_17-Aug-2014.txt"
        path.write_text(cortex_text())
        adata = datasets.read_cortex(path)
        np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
        assert adata.X.dtype == np.int32
        assert list(adata.var_names) == ["Tspan12", "NA", "Rik_loc1", "Rik_loc2"]
        assert list(adata.obs_names) == ["1772071015_C02", "1772071017_G12", "1772071017_A05"]
        assert list(adata.obs["level1class"]) == ["interneurons", "interneurons", "pyramidal CA1"]
        assert list(adata.obs["diameter"]) == [0, 9.56, 11.1]
        assert Cells.from_anndata(adata, covariates=["age"]).n_genes == 4

    def test_reads_gzip_and_windows_line_ends(self, tmp_path):
        path = tmp_path / "cortex.txt.gz"
        path.write_bytes(gzip.compress(cortex_text().replace("\n", "\r\n").encode()))
        np.testing.assert_array_equal(datasets.read_cortex(path).X.toarray(), COUNTS)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda text: text.replace("level1class", "class"), "no annotation row 'level1class'"),
            (lambda text: text.replace("\t7", "\t7.5"), "cannot read it"),
            (lambda text: text.replace("\t0\t7", "\t7"), "cannot read it"),
            (lambda text: re.sub(r"(?m)^(\w+\t1\t\d+\t\d+)\t\d+$", r"\1", text), "2 counts for 3 cells"),
            (lambda text: text[: text.index("Tspan12")], "cannot read it"),
            (lambda text: "", "no annotation row 'cell_id'"),
        ],
    )
    def test_other_layouts_are_refused_by_name(self, tmp_path, damage, message):
        path = tmp_path / "broken.txt"
        path.write_text(damage(cortex_text()))
        with pytest.raises(DataError, match=r"broken\.txt") as caught:
            datasets.read_cortex(path)
        assert message in str(caught.value)

    def test_missing_file_is_named(self, tmp_path):
        with pytest.raises(DataError, match=r"absent\.txt"):
            datasets.read_cortex(tmp_path / "absent.txt")


def write_folder(folder, version, zipped):
    folder.mkdir(exist_ok=True)
    columns = [IDS, SYMBOLS] if version == 2 else [IDS, SYMBOLS, KINDS]
    rows = "".join("\t".join(row) + "\n" for row in zip(*columns, strict=True))
    io.mmwrite(folder / "matrix.mtx", sparse.coo_matrix(COUNTS.T))
    (folder / ("genes.tsv" if version == 2 else "features.tsv")).write_text(rows)
    (folder / "barcodes.tsv").write_text("".join(f"{name}\n" for name in CELLS))
    for path in list(folder.iterdir()) if zipped else []:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return folder


def write_hdf5(path, version):
    matrix = sparse.csr_matrix(COUNTS.astype(np.int32))  # the file is CSC of (genes, cells)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        group["shape"] = COUNTS.T.shape
        group["barcodes"] = np.array(CELLS, dtype="S")
        if version == 2:
            group["genes"], group["gene_names"] = np.array(IDS, dtype="S"), np.array(SYMBOLS, dtype="S")
        else:
            features = group.create_group("features")
            columns = {"id": IDS, "name": SYMBOLS, "feature_type": KINDS, "genome": ["GRCh38"] * 4}
            for name, values in columns.items():
                features[name] = np.array(values, dtype="S")
    return path


def check_10x(adata, version):
    n_genes = 4 if version == 2 else 3  # version 3 marks the last as an antibody
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS[:, :n_genes])
    assert adata.X.format == "csr"
    assert list(adata.obs_names) == CELLS
    assert list(adata.var_names) == ["CD8A", "NA", "CD8A-1", "MS4A1"][:n_genes]
    assert list(adata.var["gene_ids"]) == IDS[:n_genes]
    assert Cells.from_anndata(adata).n_genes == n_genes


class Test10x:
    @pytest.mark.parametrize("zipped", [False, True])
    @pytest.mark.parametrize("version", [2, 3])
    def test_reads_folders(self, tmp_path, version, zipped):
        check_10x(datasets.read_10x(write_folder(tmp_path / "mtx", version, zipped)), version)

    @pytest.mark.parametrize("version", [2, 3])
    def test_reads_hdf5(self, tmp_path, version):
        check_10x(datasets.read_10x(write_hdf5(tmp_path / "filtered.h5", version)), version)

    def test_unknown_genome_is_named(self, tmp_path):
        with pytest.raises(DataError, match=r"mouse.*filtered\.h5|filtered\.h5.*mouse"):
            datasets.read_10x(write_hdf5(tmp_path / "filtered.h5", 3), genome="mouse")

    def test_incomplete_folder_is_named(self, tmp_path):
        folder = write_folder(tmp_path / "mtx", 3, zipped=False)
        (folder / "features.tsv").unlink()
        with pytest.raises(DataError, match=r"mtx: .*features\.tsv, features\.tsv\.gz, genes\.tsv"):
            datasets.read_10x(folder)

    def test_folder_with_too_few_barcodes_is_refused(self, tmp_path):
        folder = write_folder(tmp_path / "mtx", 3, zipped=False)
        (folder / "barcodes.tsv").write_text("AAAC-1\n")
        with pytest.raises(DataError, match="1 barcodes"):
            datasets.read_10x(folder)

    def test_other_files_are_refused_by_name(self, tmp_path):
        for name, content in [("empty.h5", b""), ("text.h5", b"counts")]:
            (tmp_path / name).write_bytes(content)
            with pytest.raises(DataError, match=name):
                datasets.read_10x(tmp_path / name)
        with h5py.File(tmp_path / "hollow.h5", "w") as file:
            file.create_group("matrix")
        with pytest.raises(DataError, match=r"hollow\.h5"):
            datasets.read_10x(tmp_path / "hollow.h5")
        with pytest.raises(DataError, match=r"absent\.h5"):
            datasets.read_10x(tmp_path / "absent.h5")
