"""Random streams of single cells, from a seed and the cell's name.

What is drawn for a cell then depends neither on the cells beside it nor on how many are computed at a time. Inside
:func:`cell_streams`, code that draws for cells does so inside :func:`per_cell`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pyro_scvi.utils.random_state import seeded

COMMON, ALONE = "all cells", "alone"
_FILLED = {"randn": "normal_", "rand": "uniform_"}
"""Operations that make a tensor from a size, and those that fill one."""


class Streams:
    """Generators of the cells, and one for what all cells share; each is made when it is first used.

    They are the CPU's for every device: a seed then gives the same numbers everywhere, and a GPU gets one copy where
    one generator of its own for each cell would take an operation for each cell.
    """

    def __init__(self, seed: int, names: Iterable[str]) -> None:
        self.seed, self.names = seed, list(map(str, names))
        self.of_cells = dict[str, torch.Generator]()

    def of(self, rows: Iterable[int]) -> Streams:
        """The same streams for some of the cells, where they stand; what these share starts anew."""
        part = Streams(self.seed, [self.names[i] for i in rows])
        part.of_cells = self.of_cells
        return part

    def of_cell(self, cell: int) -> torch.Generator:
        """The generator of one cell."""
        name = self.names[cell]
        if name not in self.of_cells:
            self.of_cells[name] = _generator(f"{self.seed}\0{name}")
        return self.of_cells[name]

    def next_seed(self, cell: int) -> int:
        """A seed from the generator of one cell."""
        return int(torch.randint(2**62, (), generator=self.of_cell(cell)))

    def rows_by_name(self) -> list[list[int]]:
        """Where each name stands; it may stand several times."""
        rows = dict[str, list[int]]()
        for row, name in enumerate(self.names):
            rows.setdefault(name, []).append(row)
        return list(rows.values())

    @cached_property
    def shared(self) -> torch.Generator:
        """The generator of what no cell has alone."""
        return _generator(f"{self.seed}\0\0{COMMON}")


def _generator(text: str) -> torch.Generator:
    return torch.Generator().manual_seed(_number(text))


def _number(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


_current: ContextVar[Streams | None] = ContextVar("pyro_scvi_cell_streams", default=None)
_drawing: ContextVar[Streams | None] = ContextVar("pyro_scvi_drawing_streams", default=None)
"""Streams of the block; and the same inside :func:`per_cell`, else None."""


def own_names(names: pd.Index[Any]) -> pd.Index[Any]:
    """Names of cells, and behind each how many of its name came before: such cells have streams of their own."""
    if not names.duplicated().any():
        return names
    before = names.to_series().groupby(names, sort=False).cumcount()
    return pd.Index([f"{name}\0{n}" if n else name for name, n in zip(names, before, strict=True)])


@contextmanager
def cell_streams(seed: int, names: Iterable[str]) -> Iterator[None]:
    """Give the cells of these names, in this order, streams of their own for the block."""
    token = _current.set(Streams(seed, names))
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def narrowed(rows: Tensor) -> Iterator[None]:
    """Let the block compute ``rows`` of the cells alone; a row may come several times."""
    streams = _current.get()
    token = _current.set(None if streams is None else streams.of(rows.cpu().tolist()))
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def per_cell() -> Iterator[None]:
    """Draw from the streams of the cells in the block, in tensors (cells, ...), (n, cells, ...) or (n x cells, ...).

    Without streams, the global generator draws.
    """
    streams = _current.get()
    if streams is None:
        yield
        return
    token = _drawing.set(streams)
    try:
        with _PerCell(streams):
            yield
    finally:
        _drawing.reset(token)


def each_cell(draw: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """``draw(*parameters)``, inside :func:`per_cell` for each cell alone; parameters have one shape (n, cells, ...).

    For what draws as many random numbers as its values ask for, as rejection does: the cells beside one would change
    which of them it gets. Each call seeds torch's generator with the next number of the cell's own.
    """
    streams, shape = _drawing.get(), parameters[0].shape
    if streams is None or len(shape) < 2 or shape[1] != len(streams.names):
        return draw(*parameters)
    token, place = _drawing.set(None), parameters[0].device
    try:
        parameters = tuple(one.cpu() for one in parameters)
        with _disable_current_modes():  # of plain tensors of the CPU, so that no mode is needed
            drawn = torch.empty_like(parameters[0], memory_format=torch.contiguous_format)
            for rows in streams.rows_by_name():
                with seeded(streams.next_seed(rows[0])):
                    drawn[:, rows] = draw(*(one[:, rows] for one in parameters))
        return drawn.to(place)
    finally:
        _drawing.reset(token)


class _PerCell(TorchDispatchMode):
    """Splits each random operation into one for every cell."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.streams = streams

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or not args:
            return func(*args, **kwargs)
        packet, of_tensor = func.overloadpacket, isinstance(args[0], Tensor)
        place = args[0].device if of_tensor else torch.device(kwargs.get("device") or "cpu")
        if place.type == "cpu":
            return self._drawn(packet, args, kwargs)
        if not of_tensor:
            return self._drawn(packet, args, kwargs | {"device": torch.device("cpu")}).to(place)
        if not packet.__name__.endswith("_"):
            return self._drawn(packet, [_on_cpu(one) for one in args], kwargs).to(place)
        filled = torch.empty_like(args[0], device="cpu")
        return args[0].copy_(self._drawn(packet, [filled, *map(_on_cpu, args[1:])], kwargs))

    def _drawn(self, packet: Any, args: Any, kwargs: Any) -> Any:
        fill = _FILLED.get(packet.__name__)
        if fill is not None:
            empty = torch.empty(args[0], dtype=kwargs.get("dtype"))
            return self._split(getattr(torch.ops.aten, fill), (empty,), {}, in_place=True)
        if not isinstance(args[0], Tensor):
            return packet(*args, **kwargs | {"generator": self.streams.shared})
        return self._split(packet, args, kwargs, in_place=packet.__name__.endswith("_"))

    def _split(self, packet: Any, args: Any, kwargs: Any, *, in_place: bool) -> Any:
        like, cells = args[0], len(self.streams.names)
        second = like.dim() > 1 and like.shape[1] == cells and packet.__name__ != "multinomial"
        if not second and (like.dim() == 0 or like.shape[0] % cells):
            return packet(*args, **kwargs | {"generator": self.streams.shared})
        shape = like.shape if second else (-1, cells, *like.shape[1:])
        by_cell = [one.reshape(shape) if isinstance(one, Tensor) and one.shape == like.shape else one for one in args]
        parts = []
        for cell in range(cells):
            # Contiguous: torch fills others in another order.
            own = [one[:, cell].contiguous() if isinstance(one, Tensor) and one.dim() > 1 else one for one in by_cell]
            if in_place:
                own[0] = torch.empty_like(own[0])
            parts.append(packet(*own, **kwargs | {"generator": self.streams.of_cell(cell)}))
        drawn = torch.stack(parts, 1) if second else torch.stack(parts, 1).flatten(0, 1)
        return like.copy_(drawn) if in_place else drawn


def _on_cpu(argument: Any) -> Any:
    return argument.cpu() if isinstance(argument, Tensor) else argument


@contextmanager
def alone(cell: int) -> Iterator[None]:
    """Let the block compute one cell, by its place among those that have streams; all its draws are of its stream.

    For code that draws in other shapes than (n, cells, ...). torch's global generators are set. A second block of a
    cell repeats the first; neither repeats what :func:`per_cell` draws.
    """
    streams = _current.get()
    token = _current.set(None)
    try:
        if streams is not None:
            torch.manual_seed(_number(f"{streams.seed}\0{streams.names[cell]}\0{ALONE}"))
        yield
    finally:
        _current.reset(token)
