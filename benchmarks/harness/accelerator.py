"""Accelerators run asynchronously: waiting until their work is done."""

import torch


def synchronise(device: str) -> None:
    """Wait for the device, so that its work is timed."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
