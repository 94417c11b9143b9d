"""Names of genes that look like a slip: barcodes of cells, and names that differ in form only."""

import re

import pandas as pd

from pyro_scvi.data.obs_columns import quoted
from pyro_scvi.utils.checks import warn

_BARCODE = re.compile(r"[ACGTN]{12,}([-_.].*)?")  # of a cell, such as AAACCTGAGAAACCAT-1
_GENE_ID = re.compile(r"(ENS[A-Z]*G\d{11})(\.\d+)?")  # of Ensembl; without its version it is the same gene
_LOOKED_AT = 100


def warn_of_swapped_names(genes: pd.Index, cells: pd.Index) -> None:
    """Warn where columns are named like cells, or rows like genes: most probably they were swapped on reading.

    Warns
    -----
    UserWarning
        If they are; names some.
    """
    for what, other, names, form in (("genes", "cells", genes, _BARCODE), ("cells", "genes", cells, _GENE_ID)):
        few = [str(name) for name in names[:_LOOKED_AT]]
        if few and sum(form.fullmatch(name) is not None for name in few) > len(few) / 2:
            warn(
                f"{what} are named like {other}: {quoted(few, 3)}. Cells are rows and genes are columns. If they are "
                "swapped, pass adata.T, or the matrix turned round."
            )
            return


def other_forms(missing: pd.Index, unmatched: pd.Index) -> str:
    """A sentence on missing genes that are there in another form: case, spaces or a version number; "" if none is."""
    there = {_plain(name): name for name in unmatched}
    pairs = [(name, there[_plain(name)]) for name in missing if _plain(name) in there]
    if not pairs:
        return ""
    wanted, found = pairs[0]
    return (
        f" {len(pairs)} of them are probably there under names that differ only by case, spaces or a version number, "
        f"such as {found!r} for {wanted!r}: give them the same names first, by adata.var_names = [...]."
    )


def _plain(name: str) -> str:
    bare = str(name).strip().upper()
    gene = _GENE_ID.fullmatch(bare)
    return gene[1] if gene else bare
