"""Where some training cells lie, which a guide keeps: modes of other cells are sought from there."""

import torch
from torch import Tensor

from pyro_scvi.data.minibatches import Minibatches
from pyro_scvi.guides.base import Guide
from pyro_scvi.training.distributed import Processes


def evenly_spaced(at_most: int, n: int) -> Tensor:
    """At most ``at_most`` of n positions, evenly spaced, because files are often sorted by cell type or donor."""
    few = min(at_most, n)
    return torch.arange(few) * n // max(few, 1)


@torch.no_grad()
def note_landmarks(guide: Guide, cells: Minibatches, ranks: Processes) -> None:
    """Keep in the guide where some training cells lie under it, at the end of an epoch."""
    if not guide.amortized:
        return
    guide.eval()
    rows = evenly_spaced(len(guide.landmarks), cells.n_cells).to(cells.device)
    loc, _ = guide.start(*cells.rows(rows)) if len(rows) else (guide.landmarks[:0], None)
    known = torch.as_tensor(ranks.gather(loc.cpu().numpy()))
    guide.landmarks.copy_(known[torch.arange(len(guide.landmarks)) * len(known) // len(guide.landmarks)])
