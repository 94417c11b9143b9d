"""A normal distribution fitted to each cell's posterior by Newton steps on its bound."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_scvi.inference.importance import Proposal, corrected_proposal
from pyro_scvi.types import LogJoint
from pyro_scvi.utils.cell_streams import narrowed, per_cell
from pyro_scvi.utils.precision import in_float64, put_back

DensityOf = Callable[[Tensor], LogJoint]  # the log joint density of the cells in given rows

UNDAMPED, DAMPED = 2, 0.6  # steps that take the whole new curvature, and the share of it that later ones take
LEAST_CURVATURE, MOST_CURVATURE = 0.1, 10.0  # relative to the curvature before the step
LONGEST = 6.0  # of a step, in standard deviations
LENGTHS = (1.0, 0.5, 0.25, 0.05)  # shares of a step, weighed by the density that they lead to
# Standard deviations. Up to the first, a step is taken as it is: the mean need not be where the density is high. From
# the second on, it is shortened as far as the densities say.
TRUSTED = (1.0, 2.0)
FEWEST = 4  # steps of every cell
STEADY = 0.75  # standard deviations; from the last of these on, no Newton step of a cell may be longer
GRADIENT_STEPS = 13  # for which one Newton step is taken, at a third of their cost
CONVERGED = (0.2, 0.4)  # lengths of a step: below the first a cell takes no more, above the second the whole next one
LOWEST = -1e30  # nats; where the density is no number


class _Newton(NamedTuple):
    """A step by an eigenbasis in whitened coordinates: root (cells, size, size) times these is u - loc.

    ``slope`` (cells, size) is along ``vectors`` (cells, size, size), with ``curvature`` (cells, size), in float64.
    ``bounded`` (cells,): whether the curvature of the density lies outside of what a step may change it to.
    """

    root: Tensor
    vectors: Tensor
    slope: Tensor
    curvature: Tensor
    bounded: Tensor

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
    """A normal for each cell by Newton steps, from a diagonal one at (loc, scale).

    Where these stay long, or the scale is still far off, the posterior is far from normal or the start from it. Newton
    steps would carry the rounding of densities, which depends on the cells in a batch, far into the answer. Such a cell
    is refined by ``steps`` gradient steps and a Laplace step instead. At most ``block`` points of a cell are evaluated
    at once.
    """
    newton_steps = max(FEWEST, -(-steps // GRADIENT_STEPS)) if steps else 0
    fitted, unsteady = newton_normal(density_of, loc, scale, steps=newton_steps, block=block)
    if len(unsteady):
        with narrowed(unsteady):
            slow = corrected_proposal(density_of(unsteady), loc[unsteady], scale[unsteady], steps=steps, rounds=0)
        fitted.loc[unsteady], fitted.scale_tril[unsteady] = slow.loc, slow.scale_tril
    return fitted


def newton_normal(
    density_of: DensityOf, loc: Tensor, scale: Tensor, *, steps: int, block: int
) -> tuple[Proposal, Tensor]:
    r"""Mean and covariance of the normal q that raises E_q log joint + H(q), and rows of cells whose steps stay long.

    .. math:: precision = -E_q[\nabla^2 \log p(x, u)], \qquad loc \leftarrow loc + precision^{-1} E_q[\nabla \log p]

    Both means are taken over 2 x size points, at a normal's typical distance from loc along randomly rotated axes (the
    cubature rule of degree 3, Genz and Monahan 1998), the second by Stein's identity from gradients.

    A cell whose steps have become short takes less and less of the next ones, and then no more. How much changes
    without a jump, so that rounding does not decide it.
    """
    loc, tril = loc.clone(), torch.diag_embed(scale)
    rows, taken = torch.arange(len(loc), device=loc.device), torch.ones_like(loc[:, 0])
    density, unsteady = density_of(rows), rows[:0]
    for step in range(steps):
        with narrowed(rows):
            newton = _newton(density, loc[rows], tril[rows], 1.0 if step < UNDAMPED else DAMPED, block)
        move, length = (put_back(of, loc) for of in newton.move())
        loc[rows] += taken[:, None] * _shortened(density, loc[rows], move, length)
        tril[rows] = torch.lerp(tril[rows], put_back(newton.scale_tril(), tril), taken[:, None, None])
        if step + 1 < FEWEST:
            continue
        long = (length > STEADY) | newton.bounded.to(rows.device)
        unsteady = torch.cat([unsteady, rows[long]])
        taken = taken * _ramp(length, *CONVERGED)
        left = (taken > 0) & ~long
        if not bool(left.all()):
            rows, taken = rows[left], taken[left]
            if not len(rows):
                break
            density = density_of(rows)
    return Proposal(loc, tril), unsteady.sort().values


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
    least, most = (1 - share + share * bound for bound in (LEAST_CURVATURE, MOST_CURVATURE))
    bounded = ((curvature <= least) | (curvature >= most)).any(-1)
    return _Newton(in_float64(root), vectors, along, curvature.clamp(LEAST_CURVATURE, MOST_CURVATURE), bounded)


def _gradient(density: LogJoint, u: Tensor) -> Tensor:
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(density(u).sum(), u)
    return gradient.nan_to_num(0.0, 0.0, 0.0)


@torch.no_grad()
def _shortened(density: LogJoint, loc: Tensor, move: Tensor, length: Tensor) -> Tensor:
    """The move, or for long ones the shares of it that lead to a high density."""
    doubted = _ramp(length, *TRUSTED)
    if not bool(doubted.any()):
        return move
    shares = torch.tensor(LENGTHS, dtype=loc.dtype, device=loc.device)
    densities = density(loc + shares[:, None, None] * move).nan_to_num(LOWEST, LOWEST, LOWEST)
    share = (densities.softmax(0) * shares[:, None]).sum(0)
    return torch.lerp(torch.ones_like(share), share, doubted)[:, None] * move


def _ramp(length: Tensor, low: float, high: float) -> Tensor:
    """0 up to ``low``, 1 from ``high`` on, and a straight line between."""
    return ((length - low) / (high - low)).clamp(0.0, 1.0)
