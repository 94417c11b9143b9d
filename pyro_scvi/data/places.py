"""Places of counts in an AnnData: X, a layer, or raw."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyro_scvi.data.obs_columns import quoted
from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.utils.checks import brief


class Place(NamedTuple):
    """Where the counts of an AnnData are: ``X`` by default, or a layer, or ``raw.X``."""

    layer: str | None = None
    raw: bool = False

    @property
    def name(self) -> str:
        """Name of the matrix in messages."""
        if self.raw:
            return "raw.X"
        return "X" if self.layer is None else f"layer {self.layer!r}"

    @property
    def path(self) -> str:
        """Where a file of anndata has the matrix."""
        if self.raw:
            return "raw/X"
        return "X" if self.layer is None else f"layers/{self.layer}"


def chosen(layer: str | None, raw: bool, default: Place) -> Place:
    """The place that arguments name, else the default one.

    Raises
    ------
    ModelError
        If they name two, or the layer by something else than a word.
    """
    if not isinstance(layer, str | None):
        raise ModelError(f"layer must be the name of a layer, or None; got {brief(layer)}.")
    if raw and layer is not None:
        raise ModelError("the counts are in a layer or in adata.raw: pass layer= or raw=True, not both.")
    return default if layer is None and not raw else Place(layer, raw)


def require_no_mudata(group: Any, path: Path) -> None:
    """Refuse an open file of several AnnData.

    Raises
    ------
    DataError
        If it is one; names what it holds.
    """
    if "mod" in group and len(group["mod"]):
        raise DataError(
            f"{path} holds MuData ({', '.join(group['mod'])}): write the AnnData with the counts of genes into a file "
            f"of its own, as in mdata[{first_of(list(group['mod']))!r}].write_h5ad(...)."
        )


def parts_of_mudata(given: Any) -> str:
    """What a message adds to the type of MuData, which was passed in place of an AnnData; nothing for other types."""
    parts = getattr(given, "mod", None)  # MuData holds an AnnData for each modality
    if not isinstance(parts, Mapping) or not parts:
        return ""
    return (
        f" with {quoted(list(parts))}; pass the one that holds the counts of genes, such as "
        f"mdata[{first_of(list(parts))!r}]"
    )


def first_of(modalities: Sequence[str]) -> str:
    """The AnnData of a MuData that most probably holds the counts of genes."""
    return "rna" if "rna" in modalities else modalities[0]


def hint_of(layers: str, has_raw: bool) -> str:
    """Where raw counts may be instead, for messages."""
    hint = f"Pass layer= with raw counts (layers: {layers})."
    if has_raw:
        hint += " There is adata.raw, too: if it holds the raw counts, pass raw=True, or pass adata.raw.to_adata()."
    return hint
