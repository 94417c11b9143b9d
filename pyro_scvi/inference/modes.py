"""Separate modes of a cell's posterior: short climbs from several starts, and which of their ends are modes."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_scvi.types import LogJoint

NEIGHBOURS = 6  # a candidate is a peak if none of so many nearest ones has a higher density
FEW, MANY = 6, 24  # starts that every cell climbs from, and cells with few genes or where the first find several modes
AT_FIRST, MODES = 3, 16  # modes that are looked for by few starts, and by many
SEVERAL = 2  # modes found by few starts, from which on many are taken: who has two may have four
STEPS = 16  # of a climb
FIRST_STEP, GROWN, SHRUNK = 0.15, 1.3, 0.4  # of a climb, in standard deviations of the candidates; factors of the next
DEFICIT = 10.0  # nats below the highest end, and half a nat for each latent, at which an end still counts
AHEAD = 50.0  # nats; no climb is expected to rise by more than this after its end
VALLEY = 1.0  # nats by which the density falls between two modes; a heavy-tailed proposal spans shallower ones
TIE = 0.01  # nats within which ends are equally high: the first is taken, so that rounding does not choose among them
KNOWN = 0.3  # standard deviations of the candidates around a mode, within which a climb would only find it again
INSIDE = 7  # points between two ends at which the density is looked at
PEAK = torch.tensor(1e15)  # nats, beyond all differences
PAIRS_AT_ONCE = 2**24  # distances between candidates


class Modes(NamedTuple):
    """Places of modes (modes, cells, size), the highest first, and which of these each cell has (modes, cells).

    ``start_is_low`` (cells,): the climb from the best candidate ended so low that no mass can be there.
    """

    places: Tensor
    present: Tensor
    start_is_low: Tensor

    @property
    def several(self) -> Tensor:
        """Rows of the cells that have more than one mode."""
        return (self.present.sum(0) > 1).nonzero().squeeze(-1)

    @property
    def alone(self) -> Tensor:
        """Rows of the other cells."""
        return (self.present.sum(0) <= 1).nonzero().squeeze(-1)

    def nearest(self) -> Tensor:
        """Distance (modes, cells) of each mode from the nearest other one, infinite if there is none."""
        by_cell = self.places.transpose(0, 1)
        gaps = torch.cdist(by_cell, by_cell)
        other = ~torch.eye(len(self.places), dtype=torch.bool, device=gaps.device)
        both = self.present.T[:, None] & self.present.T[:, :, None] & other
        return gaps.where(both, torch.inf).amin(-1).T

    def of(self, rows: Tensor) -> "Modes":
        """Those of some of the cells."""
        return Modes(self.places[:, rows], self.present[:, rows], self.start_is_low[rows])

    def mirrored(self, centre: Tensor) -> Tensor:
        """Points (n, cells, size): each mode with one coordinate changed, for each coordinate.

        It is reflected at the ``centre`` (cells, size), or is that of the other mode where it is farthest away. Where
        the counts do not tell the signs of several latents, these are modes, too.
        """
        coordinate = self.places.transpose(0, 1)  # (cells, modes, size)
        gaps = (coordinate[:, :, None] - coordinate[:, None]).abs()
        farthest = gaps.where(self.present.T[:, None, :, None], -1.0).argmax(2)
        other = coordinate.gather(1, farthest).transpose(0, 1)
        changed = torch.eye(self.places.shape[-1], dtype=torch.bool, device=self.places.device)[:, None, None]
        points = [torch.where(changed, new, self.places) for new in (other, 2 * centre - self.places)]
        return torch.stack(points).flatten(0, 2)

    def with_more(self, rows: Tensor, more: "Modes") -> "Modes":
        """The modes of all cells, with those of ``rows`` exchanged."""
        n = max(len(self.places), len(more.places))
        places, present = self.places[:1].repeat(n, 1, 1), torch.zeros_like(self.present[:1]).repeat(n, 1)
        places[: len(self.places)], present[: len(self.places)] = self.places, self.present
        present[:, rows] = False
        places[: len(more.places), rows], present[: len(more.places), rows] = more.places, more.present
        return Modes(places, present, self.start_is_low)


def separate_modes(
    density: LogJoint, candidates: Tensor, values: Tensor, unit: Tensor, *, starts: int, modes: int, block: int
) -> Modes:
    """Climb from the most promising of the candidates (n, cells, size), and keep ends that a valley separates.

    ``values`` (n, cells) are the densities there; one climb always starts at the highest of them. ``unit`` (cells,
    size) is how far candidates lie apart. At most ``block`` points of a cell are evaluated at once, but 6 in any case.
    """
    return _separated(density, _climbs(density, candidates, values, unit, starts, block), modes, block)


def further_modes(
    density: LogJoint, found: Modes, candidates: Tensor, values: Tensor, unit: Tensor, *, block: int
) -> Modes:
    """The modes ``found``, and those that as many climbs from more candidates, away from these, lead to."""
    by_cell = (found.places / unit).transpose(0, 1)
    gaps = torch.cdist((candidates / unit).transpose(0, 1), by_cell)
    near = (gaps.where(found.present.T[:, None], torch.inf).amin(-1) < KNOWN).T
    climbs = _climbs(density, candidates, values.masked_fill(near, -torch.inf), unit, MANY, block)
    with torch.no_grad():
        heights = torch.cat([density(part) for part in found.places.split(max(block, FEW))])
    heights = heights.nan_to_num(-torch.inf).masked_fill(~found.present, -torch.inf)
    known = Climbs(found.places, heights, torch.zeros_like(heights))
    every = Climbs(*(torch.cat(of) for of in zip(known, climbs, strict=True)))
    return _separated(density, every, MODES, block)._replace(start_is_low=found.start_is_low)


class Climbs(NamedTuple):
    """Ends (climbs, cells, size), densities there (climbs, cells), and by how much the next step may raise these."""

    ends: Tensor
    heights: Tensor
    ahead: Tensor


def _climbs(density: LogJoint, candidates: Tensor, values: Tensor, unit: Tensor, starts: int, block: int) -> Climbs:
    """Climbs from the most promising of the candidates."""
    first = _at(candidates, _promising(candidates, values.nan_to_num(-torch.inf), unit, starts))
    parts = [climbed(density, part, unit) for part in first.split(max(block, FEW))]
    return Climbs(*(torch.cat(of) for of in zip(*parts, strict=True)))


def _at(points: Tensor, index: Tensor) -> Tensor:
    """Points (n, cells, size) at index (k, cells)."""
    return points.gather(0, index[..., None].expand(-1, -1, points.shape[-1]))


def _promising(candidates: Tensor, values: Tensor, unit: Tensor, n: int) -> Tensor:
    """Indices (n, cells) of the highest candidate, of peaks far from what is higher, and of the highest other peaks.

    Where there are more than ``FEW``, half of these are candidates far from all others that are taken: a mode whose
    candidates are all lower than their neighbours has no peak.
    """
    block = max(1, PAIRS_AT_ONCE // len(candidates) ** 2)
    by_cells = zip((candidates / unit).split(block, 1), values.split(block, 1), strict=True)
    remote = torch.cat([_remoteness(*part) for part in by_cells], -1)
    n = min(n, len(candidates))
    apart = max(n - FEW, 0) // 2
    far = remote.topk((n - apart + 1) // 2, 0).indices
    # Candidates that are no peak only make up the number.
    high = (values + PEAK.to(values) * (remote > 0)).scatter(0, far, -torch.inf).topk((n - apart) // 2, 0).indices
    return _with_others_apart(candidates / unit, torch.cat([far, high]), apart)


def _with_others_apart(points: Tensor, taken: Tensor, n: int) -> Tensor:
    """The indices ``taken`` (k, cells), then n times that of the point farthest from all before (Gonzalez 1985)."""
    nearest = torch.cdist(points.transpose(0, 1), _at(points, taken).transpose(0, 1)).amin(-1).T
    indices = [taken]
    for _ in range(n):
        indices.append(nearest.argmax(0, keepdim=True))
        nearest = torch.minimum(nearest, (points - _at(points, indices[-1])).norm(dim=-1))
    return torch.cat(indices)


def _remoteness(points: Tensor, values: Tensor) -> Tensor:
    """Distance of each peak from the nearest higher candidate, infinite for the highest; 0 for what is no peak."""
    by_cell, height = points.transpose(0, 1), values.T
    gaps = torch.cdist(by_cell, by_cell)
    higher = height[:, None] > height[..., None]
    near = gaps.topk(min(NEIGHBOURS + 1, len(points)), largest=False).indices
    peak = ~higher.gather(2, near).any(-1)
    remote = gaps.where(higher, torch.inf).amin(-1) * peak
    return remote.nan_to_num(0.0, torch.inf).scatter(1, height.argmax(1, keepdim=True), torch.inf).T


def climbed(density: LogJoint, u: Tensor, unit: Tensor) -> Climbs:
    """Climbs from u (starts, cells, size).

    Each coordinate has a step of its own, first in ``unit``, that grows while the slope keeps its sign and shrinks when
    it changes (Riedmiller and Braun 1993): posteriors may be far narrower than what is known beforehand.
    """
    size, before = FIRST_STEP * unit.expand_as(u), torch.zeros_like(u)
    for _ in range(STEPS):
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            (slope,) = torch.autograd.grad(density(u).sum(), u)
        turned = slope * before
        size = torch.where(turned < 0, SHRUNK * size, torch.where(turned > 0, GROWN * size, size))
        before = slope.nan_to_num(0.0, 0.0, 0.0)
        u = u.detach() + size * before.sign()
    with torch.no_grad():
        ahead = (before * size).abs().sum(-1).clamp(max=AHEAD)
        return Climbs(u, density(u).nan_to_num(-torch.inf), ahead)


@torch.no_grad()
def _separated(density: LogJoint, climbs: Climbs, modes: int, block: int) -> Modes:
    """The highest end, then again and again the highest that a valley separates from all ends taken before."""
    ends, heights, ahead = climbs
    alive = heights + ahead > heights.amax(0) - DEFICIT - 0.5 * ends.shape[-1]
    start_is_low = ~alive[0]
    places, present = list[Tensor](), list[Tensor]()
    while len(places) < modes and (not present or present[-1].any()):
        left = heights.where(alive, -torch.inf)
        taken = (left >= left.amax(0) - TIE).byte().argmax(0, keepdim=True)
        places.append(_at(ends, taken)[0])
        present.append(alive.any(0) | (not present))  # the first in any case: where nothing has mass, k-hat tells
        if len(places) < modes:
            lowest = _lowest_between(density, ends, places[-1], block)
            alive = alive & (torch.minimum(heights, heights.gather(0, taken)) - lowest > VALLEY)
    return Modes(torch.stack(places), torch.stack(present), start_is_low)


def _lowest_between(density: LogJoint, ends: Tensor, place: Tensor, block: int) -> Tensor:
    """The lowest density (ends, cells) at points on the line from each end to one place of the cell."""
    shares = torch.linspace(0, 1, INSIDE + 2, dtype=ends.dtype, device=ends.device)[1:-1, None, None, None]
    between = (ends + shares * (place - ends)).flatten(0, 1)
    values = torch.cat([density(part) for part in between.split(max(block, FEW))])
    return values.nan_to_num(-torch.inf).unflatten(0, (INSIDE, -1)).amin(0)
