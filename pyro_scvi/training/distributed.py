"""Distributed training: a single process, or the process group that torchrun started."""

import math
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from typing import Any, TypeVar, final

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_scvi.data.minibatches import even_sizes
from pyro_scvi.errors import FitError, ModelError
from pyro_scvi.guides.base import Guide
from pyro_scvi.inference.elbo import Bound
from pyro_scvi.model import SCVI
from pyro_scvi.nn.normalization import running_statistics
from pyro_scvi.training.signals import signals_end_at_once
from pyro_scvi.utils.random_state import seed_of

__all__ = ["ProcessGroup", "Processes", "SingleProcess", "joined"]


def __dir__() -> list[str]:
    return __all__


LAST_PORT, MOST_DIGITS = 65_535, 9

T = TypeVar("T")
LossAndGrads = Callable[..., float]
"""Arguments of the programs -> negative bound of these cells, nats; its gradients are added to the parameters'."""

# gloo and NCCL raise plain RuntimeErrors; the text tells them from an error of the user's own components.
_CONNECTION_ERROR = re.compile(r"[Cc]onnection|closed by peer|[Tt]imed out|gloo|NCCL|TCPStore|[Ss]ocket")

# The option's name since torch 2.13, which deprecates broadcast_buffers.
_SYNC_OPTION = "forward_sync_buffers"
_DDP_OPTIONS = signature(DistributedDataParallel.__init__).parameters
_UNSYNCED_BUFFERS: dict[str, Any] = {_SYNC_OPTION if _SYNC_OPTION in _DDP_OPTIONS else "broadcast_buffers": False}


class Processes(ABC):
    """The processes that train one model together, as one of them sees them.

    Every ``size``-th training cell is this process' own, from its ``rank`` on. Parameters are the same everywhere.

    Attributes
    ----------
    rank, size
        The number of this process, from 0, and how many there are.

    Examples
    --------
    >>> with ps.distributed.joined() as ranks:
    ...     isinstance(ranks, ps.distributed.Processes), ranks.batch_sizes(10, 4)
    ...
    (True, [4, 3, 3])
    """

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def shard(self, rows: np.ndarray) -> np.ndarray:
        """The rows of this process: every ``size``-th, so that files sorted by cell type are shared evenly."""
        return rows[self.rank :: self.size]

    def batch_sizes(self, n_cells: int, batch_size: int, *, equal: bool = False) -> list[int]:
        """Number of cells in every step of one epoch, over all processes; each has at least one cell in each step.

        Steps differ by one cell of each process at most. If ``equal``, all but the last have one size, which suits a
        GPU, and the last takes the rest: from half of that size to one and a half.

        Raises
        ------
        ModelError
            If there are fewer cells in a step than processes.
        """
        if min(batch_size, n_cells) < self.size:
            raise ModelError(
                f"batch_size counts the cells of all {self.size} ranks together, and each needs one: got "
                f"{batch_size} of {n_cells} cells"
            )
        shares = [self._sizes_of(rank, n_cells, batch_size, equal) for rank in range(self.size)]
        return [sum(step) for step in zip(*shares, strict=True)]

    def own_batch_sizes(self, n_cells: int, batch_size: int, *, equal: bool = False) -> list[int]:
        """The share of this process in :meth:`batch_sizes`."""
        return self._sizes_of(self.rank, n_cells, batch_size, equal)

    def _sizes_of(self, rank: int, n_cells: int, batch_size: int, equal: bool) -> list[int]:
        n = len(range(rank, n_cells, self.size))
        if not equal:
            return even_sizes(n, min(-(-n_cells // batch_size), n_cells // self.size))
        size = min(batch_size, n_cells) // self.size
        n_batches = (n_cells // self.size + size // 2) // size  # of the smallest share, so that all have as many
        return [size] * (n_batches - 1) + [n - size * (n_batches - 1)]

    @abstractmethod
    def among_all(self, rows: Tensor) -> Tensor:
        """Turn positions in this process' shard into positions among the rows of all processes."""

    @abstractmethod
    def noise_seed(self, *numbers: int) -> int:
        """A seed of this process' own, made of the numbers; the first process takes the first number."""

    @abstractmethod
    def loss_and_grads(self, elbo: Any, model: SCVI, guide: Guide) -> LossAndGrads:
        """The bound of a minibatch of ``len_all`` cells over all processes, with the gradients of all of them."""

    @abstractmethod
    def reduced(self, own: LossAndGrads, parameters: Sequence[Tensor]) -> LossAndGrads:
        """The same from a bound that leaves the gradients of this process' cells only in ``parameters``."""

    @abstractmethod
    def sum(self, *values: float) -> tuple[float, ...]:
        """Sums over all processes."""

    @abstractmethod
    def gather(self, rows: np.ndarray) -> np.ndarray:
        """The rows of all processes, one shard after the other."""

    @abstractmethod
    def from_first(self, make: Callable[[], T]) -> T:
        """Give all processes what the first one makes; its errors are raised in all."""

    @abstractmethod
    def require_alike(self, facts: Callable[[], dict[str, Any]]) -> None:
        """Refuse a run that is not the same on all processes.

        Raises
        ------
        FitError
            If something differs; raised in all processes, and names it.
        """

    @abstractmethod
    def require_own_gpus(self, device: torch.device) -> None:
        """Refuse two processes on one GPU, between which NCCL cannot send.

        Raises
        ------
        FitError
            If there are any; raised in all processes, and names them.
        """

    @abstractmethod
    def average_statistics(self, *parts: nn.Module) -> None:
        """Give all processes the same running statistics, the mean of theirs."""


@final
class SingleProcess(Processes):
    """One process with all of the cells, the default of ``fit``.

    Examples
    --------
    >>> alone = ps.distributed.SingleProcess()
    >>> alone.rank, alone.size, alone.first
    (0, 1, True)
    >>> ps.fit(ps.SCVI(20, 2), cells, ranks=alone, epochs=1, progress=False).settings["epochs"]
    1
    """

    rank = 0
    size = 1

    def __repr__(self) -> str:
        return "SingleProcess()"

    def among_all(self, rows: Tensor) -> Tensor:
        """The same positions: all rows are its own."""
        return rows

    def noise_seed(self, *numbers: int) -> int:
        """The first of the numbers."""
        return numbers[0]

    def loss_and_grads(self, elbo: Any, model: SCVI, guide: Guide) -> LossAndGrads:
        """Call the ELBO itself."""

        def of_minibatch(*args: Any, len_all: int, **kwargs: Any) -> float:
            return elbo.loss_and_grads(model, guide, *args, **kwargs)

        return of_minibatch

    def reduced(self, own: LossAndGrads, parameters: Sequence[Tensor]) -> LossAndGrads:
        """Return it unchanged: there are no other gradients."""
        return own

    def sum(self, *values: float) -> tuple[float, ...]:
        """The values."""
        return values

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """The rows."""
        return rows

    def from_first(self, make: Callable[[], T]) -> T:
        """Made here."""
        return make()

    def require_alike(self, facts: Callable[[], dict[str, Any]]) -> None:
        """Nothing to compare: there is no other process, so ``facts`` is not called."""

    def require_own_gpus(self, device: torch.device) -> None:
        """Nothing to refuse: there is no other process."""

    def average_statistics(self, *parts: nn.Module) -> None:
        """Nothing to average: they are the mean already."""


@final
class ProcessGroup(Processes):
    """The processes of torch's process group, each with its own share of the cells.

    The gradient of a step is that of the cells of all ranks together. Batch normalisation uses the statistics of each
    rank's own cells in training, and the mean of the ranks' running statistics afterwards. Keep ``batch_size`` at some
    dozens of cells per rank, or take ``ps.networks.LayerNorm()``.

    Raises
    ------
    FitError
        By every method, if another rank failed.

    Examples
    --------
    >>> store = torch.distributed.HashStore()
    >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> with ps.distributed.joined() as ranks:
    ...     print(ranks)
    ...
    ProcessGroup(rank 0 of 1)
    >>> torch.distributed.destroy_process_group()
    """

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def __repr__(self) -> str:
        return f"ProcessGroup(rank {self.rank} of {self.size})"

    def among_all(self, rows: Tensor) -> Tensor:
        """Shards are every ``size``-th row."""
        return rows * self.size + self.rank

    def noise_seed(self, *numbers: int) -> int:
        """A seed of the numbers and the rank; the first rank takes the first number, as a single process does."""
        return seed_of(*numbers, self.rank) if self.rank else numbers[0]

    def loss_and_grads(self, elbo: Any, model: SCVI, guide: Guide) -> LossAndGrads:
        """Wrap bound, model and guide in DistributedDataParallel, which copies the parameters of the first rank to all.

        Raises
        ------
        ModelError
            If the ELBO has no ``differentiable_loss``.
        FitError
            If another rank failed.
        """
        if not hasattr(elbo, "differentiable_loss"):
            raise ModelError(
                f"{type(elbo).__name__} has no differentiable_loss, which training over several ranks needs"
            )
        with self._connection_errors_explained():
            # Running statistics are each rank's own between steps; average_statistics brings them together.
            bound = DistributedDataParallel(Bound(elbo, model, guide), **_UNSYNCED_BUFFERS)
            for buffer in bound.buffers():  # torch before 2.13 does not copy these from the first rank
                distributed.broadcast(buffer, 0)

        def of_minibatch(x: Tensor, *args: Any, len_all: int, **kwargs: Any) -> float:
            with self._connection_errors_explained():
                loss = bound(x, *args, **kwargs)  # torch tells the other ranks here, too, once it knows the gradients
                # DDP averages over ranks; the factor gives cells equal weight where ranks differ by a cell.
                (loss * (len(x) * self.size / len_all)).backward()
            return loss.item()

        return of_minibatch

    def reduced(self, own: LossAndGrads, parameters: Sequence[Tensor]) -> LossAndGrads:
        """Add up all gradients in a single message."""

        def of_minibatch(x: Tensor, *args: Any, len_all: int, **kwargs: Any) -> float:
            loss = own(x, *args, len_all=len_all, **kwargs)
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            message = torch.cat([gradient.flatten() for gradient in gradients]) * (len(x) / len_all)
            with self._connection_errors_explained():
                distributed.all_reduce(message)
            for gradient, part in zip(gradients, message.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
            return loss

        return of_minibatch

    def sum(self, *values: float) -> tuple[float, ...]:
        """Add up on the CPU, in float64: these are a few numbers."""
        sums = torch.tensor(values, dtype=torch.float64)
        with self._connection_errors_explained():
            distributed.all_reduce(sums)
        return tuple(sums.tolist())

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Concatenate the shards by torch's all_gather_object."""
        return np.concatenate(self._of_all(rows))

    def from_first(self, make: Callable[[], T]) -> T:
        """Send the object, or the error, by torch's broadcast_object_list."""
        told: list[Any] = [None, None]
        try:
            told[0] = make() if self.first else None
        except Exception as raised:
            told[1] = raised
        with self._connection_errors_explained():
            distributed.broadcast_object_list(told)
        made, error = told
        if error is not None:
            raise error
        return made

    def require_alike(self, facts: Callable[[], dict[str, Any]]) -> None:
        """Compare what all_gather_object brings from all ranks, which then raise the same error."""
        first, *others = self._of_all(facts())
        differing = [
            "{} is {} on rank 0 and {} on rank {}".format(
                name, *_around_difference(str(first[name]), str(other[name])), rank
            )
            for rank, other in enumerate(others, 1)
            for name in first
            if other[name] != first[name]
        ]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise FitError(
                f"all ranks must call fit with the same model, cells and options: {'; '.join(differing[:3])}{more}"
            )

    def require_own_gpus(self, device: torch.device) -> None:
        """Compare what all_gather_object brings of the GPUs' identities; a device without NCCL may be shared."""
        by_nccl = device.type == "cuda" and "cuda:nccl" in distributed.get_backend_config()
        gpus = self._of_all(str(torch.cuda.get_device_properties(device).uuid) if by_nccl else None)
        shared = [rank for rank, gpu in enumerate(gpus) if gpu is not None and gpus.count(gpu) > 1]
        if shared:
            raise FitError(
                f"ranks {', '.join(map(str, shared))} of {self.size} do not have a GPU each, as NCCL needs: start as "
                "many as there are GPUs, as by torchrun --nproc-per-node gpu, or let all of them train on CPUs by "
                "device='cpu' or CUDA_VISIBLE_DEVICES= before the command"
            )

    def _of_all(self, value: T) -> list[T]:
        gathered: list[Any] = [None] * self.size
        with self._connection_errors_explained():
            distributed.all_gather_object(gathered, value)
        return gathered

    def average_statistics(self, *parts: nn.Module) -> None:
        """Average by one small message for each layer, once an epoch."""
        with self._connection_errors_explained():
            for statistic in running_statistics(*parts):
                distributed.all_reduce(statistic)
                statistic /= self.size

    @contextmanager
    def _connection_errors_explained(self) -> Iterator[None]:
        """Turn torch's connection errors into one that says that a rank failed and what to do."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, distributed.DistError) and not _CONNECTION_ERROR.search(str(error)):
                raise
            raise FitError(
                f"rank {self.rank} of {self.size} lost contact with the others ({_reason(error)}): one of them "
                "failed; see its own message. With a checkpoint, start again with resume=True and any number of "
                "ranks"
            ) from error


def _around_difference(*texts: str) -> list[str]:
    """The parts of long descriptions around their first difference."""
    first_difference = next((i for i, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), None)
    start = max(0, (min(map(len, texts)) if first_difference is None else first_difference) - 40)
    return [text if len(text) <= 80 else f"{'...' * (start > 0)}{text[start : start + 80]}..." for text in texts]


@contextmanager
def joined(*, timeout: float | None = None) -> Iterator[Processes]:
    """Join the ranks that torchrun started; without torchrun, one process alone.

    On a machine with CUDA each rank takes the GPU of its local rank, if there is one. Pass the result to ``fit``, and
    write files only if this process is the ``first``::

        with ps.distributed.joined() as ranks:
            fit = ps.fit(model, cells, ranks=ranks, batch_size=1024)
            if ranks.first:
                fit.save("fit")

    Start the script by ``torchrun --standalone --nproc-per-node 2 script.py``. If torch's process group exists already,
    it is used and left open.

    Parameters
    ----------
    timeout
        Seconds after which a rank gives up waiting for one that does not answer; None for torch's own time, 30 minutes
        on CPUs and 10 on GPUs.

    Yields
    ------
    SingleProcess or ProcessGroup
        What ``fit`` takes as ``ranks``.

    Raises
    ------
    FitError
        If the ranks cannot join, such as where another run listens on the port.

    Warns
    -----
    UserWarning
        If WORLD_SIZE says that there are several processes but nothing joins them: each then trains alone.

    Examples
    --------
    >>> with ps.distributed.joined() as ranks:
    ...     made = ps.fit(ps.SCVI(20, 2), cells, ranks=ranks, epochs=1, progress=False)
    ...
    >>> ranks.first, len(made.history)
    (True, 1)
    """
    if distributed.is_available() and distributed.is_initialized():
        yield ProcessGroup()
        return
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        if (size := os.environ.get("WORLD_SIZE", "")) not in ("", "1"):
            warnings.warn(
                f"WORLD_SIZE is {size}, but neither torchrun nor a process group is there to join them: each process "
                "trains alone. Start them by torchrun, or call torch.distributed.init_process_group before",
                UserWarning,
                stacklevel=3,
            )
        yield SingleProcess()
        return
    _join(timeout)
    try:
        yield ProcessGroup()
    finally:
        distributed.destroy_process_group()


def _join(timeout: float | None) -> None:
    if timeout is not None and not timeout > 0:
        raise FitError(f"timeout must be seconds above 0, got {timeout!r}")
    cuda, waiting = torch.cuda.is_available(), None if timeout is None else timedelta(seconds=timeout)
    local_rank = _number("LOCAL_RANK", 0, math.inf)
    _number("MASTER_PORT", 1, LAST_PORT)
    _number("RANK", 0, _number("WORLD_SIZE", 1, math.inf) - 1)
    # Only fit knows where the ranks train: it refuses those that share a GPU, in all of them, so that none waits.
    if cuda and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    try:
        with signals_end_at_once():  # it waits for the other ranks, half an hour unless told otherwise
            distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=waiting)
    except (RuntimeError, ValueError, KeyError) as error:
        raise FitError(
            f"the ranks could not join ({_reason(error)}). Is the port used by another run? On one machine, start them "
            "by torchrun --standalone, which takes a free one; on several, choose another --master-port"
        ) from error


def _number(name: str, least: int, most: float) -> int:
    """An integer from the environment; ``least`` where it is not set, which torch itself refuses if it needs it."""
    text = os.environ.get(name, str(least))
    # Python converts no numbers of thousands of digits.
    if not (text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS and least <= int(text) <= most):
        ends = f"from {least} to {most}" if most < math.inf else f"of {least} or more"
        raise FitError(
            f"the environment variable {name} is {text[:40]!r}, and must be an integer {ends}: torchrun sets it; start "
            "the ranks by torchrun --standalone, or correct it"
        )
    return int(text)


def _reason(error: Exception) -> str:
    """The first sentence of an error of torch's connections, without the number of its process."""
    return " ".join(re.sub(r"^\[\S*\] ", "", str(error)).split()).split(". ")[0][:200]
