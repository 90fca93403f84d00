"""Copies from the host to a device that do not make the host wait for it."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device. A GPU gets it through pinned memory, behind the work that it has already: from other
    memory the host would wait until all that is done."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return pinned(values, device).to(device, non_blocking=True)


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host in memory from which `device` copies by itself; one without storage, of an estimate, as it is."""
    return values.pin_memory() if device.type == "cuda" and type(values) is Tensor and not values.is_pinned() else values
