"""What travels between the CPU's memory and a device's: a CUDA device is never waited for where that can be avoided.

A plain copy to or from a CUDA device waits until all that was put before the device is done, so that it stands still
while the next work is prepared. On any other device these functions are plain copies.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dasc.data.pack import MappedPatches

RESIDENT_SHARE = 0.25  # of a CUDA device's free memory that patches may take for a whole training


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; itself where it lies there already."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def upload_all(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Small tensors of one type on a device, in one copy."""
    if device.type != "cuda":
        return [upload(tensor, device) for tensor in tensors]
    parts = upload(torch.cat([tensor.flatten() for tensor in tensors]), device).split([t.numel() for t in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def resident(tensor: Tensor | MappedPatches, device: torch.device) -> Tensor | MappedPatches:
    """A tensor (N, ...) on a CUDA device if it takes at most RESIDENT_SHARE of the free memory, else as it is."""
    if device.type != "cuda" or tensor.nbytes > RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
        return tensor
    return tensor.to(device)


def gather(tensors: list[Tensor | MappedPatches], batch: Tensor, device: torch.device) -> list[Tensor]:
    """These rows (B,) int64 of each tensor (N, ...) on a device, taken where the tensor lies."""
    there = upload(batch, device)
    return [tensor[there] if tensor.device.type == device.type else upload(tensor[batch], device) for tensor in tensors]


def read_later(values: Tensor) -> Callable[[], list[float]]:
    """A function that gives the values (N,), waiting for them alone and not for what was put before a device since."""
    values = values.detach()
    if values.device.type != "cuda":
        return values.tolist
    there = values.to("cpu", non_blocking=True)  # torch pins the memory it is copied to
    done = torch.cuda.Event()
    done.record()

    def read() -> list[float]:
        done.synchronize()
        return there.tolist()

    return read
