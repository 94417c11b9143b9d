"""Neural networks and their layers, and the base class of all components."""

from pyro_scvi.nn.decoders import LinearDecoder, MLPDecoder
from pyro_scvi.nn.normalization import BatchNorm, LayerNorm

__all__ = ["BatchNorm", "LayerNorm", "LinearDecoder", "MLPDecoder"]


def __dir__() -> list[str]:
    return __all__
