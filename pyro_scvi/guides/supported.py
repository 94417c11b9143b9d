"""Which sites of a program the verbs can do right by; every other site is refused by its name.

Verbs read densities off the program's trace, at draws of its latents, which the guide knows. Any other latent would be
drawn from its prior whenever a density is evaluated, in silence.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, cast

import pyro
import pyro.distributions as dist
from pyro.poutine.subsample_messenger import _Subsample

from pyro_scvi.discovery import Kind, TracedSite
from pyro_scvi.distributions.supports import (
    constant_support,
    is_masked,
    require_coordinates,
    same_coordinates,
    support_of,
    unwrapped,
)
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.enumeration import is_enumerated
from pyro_scvi.guides.packaged import is_packaged
from pyro_scvi.likelihoods.base import Likelihood
from pyro_scvi.likelihoods.library_size import Library
from pyro_scvi.model import SCVI
from pyro_scvi.types import Theta

DIMENSIONS = ("sample", "chain", "draw", "cell", "gene", "latent", "covariate")

RESERVED = {"w", "y", "h", "gamma", *DIMENSIONS, "lp", "khat", "ess", "rhat", "divergences"}
"""Names of sites, dimensions and diagnostics that tables have beside the latents."""

EXPLICIT = ("w", "y", "h")
"""Sites of the explicit program beside its latents and x."""


def own_dims(name: str, n: int) -> tuple[str, ...]:
    """Names for ``n`` dimensions of a site that have none, as ArviZ makes them."""
    return tuple(f"{name}_dim_{i}" for i in range(n))


class Latent(NamedTuple):
    """What a guide takes a latent for; the shape of an event is None where it may be any."""

    kind: Kind
    support: Any
    event_shape: tuple[int, ...] | None


def require_theta(model: SCVI) -> None:
    """Refuse a program that observes x otherwise than by ``observe``, which tells what its theta was.

    Raises
    ------
    ModelError
        Naming the class.
    """
    for site in model.discovered():
        if site.name == "x":
            theta_of(model, site.infer)


def theta_of(model: SCVI, infer: Mapping[str, Any] | None) -> Theta:
    """What the program told of theta where it sampled x.

    Raises
    ------
    ModelError
        If it samples x itself, without ``observe``; names the class.
    """
    if "theta" not in (infer or {}):
        raise ModelError(
            f"{type(model).__name__} samples x itself, so the likelihood's parameters theta are not known, nor are w, "
            "y, h and what is computed from them. Let its last line be return self.observe(x, theta, "
            "marginal=marginal, mask=mask). Latents, evidence and predictions work as it is"
        )
    theta: Theta = cast(Mapping[str, Any], infer)["theta"]
    return theta


def require_supported(model: SCVI, latents: Mapping[str, Latent]) -> None:
    """Refuse a program that has other sites than x and these latents, or has them as something else.

    Raises
    ------
    ModelError
        Naming the site.
    """
    found = model.discovered()
    _require_known(found, latents)
    _require_names(found)
    _require_before_x(found)
    _require_plainly_enumerated(found)
    _require_unweighed(found)
    _require_x(found, model.n_genes)
    _require_n_latent(found, model.n_latent)
    _require_proper([site for site in found if site.name != "z"])  # a prior of z is asked itself, by what needs it
    if not is_packaged(model):
        _require_densities(found)
        _require_constant(found, model.discovered(count=2.0, seed=1, at=0.5, varied=True))
        _require_library(model)
    likelihood = model.likelihood
    if likelihood.explicit and type(likelihood).generate is not Likelihood.generate:
        _require_known([site for site in model.discovered(marginal=False) if site.name not in EXPLICIT], latents)


def require_drawable(model: SCVI) -> None:
    """Refuse a program from which counts cannot be drawn by running it.

    Raises
    ------
    ModelError
        Naming the factor that weighs its draws.
    """
    for site in model.discovered():
        if site.kind is Kind.FACTOR:
            raise site.refusal()


def require_same_sites(trace: pyro.poutine.Trace, given: Collection[str], enumerated: Collection[str]) -> None:
    """Refuse a scored program that has other sites for these cells than it had when it was looked at.

    Raises
    ------
    ModelError
        Naming the site.
    """
    expected, nodes = {*given, *enumerated}, cast(Mapping[str, Any], trace.nodes)
    for node in nodes.values():
        if node["type"] == "sample":
            require_expected(node, expected)
    require_met(expected - nodes.keys())
    for name in enumerated:
        if not is_enumerated(nodes[name]):
            raise ModelError(
                f"the program sums out {name!r} under a condition only: let infer={{'enumerate': 'parallel'}} hold "
                "for all cells and draws"
            )


def is_expected(site: Any, expected: Collection[str]) -> bool:
    """Whether a site of one run is among those expected, or may come and go: a plate's rows, functions of others."""
    aside = isinstance(site["fn"], _Subsample) or bool((site["infer"] or {}).get("_deterministic"))
    return aside or site["name"] in expected


def require_expected(site: Any, expected: Collection[str]) -> None:
    """Refuse a site of one run that the program did not have when it was looked at.

    Raises
    ------
    ModelError
        Naming it.
    """
    if not is_expected(site, expected):
        raise conditional(site["name"])


def require_met(left: Collection[str]) -> None:
    """Refuse a run that did not come to these sites.

    Raises
    ------
    ModelError
        Naming the first of them.
    """
    for name in sorted(left):
        raise conditional(name)


def _require_known(found: list[TracedSite], latents: Mapping[str, Latent]) -> None:
    for site in sorted(found, key=lambda site: not site.kind.latent):  # a latent explains an observation of its name
        if site.kind is Kind.DETERMINISTIC or (site.name, site.kind) == ("x", Kind.OBSERVED):
            continue
        if site.name not in latents or latents[site.name].kind is not site.kind:
            raise site.refusal()
        _require_place(site, latents[site.name])
    if missing := [name for name in (*latents, "x") if name not in {site.name for site in found}]:
        raise ModelError(
            f"the program does not sample {missing}, which the guide or the library says it has: sample it under that "
            "name, or take a library without it and make the guide anew"
        )


def _require_proper(found: list[TracedSite]) -> None:
    """Refuse latents without a density, of which there is neither evidence nor a draw."""
    for site in found:
        if site.kind.latent and isinstance(unwrapped(site.law), dist.ImproperUniform):
            raise ModelError(f"the program's site {site.name!r} has no density (ImproperUniform): take a wide normal")
        if site.kind.latent and is_masked(site.law):
            raise ModelError(
                f"the distribution of the program's site {site.name!r} is masked, and it has no density where the "
                "mask is False: leave the mask out"
            )


def _require_densities(found: list[TracedSite]) -> None:
    """Refuse laws that can be drawn from but not scored; an improper prior of z is asked itself."""
    for site in found:
        if site.kind is Kind.DETERMINISTIC or isinstance(unwrapped(site.law), dist.ImproperUniform):
            continue
        try:
            site.law.log_prob(site.value.clone())  # some laws know their own draws by identity
        except KeyError as error:
            raise ModelError(
                f"the distribution of the program's site {site.name!r} ({type(unwrapped(site.law)).__name__}) has a "
                f"density at its own draws alone ({error}): take a transform that has an inverse, as "
                "dist.transforms.affine_coupling or dist.transforms.spline"
            ) from error
        except NotImplementedError as error:
            raise ModelError(
                f"the distribution of the program's site {site.name!r} ({type(unwrapped(site.law)).__name__}) has "
                "no density that can be computed: take one that has, as dist.FoldedDistribution(base) for the "
                "absolute value, or compute the value from a latent that has one"
            ) from error


def _require_names(found: list[TracedSite]) -> None:
    """Refuse latents under a name that the results have for something else."""
    dims = {dim: site.name for site in found if site.kind.latent for dim in own_dims(site.name, site.value.dim())}
    for site in found:
        if site.kind.latent and site.name in dims:
            raise ModelError(
                f"the program's site {site.name!r} has the name that results give a dimension of {dims[site.name]!r}: "
                "rename it"
            )
        if site.kind.latent and site.name in RESERVED:
            raise ModelError(
                f"the program's site {site.name!r} has a name that results use for something else: rename it"
            )
        if site.kind.latent and not site.name:
            raise ModelError("a site of the program has an empty name: give it one")
        if site.kind.latent and "/" in site.name:
            raise ModelError(
                f"the program's site {site.name!r} has a '/' in its name, which trees and files use: rename it"
            )


def _require_before_x(found: list[TracedSite]) -> None:
    """Refuse latents that the program samples after x, which no draw of counts would come to."""
    names = [site.name for site in found]
    for site in found:
        if site.kind.latent and "x" in names and names.index(site.name) > names.index("x"):
            raise ModelError(
                f"the program samples {site.name!r} after x: sample it before, and let return self.observe(x, theta, "
                "marginal=marginal, mask=mask) be the last line"
            )


def _require_plainly_enumerated(found: list[TracedSite]) -> None:
    """Refuse discrete latents whose values are not all taken, or share a dimension with those of others."""
    for site in found:
        if site.kind is not Kind.ENUMERATED:
            continue
        options = [option for option in ("num_samples", "expand") if site.infer.get(option)]
        if options or "_markov_scope" in site.infer:
            option = f"{options[0]}=" if options else "pyro.markov"
            raise ModelError(
                f"the program's site {site.name!r} is summed out, and {option} is not supported beside that: leave it "
                'out; infer={"enumerate": "parallel"} alone gives the exact sum'
            )


def _require_library(model: SCVI) -> None:
    """Refuse a library whose law of the total is a part of the evidence, and which the program does not use."""
    if type(model.library).log_prob_of_total is Library.log_prob_of_total:
        return
    used = []
    handle = model.library.register_forward_hook(lambda *_: used.append(True))
    try:
        model.discovered()
    finally:
        handle.remove()
    if not used:
        raise ModelError(
            f"the program does not use the model's library, {model.library!r}, whose distribution of a cell's "
            "total would be a part of the evidence: call self.library(x, gamma) in forward, or pass "
            "library=ps.libraries.NoLibrary()"
        )


def require_scaled(model: SCVI) -> None:
    """Refuse a program whose terms of a cell do not grow as minibatches become a smaller part of the cells.

    Raises
    ------
    ModelError
        Naming a site, or an argument that ``forward`` lacks.
    """
    if is_packaged(model):
        return
    model.require_arguments("mask", "index", "n_cells")
    for site in model.discovered(n_cells=8):
        of_cell = site.kind in (Kind.LOCAL, Kind.ENUMERATED) or site.name == "x"
        if site.weighed is not of_cell and site.kind is not Kind.DETERMINISTIC:
            raise ModelError(
                f"the program's site {site.name!r} is {'not ' if of_cell else ''}scaled by n_cells / len(index) in a "
                "minibatch, so that the bound would be wrong: sample what cells have inside, and what they share "
                "outside, of cells_plate(gamma, index, n_cells) from pyro_scvi.program"
            )


def _require_unweighed(found: list[TracedSite]) -> None:
    """Refuse sites whose density counts otherwise than once: no posterior is one of such a joint density."""
    for site in found:
        if site.weighed:
            raise ModelError(
                f"the program's site {site.name!r} is under poutine.scale, or a latent under poutine.mask, so "
                "densities and draws of the program would disagree: change its distribution instead, or mask x "
                "by observe(mask=)"
            )


def _require_x(found: list[TracedSite], n_genes: int) -> None:
    """Refuse a law of x of whole cells, or with more dimensions than cells and genes: latents of two shapes met."""
    for site in found:
        if site.name == "x" and site.law.event_shape:
            raise ModelError(
                f"the distribution of the program's site 'x' ({type(unwrapped(site.law)).__name__}) is of events of "
                f"shape {tuple(site.law.event_shape)}, and results need a density of each entry, batch shape (cells, "
                "genes): leave to_event out. Instead of a Multinomial given the total, take likelihood="
                "ps.likelihoods.Poisson() and library=ps.libraries.ObservedLibrary(): the same counts, and their total"
            )
        if site.name == "x" and tuple(site.law.batch_shape) != (2, n_genes):
            raise ModelError(
                f"the distribution of the program's site 'x' has batch shape {tuple(site.law.batch_shape)} for "
                f"two cells and {n_genes} genes: is [..., None] missing where a latent of shape (cells, 1) meets "
                "one of shape (cells, 1, latents)?"
            )


def _require_n_latent(found: list[TracedSite], n_latent: int) -> None:
    """Refuse a site z with other than ``n_latent`` values, as embeddings and exports have them."""
    for site in found:
        if site.name == "z" and site.kind is Kind.LOCAL and tuple(site.law.event_shape) != (n_latent,):
            raise ModelError(
                f"the program's site 'z' has values of shape {tuple(site.law.event_shape)}, and the model has "
                f"n_latent={n_latent}: give it the event shape ({n_latent},), or another name"
            )


def _require_place(site: TracedSite, latent: Latent) -> None:
    """Refuse a latent whose shape or support is not what the guide's coordinates are made for."""
    shape, event = tuple(site.batch_shape), tuple(site.law.event_shape)
    if site.kind in (Kind.LOCAL, Kind.ENUMERATED) and shape != (2, 1):
        raise ModelError(
            f"the program's site {site.name!r} has batch shape {shape} for two cells; it must be (cells, 1), as of a "
            "sample in the plate 'cells': is to_event(1) or [..., None] missing?"
        )
    if site.kind is Kind.ENUMERATED:
        return
    what = f"the law of the site {site.name!r}"
    require_coordinates(site.law, what)
    support = constant_support(site.law, what) if site.kind is Kind.LOCAL else support_of(site.law)
    expected = event if latent.event_shape is None else latent.event_shape
    if event != expected or not same_coordinates(support, latent.support, event):
        raise ModelError(
            f"the program's site {site.name!r} has values of shape {event} in {support}; the guide was "
            f"made for shape {expected} in {latent.support}: make it after the model's last change, and leave the site "
            "the support that its prior or library has"
        )


def _require_constant(first: list[TracedSite], second: list[TracedSite]) -> None:
    """Refuse sites that come and go, or whose support moves, with what else is drawn, with counts or covariates."""
    others = {site.name: site for site in second}
    require_met({site.name for site in first} ^ others.keys())
    for site in first:
        if site.kind in (Kind.LOCAL, Kind.GLOBAL):
            moved = support_of(others[site.name].law)
            if not same_coordinates(support_of(site.law), moved, site.law.event_shape):
                raise ModelError(
                    f"the support of the program's site {site.name!r} depends on other sites, counts or "
                    "covariates: take a distribution with a constant support, and scale its value instead"
                )


def conditional(name: str) -> ModelError:
    """The error for a site that comes and goes between runs of the program."""
    return ModelError(
        f"the program samples {name!r} under a condition only, so that some cells, counts or draws have other sites "
        "than the guide: sample it always and multiply it by 0 where it is not wanted, or do not sample it at all"
    )
