"""Loading a saved Fit: weights from safetensors, everything else from JSON, never a pickle."""

from pathlib import Path
from typing import Any

import torch

from pyro_scvi.data.schema import Schema
from pyro_scvi.errors import CheckpointError
from pyro_scvi.guides.base import Guide
from pyro_scvi.model import SCVI
from pyro_scvi.persistence import archive
from pyro_scvi.persistence.serialization import (
    FIT_FACTS,
    build_sized,
    check_finite,
    check_schema,
    check_shapes,
    history_of,
    limited_by,
    put_states,
    with_landmarks,
)
from pyro_scvi.training.checkpoint import CHECKPOINT_FACTS, best_states
from pyro_scvi.training.copying import copied
from pyro_scvi.training.fitted import Fit
from pyro_scvi.training.trial import require_finite_results
from pyro_scvi.utils.out_of_memory import is_out_of_memory

NUMBERS = {"epochs", "batch_size", "seed", "n_cells", "held_out_loss"}
"""Settings that are numbers, in whatever version wrote them."""

_PRECISIONS = {"float32": torch.float32, "float64": torch.float64}


def load(path: str | Path, *, model: SCVI | None = None, guide: Guide | None = None) -> Fit:
    """Read a fit that :meth:`Fit.save` wrote, or the best state in a checkpoint.

    Parameters
    ----------
    path
        The directory.
    model, guide
        Needed if the fit holds components that are not this package's own (a user's prior or likelihood): the same
        objects, built again. Copies of them get the weights that were saved; the objects stay as they are.

    Returns
    -------
    Fit
        In evaluation mode.

    Raises
    ------
    CheckpointError
        If the save is missing, corrupt or of another format, or holds a part that must be passed; if what is passed is
        of another kind or shape, or has no copy (as in :func:`fit`).

    Warns
    -----
    UserWarning
        If the save is of format 1, which has no digest.

    Examples
    --------
    >>> fit.save(folder / "saved")
    >>> ps.load(folder / "saved").model
    SCVI(n_genes=20, n_latent=2, ...)
    """
    source = archive.folder(path)
    content = archive.read(source, {"fit": FIT_FACTS, "checkpoint": CHECKPOINT_FACTS})
    try:
        return _rebuilt(content, model, guide)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    except Exception as error:  # what constructors raise for arguments that this version does not write
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"the save {source} is inconsistent: {error}") from error


def _rebuilt(content: archive.Content, model: SCVI | None, guide: Guide | None) -> Fit:
    facts: dict[str, Any] = content.facts
    dtype, given = _PRECISIONS[facts["dtype"]], model is not None
    with limited_by(content.tensors):
        model = build_sized(facts["model"], None, content.tensors) if model is None else model
        guide = build_sized(facts["guide"], model, content.tensors) if guide is None else guide
    _check_settings(facts["settings"])
    if not (isinstance(model, SCVI) and isinstance(guide, Guide)):
        raise CheckpointError(
            f"it holds a {type(model).__name__} and a {type(guide).__name__}, not a model and a guide"
        )
    if guide.model is not model:
        raise CheckpointError(
            "the guide was made for another model; make it with this one, as in DiagonalNormal(model)"
        )
    history, schema = history_of(facts["history"]), Schema.from_dict(facts["schema"])
    check_schema(schema, model)
    tensors = content.tensors if content.kind == "fit" else best_states(content)
    tensors = with_landmarks(guide, tensors)
    check_shapes(model, guide, tensors)
    check_finite(tensors)
    own_model, own_guide = copied(model, guide) if given else (model, guide)
    made = Fit(own_model.to(dtype).eval(), own_guide.to(dtype).eval(), history, schema, facts["settings"])
    put_states(own_model, own_guide, tensors)
    own_model.trained_on = schema
    if not given:  # a model of one's own may ask more of cells than a trial knows
        require_finite_results(own_model, own_guide, schema)
    return made


def _check_settings(settings: Any) -> None:
    """Refuse settings that are no mapping, or in which a number that this package reads is none."""
    if not isinstance(settings, dict):
        raise CheckpointError("its settings are not a mapping of names to values")
    for name in NUMBERS & settings.keys():
        if type(settings[name]) not in (int, float):
            raise CheckpointError(f"its settings have {repr(settings[name])[:60]} as {name}, which is not a number")
