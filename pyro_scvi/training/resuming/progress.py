"""Whether the progress that a checkpoint notes is that of the epochs in its history."""

import math
from typing import Any, NamedTuple

from pyro_scvi.training.state import Snapshot


class Course(NamedTuple):
    """What a run will do: its epochs, the steps of each, and the weight by which epochs are compared."""

    epochs: int
    steps: int
    last_kl_weight: float

    def loss(self, row: dict[str, float]) -> float:
        """The held-out loss of an epoch, under the last weight of the KL divergence."""
        return row["held_out_loss"] - (1 - self.last_kl_weight) * row["kl"]

    def require(self, epochs: list[float], read: Snapshot) -> None:
        """Refuse progress that the epochs of the history do not lead to.

        Raises
        ------
        ValueError
            If there is some; names the number.
        """
        n = len(epochs)
        if epochs != list(range(1, n + 1)):
            raise ValueError(f"its history has the epochs {epochs[:3]}, ... where 1, 2, ... belong")
        if n > self.epochs:
            raise ValueError(f"its history has {n} epochs of {self.epochs}")
        self._require_steps(n, read)
        self._require_best(read)
        _require_halvings(read.facts)

    def _require_steps(self, n: int, read: Snapshot) -> None:
        taken = {int(step) for name, step in read.tensors.items() if _is_step(name)} or {0}
        scheduled = read.facts["schedule"].get("last_epoch")
        for what, steps in [*(("optimiser", steps) for steps in taken), ("schedule", scheduled)]:
            # Other devices and ranks divide an epoch into a step more or less.
            if steps is not None and (abs(steps - n * self.steps) > n or steps not in taken):
                raise ValueError(f"its {what} is after step {steps}, and {n} epochs have {n * self.steps} steps")

    def _require_best(self, read: Snapshot) -> None:
        facts = read.facts
        losses = [loss for loss in map(self.loss, read.rows) if not math.isnan(loss)]
        best = min(losses, default=math.inf)
        noted = math.inf if facts["best_loss"] is None else facts["best_loss"]
        if noted != best and not math.isclose(noted, best, rel_tol=1e-6):
            raise ValueError(f"its best_loss is {noted:.6g}, and the best of its history is {best:.6g}")
        waited = len(losses) - 1 - losses.index(best) if losses else 0
        if facts["waited"] != waited:
            raise ValueError(f"it has waited {facts['waited']} epochs, and by its history {waited}")
        if facts["best_is_now"] != bool(losses and not waited):
            raise ValueError(f"best_is_now is {facts['best_is_now']}, and the best epoch is {waited} epochs before")


def _require_halvings(facts: dict[str, Any]) -> None:
    halvings, scale = facts["halvings"], facts.get("rate_scale", 1.0)
    if halvings not in range(1_000) or scale not in (1.0, 0.5**halvings):  # earlier versions halved the rates instead
        raise ValueError(f"its rate was halved {halvings} times, and multiplied by {scale}")


def _is_step(name: str) -> bool:
    return name.startswith("optimiser.") and name.endswith(".step")
