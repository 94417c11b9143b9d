"""Random bits, four times cheaper than random numbers."""

import torch
from torch import Tensor


def random_bits(like: Tensor) -> Tensor:
    """Uniform integers from -32,768 to 32,767, int16, of the shape and on the device of another tensor."""
    # One 64-bit draw gives four entries. None as the upper end means 2^63, which int64 cannot hold.
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    return words.view(torch.int16)[: like.numel()].view(like.shape)
