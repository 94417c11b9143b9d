"""What the tests of the command line share: a small data set, runs in this process, and a reader of pages."""

from html.parser import HTMLParser

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from typer.testing import CliRunner

from pyro_scvi import cli
from tests.support.simulate import simulated_counts


def make_adata():
    """60 cells of two groups and one that has to be escaped, with batches, an age and a layer."""
    kinds = np.where(np.arange(60) % 2, "CD19+ B", "Dendritic").astype(object)
    kinds[:4] = "<i>NK</i>"
    obs = pd.DataFrame(
        {"bulk_labels": pd.Categorical(kinds), "donor": ["a", "b", "b"] * 20, "age": np.linspace(20.0, 50.0, 60)},
        index=[f"c{i}" for i in range(60)],
    )
    counts = sparse.csr_matrix(simulated_counts())
    adata = AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(20)]))
    adata.layers["raw"] = adata.X.copy()
    return adata


def run(*arguments):
    return CliRunner().invoke(cli.app, [*map(str, arguments)])


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def check_table(path, expected):
    """A CSV holds the table, to the digits of its columns."""
    index = list(expected.index.names)
    written = pd.read_csv(path, index_col=index, dtype=dict.fromkeys(index, str))
    pd.testing.assert_frame_equal(written, expected, check_dtype=False, rtol=1e-6)


def one_line(result):
    """The one line of an error that a user can mend."""
    assert result.exit_code == 1, (result.output, result.exception)
    assert "Traceback" not in result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("error: ")


class Page(HTMLParser):
    """Collects tags, text and links; every element must be closed."""

    VOID = {"meta", "link", "img"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    @classmethod
    def read(cls, path):
        return cls(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
