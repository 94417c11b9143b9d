"""Programs with sites beyond those of the paper: some that every verb follows, some that every verb refuses by name."""

import pyro
import pyro.distributions as dist
import torch

import pyro_scvi as ps
from pyro_scvi.program import cells_plate, check_inputs, register

N_GENES, N_LATENT = 8, 3


class Own(ps.SCVI):
    """SCVI's program written out, with places for more of it."""

    def outside(self):
        """Before the plate over cells."""

    def latent(self, x, gamma):
        """z, in the plate over cells."""
        return pyro.sample("z", self.prior())

    def size(self, x, gamma):
        """Log l, in the plate over cells."""
        return self.library(x, gamma)

    def in_genes(self, log_mean):
        """In the plates over cells and genes."""
        return log_mean

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        with self.weights.drawn_into(self):
            self.outside()
            with cells_plate(gamma, index, n_cells):
                z = self.latent(x, gamma)
                theta = self.decode(z, self.size(x, gamma), gamma)
                with pyro.plate("genes", self.n_genes, dim=-1), pyro.poutine.mask(mask=mask):
                    theta["log_mean"] = self.in_genes(theta["log_mean"])
                    if marginal:
                        return pyro.sample("x", self.likelihood.marginal(**theta), obs=x)
                    return self.likelihood.generate(x, theta)


def made(kind=ps.SCVI, **options):
    return kind(N_GENES, N_LATENT, n_hidden=8, n_layers=1, **options)


def normal(loc=0.0):
    return dist.Normal(torch.zeros(N_LATENT) + loc, 1.0).to_event(1)


class Effect(Own):
    def latent(self, x, gamma):
        z = super().latent(x, gamma)
        return z + pyro.sample("e", dist.Normal(0.0, 1.0))[..., None]


class Partly(Own):
    def latent(self, x, gamma):
        known = torch.arange(len(gamma))[:, None] % 2 == 0
        pyro.sample("age", dist.Normal(0.0, 1.0), obs=torch.zeros(len(gamma), 1), obs_mask=known)
        return super().latent(x, gamma)


class Decoding(ps.SCVI):
    """SCVI's own program, whose decoder draws."""

    def decode(self, z, log_library, gamma):
        return super().decode(z + pyro.sample("noise", dist.Normal(0.0, 1.0))[..., None], log_library, gamma)


class PerGene(Own):
    site = "w2"

    def in_genes(self, log_mean):
        return log_mean + pyro.sample(self.site, dist.Normal(0.0, 0.1))


class CalledW(PerGene):
    site = "w"


class Global(Own):
    def outside(self):
        self.tau = pyro.sample("tau", dist.HalfCauchy(torch.ones(())))


class Donors(Own):
    def outside(self):
        with pyro.plate("donors", 4):
            pyro.sample("m", dist.Normal(0.0, 1.0))


class Subsampled(Own):
    def outside(self):
        with pyro.plate("some", 10, subsample_size=3) as rows:
            pyro.deterministic("picked", rows.float())


class Factor(Own):
    def latent(self, x, gamma):
        z = super().latent(x, gamma)
        pyro.factor("push", -z.square().sum(-1))
        return z


class GlobalFactor(Own):
    def outside(self):
        pyro.factor("penalty", -self.decoder.heads["log_mean"].weight.square().sum())


class Proteins(Own):
    def latent(self, x, gamma):
        z = super().latent(x, gamma)
        pyro.sample("protein", dist.Poisson(z[..., 0].exp()), obs=torch.ones(len(gamma), 1))
        return z


class Point(Own):
    def latent(self, x, gamma):
        return super().latent(x, gamma) + pyro.sample("point", dist.Delta(torch.ones(len(gamma), 1)))[..., None]


class Moving(Own):
    def latent(self, x, gamma):
        self.kept = self.library(x, gamma)
        return pyro.sample("z", dist.Uniform(torch.zeros(N_LATENT), self.kept.exp()[..., None]).to_event(1))

    def size(self, x, gamma):
        return self.kept


class ByWeights(Own):
    def latent(self, x, gamma):
        top = self.decoder.heads["log_mean"].bias[:N_LATENT].exp()
        return pyro.sample("z", dist.Uniform(torch.zeros(N_LATENT), top).to_event(1))


class ByCounts(Own):
    def latent(self, x, gamma):
        top = torch.ones(len(gamma), 1) if x is None else 1 + x.sum(-1, keepdim=True)
        return pyro.sample("z", dist.Uniform(torch.zeros(N_LATENT), top[..., None]).to_event(1))


class OtherShape(Own):
    def latent(self, x, gamma):
        return pyro.sample("z", dist.Normal(torch.zeros(len(gamma), 1), 1.0))[..., None].expand(-1, -1, N_LATENT)


class Improper(Own):
    def latent(self, x, gamma):
        law = dist.ImproperUniform(dist.constraints.real, (), ()).expand([len(gamma), 1])
        return super().latent(x, gamma) + pyro.sample("anything", law)[..., None]


class Generating(ps.likelihoods.NB):
    """Explicit counts with one more latent."""

    def generate(self, x, theta):
        thinned = pyro.sample("thinned", dist.Beta(1.0, 1.0))
        return super().generate(x, theta | {"log_mean": theta["log_mean"] + thinned.log()})


class BetaLibrary(ps.libraries.LatentLibrary):
    """A capture efficiency under the name of a library size."""

    def forward(self, x, gamma):
        return pyro.sample("l", dist.Beta(2.0, 2.0).expand([len(gamma), 1])).log()


class SecondLibrary(ps.libraries.LatentLibrary):
    def forward(self, x, gamma):
        return super().forward(x, gamma) + pyro.sample("doublet", dist.HalfNormal(1.0))


def enumerated():
    c = pyro.sample("c", dist.Categorical(torch.ones(4) / 4), infer={"enumerate": "parallel"})
    return normal(c[..., None].float())


def counted():
    return normal(pyro.sample("lineages", dist.Poisson(2.0))[..., None])


def flipped():
    return normal(pyro.sample("coin", dist.Bernoulli(torch.tensor(0.5)))[..., None])


def scaled():
    return dist.Normal(torch.zeros(N_LATENT), pyro.sample("spread", dist.HalfNormal(1.0))[..., None]).to_event(1)


def called_l():
    return normal(pyro.sample("l", dist.Normal(0.0, 1.0))[..., None])


class Bayesian(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = pyro.nn.PyroSample(dist.Normal(0.0, 1.0))

    def forward(self):
        return normal(self.loc[..., None])


class ScaleInPlate(torch.nn.Module):
    """A prior on weights that draws something discrete, too."""

    def forward(self, name, like):
        on = pyro.sample("switch", dist.Bernoulli(torch.tensor(0.5)))
        return pyro.sample(name, dist.Normal(torch.zeros_like(like), 1.0 + on).to_event(like.dim()))


def interval():
    return dist.Uniform(torch.zeros(N_LATENT), torch.ones(N_LATENT)).to_event(1)


def nine():
    """What the support is for the cells that a program is looked at with."""
    return dist.Uniform(torch.zeros(N_LATENT), 9 * torch.ones(N_LATENT)).to_event(1)


BIAS = {"decoder.heads.log_mean.bias": ps.weights.NormalWeights()}
NONE = ps.libraries.NoLibrary


class Observing(ps.SCVI):
    """SCVI's program written out, with places for more of it."""

    def outside(self):
        """Before the plate over cells."""

    def latent(self, x, gamma):
        """z, in the plate over cells."""
        return pyro.sample("z", self.prior())

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        with self.weights.drawn_into(self):
            self.outside()
            with cells_plate(gamma, index, n_cells):
                z = self.latent(x, gamma)
                theta = self.decode(z, self.library(x, gamma), gamma)
                return self.observe(x, theta, marginal=marginal, mask=mask)


class Shift(Observing):
    """A latent on every log mean."""

    def decode(self, z, log_library, gamma):
        theta = super().decode(z, log_library, gamma)
        return {**theta, "log_mean": theta["log_mean"] + pyro.sample("e", dist.Normal(0.0, 1.0))}


class Age(Observing):
    """A positive latent and two shares."""

    def latent(self, x, gamma):
        z = super().latent(x, gamma)
        age = pyro.sample("age", dist.LogNormal(0.0, 0.5))
        shares = pyro.sample("shares", dist.Beta(2 * torch.ones(2), 3.0).to_event(1))
        return z + age.log()[..., None] + shares.sum(-1, keepdim=True)


class Switch(Observing):
    """A discrete latent on every log mean, and one whose law depends on it."""

    def decode(self, z, log_library, gamma):
        on = pyro.sample("on", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        level = pyro.sample("level", dist.Categorical(LEVELS[on.long()]), infer={"enumerate": "parallel"})
        theta = super().decode(z, log_library, gamma)
        return {**theta, "log_mean": theta["log_mean"] + 0.7 * on - 0.5 * level}


LEVELS = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])


class Population(Observing):
    """A scale, means of donors in a plate of their own, and z around the first of these."""

    def outside(self):
        self.tau = pyro.sample("tau", dist.HalfCauchy(torch.ones(())))
        with pyro.plate("donors", 4, dim=-1):
            self.m = pyro.sample("m", dist.Normal(0.0, self.tau))

    def latent(self, x, gamma):
        return pyro.sample("z", normal(self.m[0]).expand([len(gamma), 1]))


class NoneMissing(Observing):
    """Adds (cells, 1) to (cells, 1, latents), which makes (cells, cells, latents)."""

    def latent(self, x, gamma):
        return super().latent(x, gamma) + pyro.sample("e", dist.Normal(0.0, 1.0))


class FromTheLeft(Observing):
    """Takes draws for cells where there are several."""

    def latent(self, x, gamma):
        z = super().latent(x, gamma)
        pyro.sample("e", dist.Normal(4 * z[:, 0, :1], 0.1))
        return z


class Scaled(Observing):
    def latent(self, x, gamma):
        with pyro.poutine.scale(scale=0.5):
            return super().latent(x, gamma)


class Masked(Observing):
    def latent(self, x, gamma):
        with pyro.poutine.mask(mask=torch.arange(len(gamma))[:, None] > 0):
            e = pyro.sample("e", dist.Normal(0.0, 1.0))
        return super().latent(x, gamma) + e[..., None]


class CalledCell(Observing):
    def latent(self, x, gamma):
        return super().latent(x, gamma) + pyro.sample("cell", dist.Normal(0.0, 1.0))[..., None]


class Matrix(Observing):
    """A latent that is a matrix, one that is a point of the simplex, and a global covariance."""

    def outside(self):
        self.scales = pyro.sample("scales", dist.LKJCholesky(2, torch.tensor(2.0)))

    def latent(self, x, gamma):
        rows = pyro.sample("rows", dist.Normal(torch.zeros(2, N_LATENT), 1.0).to_event(2))
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(2)))
        return super().latent(x, gamma) + (shares @ self.scales)[..., :1] + rows.sum(-2)


class Unnamed(Observing):
    def latent(self, x, gamma):
        return pyro.sample("zeta", self.prior())


class Positive(Observing):
    def latent(self, x, gamma):
        return pyro.sample("z", dist.LogNormal(torch.zeros(N_LATENT), 1.0).to_event(1))


KNOWN = {
    "effect of a cell": (lambda: made(Effect), "e"),
    "effect of a cell, observed": (lambda: made(Shift), "e"),
    "effect of a cell, in the decoder": (lambda: made(Decoding), "noise"),
    "scale of a cell, in the prior": (lambda: made(prior=scaled), "spread"),
    "site of a PyroModule": (lambda: made(prior=Bayesian()), "loc"),
    "positive and shares": (lambda: made(Age), "age"),
    "second site of a library": (lambda: made(library=SecondLibrary()), "doublet"),
    "matrix and simplex": (lambda: made(Matrix), "(scales|rows)"),
    "enumerated": (lambda: made(prior=enumerated), "c"),
    "two enumerated, without a library": (lambda: made(Switch, library=NONE()), "on"),
    "l of another law": (lambda: made(prior=called_l, library=NONE()), "l"),
    "l of another support": (lambda: made(library=BetaLibrary()), "l"),
    "global": (lambda: made(Global), "tau"),
    "global in a plate": (lambda: made(Donors), "m"),
    "population": (lambda: made(Population), "tau"),
    "z of another support": (lambda: made(Positive), "z"),
    "z under another name": (lambda: made(Unnamed), "zeta"),
}
"""What every verb follows: how to make it, and a latent beyond the paper's."""

REFUSED = {
    "partly observed": (lambda: made(Partly), "age_(un)?observed"),
    "infinitely many values": (lambda: made(prior=counted), "lineages"),
    "not enumerated": (lambda: made(prior=flipped), "coin"),
    "l twice": (lambda: made(prior=called_l), "l"),
    "of every cell and gene": (lambda: made(PerGene), "w2"),
    "of every cell and gene, called w": (lambda: made(CalledW), "w"),
    "in the explicit program": (lambda: made(likelihood=Generating()), "thinned"),
    "factor": (lambda: made(Factor), "push"),
    "global factor": (lambda: made(GlobalFactor), "penalty"),
    "second observation": (lambda: made(Proteins), "protein"),
    "point mass": (lambda: made(Point), "point"),
    "scaled": (lambda: made(Scaled), "z"),
    "masked": (lambda: made(Masked), "e"),
    "name of a dimension": (lambda: made(CalledCell), "cell"),
    "None missing": (lambda: made(NoneMissing), "(e|x)"),
    "improper": (lambda: made(Improper), "anything"),
    "subsampled plate": (lambda: made(Subsampled), "some"),
    "support that moves with another site": (lambda: made(Moving, prior=interval), "z"),
    "support that moves with the counts": (lambda: made(ByCounts, prior=nine), "z"),
    "support that moves with a weight": (lambda: made(ByWeights, prior=interval, weight_priors=BIAS), "z"),
    "z of another shape": (lambda: made(OtherShape), "z"),
}
"""What every verb refuses: how to make it, and the name that the refusal must give."""

KINDS = KNOWN | REFUSED
