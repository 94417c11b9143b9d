"""Accelerators, whose work goes on after the call that asked for it: waiting until it is done."""

import torch


def synchronise(device: str) -> None:
    """Wait for the device, without which its work would not be timed."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
