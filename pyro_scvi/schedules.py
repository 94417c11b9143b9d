"""Schedules of the learning rate, of the KL weight and of checkpoints, as objects that a fit is given."""

from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LRScheduler

from pyro_scvi.errors import FitError, require_number

__all__ = ["Constant", "Every", "OneCycle", "WarmUp", "Weight"]


def __dir__():
    return __all__


@dataclass(frozen=True)
class OneCycle:
    """Learning rate up to ``peak`` over the first 30 % of all steps, then down to nearly nothing (Smith 2018).

    Examples
    --------
    >>> short = {"epochs": 1, "progress": False}
    >>> ps.fit(ps.SCVI(20, 2), cells, learning_rate=ps.schedules.OneCycle(0.01), **short).settings["epochs"]
    1
    """

    peak: float = 2e-2

    def __post_init__(self) -> None:
        require_number(self.peak, "peak")

    def __call__(self, optimiser: torch.optim.Optimizer, steps: int) -> LRScheduler:
        """Attach to an optimiser that will make ``steps`` steps."""
        return torch.optim.lr_scheduler.OneCycleLR(optimiser, float(self.peak), total_steps=max(steps, 2))


@dataclass(frozen=True)
class Constant:
    """The same learning rate throughout.

    Examples
    --------
    >>> made = ps.fit(ps.SCVI(20, 2), cells, learning_rate=ps.schedules.Constant(0.004), epochs=2, progress=False)
    >>> made.history.learning_rate.tolist()
    [0.004, 0.004]
    """

    rate: float = 1e-3

    def __post_init__(self) -> None:
        require_number(self.rate, "rate")

    def __call__(self, optimiser: torch.optim.Optimizer, steps: int) -> LRScheduler:
        """Attach to an optimiser."""
        for group in optimiser.param_groups:
            group["lr"] = float(self.rate)  # NumPy's numbers are none to JSON
        return torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0, total_iters=0)


@dataclass(frozen=True)
class Weight:
    """A KL weight of ``value`` throughout: 1 is the evidence bound, 0 leaves the prior of z out of training.

    Examples
    --------
    >>> made = ps.fit(ps.SCVI(20, 2), cells, kl_weight=ps.schedules.Weight(0.5), epochs=2, progress=False)
    >>> made.history.kl_weight.tolist()
    [0.5, 0.5]
    """

    value: float = 1.0

    def __post_init__(self) -> None:
        require_number(self.value, "value")

    def at(self, epoch: int, epochs: int) -> float:
        """Weight in ``epoch`` of ``epochs``."""
        return float(self.value)


@dataclass(frozen=True)
class WarmUp:
    """A KL weight that grows linearly from 1 / ``epochs`` to 1 over the first ``epochs`` epochs.

    Examples
    --------
    >>> made = ps.fit(ps.SCVI(20, 2), cells, kl_weight=ps.schedules.WarmUp(2), epochs=3, progress=False)
    >>> made.history.kl_weight.tolist()
    [0.5, 1.0, 1.0]
    """

    epochs: int

    def at(self, epoch: int, epochs: int) -> float:
        """Weight in ``epoch`` of ``epochs``; raises FitError if the warm-up would not end inside the run."""
        if not self.epochs >= 1:  # NaN neither
            raise FitError(f"a KL warm-up takes 1 epoch or more, got {self.epochs}")
        if self.epochs >= epochs:
            raise FitError(
                f"a KL warm-up of {self.epochs} epochs does not end inside a run of {epochs}: the evidence bound would "
                "never be optimised; shorten the warm-up or train longer"
            )
        return min(1.0, (epoch + 1) / self.epochs)


@dataclass(frozen=True)
class Every:
    """Checkpoints at the end of epochs: when so many epochs and so many seconds have passed since the last one.

    Examples
    --------
    >>> every = ps.schedules.Every(epochs=2)
    >>> run = {"checkpoint": folder / "run", "checkpoint_every": every, "epochs": 2, "progress": False}
    >>> made = ps.fit(ps.SCVI(20, 2), cells, **run)
    >>> len(ps.load(folder / "run").history)
    2
    """

    epochs: int = 1
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not (self.epochs >= 1 and self.seconds >= 0):  # NaN neither
            raise FitError(f"checkpoints need epochs >= 1 and seconds >= 0, got {self}")


LearningRate = OneCycle | Constant
KLWeight = Weight | WarmUp
