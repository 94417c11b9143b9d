"""The sites of a program: found by running it once, and classified by how they are sampled, never by their names."""

from collections import Counter
from collections.abc import Iterator
from enum import Enum
from itertools import chain
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_scvi.distributions.supports import is_discrete, is_point, support_of, unwrapped
from pyro_scvi.distributions.zero_inflated import ZeroInflated
from pyro_scvi.errors import ModelError
from pyro_scvi.failed_runs import explained
from pyro_scvi.nn.component import evaluation_mode
from pyro_scvi.utils.execution import executing
from pyro_scvi.utils.random_state import seeded


class Site(NamedTuple):
    """A random variable of a program: its name, its law, and its shape in words."""

    name: str
    law: str
    shape: str


class Kind(Enum):
    """What a site is, each with words for it and what to write where no verb can do right by it."""

    LOCAL = (
        "a latent of every cell",
        "make the guide anew, after the model's last change",
    )
    ENUMERATED = (
        "a discrete latent that is summed out",
        "make the guide anew, after the model's last change",
    )
    PER_GENE = (
        "a latent of every cell and gene",
        "integrate it out in the distribution of x; only w, y and h of the explicit program may be such",
    )
    GLOBAL = (
        "a latent outside the plate 'cells'",
        "make the guide anew, after the model's last change",
    )
    DISCRETE = (
        "a discrete latent",
        "let it be summed out, by infer={'enumerate': 'parallel'}, if it has finitely many values and is in the plate "
        "'cells'",
    )
    POINT = (
        "a latent whose distribution is a point mass (Delta)",
        "write pyro.deterministic, or make it a parameter",
    )
    OBSERVED = (
        "an observation",
        "x must be the only one: make the others part of the distribution of x",
    )
    COMPUTED = (
        "a value that is computed from other sites and observed as a Delta, as poutine.reparam does",
        "sample what it is computed from and compute it in plain Python, as e0 = pyro.sample('e0', dist.Normal(0.0, "
        "1.0)) and e = loc + scale * e0",
    )
    FACTOR = (
        "a pyro.factor, which the training loss counts and neither draws nor evidence can",
        "make it a part of the distribution of z or of x",
    )
    SUBSAMPLED = (
        "a plate of which a random part is taken",
        "leave out subsample_size and subsample; minibatches of cells are taken by index= and n_cells=",
    )
    REPEATED = (
        "a plate that is made twice",
        "make it once, as plate = cells_plate(gamma, index, n_cells), and enter it by 'with plate:' each time; observe "
        "makes the plate 'genes', so that one of your own needs another name, as pyro.plate('genes of b', n_genes)",
    )
    PARAMETER = (
        "a pyro.param, which fit would never train and verbs would start anew",
        "make it an nn.Parameter of a module that is part of the model",
    )
    DETERMINISTIC = ("a function of other sites", "")

    def __init__(self, what: str, remedy: str) -> None:
        self.what, self.remedy = what, remedy

    @property
    def random(self) -> bool:
        """Whether it is a random variable, or a function of such."""
        return self not in (Kind.SUBSAMPLED, Kind.REPEATED, Kind.PARAMETER)

    @property
    def sampled(self) -> bool:
        """Whether every run must have it: functions of other sites may come and go."""
        return self.random and self is not Kind.DETERMINISTIC

    @property
    def latent(self) -> bool:
        """Whether it is drawn, neither given nor computed."""
        return self.sampled and self not in (Kind.OBSERVED, Kind.COMPUTED, Kind.FACTOR)


class TracedSite(NamedTuple):
    """A site as one run of the program met it."""

    name: str
    kind: Kind
    law: Any
    value: Tensor
    plates: dict[int, str]
    infer: dict[str, Any]
    weighed: bool

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the value without the dimensions of an event."""
        return self.value.shape[: self.value.dim() - len(self.law.event_shape)]

    def refusal(self) -> ModelError:
        """The error that names the site and says what to do."""
        followed = self.kind in (Kind.LOCAL, Kind.ENUMERATED, Kind.GLOBAL)
        why = "which the guide does not have" if followed else "which is not supported"
        plain = ". Model and guide still run under plain Pyro (SVI, MCMC, Predictive)"
        return ModelError(
            f"the program's site {self.name!r} is {self.kind.what}, {why}: {self.kind.remedy}"
            f"{'' if self.kind is Kind.REPEATED else plain}"
        )


def discovered(program: nn.Module, *args: Any, seed: int = 0, at: float = 0.0, **kwargs: Any) -> list[TracedSite]:
    """The sites of a program in the order in which it samples them, from one run that leaves no trace of itself.

    The run is in evaluation mode, under a seed of its own, hidden from the caller's handlers, with a parameter store of
    its own. Global latents are not drawn, but given the value of their support that ``at`` is taken to.

    Raises
    ------
    ModelError
        If it cannot be run, for a reason that :mod:`pyro_scvi.failed_runs` knows.
    """
    with (
        evaluation_mode(program),
        seeded(seed),
        pyro.get_param_store().scope(),
        pyro.validation_enabled(False),
        executing(register_parameters=False),
        torch.no_grad(),
        pyro.poutine.block(),
        _Recorder() as recorder,
        _InitToFeasible(like(program), at),
    ):
        try:
            program(*args, **kwargs)
        except (AttributeError, RuntimeError, ValueError) as error:
            if (named := explained(program, error, recorder.messages)) is None:
                raise
            raise named from error
    return list(_classified(recorder.messages))


def require_distinct(found: list[TracedSite]) -> None:
    """Refuse a program with two sites, or a site and a plate, of one name, which Pyro cannot trace.

    Raises
    ------
    ModelError
        Naming them.
    """
    for name, times in Counter(site.name for site in found if site.kind is not Kind.PARAMETER).items():
        if times > 1:
            raise ModelError(f"the program samples two sites called {name!r}: give each a name of its own")
    plates = {plate for site in found for plate in site.plates.values()}
    for site in found:
        if site.name in plates and site.kind is not Kind.REPEATED and site.kind is not Kind.SUBSAMPLED:
            raise ModelError(f"the program's site {site.name!r} has the name of a plate: rename the site")


def sites_of(program: nn.Module, *args: Any, **kwargs: Any) -> list[Site]:
    """List the sample sites of a program in the order in which it draws them.

    A dimension that belongs to a plate goes by the plate's name, any other by its size: "cells x genes", "cells x 10".
    """
    found = discovered(program, *args, **kwargs)
    return [Site(one.name, _distribution_name(one.law), _shape(one)) for one in found if one.kind.random]


def like(program: nn.Module) -> Tensor:
    """A parameter or buffer that has the program's device and precision; all weights may be latent."""
    tensors = chain(program.parameters(), program.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))


class _Recorder(Messenger):
    """Keeps what is sampled, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.messages = list[dict[str, Any]]()

    def _pyro_post_sample(self, msg: Any) -> None:
        self.messages.append(dict(msg))

    def _pyro_post_param(self, msg: Any) -> None:
        self.messages.append(dict(msg))


def _classified(messages: list[dict[str, Any]]) -> Iterator[TracedSite]:
    plates_made = set[str]()
    for msg in messages:
        kind = _kind(msg)
        if isinstance(msg["fn"], _Subsample):
            kind = Kind.REPEATED if msg["name"] in plates_made else kind
            plates_made.add(msg["name"])
        if kind is not None:
            plates = {frame.dim: frame.name for frame in msg["cond_indep_stack"] if frame.vectorized}
            infer = dict(msg["infer"] or {})
            yield TracedSite(msg["name"], kind, msg["fn"], msg["value"], plates, infer, _is_weighed(msg))


def _kind(msg: dict[str, Any]) -> Kind | None:
    """What was sampled; None for a plate all of which is taken, as this is no random variable."""
    law = msg["fn"]
    if msg["type"] == "param":
        return Kind.PARAMETER
    if isinstance(law, _Subsample):
        return Kind.SUBSAMPLED if len(msg["value"]) < law.size else None
    if isinstance(unwrapped(law), dist.Unit):
        return Kind.FACTOR
    if (msg["infer"] or {}).get("_deterministic"):
        return Kind.DETERMINISTIC
    if msg["is_observed"]:
        return Kind.COMPUTED if is_point(law) and msg["name"] != "x" else Kind.OBSERVED
    plates = {frame.name for frame in msg["cond_indep_stack"]}
    if {"cells", "genes"} <= plates:
        return Kind.PER_GENE
    if is_point(law):
        return Kind.POINT
    if is_discrete(law):
        return Kind.ENUMERATED if "cells" in plates and _is_summed_out(msg) else Kind.DISCRETE
    return Kind.LOCAL if "cells" in plates else Kind.GLOBAL


def _is_weighed(msg: Any) -> bool:
    """Whether a scale, or a mask on a latent, says that the site's density counts otherwise than once."""
    masked = msg["mask"] is not None and msg["mask"] is not True
    return (masked and not msg["is_observed"]) or bool(torch.as_tensor(msg["scale"] != 1).any())


def _is_summed_out(msg: Any) -> bool:
    asked = (msg["infer"] or {}).get("enumerate") == "parallel"
    return asked and bool(getattr(unwrapped(msg["fn"]), "has_enumerate_support", False))


class _InitToFeasible(Messenger):
    """Gives global latents, and latents that cannot be drawn, a value near the middle of their support.

    Weights drawn from wide priors overflow the rates of the counts; an improper prior has no draws. Values have the
    device and precision of ``like``, whatever those of a prior that was made before the model was moved.
    """

    def __init__(self, like: Tensor, at: float) -> None:
        super().__init__()
        self.like, self.at = like, at

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None or isinstance(msg["fn"], _Subsample):
            return
        value = _draw_or_none(msg["fn"])
        if value is None or not any(frame.name == "cells" for frame in msg["cond_indep_stack"]):
            value = _feasible_value(msg["fn"], value, self.at)
        msg["value"] = value.to(self.like) if value.is_floating_point() else value.to(self.like.device)


def _draw_or_none(law: Any) -> Tensor | None:
    try:
        return law.sample()
    except RuntimeError:  # NotImplementedError, which is one, and draws in another precision than the parameters'
        return None


def _feasible_value(law: Any, drawn: Tensor | None, at: float) -> Tensor:
    """The value of the support that the bijection takes ``at`` to; a draw where no bijection leads there."""
    try:
        transform = biject_to(support_of(law))
    except (NotImplementedError, ValueError):
        if drawn is None:
            raise
        return drawn
    return transform(torch.full(transform.inverse_shape(law.shape()), at))


def _distribution_name(law: Any) -> str:
    """Name of a distribution, without the wrappers that only reshape it, and of what a mixture or transform is of."""
    law = unwrapped(law)
    name = type(law).__name__
    if isinstance(law, dist.Delta):
        return "a function of those above"
    if isinstance(law, ZeroInflated):
        return f"{name} {_distribution_name(law.base)}"
    if isinstance(law, dist.MixtureSameFamily):
        return (
            f"mixture of {law.mixture_distribution.logits.shape[-1]} {_distribution_name(law.component_distribution)}"
        )
    if name == "TransformedDistribution":  # named ones, such as LogNormal, say enough
        return f"transformed {_distribution_name(law.base_dist)}"
    return name


def _shape(found: TracedSite) -> str:
    shape, n_event = tuple(found.value.shape), len(found.law.event_shape)
    if isinstance(unwrapped(found.law), dist.Delta):  # deterministic sites call all their dimensions events
        n_event = 0
    batch, event = shape[: len(shape) - n_event], shape[len(shape) - n_event :]
    named = [(found.plates.get(place - len(batch)), size) for place, size in enumerate(batch)]
    return " x ".join([name or str(size) for name, size in named if name or size > 1] + list(map(str, event))) or "1"
