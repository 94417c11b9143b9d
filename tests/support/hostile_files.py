"""Files of anndata with one array or attribute that is damaged or made to harm, each by a change of an .h5ad file."""

import h5py
import numpy as np

from tests.support.cli_runs import make_adata

ARRAYS = (
    "X/data",
    "X/indices",
    "X/indptr",
    "obs/_index",
    "obs/age",
    "obs/donor/codes",
    "obs/donor/categories",
    "var/_index",
)
DENSE = "X"


def write_file(path, dense=False):
    """An .h5ad file of 60 cells with counts in X, compressed sparse rows or dense."""
    adata = make_adata()
    del adata.layers["raw"]
    adata.obs["donor"] = adata.obs["donor"].astype("category")
    adata.X = adata.X.toarray() if dense else adata.X
    adata.write_h5ad(path)
    return path


def replace(file, name, content):
    """Another array under a name, with the attributes of the first."""
    attributes = dict(file[name].attrs)
    del file[name]
    file[name] = content
    file[name].attrs.update(attributes)


def _gone(file, name):
    del file[name]


def _shorter(file, name):
    replace(file, name, file[name][:-3])


def _longer(file, name):
    replace(file, name, np.concatenate([file[name][...], file[name][:3]]))


def _empty(file, name):
    replace(file, name, file[name][:0])


def _one_number(file, name):
    replace(file, name, 7)


def _two_dimensional(file, name):
    replace(file, name, file[name][...][:, None])


def _words(file, name):
    replace(file, name, np.full(file[name].shape, "word", dtype=h5py.string_dtype()))


def _no_utf8(file, name):
    replace(file, name, np.full(file[name].shape, b"\xff\xfe\x00", dtype="S3"))


def _nan(file, name):
    replace(file, name, np.full(file[name].shape, np.nan))


def _negative(file, name):
    replace(file, name, np.full(file[name].shape, -1, np.int64))


def _beyond(file, name):
    replace(file, name, np.full(file[name].shape, 2**62, np.int64))


def _unsigned(file, name):
    replace(file, name, np.full(file[name].shape, 2**64 - 1, np.uint64))


def _complex(file, name):
    replace(file, name, np.full(file[name].shape, 1j))


def _records(file, name):
    replace(file, name, np.zeros(file[name].shape, dtype=[("a", "f4"), ("b", "S3")]))


def _references(file, name):
    replace(file, name, np.full(file[name].shape, file.ref, dtype=h5py.ref_dtype))


def _no_content(file, name):
    replace(file, name, h5py.Empty("f4"))


def _group(file, name):
    attributes = dict(file[name].attrs)
    del file[name]
    file.create_group(name).attrs.update(attributes)


def _type(file, name):
    del file[name]
    file[name] = np.dtype("f4")


def _loop(file, name):
    del file[name]
    file[name] = h5py.SoftLink(f"/{name}")


def _nowhere(file, name):
    del file[name]
    file[name] = h5py.SoftLink("/nowhere")


def _root(file, name):
    del file[name]
    file[name] = h5py.SoftLink("/")


def _garbled(file, name):
    """Chunks that are not what their compression wrote."""
    values, attributes = file[name][...], dict(file[name].attrs)
    if values.dtype == object:
        values = values.astype("S8")
    del file[name]
    array = file.create_dataset(name, data=values, compression="gzip", chunks=values.shape)
    array.attrs.update(attributes)
    array.id.write_direct_chunk((0,) * values.ndim, b"no chunk of gzip")


def _enormous(file, name):
    """A petabyte that takes no space, because none of it was written."""
    attributes = dict(file[name].attrs)
    del file[name]
    array = file.create_dataset(name, shape=(2**48, *([20] if name == DENSE else [])), dtype="f4", chunks=True)
    array.attrs.update(attributes)


OF_ARRAYS = {
    damage.__name__.lstrip("_"): damage
    for damage in (
        _gone, _shorter, _longer, _empty, _one_number, _two_dimensional, _words, _no_utf8, _nan, _negative, _beyond,
        _unsigned, _complex, _records, _references, _no_content, _group, _type, _loop, _nowhere, _root, _garbled,
        _enormous,
    )
}  # fmt: skip


def _without(attribute):
    return lambda group: group.attrs.__delitem__(attribute)


def _set(attribute, value):
    return lambda group: group.attrs.__setitem__(attribute, value)


OF_GROUPS = {
    ("X", "no shape"): _without("shape"),
    ("X", "shape of one number"): _set("shape", 60),
    ("X", "negative shape"): _set("shape", [-60, 20]),
    ("X", "enormous shape"): _set("shape", [60, 2**62]),
    ("X", "more cells"): _set("shape", [2**40, 20]),
    ("X", "fewer cells"): _set("shape", [50, 20]),
    ("X", "fewer genes"): _set("shape", [60, 10]),
    ("X", "shape of three"): _set("shape", [60, 20, 1]),
    ("X", "shape of words"): _set("shape", "60x20"),
    ("X", "shape of decimals"): _set("shape", [60.5, 20.0]),
    ("X", "no encoding"): _without("encoding-type"),
    ("X", "unknown encoding"): _set("encoding-type", "pickle"),
    ("X", "encoding of numbers"): _set("encoding-type", 7),
    ("X", "encoding of a table"): _set("encoding-type", "dataframe"),
    ("X", "encoding of columns"): _set("encoding-type", "csc_matrix"),
    ("X", "unknown version"): _set("encoding-version", "9.9.9"),
    ("obs", "no columns"): _without("column-order"),
    ("obs", "columns that are not there"): _set("column-order", ["nothing", "age"]),
    ("obs", "columns of numbers"): _set("column-order", [1, 2]),
    ("obs", "no index"): _without("_index"),
    ("obs", "index that is not there"): _set("_index", "nothing"),
    ("obs", "index of numbers"): _set("_index", 7),
    ("obs", "unknown encoding"): _set("encoding-type", "pickle"),
    ("obs", "encoding of a matrix"): _set("encoding-type", "csr_matrix"),
    ("var", "no columns"): _without("column-order"),
    ("var", "no index"): _without("_index"),
    ("var", "index that is not there"): _set("_index", "nothing"),
    ("var", "unknown version"): _set("encoding-version", "9.9.9"),
    ("var", "encoding of words"): _set("encoding-type", "string"),
    ("obs/donor", "no order"): _without("ordered"),
    ("obs/donor", "order of words"): _set("ordered", "perhaps"),
    ("obs/donor", "encoding of a matrix"): _set("encoding-type", "csr_matrix"),
    ("obs/donor", "no encoding"): _without("encoding-type"),
}
