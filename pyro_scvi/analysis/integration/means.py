"""Decoding of mean counts alone, where nothing else of the decoder is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pyro_scvi.model import SCVI

OWN = "pyro_scvi."
"""The package of parts in which the mean depends on no other head."""


@contextmanager
def means_alone(model: SCVI) -> Iterator[None]:
    """Within the block, the decoder's heads other than the mean's give zeros: two thirds of the time of decoding.

    Of models of this package's parts only. In a program of one's own the mean may depend on other heads, so there it
    does nothing. Threads take turns while a verb runs, so that no other call sees the zeros.
    """
    heads = [head for name, head in _heads(model).items() if name != "log_mean"] if _is_plain(model) else []
    try:
        for head in heads:
            head.forward = _zeros(head)
        yield
    finally:
        for head in heads:
            vars(head).pop("forward", None)


def _heads(model: Any) -> dict[str, Any]:
    return dict(getattr(model.decoder, "heads", {}).items())


def _zeros(head: nn.Module) -> Any:
    n_genes: Any = head.out_features

    def forward(hidden: Tensor) -> Tensor:
        return hidden.new_zeros(()).expand(*hidden.shape[:-1], n_genes)

    return forward


def _is_plain(model: SCVI) -> bool:
    program = all(
        getattr(type(model), name) is getattr(SCVI, name) for name in ("forward", "decode", "observe", "__call__")
    )
    parts = (model.decoder, model.likelihood, model.library, *_heads(model).values())
    return program and all(type(part).__module__.startswith((OWN, "torch.nn.")) for part in parts)
