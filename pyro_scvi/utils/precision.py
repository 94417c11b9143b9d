"""Double precision, wherever a tensor is."""

from torch import Tensor


def in_float64(values: Tensor) -> Tensor:
    """The values in float64: on their own device, or on the CPU if they are on MPS, which has no float64."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def put_back(values: Tensor, like: Tensor) -> Tensor:
    """Values that :func:`in_float64` brought about, in the precision and on the device of ``like``."""
    return values.to(like.dtype).to(like.device)  # in this order: the device may have no float64
