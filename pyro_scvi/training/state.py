"""Training state: everything that an epoch changes, as a snapshot in memory or on disk."""

import copy
import math
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from pyro_scvi.guides.base import Guide
from pyro_scvi.model import SCVI
from pyro_scvi.persistence.serialization import put_states, states_of, with_landmarks

HISTORY = ("train_loss", "held_out_loss", "kl", "learning_rate", "kl_weight", "seconds")
_DEFAULT_FACTS = {"rate_scale": 1.0}  # not in earlier checkpoints, whose runs halved the schedule's own rates


class Snapshot(NamedTuple):
    """State of a run after an epoch: values as JSON takes them, rows of the history, and copies of tensors."""

    facts: dict[str, Any]
    rows: list[dict[str, float]]
    tensors: dict[str, Tensor]


class Best:
    """The best held-out state so far, and the number of epochs since."""

    def __init__(self, patience: int | None) -> None:
        self.patience, self.loss, self.waited = patience, math.inf, 0
        self.states: dict[str, Tensor] = {}

    @property
    def waited_out(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.waited >= self.patience

    def note(self, loss: float, states: dict[str, Tensor]) -> None:
        """Note an epoch's held-out loss, NaN if no cells are held out, and the state that it belongs to."""
        if math.isnan(loss):
            return
        self.waited += 1
        if loss < self.loss:
            self.loss, self.waited, self.states = loss, 0, states


class TrainingState:
    """One run's model, guide, optimiser and schedule, its history, and its first, last good and best state.

    ``halvings`` counts how often the learning rate was halved after a loss that was not finite. ``rate_scale``
    multiplies the schedule's rates: a power of 1/2, so that the product is exact.
    """

    def __init__(self, model: SCVI, guide: Guide, optimiser: Any, schedule: Any, patience: int | None) -> None:
        self.model, self.guide, self.optimiser, self.schedule = model, guide, optimiser, schedule
        self.rows: list[dict[str, float]] = []
        self.best, self.halvings, self.rate_scale = Best(patience), 0, 1.0
        self.parameters = [p for group in optimiser.param_groups for p in group["params"]]
        self.good = self.start = self._snapshot(self._states())

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self.schedule.get_last_lr()[0]) * self.rate_scale

    @property
    def finite(self) -> bool:
        """Whether every parameter is finite."""
        return bool(get_total_norm([p.detach() for p in self.parameters]).isfinite())

    @property
    def history(self) -> pd.DataFrame:
        """One row per finished epoch."""
        index = pd.RangeIndex(1, len(self.rows) + 1, name="epoch")
        return pd.DataFrame(self.rows, index=index, columns=list(HISTORY), dtype=float)

    def step(self) -> None:
        """Make one step of the optimiser, clear its gradients, and make one step of the schedule."""
        scheduled = self.schedule.get_last_lr()
        self._set_rates([rate * self.rate_scale for rate in scheduled])
        self.optimiser.step()
        self.optimiser.zero_grad()
        self._set_rates(scheduled)  # some of torch's schedules compute the next rate from it
        self.schedule.step()

    def _set_rates(self, rates: list[float]) -> None:
        for group, rate in zip(self.optimiser.param_groups, rates, strict=True):
            group["lr"] = rate

    def advance(self, row: dict[str, float], loss: float) -> None:
        """Note that an epoch is finished; ``loss`` is the criterion for the best epoch."""
        self.rows.append(row)
        states = self._states()
        self.best.note(loss, states)
        self.good = self._snapshot(states)

    def halve(self) -> None:
        """Go back to the last good state, with half its learning rate."""
        self.restore(self.good)
        self.halvings += 1
        self.rate_scale /= 2
        self.good = self._snapshot(self._states())

    def finish(self) -> None:
        """Leave model and guide in the best state, or in the last good one if no cells are held out."""
        self.restore(self.good)
        if self.best.states:
            put_states(self.model, self.guide, self.best.states)

    def restore(self, snapshot: Snapshot) -> None:
        """Put a snapshot back.

        Raises
        ------
        CheckpointError, KeyError, TypeError, ValueError, RuntimeError
            If the snapshot, read from a file, is not of such a run; model and guide are unchanged then.
        """
        snapshot = snapshot._replace(facts=_DEFAULT_FACTS | snapshot.facts)
        facts, tensors = copy.deepcopy(snapshot.facts), snapshot.tensors
        best_loss = math.inf if facts["best_loss"] is None else facts["best_loss"]  # JSON has no infinity
        _require_alike({**self.good.facts, "best_loss": math.inf}, {**facts, "best_loss": best_loss})
        # These raise for tensors of another run, before model and guide are changed.
        moments = self._moments(under("optimiser", tensors))
        _set_generators(under("random", tensors), self.parameters[0].device)
        put_states(self.model, self.guide, with_landmarks(self.guide, under("now", tensors)))
        whose = self.optimiser.state_dict()["param_groups"]
        groups = [{**_with_tuples(read), "params": g["params"]} for g, read in zip(whose, facts["groups"], strict=True)]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
        self.optimiser.zero_grad()
        self.schedule.load_state_dict(facts["schedule"])
        self.rows, self.halvings, self.rate_scale = list(snapshot.rows), facts["halvings"], facts["rate_scale"]
        self.best.loss, self.best.waited = best_loss, facts["waited"]
        best = under("now" if facts["best_is_now"] else "best", tensors)
        self.best.states = with_landmarks(self.guide, best) if best else best
        self.good = snapshot

    def _moments(self, tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """Copies of Adam's state by the number of the parameter; empty before the first step."""
        held: dict[int, dict[str, Tensor]] = {}
        for i, parameter in enumerate(self.parameters if tensors else ()):
            held[i] = {name: tensors[f"{i}.{name}"].clone() for name in ("step", "exp_avg", "exp_avg_sq")}
            shapes = [tuple(tensor.shape) for tensor in held[i].values()]
            if shapes != [(), tuple(parameter.shape), tuple(parameter.shape)]:
                raise ValueError(f"the optimiser's state of a parameter of shape {tuple(parameter.shape)} has {shapes}")
        return held

    def _states(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in states_of(self.model, self.guide).items()}

    def _snapshot(self, states: dict[str, Tensor]) -> Snapshot:
        moments = self.optimiser.state_dict()
        facts = {
            "schedule": self.schedule.state_dict(),
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in moments["param_groups"]],
            "halvings": self.halvings,
            "rate_scale": self.rate_scale,
            "best_loss": None if math.isinf(self.best.loss) else self.best.loss,
            "waited": self.best.waited,
            "best_is_now": self.best.states is states,
        }
        earlier = {} if self.best.states is states else self.best.states
        tensors = {
            **{f"now.{name}": tensor for name, tensor in states.items()},
            **{f"best.{name}": tensor for name, tensor in earlier.items()},
            **{f"optimiser.{i}.{k}": v.clone() for i, held in moments["state"].items() for k, v in held.items()},
            **{f"random.{name}": tensor for name, tensor in _generators(self.parameters[0].device).items()},
        }
        return Snapshot(copy.deepcopy(facts), list(self.rows), tensors)


def _generators(device: torch.device) -> dict[str, Tensor]:
    """State of the generators of torch from which a run on ``device`` draws."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def _set_generators(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type], device)


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, under names without it."""
    return {n.removeprefix(f"{prefix}."): tensor for n, tensor in tensors.items() if n.startswith(f"{prefix}.")}


def _with_tuples(group: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in group.items()}


def _require_alike(ours: Any, read: Any) -> None:
    """Refuse values whose kinds or names differ from those of this run."""
    if isinstance(ours, dict) and isinstance(read, dict) and ours.keys() == read.keys():
        for name, value in ours.items():
            _require_alike(value, read[name])
    elif isinstance(ours, list | tuple) and isinstance(read, list | tuple) and len(ours) == len(read):
        for value, other in zip(ours, read, strict=True):
            _require_alike(value, other)
    elif not (_kind(ours) is _kind(read) and _kind(ours) in (bool, float, str, type(None))):
        raise ValueError(f"{read!r} is in the place of {ours!r}")


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)  # numbers are of one kind, except bool
