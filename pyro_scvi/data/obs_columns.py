"""Columns of obs, read as categories or numbers, with errors that name the column and a cell."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from pyro_scvi.errors import DataError, SchemaError
from pyro_scvi.utils.checks import warn

MOST_FLOAT_LEVELS = 20
"""A batch column of numbers with decimals and more levels than this is refused: it is probably continuous."""

MOST_INTEGER_LEVELS = 100
"""A batch column of integers with more levels than this raises a warning: it may count something."""

FEW_CELLS = 2
"""A batch of so few cells raises a warning."""

LARGEST_NUMBER = 1e100
"""A covariate above this is refused: its variance may overflow."""

PLURALS = {"batch": "batches", "category": "categories"}
"""What columns of categories are called in messages."""

MOST_PAIRS = 5
"""So many pairs of names that look alike are listed in a message."""

LARGEST_EXACT = 2.0**53
"""Below this, float64 holds every integer: two numbers are not taken for one."""

_TOO_LARGE = "holds values too large to be standardised; rescale it."

WORDS_FOR_MISSING = frozenset({"", "nan", "none", "null", "na", "n/a", "nat", "<na>"})
"""What a missing value becomes when a column is turned into text; in lower case."""


WORDS_FOR_UNLABELLED = WORDS_FOR_MISSING | {"unknown", "unlabelled", "unlabeled", "unassigned"}
"""What cells without a label are called where missing values are spelled out; in lower case."""


def categories(obs: pd.DataFrame, name: str, what: str = "batch") -> tuple[list[str], np.ndarray]:
    """Read a column of categories; ``what`` names in messages what they are.

    Returns
    -------
    labels
        Names of the categories that occur, each once, in the order of the column's categories, else sorted. 1 and "1"
        have one name.
    codes
        (cells,): position of each cell's category among the labels.

    Raises
    ------
    SchemaError
        If there is no column of this name.
    DataError
        If a cell has no value, or the column looks continuous.
    """
    levels, codes = _levels(obs, name, what)
    labels = list(dict.fromkeys(levels))
    places = {label: place for place, label in enumerate(labels)}
    return labels, np.array([places[level] for level in levels])[codes]


def _levels(obs: pd.DataFrame, name: str, what: str) -> tuple[list[str], np.ndarray]:
    """Names of a column's categories, twice where these are written in two ways, and each cell's position in them."""
    column = _column(obs, name)
    absent = column.isna().to_numpy()
    if absent.any():
        raise DataError(
            f"{what} column {name!r} has no value for {absent.sum()} cells, such as {_first(obs, absent)}; "
            "fill or drop them."
        )
    categorical = column.astype("category").cat.remove_unused_categories()
    labels = [label_of(level) for level in categorical.cat.categories]
    if len(labels) > MOST_FLOAT_LEVELS and (column.dtype.kind == "f" or _have_decimals(labels)):
        raise DataError(
            f"{what} column {name!r} holds floats with {len(labels)} levels. If it is continuous, pass "
            f"covariates=[{name!r}]. If it names groups of cells, turn the numbers into words."
        )
    return labels, categorical.cat.codes.to_numpy()


def has_order(obs: pd.DataFrame, name: str) -> bool:
    """Whether the categories of a column have an order of their own: numbers, dates, or an ordered Categorical."""
    column = _column(obs, name)
    if isinstance(column.dtype, pd.CategoricalDtype) and column.cat.ordered:
        return True
    levels = column.astype("category").cat.categories
    return levels.dtype.kind in "biufmM" and levels.is_monotonic_increasing


def labels_of(obs: pd.DataFrame, name: str) -> tuple[list[str], np.ndarray]:
    """Read a column of labels as :func:`categories` does; cells without a label have the code -1.

    Raises
    ------
    SchemaError, DataError
        As :func:`categories`, and if no cell has a label.

    Warns
    -----
    UserWarning
        If a label is a word for a missing value.
    """
    present = _column(obs, name).notna().to_numpy()
    if not present.any():
        raise DataError(f"label column {name!r} has no value for any cell; leave labels= out.")
    labels, known = categories(obs[present], name, "label")
    if words := [label for label in labels if label.strip().lower() in WORDS_FOR_UNLABELLED]:
        warn(
            f"label column {name!r} holds {quoted(words)}, which counts as a label like any other. If these cells have "
            f"no label, put missing values there: obs[{name!r}].replace({words[0]!r}, None)."
        )
    codes = np.full(len(obs), -1)
    codes[present] = known
    return labels, codes


def warn_of_batches(obs: pd.DataFrame, name: str, what: str = "batch") -> None:
    """Warn of what can serve as a batch, but is mostly a slip: very small batches, measurements, words for missing.

    Warns
    -----
    UserWarning
        Once for each kind of slip; names the column and the batches.
    """
    sizes = _warned_sizes(obs, name, what)
    few = sizes[sizes <= FEW_CELLS]
    if len(few):
        plural = PLURALS[what]
        warn(
            f"{len(few)} of the {len(sizes)} {plural} in column {name!r} have 1 or 2 cells, too few to learn from: "
            f"{quoted(list(few.index))}. If this is no column of {plural}, choose another; otherwise join or leave out "
            f"such {plural}."
        )


def warn_of_new_batches(obs: pd.DataFrame, name: str, known: Sequence[str]) -> None:
    """Warn of new batches of a query that are mostly a slip, among them those that look like a ``known`` one.

    Few cells are no slip here: they are enough to embed them.

    Warns
    -----
    UserWarning
        As :func:`warn_of_batches`.
    """
    _warned_sizes(obs, name, "batch", known)


def _warned_sizes(obs: pd.DataFrame, name: str, what: str, known: Sequence[str] = ()) -> pd.Series:
    """Number of cells of each category, most first; warns of names that are mostly a slip."""
    plural, column = PLURALS[what], f"{what} column {name!r}"
    labels, codes = _levels(obs, name, what)
    sizes = pd.Series(codes).map(dict(enumerate(labels))).value_counts()
    missing = words_for_missing(sizes.index)
    if missing:
        warn(
            f"{column} holds {quoted(missing)} ({sizes[missing].sum()} cells), as missing values are written in text. "
            f"These cells count as a {what} of their own. Name their {what}, or leave them out."
        )
    if len(labels) > len(sizes):
        warn(f"{column} holds the same {plural} as numbers and as text, such as 1 and '1': taken as one.")
    warn_of_lookalikes(column, plural, list(sizes.index), known)
    if len(sizes) > MOST_INTEGER_LEVELS and all(map(_is_integer, sizes.index)):
        warn(
            f"{what} column {name!r} holds integers with {len(sizes)} levels, each a {what}. If it is a measurement, "
            f"pass covariates=[{name!r}]."
        )
    return sizes


def warn_of_lookalikes(source: str, plural: str, names: Sequence[str], known: Sequence[str] = ()) -> None:
    """Warn of names that differ from each other, or from ``known`` ones, in form only: "a" and "a ", "1" and "1.0".

    Warns
    -----
    UserWarning
        If there are any; ``source`` says where, ``plural`` what they name.
    """
    forms: dict[str, str] = {}
    pairs = []
    for word in [*known, *sorted(names)]:
        other = forms.setdefault(_form(word), word)
        pairs += [f"{word!r} beside {other!r}"] if other != word else []
    if pairs:
        more = f" ({len(pairs)} in all)" if len(pairs) > MOST_PAIRS else ""
        warn(
            f"{source} holds {', '.join(pairs[:MOST_PAIRS])}{more}. Such {plural} differ by spaces, capitals or the "
            "form of a number only, and they count as different. If they are the same, give them one name first."
        )


def _form(word: str) -> str:
    """What names share that are probably the same: without spaces at the ends, capitals, and zeros of a number."""
    bare = " ".join(word.split()).casefold()
    return number_named(bare)


def number_named(text: str) -> str:
    """A number in text in the form that :func:`label_of` gives it, such as "1" for "1.0"; other text as it is."""
    return label_of(float(text)) if _is_number(text) and abs(float(text)) < LARGEST_EXACT else text


def words_for_missing(labels: Sequence[Any] | pd.Index) -> list[Any]:
    """Labels that are words for a missing value, such as "nan", which ``astype(str)`` makes of it."""
    return [label for label in labels if isinstance(label, str) and label.strip().lower() in WORDS_FOR_MISSING]


def numbers(obs: pd.DataFrame, name: str) -> np.ndarray:
    """Read a continuous column: (cells,), float64, finite.

    Raises
    ------
    SchemaError
        If there is no column of this name.
    DataError
        If it is not numeric, or a value is NaN or infinite.
    """
    column = _column(obs, name)
    if _holds_categories(column):
        raise DataError(
            f"covariate column {name!r} must be numeric; its type is {column.dtype}, and text and categories are "
            "not measurements, even if they are digits, like the numbers of clusters. Pass categories as batch=. "
            "Join two columns of them into one: obs['a'].astype(str) + '_' + obs['b'].astype(str). For a "
            f"measurement that was read as text, obs[{name!r}].astype(float)."
        )
    try:
        if column.dtype.kind in "cmM":  # NumPy would drop imaginary parts, and turn dates into nanoseconds
            raise TypeError
        with np.errstate(over="ignore"):  # of a longer type; infinity is refused below
            values = column.to_numpy(dtype=np.float64, na_value=np.nan)
    except OverflowError as error:  # an integer of Python may be of any size
        raise DataError(f"covariate column {name!r} {_TOO_LARGE}") from error
    except (TypeError, ValueError) as error:
        raise DataError(
            f"covariate column {name!r} must be numeric; its type is {column.dtype}. Pass categories as batch=."
        ) from error
    if (np.abs(values) > LARGEST_NUMBER).any() and np.isfinite(values).all():
        raise DataError(f"covariate column {name!r} {_TOO_LARGE}")
    wrong = ~np.isfinite(values)
    if wrong.any():
        raise DataError(
            f"covariate column {name!r} must be finite; {wrong.sum()} cells, such as {_first(obs, wrong)}, "
            "hold NaN or infinity."
        )
    return values


def positive(obs: pd.DataFrame, name: str) -> np.ndarray:
    """Read a column of size factors: (cells,), float64, above 0.

    Raises
    ------
    SchemaError, DataError
        As :func:`numbers`, and if a value is not above 0.
    """
    values = numbers(obs, name)
    wrong = values <= 0
    if wrong.any():
        raise DataError(
            f"size factors in column {name!r} must be above 0; {wrong.sum()} cells, such as {_first(obs, wrong)}, have "
            f"{values[wrong].min():g}. Are these logarithms, or cells without counts?"
        )
    return values


def native(obs: pd.DataFrame) -> pd.DataFrame:
    """A copy whose numbers have the byte order of this machine, as pandas needs them."""
    types = {name: kind.newbyteorder("=") for name, kind in obs.dtypes.items() if _is_foreign(kind)}
    return obs.astype(types) if types else obs.copy()


def _is_foreign(kind: Any) -> bool:
    return isinstance(kind, np.dtype) and not kind.isnative


def object_columns(obs: pd.DataFrame) -> list[Any]:
    """Names of the columns of Python objects; ``select_dtypes(object)`` of pandas 3 adds those of type str."""
    return [name for name, kind in obs.dtypes.items() if pd.api.types.is_object_dtype(kind)]


def inferred(column: pd.Series) -> pd.Series:
    """A column of objects in the type of its values; strings and booleans may have missing values."""
    column = column.infer_objects()  # first: floats stay floats, which convert_dtypes would turn into Float64
    return column.convert_dtypes() if pd.api.types.is_object_dtype(column) else column


def of_one_kind(column: pd.Series) -> pd.Series:
    """A column that is text in some cells and numbers in others as text throughout: 1 and "1" are the same word."""
    levels = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column.dropna()
    if not pd.api.types.is_object_dtype(levels) or len({isinstance(level, str | bytes) for level in levels}) < 2:
        return column
    return column.astype(object).map(label_of, na_action="ignore")


def quoted(names: Sequence[str] | pd.Index, most: int = 10) -> str:
    """List names for a message: the first few, and how many there are."""
    shown = ", ".join(repr(str(name)) for name in names[:most])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > most else shown


def _column(obs: pd.DataFrame, name: str) -> pd.Series:
    if name not in obs.columns:
        raise SchemaError(f"obs has no column {name!r}; its columns are {sorted(map(str, obs.columns))}.")
    column = obs[name]
    if isinstance(column, pd.DataFrame):
        raise DataError(f"obs has {column.shape[1]} columns named {name!r}; rename all but one.")
    return column


def _first(obs: pd.DataFrame, mask: np.ndarray) -> str:
    return repr(str(obs.index[int(mask.argmax())]))


def label_of(level: Any) -> str:
    """Name of a category; 1.0 is named 1, because a missing value turns a column of integers into floats."""
    if isinstance(level, float | np.floating) and float(level).is_integer():
        return str(int(level))
    return text_of(level)


def text_of(name: Any) -> str:
    """A name as text; HDF5 files read by other programs give names as bytes."""
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def as_written(labels: np.ndarray, label: Any) -> Any:
    """A label as the ``labels`` (cells,) have it, which may hold 1 for "1"; itself if none has its name."""
    names = {label_of(known): known for known in pd.unique(labels[~pd.isna(labels)])}
    return names.get(label_of(label), label)


def _holds_categories(column: pd.Series) -> bool:
    """Whether values are text or categories, whatever is written in them."""
    if isinstance(column.dtype, pd.CategoricalDtype | pd.StringDtype):
        return True
    return pd.api.types.is_object_dtype(column) and any(isinstance(value, str | bytes) for value in column)


def _have_decimals(labels: Sequence[str]) -> bool:
    """Whether all labels are numbers and some are no integers."""
    return all(map(_is_number, labels)) and not all(map(_is_integer, labels))


def _is_number(label: str) -> bool:
    try:
        return np.isfinite(float(label))
    except ValueError:
        return False


def _is_integer(label: str) -> bool:
    return label.removeprefix("-").isdecimal()
