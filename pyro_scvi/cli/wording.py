"""Messages of the package in the words of the command line: options where Python has arguments."""

import re

_OPTIONS = (
    (r"pass raw=True, or pass adata\.raw\.to_adata\(\)", "add --raw"),
    (r"pass layer= or raw=True, not both", "pass --layer or --raw, not both"),
    (r"[Pp]ass layer= with", "Pass --layer with"),
    (r"pass allow_non_integer=True", "add --allow-non-integer"),
    (r"[Pp]ass fill_missing_genes=True", "Add --fill-missing-genes"),
    (r"pass covariates=\['(.*?)'\]", r"pass --covariates '\1' in place of --batch"),
    (r"pass index_unique='-'", "add --index-unique -"),
    (r"Pass categories as batch=", "Pass categories as --batch"),
    (r"without batch=", "without --batch"),
    (r"backed=True reads", "infer reads"),
    (r"Use Cells\.take for some of the cells, and ps\.stores\.build\(file, path, layer=\.\.\.\) for a layer", "Make a "
     "store of the layer: python -m pyro_scvi store FILE --layer LAYER --out STORE"),
)  # fmt: skip


def on_the_command_line(text: str) -> str:
    """A message that names options of the commands; one line."""
    for pattern, option in _OPTIONS:
        text = re.sub(pattern, option, text)
    return " ".join(text.split())
