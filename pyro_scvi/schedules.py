"""Schedules of the learning rate, the KL weight and checkpoints, passed to fit as objects."""

from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LRScheduler

from pyro_scvi.errors import ModelError
from pyro_scvi.utils.checks import require_number

__all__ = ["CheckpointInterval", "Constant", "ConstantKL", "OneCycle", "WarmUp"]


def __dir__() -> list[str]:
    return __all__


@dataclass(frozen=True)
class OneCycle:
    r"""A learning rate that rises over the first 30 % of all steps, then falls to nearly zero.

    See Smith (2018).

    .. math:: a \to b: \quad \tfrac12 (a + b) + \tfrac12 (a - b) \cos(\pi u), \quad 0 \le u \le 1

    from peak / 25 to ``peak``, then from there to peak / 250,000. This is torch's OneCycleLR, which also moves Adam's
    first beta from .95 to .85 and back.

    Parameters
    ----------
    peak
        The largest learning rate.

    Raises
    ------
    ModelError
        If ``peak`` is no finite number of 0 or more.

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
        # At least 2: of a single step torch takes the end of the cycle, a rate of nearly zero.
        return torch.optim.lr_scheduler.OneCycleLR(optimiser, float(self.peak), total_steps=max(steps, 2))


@dataclass(frozen=True)
class Constant:
    """The same learning rate throughout.

    Parameters
    ----------
    rate
        The learning rate.

    Raises
    ------
    ModelError
        If ``rate`` is no finite number of 0 or more.

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
            group["lr"] = float(self.rate)  # JSON takes no number of NumPy
        return torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0, total_iters=0)


@dataclass(frozen=True)
class ConstantKL:
    r"""The same KL weight throughout: 1 gives the evidence bound, 0 ignores the prior of z.

    .. math:: L_\beta(n) = E_{q(z | x_n)} \log p(x_n | z) - \beta\, KL(q(z | x_n) \| p(z))

    Parameters
    ----------
    value
        beta.

    Raises
    ------
    ModelError
        If ``value`` is no finite number of 0 or more.

    Examples
    --------
    >>> made = ps.fit(ps.SCVI(20, 2), cells, kl_weight=ps.schedules.ConstantKL(0.5), epochs=2, progress=False)
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
    r"""A KL weight that grows linearly to 1 over the first epochs, t counted from 0.

    .. math:: \beta_t = \min(1, (t + 1) / epochs)

    Parameters
    ----------
    epochs
        Epochs until the weight is 1; fewer than those of the run.

    Raises
    ------
    ModelError
        Raised by ``fit``, if ``epochs`` is below 1, or not below the number of epochs of the run.

    Examples
    --------
    >>> made = ps.fit(ps.SCVI(20, 2), cells, kl_weight=ps.schedules.WarmUp(2), epochs=3, progress=False)
    >>> made.history.kl_weight.tolist()
    [0.5, 1.0, 1.0]
    """

    epochs: int

    def at(self, epoch: int, epochs: int) -> float:
        """Weight in ``epoch`` of ``epochs``; raises ModelError if the warm-up would not end inside the run."""
        if not self.epochs >= 1:  # refuses NaN, too
            raise ModelError(f"a KL warm-up takes 1 epoch or more, got {self.epochs}")
        if self.epochs >= epochs:
            raise ModelError(
                f"a KL warm-up of {self.epochs} epochs does not end within {epochs} epochs of training, so the "
                "evidence bound would never be optimised. Shorten the warm-up, or train longer"
            )
        return min(1.0, (epoch + 1) / self.epochs)


@dataclass(frozen=True)
class CheckpointInterval:
    """How often checkpoints are written: after so many epochs and seconds since the last one.

    Parameters
    ----------
    epochs, seconds
        Fewest epochs and seconds between two checkpoints; both must have passed.

    Raises
    ------
    ModelError
        If ``epochs`` is below 1 or ``seconds`` below 0.

    Examples
    --------
    >>> every = ps.schedules.CheckpointInterval(epochs=2)
    >>> run = {"checkpoint": folder / "run", "checkpoint_every": every, "epochs": 2, "progress": False}
    >>> made = ps.fit(ps.SCVI(20, 2), cells, **run)
    >>> len(ps.load(folder / "run").history)
    2
    """

    epochs: int = 1
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not (self.epochs >= 1 and self.seconds >= 0):  # refuses NaN, too
            raise ModelError(f"checkpoints need epochs >= 1 and seconds >= 0, got {self}")


LearningRate = OneCycle | Constant
KLWeight = ConstantKL | WarmUp
