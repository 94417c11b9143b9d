"""Fit: a trained model with its guide, history and schema, and how it is saved."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyro_scvi.data.minibatches import require_precision, resolve_device
from pyro_scvi.data.schema import Schema
from pyro_scvi.errors import CheckpointError
from pyro_scvi.guides.base import Guide
from pyro_scvi.guides.global_draws import GlobalDraws, at_globals, parsed_draws
from pyro_scvi.model import SCVI
from pyro_scvi.persistence import archive
from pyro_scvi.persistence.serialization import facts_of, states_of
from pyro_scvi.utils.html_repr import curves, table

COLUMNS = ("train_loss", "held_out_loss", "kl", "learning_rate", "kl_weight", "seconds")
"""Of the history that ``fit`` writes."""

BY_HAND = "not by ps.fit: there is no history of it"


@dataclass(eq=False)
class Fit:
    """A trained model with its guide, history and schema.

    :func:`fit` and :func:`load` return it. Make one by hand after training with Pyro's own tools.

    Attributes
    ----------
    model, guide
        The generative model, and q.
    history
        By epoch: ``train_loss`` and ``held_out_loss`` (negative evidence bound, untempered), ``kl``, all in nats per
        cell, ``learning_rate``, ``kl_weight`` and ``seconds``; an empty table where ``fit`` did not train.
    schema
        Genes, batches and covariates of its cells; new cells are read with it.
    settings
        How the fit was made: epochs, seed, number of cells and the like. ``held_out_loss`` is that of the epoch that
        was kept, by many draws; the history's, by one draw for each cell, was the least of all, and is too low by
        chance.

    Examples
    --------
    >>> fit.settings
    {'epochs': 5, 'batch_size': 128, 'seed': 0, 'n_cells': 43, 'held_out_loss': ...}
    >>> len(fit.history), fit.schema == train.schema
    (5, True)
    >>> fit.save(folder / "fit")
    >>> bool((ps.embed(ps.load(folder / "fit"), test) == ps.embed(fit, test)).all())
    True
    """

    model: SCVI
    guide: Guide
    history: pd.DataFrame
    schema: Schema
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.guide.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' precision."""
        return next(self.guide.parameters()).dtype

    def to(self, device: str | torch.device) -> "Fit":
        """Move model and guide in place; returns the fit.

        Raises
        ------
        ModelError
            If the device cannot be used, or is MPS and the parameters are float64, which it does not have.
        """
        place = resolve_device(device)
        require_precision(place, self.dtype)
        self.model.to(place)
        self.guide.to(place)
        return self

    def with_globals(self, draws: Any) -> "Fit":
        """The fit with its global latents at these draws, from MCMC for example, instead of the guide's.

        Everything else is shared with this fit. Verbs compute at the medians of the draws; draws and averages over
        global latents are over them.

        Parameters
        ----------
        draws
            Of every global latent: a dict of arrays (samples, ...), or an xarray Dataset with dimensions (sample, ...)
            or (chain, draw, ...). Draws of the cells' latents beside them are left aside, as those that
            ``ps.log_density(..., free_globals=True).constrain(u)`` returns, and so are other variables of a Dataset.

        Raises
        ------
        ModelError
            Naming a latent that is missing, unknown, of another shape or outside its support.
        """
        given, _, _ = parsed_draws(draws, "draws")
        shared, of_cells = self.guide.weights.supports, self.guide.coordinates.latents()
        aside = given.keys() if hasattr(draws, "data_vars") else of_cells.keys()
        kept = {name: value for name, value in given.items() if name in shared or name not in aside}
        return replace(self, guide=at_globals(self.guide, kept))

    def save(self, path: str | Path) -> None:
        """Write weights (safetensors) and configuration (JSON) into the directory ``path``; see :func:`load`.

        Raises
        ------
        CheckpointError
            If the directory holds something else than a saved fit, cannot be written, or another process writes there.
            What was there is intact then.
            Also if the global latents are at draws of your own: save the fit that they were made for, and the draws.
        """
        if isinstance(self.guide.weights, GlobalDraws):
            raise CheckpointError(
                "the global latents of this fit are set to draws of your own, which a save does not hold. Save "
                "the fit that with_globals was called on, and save the draws separately"
            )
        facts = facts_of(self.model, self.guide, self.history, self.schema, self.settings)
        target = archive.folder(path)
        archive.check_replaceable(target, "fit")
        with archive.alone(target):
            archive.write(target, archive.Content("fit", facts, states_of(self.model, self.guide)))

    def __repr__(self) -> str:
        return "Fit\n" + "\n".join(f"  {name}: {fact}" for name, fact in self._facts().items())

    def _repr_html_(self) -> str:
        columns = {"training": "train_loss", "held out": "held_out_loss"}
        lines = {label: self.history[name].tolist() for label, name in columns.items() if name in self.history}
        return table("Fit", self._facts(), curves(lines))

    def _facts(self) -> dict[str, str]:
        made = self._of_training() if len(self.history) and "train_loss" in self.history else {"training": BY_HAND}
        parts = {"model": repr(self.model), "guide": type(self.guide).__name__, "training": made.pop("training")}
        parts |= {"device": str(self.device)} | made
        if not self.guide.has_landmarks and self.guide.amortized:
            parts["landmarks"] = "of no training cells (an earlier save?): modes are sought from guide and prior"
        return parts

    def _of_training(self) -> dict[str, str]:
        history = self.history.reindex(columns=list(COLUMNS))  # one made by hand may lack some
        n_epochs = f"{len(history)} epoch{'s' * (len(history) != 1)}"
        # As in training, epochs are compared under the last KL weight: 0 leaves the prior of z out.
        weight = history.kl_weight
        lasting = weight.iloc[0] if weight.nunique() == 1 else 1.0
        judged = history.held_out_loss - (1 - lasting) * history.kl.fillna(0.0)
        watched = bool(judged.notna().any())
        kept = history.iloc[int(np.nanargmin(judged)) if watched else -1]
        # One draw a cell chose the epoch; many tell its loss. Fits of earlier versions have the first alone.
        loss = self.settings.get("held_out_loss", kept.held_out_loss)
        held_out = f"{loss:.2f} nats per cell in epoch {kept.name}, the best, which was kept"
        return {
            "training": f"{n_epochs} of {self.settings.get('n_cells', 'some')} cells, {history.seconds.sum():.1f} s",
            "training loss": f"{kept.train_loss:.2f} nats per cell in epoch {kept.name}",
            "held-out loss": held_out if watched else "no cells held out; the last epoch was kept",
        }
