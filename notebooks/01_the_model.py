# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # 1. The paper's model, letter by letter
#
# *Question: what does scVI (Lopez, Regier, Cole, Jordan and Yosef 2017) say about a table of counts, before any
# data?*
#
# The table has a row per cell $n$ and a column per gene $g$; $x_{ng}$ is how many RNA molecules of that gene were
# counted in that cell. Most entries are zero. The model explains a row by a few numbers $z_n$:
#
# $$z_n \sim \mathrm{Normal}(0, I), \qquad
#   w_{ng} \sim \mathrm{Gamma}\!\left(r_{ng},\ r_{ng}/\mu_{ng}\right), \qquad
#   y_{ng} \sim \mathrm{Poisson}(w_{ng}), \qquad
#   h_{ng} \sim \mathrm{Bernoulli}(\pi_{ng}), \qquad
#   x_{ng} = \begin{cases} y_{ng} & h_{ng} = 0 \\ 0 & h_{ng} = 1 \end{cases}$$
#
# with $(\mu, r) = f_w(z_n)$ and $\operatorname{logit} \pi = f_h(z_n)$, two networks with shared hidden layers.
#
# | letter | if you know Stan or Pyro | if you know single cells |
# |---|---|---|
# | $z_n$ | latent vector of a row | the cell's state; its posterior mean is the embedding |
# | $w_{ng}$ | Gamma rate, mean $\mu$, shape $r$ | expression of the gene in the cell |
# | $y_{ng}$ | Poisson count | molecules that were there to be counted |
# | $h_{ng}$ | zero-inflation indicator | 1 if the entry was lost for technical reasons |
# | $x_{ng}$ | observation | the UMI count |

# %%
import inspect
import json
import os

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from pyro import poutine

import pyro_scvi as ps

SHORT = os.environ.get("PYRO_SCVI_NOTEBOOKS") == "short"  # for tests: less of everything but the headline

# %% [markdown]
# ## The program
#
# `ps.SCVI` is a Pyro program. The default adds a latent library size, which came a year after the paper;
# `NoLibrary()` leaves it out. There are two latents here, so that they can be plotted. The weights are random:
# nothing has been fitted.

# %%
n_cells, n_genes = 400, 60
size = {"n_latent": 2, "library": ps.libraries.NoLibrary(), "n_hidden": 16, "initial_sd": 0.45, "seed": 3}
model = ps.SCVI(n_genes, **size).eval()
print(inspect.getsource(ps.SCVI.forward).split('"""')[-1])

# %% [markdown]
# Read from the bottom: `marginal` integrates $w$, $y$ and $h$ out, and `generate` samples them. The plate diagram
# below is made from the program itself, so a changed model has another diagram. (`pyro.render_model(model,
# model_args=(x,), model_kwargs={"marginal": False})` gives Graphviz's.)

# %%
_ = ps.plots.program(model, n_cells=n_cells)

# %% [markdown]
# ## Draws from the prior
#
# `model(None, gamma)` draws instead of scoring. `gamma` holds covariates of the cells, such as batches; here there
# are none, so it has no columns and only says how many cells to draw. A trace keeps every site.

# %%
gamma = torch.zeros(n_cells, 0)


def drawn(seed):
    """A value of every site of the program."""
    pyro.set_rng_seed(seed)
    with torch.no_grad():
        trace = poutine.trace(model).get_trace(None, gamma, marginal=False)
    return {site: trace.nodes[site]["value"] for site in "zwyhx"}


z, w, y, h, x = drawn(0).values()
for site, value in zip("zwyhx", (z, w, y, h, x), strict=True):
    print(f"{site}  {tuple(value.shape)!s:14}  mean {value.mean():6.2f}   sd {value.std():6.2f}")

# %%
order = z[:, 0, 0].argsort()
figure, axes = plt.subplots(1, 5, figsize=(11, 3.4), layout="constrained", width_ratios=[1.5, 1, 1, 1, 1])
axes[0].scatter(*z.squeeze(1).T, c=z[:, 0, 0], s=6)
axes[0].set(title="z: cells", xlabel="latent 1", ylabel="latent 2")
titles = {"w: expression": w, "y: molecules": y, "h: lost": h, "x: counts": x}
for ax, (title, value) in zip(axes[1:], titles.items(), strict=True):
    shown = value[order][::4].numpy()
    shade = {"cmap": "Greys"} if title.startswith("h") else {"cmap": "viridis", "vmax": 2.5}
    ax.imshow(np.log1p(shown), aspect="auto", interpolation="nearest", **shade)
    ax.set(title=title, xlabel="genes", xticks=[], yticks=[])
_ = axes[1].set_ylabel("cells, by latent 1; lighter: more")

# %% [markdown]
# From left to right, smooth structure in $z$ becomes smooth expression, then molecules, then a table with holes.
# Fitting goes from right to left. An entry of $x$ can be 0 for two reasons, and $x$ alone does not say which:


# %% tags=["headline"]
def lost(y, h, x, **others):
    """Share of the zeros of x behind which there was a molecule."""
    return float(((h == 1) & (y > 0)).sum() / (x == 0).sum())


seeds = [] if SHORT else [1, 2, 3, 4]
again = [lost(**drawn(seed)) for seed in seeds]
headline = {
    "quantity": "share of the zeros of x behind which there was a molecule, prior draws of this program",
    "value": round(lost(y, h, x), 4),
    "error": 0.0005,  # of the same run on another machine: instruction sets did not move it
    "unit": "share of zeros",
    "refit_sd": round(float(np.std([lost(y, h, x), *again], ddof=1)), 4) if seeds else None,  # over other draws
}
print(json.dumps(headline))

# %% [markdown]
# ## w, y and h integrated out
#
# Gamma-Poisson conjugacy makes $y$ negative binomial, and $x$ zero-inflated negative binomial (Section 2 of the
# paper):
#
# $$p(x \mid z) = \pi\, 1[x = 0] + (1 - \pi)\, \mathrm{NB}(x; \mu, r), \qquad
#   \mathrm{Var}[y \mid z] = \mu + \mu^2 / r .$$
#
# Training uses this marginal program, because then only $z$ has to be inferred. First check: at one fixed $z$, how
# often does the explicit program draw each count, and what is its probability in the marginal program?

# %%
draws = 2_000 if SHORT else 20_000
same_z = {"z": z[:1].expand(draws, 1, 2)}
pyro.set_rng_seed(1)
with torch.no_grad():
    counts = poutine.condition(model, data=same_z)(None, torch.zeros(draws, 0), marginal=False)
    law = model.likelihood.marginal(**model.decode(z[:1], None, gamma[:1]))  # batch shape (1, genes)
gene = int((counts.mean(0) - 2).abs().argmin())  # one whose histogram has some width
support = torch.arange(12.0)
with torch.no_grad():
    probability = law.log_prob(support[:, None].expand(-1, n_genes))[:, gene].exp()
frequency = torch.stack([(counts[:, gene] == k).float().mean() for k in support])
se = (probability * (1 - probability) / draws).sqrt()
gap = ((frequency - probability) / se).abs().max()

figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.bar(range(12), frequency.numpy(), color="#c9ced6", label="explicit program, frequency")
bars = {"fmt": "o", "ms": 4, "color": "#31688e", "label": "marginal law, ± 2 se of a frequency"}
ax.errorbar(range(12), probability.numpy(), 2 * se.numpy(), **bars)
ax.set(xlabel="count of one gene in one cell", ylabel="probability")
ax.legend(frameon=False)
print(f"largest gap: {gap:.1f} standard errors over {len(support)} counts")

# %% [markdown]
# Second check, without Monte Carlo error. The conditional of $w, y, h$ given $x$ and $z$ is known exactly
# (`model.likelihood.condition` samples it), so for *every single draw* of it
#
# $$\log p(x, y, w, h \mid z) - \log p(y, w, h \mid x, z) = \log p(x \mid z).$$
#
# Both terms on the left differ from draw to draw. Their difference does not. In double precision:

# %%
exact = ps.SCVI(n_genes, **size).double().eval()
x, z, gamma = x.double(), z.double(), gamma.double()
with torch.no_grad():
    theta = exact.decode(z, None, gamma)
    marginal = exact.likelihood.marginal(**theta).log_prob(x)  # (cells, genes)

    with pyro.plate("cells", n_cells, dim=-2), pyro.plate("genes", n_genes, dim=-1):
        posterior = poutine.trace(exact.likelihood.condition).get_trace(x, theta)
    posterior.compute_log_prob()
    sites = {name: posterior.nodes[name]["value"] for name in ("w", "y", "h")}
    joint = poutine.trace(poutine.condition(exact, data={"z": z, **sites})).get_trace(x, gamma, marginal=False)
    joint.compute_log_prob()

forward = sum(joint.nodes[name]["log_prob"] for name in ("w", "y", "h", "x"))
backward = sum(posterior.nodes[name]["log_prob"] for name in ("w", "y", "h"))
print(f"log p(x, y, w, h | z): from {forward.min():.1f} to {forward.max():.1f} nats per entry (w has a density)")
print(f"largest |forward - backward - marginal|: {(forward - backward - marginal).abs().max():.0e} nats")

# %% [markdown]
# ## do(h = 0): the same cells, had nothing been lost
#
# An intervention replaces the statement that draws $h$ and leaves the rest of the program alone. The draws of $z$, $w$
# and $y$ below are the same as before, and $x$ becomes $y$.

# %%
with torch.no_grad():
    unlost = poutine.do(model, data={"h": torch.zeros(n_cells, n_genes)})
    given = poutine.condition(unlost, data={"z": z.float(), "w": w, "y": y})
    x_unlost = given(None, gamma.float(), marginal=False)
print(f"zeros in x: {(x == 0).double().mean():.3f};  under do(h = 0): {(x_unlost == 0).float().mean():.3f}")
print(f"x under do(h = 0) is y: {torch.equal(x_unlost, y)}")

# %% [markdown]
# **What to take along.** The paper's Section 1 is one short program; its marginal and explicit forms are the same
# distribution; every Pyro handler works on it.
#
# **What not to conclude.** The weights were random: none of these numbers says anything about real cells. And $h$ is
# a *name* for excess zeros: whether such zeros are technical is a matter of interpretation, which notebook 4 puts to
# a test. Next, notebook 2 fits the model to blood cells.
