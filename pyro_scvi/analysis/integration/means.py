"""Decoding of mean counts alone, where nothing else of the decoder is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pyro_scvi.guides.packaged import is_packaged
from pyro_scvi.model import SCVI


@contextmanager
def means_alone(model: SCVI) -> Iterator[None]:
    """Within the block, ``log_mean`` is the decoder's own head, without the library size, and other heads are zeros.

    That is enough for shares of the genes, and takes a third of the time. Of models of this package's parts only: in a
    program of one's own the mean may depend on other heads or on the library size, so there it does nothing. Threads
    take turns while a verb runs, so that no other call sees this.
    """
    if not is_packaged(model, decoding=True):
        yield
        return
    heads = [head for name, head in _heads(model).items() if name != "log_mean"]
    library: Any = model.library
    try:
        for head in heads:
            head.forward = _zeros(head)
        library.log_mean = _as_it_is  # any library size is one factor of all genes
        yield
    finally:
        for head in heads:
            vars(head).pop("forward", None)
        vars(library).pop("log_mean", None)


def _heads(model: Any) -> dict[str, Any]:
    return dict(getattr(model.decoder, "heads", {}).items())


def _as_it_is(eta: Tensor, log_library: Tensor | None) -> Tensor:
    return eta


def _zeros(head: nn.Module) -> Any:
    n_genes: Any = head.out_features

    def forward(hidden: Tensor) -> Tensor:
        return hidden.new_zeros(()).expand(*hidden.shape[:-1], n_genes)

    return forward
