"""A normal distribution fitted to each cell's posterior by Newton steps on its bound."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_scvi.inference.importance import Proposal
from pyro_scvi.types import LogJoint
from pyro_scvi.utils.cell_streams import narrowed, per_cell
from pyro_scvi.utils.precision import in_float64, put_back

DensityOf = Callable[[Tensor], LogJoint]  # the log joint density of the cells in given rows

UNDAMPED, DAMPED = 2, 0.6  # steps that take the whole new curvature, and the share of it that later ones take
LEAST_CURVATURE, MOST_CURVATURE = 0.1, 10.0  # relative to the curvature before the step
LONGEST = 6.0  # of a step, in standard deviations
LENGTHS = (1.0, 0.5, 0.25, 0.05)  # shares of a step, of which the one with the highest density is taken
TRUSTED = 1.0  # standard deviations; of a step that is taken as it is: the mean need not be where the density is high
FEWEST, CONVERGED = 4, 0.2  # steps of every cell, and the length of a step after which a cell takes no more


class _Newton(NamedTuple):
    """A step by an eigenbasis in whitened coordinates: root (cells, size, size) times these is u - loc.

    ``slope`` (cells, size) is along ``vectors`` (cells, size, size), with ``curvature`` (cells, size), in float64.
    """

    root: Tensor
    vectors: Tensor
    slope: Tensor
    curvature: Tensor

    def move(self) -> tuple[Tensor, Tensor]:
        """The move of the mean, (cells, size), and its length in standard deviations, (cells,)."""
        white = self.slope / self.curvature
        length = white.norm(dim=-1, keepdim=True)
        white = white * (LONGEST / length).clamp(max=1.0)
        return (self.root @ (self.vectors @ white[..., None])).squeeze(-1), length.squeeze(-1)

    def scale_tril(self) -> Tensor:
        """Cholesky factor of the new covariance, without forming it: it may be nearly singular."""
        factor = self.root @ (self.vectors * self.curvature.rsqrt()[:, None])
        tril = torch.linalg.qr(factor.mT).R.mT
        return tril * tril.diagonal(dim1=-2, dim2=-1).sign()[:, None]


def fitted_normal(density_of: DensityOf, loc: Tensor, scale: Tensor, *, steps: int, block: int) -> Proposal:
    r"""Mean and covariance of the normal q that raises E_q log joint + H(q), from a diagonal one at (loc, scale).

    .. math:: precision = -E_q[\nabla^2 \log p(x, u)], \qquad loc \leftarrow loc + precision^{-1} E_q[\nabla \log p]

    Both means are taken over 2 x size points, at a normal's typical distance from loc along randomly rotated axes (the
    cubature rule of degree 3, Genz and Monahan 1998), the second by Stein's identity from gradients. A cell whose steps
    have become short takes no more. At most ``block`` points of a cell are evaluated at once.
    """
    loc, tril = loc.clone(), torch.diag_embed(scale)
    rows = torch.arange(len(loc), device=loc.device)
    density = density_of(rows)
    for step in range(steps):
        with narrowed(rows):
            newton = _newton(density, loc[rows], tril[rows], 1.0 if step < UNDAMPED else DAMPED, block)
        move, length = newton.move()
        loc[rows] += _shortened(density, loc[rows], put_back(move, loc), put_back(length, loc))
        tril[rows] = put_back(newton.scale_tril(), tril)
        left = length.to(rows.device) > CONVERGED
        if step + 1 >= FEWEST and not bool(left.all()):
            rows = rows[left]
            if not len(rows):
                break
            density = density_of(rows)
    return Proposal(loc, tril)


def _newton(density: LogJoint, loc: Tensor, tril: Tensor, share: float, block: int) -> _Newton:
    """The Newton step, with ``share`` of the new curvature and the rest of the old."""
    size = loc.shape[-1]
    with per_cell():
        normal = torch.randn(size, *loc.shape, dtype=loc.dtype, device=loc.device)
    root = tril @ torch.linalg.qr(normal.transpose(0, 1)).Q
    distance = size**0.5
    offsets = distance * root.permute(2, 0, 1)  # (axis, cells, size)
    points = torch.cat([loc + offsets, loc - offsets])
    gradients = torch.cat([_gradient(density, part) for part in points.split(block)])
    slope = torch.einsum("cij,ci->cj", root, gradients.mean(0))
    change = torch.einsum("kci,cij->ckj", gradients[size:] - gradients[:size], root) / (2 * distance)
    change = in_float64(change + change.mT).nan_to_num(0.0, 0.0, 0.0) / 2
    eye = torch.eye(size, dtype=change.dtype, device=change.device)
    curvature, vectors = torch.linalg.eigh((1 - share) * eye + share * change)
    along = torch.einsum("cij,ci->cj", vectors, in_float64(slope))
    return _Newton(in_float64(root), vectors, along, curvature.clamp(LEAST_CURVATURE, MOST_CURVATURE))


def _gradient(density: LogJoint, u: Tensor) -> Tensor:
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(density(u).sum(), u)
    return gradient.nan_to_num(0.0, 0.0, 0.0)


@torch.no_grad()
def _shortened(density: LogJoint, loc: Tensor, move: Tensor, length: Tensor) -> Tensor:
    """The move, or for long ones the share of it that leads to the highest density."""
    if bool((length < TRUSTED).all()):
        return move
    shares = torch.tensor(LENGTHS, dtype=loc.dtype, device=loc.device)
    best = density(loc + shares[:, None, None] * move).nan_to_num(-torch.inf).argmax(0)
    return torch.where(length < TRUSTED, 1.0, shares[best])[:, None] * move
