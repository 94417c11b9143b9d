"""Datasets: real demo counts without a download, and readers of the paper's public files."""

import csv
import gzip
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from pyro_scvi.errors import DataError

__all__ = ["pbmc68k_reduced", "read_10x", "read_cortex"]


def __dir__() -> list[str]:
    return __all__


LOG_TOLERANCE = 5.1e-4
"""Largest difference in log(1 + normalised count) of a recovered count from the stored value, which has 3 decimals."""

_TARGET = 1e4  # total to which pbmc68k_reduced was normalised
_GENE_EXPRESSION = "Gene Expression"


def pbmc68k_reduced() -> AnnData:
    """Return 700 peripheral blood cells x 765 genes with ten cell types.

    The counts are recovered from a file that scanpy ships.

    That file holds log(1 + 10000 x / n), rounded to 3 decimals, and the total n of each cell over all its genes
    (obs column ``n_counts``). This determines the counts x exactly: for a count of c the rounding moves the recovered
    value by at most c / 2000, and the largest count is 259.

    Returns
    -------
    AnnData
        ``X``: CSR of integer counts, (700, 765). ``obs``: ``bulk_labels`` (cell type), ``louvain``, ``phase`` and
        the quality covariates ``n_genes``, ``percent_mito``, ``n_counts``, ``S_score``, ``G2M_score``.

    Raises
    ------
    ImportError
        If scanpy is not installed.
    DataError
        If the stored values do not come from integers to within ``LOG_TOLERANCE``.

    References
    ----------
    Zheng et al. 2017, Massively parallel digital transcriptional profiling of single cells.

    Examples
    --------
    >>> blood = ps.datasets.pbmc68k_reduced()
    >>> blood.shape, int(blood.X.max())
    ((700, 765), 259)
    """
    shipped = _scanpy().datasets.pbmc68k_reduced()
    counts = recover_counts(shipped.raw.X, shipped.obs["n_counts"].to_numpy(dtype=np.float64))
    columns = ["bulk_labels", "louvain", "phase", "n_genes", "percent_mito", "n_counts", "S_score", "G2M_score"]
    return AnnData(counts, obs=shipped.obs[columns].copy(), var=pd.DataFrame(index=shipped.raw.var_names.copy()))


def recover_counts(log_values: Any, totals: np.ndarray) -> sparse.csr_matrix:
    """Invert log(1 + 10000 x / n): counts x from values that were stored with 3 decimals.

    Parameters
    ----------
    log_values
        (cells, genes), sparse.
    totals
        n, (cells,): the total count of each cell.

    Returns
    -------
    csr_matrix
        (cells, genes), int32 counts.

    Raises
    ------
    DataError
        If a stored value is further than ``LOG_TOLERANCE`` from that of its nearest count, or so large that
        several counts share one stored value.
    """
    stored = sparse.csr_matrix(log_values, dtype=np.float64)
    scale = np.repeat(totals / _TARGET, np.diff(stored.indptr))
    counts = np.rint(np.expm1(stored.data) * scale)
    deviation = np.abs(np.log1p(counts / scale) - stored.data).max(initial=0.0)
    if deviation > LOG_TOLERANCE:
        raise DataError(
            f"values are not those of integer counts: {deviation:.2g} away in log(1 + normalised count), where "
            f"rounding explains {LOG_TOLERANCE:.2g}."
        )
    if counts.max(initial=0.0) > 0.5 / LOG_TOLERANCE:
        raise DataError(f"a count of {counts.max():.0f} cannot be recovered exactly from values with 3 decimals.")
    return sparse.csr_matrix((counts.astype(np.int32), stored.indices, stored.indptr), shape=stored.shape)


def read_cortex(path: str | Path) -> AnnData:
    r"""Read the mouse cortex counts of Zeisel et al. (2015).

    The file is ``expression_mRNA_17-Aug-2014.txt``, plain or .gz.

    The tab-separated file starts with rows of cell annotations (tissue, group #, ..., cell_id, level1class,
    level2class), whose first field is empty. An empty row follows, then one row per gene: name, gene group, counts.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    AnnData
        ``X``: CSR of int32 counts, (cells, genes), all genes of the file (the paper takes the 558 of largest
        variance); ``obs``: the annotations, indexed by cell_id; ``level1class`` holds the 7 classes.

    Raises
    ------
    DataError
        If the file is missing or has another layout; names the file.

    References
    ----------
    Zeisel et al. 2015, Cell types in the mouse cortex and hippocampus revealed by single-cell RNA-seq.

    Examples
    --------
    >>> rows = ["\tcell_id\tc1\tc2", "\tlevel1class\tneuron\tglia", "", "Sox2\t1\t0\t3", "Snap25\t1\t7\t0"]
    >>> _ = (folder / "cortex.txt").write_text("\n".join(rows))
    >>> cortex = ps.datasets.read_cortex(folder / "cortex.txt")
    >>> cortex.X.toarray().tolist(), list(cortex.obs.level1class)
    ([[0, 7], [3, 0]], ['neuron', 'glia'])
    """
    path = Path(path)
    with _errors_name_file(path):
        with _opened(path) as file:
            header = list(takewhile(lambda row: row[0] == "", (line.rstrip("\r\n").split("\t") for line in file)))
        annotations = {row[1]: row[2:] for row in header if len(row) > 1 and row[1]}
        for name in ("cell_id", "level1class"):
            if name not in annotations:
                raise DataError(f"found no annotation row {name!r}; the rows are {sorted(annotations)}.")
        obs = pd.DataFrame({name: _typed(values) for name, values in annotations.items()})
        types: defaultdict[int, type] = defaultdict(lambda: np.int32, {0: str})
        genes = pd.read_csv(
            path, sep="\t", header=None, skiprows=len(header), index_col=0, dtype=types, na_filter=False,
            quoting=csv.QUOTE_NONE,
        )  # fmt: skip
        counts = sparse.csr_matrix(genes.to_numpy()[:, 1:].T)
        if counts.shape[0] != len(obs):
            raise DataError(f"gene rows have {counts.shape[0]} counts for {len(obs)} cells.")
    var = pd.DataFrame({"group": genes.iloc[:, 0].to_numpy()}, index=pd.Index(genes.index.astype(str), name="gene"))
    return AnnData(counts, obs=obs.set_index("cell_id"), var=var)


def read_10x(path: str | Path, *, genome: str | None = None) -> AnnData:
    r"""Read the output of Cell Ranger: an HDF5 file (.h5) or a folder.

    A folder holds matrix.mtx, barcodes, and features or genes.

    Versions 2 and 3 of both layouts are read, the files of a folder plain or gzipped. Only gene expression is kept.

    Parameters
    ----------
    path
        File or folder.
    genome
        The genome to read from an HDF5 file that holds several.

    Returns
    -------
    AnnData
        ``X``: CSR of counts, (cells, genes); gene symbols as names, made unique by -1, -2, ...; ``var["gene_ids"]``.

    Raises
    ------
    DataError
        If the file is missing or has another layout; names the file.
    ImportError
        If scanpy is not installed and ``path`` is an HDF5 file.

    Examples
    --------
    >>> _ = (folder / "barcodes.tsv").write_text("AAAC-1")
    >>> _ = (folder / "genes.tsv").write_text("ENSG1\tCD8A")
    >>> _ = (folder / "matrix.mtx").write_text("%%MatrixMarket matrix coordinate integer general\n1 1 1\n1 1 3")
    >>> ps.datasets.read_10x(folder).to_df()
            CD8A
    AAAC-1     3
    """
    path = Path(path)
    with _errors_name_file(path):
        adata = _read_10x_folder(path) if path.is_dir() else _read_10x_hdf5(path, genome)
    adata.var_names_make_unique()
    return adata


def _read_10x_hdf5(path: Path, genome: str | None) -> AnnData:
    if not path.is_file():
        raise DataError("there is no such file.")
    scanpy = _scanpy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Variable names are not unique")  # the caller makes them unique
        return scanpy.read_10x_h5(path, genome=genome)


def _read_10x_folder(folder: Path) -> AnnData:
    # scanpy reads the files of version 3 only if they are gzipped, those of version 2 only if they are not.
    features = _table(_one_of(folder, "features.tsv", "genes.tsv"))
    barcodes = _table(_one_of(folder, "barcodes.tsv"))[0].to_numpy()
    with _opened(_one_of(folder, "matrix.mtx"), "rb") as file:
        matrix = sparse.csr_matrix(_matrix_market(file).T)
    if matrix.shape != (len(barcodes), len(features)):
        raise DataError(f"matrix.mtx is {matrix.shape} for {len(barcodes)} barcodes and {len(features)} features.")
    var = pd.DataFrame({"gene_ids": features[0].to_numpy()}, index=pd.Index(features[1].to_numpy()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Variable names are not unique")
        adata = AnnData(matrix, obs=pd.DataFrame(index=pd.Index(barcodes)), var=var)
        if features.shape[1] > 2:
            adata.var["feature_types"] = features[2].to_numpy()
            adata = adata[:, adata.var["feature_types"] == _GENE_EXPRESSION].copy()
    return adata


def _matrix_market(file: Any) -> Any:
    from scipy import io  # 15 ms, which only these files need

    with warnings.catch_warnings():
        # SciPy 1.18 wants to be told the class of its result, which does not matter here; SciPy 1.13 cannot be told.
        warnings.filterwarnings("ignore", "The default value for `spmatrix`", DeprecationWarning)
        return io.mmread(file)


def _one_of(folder: Path, *names: str) -> Path:
    candidates = [folder / (name + suffix) for name in names for suffix in ("", ".gz")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise DataError(f"found none of {', '.join(candidate.name for candidate in candidates)}.")


def _table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", header=None, dtype=str, na_filter=False, quoting=csv.QUOTE_NONE)


def _typed(values: list[str]) -> pd.Series:
    """A column of numbers if all values are numbers, else of categories, or of strings if every value differs."""
    column = pd.Series(values)
    try:
        return pd.to_numeric(column)
    except ValueError:
        return column if column.is_unique else column.astype("category")


def _opened(path: Path, mode: Literal["rt", "rb"] = "rt") -> IO[Any]:
    opener: Callable[..., IO[Any]] = gzip.open if path.suffix == ".gz" else open
    return opener(path, mode)


@contextmanager
def _errors_name_file(path: Path) -> Iterator[None]:
    """Turn any error while reading into a DataError that names the file."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # scanpy raises a bare Exception for missing HDF5 groups
        raise DataError(f"{path}: cannot read it: {error}") from error


def _scanpy() -> ModuleType:
    try:
        import scanpy
    except ImportError as error:
        raise ImportError("this needs scanpy: pip install 'pyro-scvi[demo]'") from error
    return scanpy
