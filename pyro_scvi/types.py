"""Types that several packages share: a distribution, a likelihood's parameters, a log joint density."""

from collections.abc import Callable

from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

Distribution = TorchDistributionMixin  # what Pyro can sample: its own distributions and its wrappers of torch's
Theta = dict[str, Tensor]  # a likelihood's parameters by name, (..., cells, genes) each
LogJoint = Callable[[Tensor], Tensor]  # u (samples, cells, size) -> log p(x, latents), nats, (samples, cells)
