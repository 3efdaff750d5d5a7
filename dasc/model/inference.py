"""A network at work: patches to log odds, probabilities and features, on every core of a CPU or on one device."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dasc.data.pack import MappedPatches
from dasc.errors import InputError
from dasc.model.augment import dihedral, to_float
from dasc.model.network import CamNetwork
from dasc.model.transfer import upload

CPU_BATCH = 32  # patches scored together by one core, whose cache holds no more; a network may have its own `cpu_batch`

Patches = torch.Tensor | MappedPatches

logger = logging.getLogger(__name__)


def score_patches(network: CamNetwork, patches: Patches, batch_size: int, views: int = 1) -> torch.Tensor:
    """p(mitosis): (N,) float32 on the CPU.

    patches: (N, 3, S, S) uint8, on any device.
    batch_size: patches scored together, every view of one counted; halved where the device's memory is full. On a CPU
    every core scores CPU_BATCH at a time.
    views: test-time augmentation: turned and mirrored views of a patch averaged in logits, 1, 2, 4 or 8.
    """
    return torch.sigmoid(log_odds(network, patches, batch_size, range(views)))


def log_odds(network: CamNetwork, patches: Patches, batch_size: int, views: Sequence[int] = (0,)) -> torch.Tensor:
    """Log odds of a mitosis, (N,) float32 on the CPU.

    patches, batch_size: as `score_patches`. views: those averaged, as `augment.dihedral` numbers them.
    Raises: InputError: a device whose memory does not hold one patch.
    """
    cores, at_once, device = 1, 1, device_of(network)
    if device.type == "cpu":
        cores, at_once = torch.get_num_threads(), len(patches)
        batch_size = min(batch_size, getattr(network, "cpu_batch", CPU_BATCH))
    else:  # all views of a patch together
        batch_size = max(1, batch_size // len(views))
    scores, start = [torch.empty(0, device=device)], 0
    with on_cores(cores) as each:
        while start < len(patches):
            starts = range(start, min(start + batch_size * at_once, len(patches)), batch_size)
            try:  # mapped patches are read when it is their turn
                scores += each(
                    lambda at, size=batch_size: _score_batch(network, patches[at : at + size], views), starts
                )
                start += batch_size * at_once
            except torch.OutOfMemoryError as error:
                if batch_size == 1:
                    raise InputError("the device's memory does not hold one patch; use --device cpu") from error
                batch_size //= 2
                logger.warning("the device's memory is full: %d patches at a time from here on", batch_size)
    return torch.cat(scores).cpu()  # at the end: a device works on while the next batches are put before it


def device_of(network: torch.nn.Module) -> torch.device:
    """The device that a network's weights lie on."""
    return next(network.parameters()).device


@contextlib.contextmanager
def on_cores(cores: int) -> Iterator[Callable]:
    """A `map` whose jobs run side by side, one per core: two cores are nearly twice as fast as both in one job."""
    if cores == 1:
        yield lambda work, jobs: list(map(work, jobs))
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield lambda work, jobs: list(pool.map(work, jobs))
    finally:
        torch.set_num_threads(threads)  # what one thread sets is also set for threads to come


@torch.inference_mode()
def _score_batch(network: CamNetwork, batch: torch.Tensor, views: Sequence[int]) -> torch.Tensor:
    device, number = device_of(network), len(batch)
    batch = to_float(_on(device, batch))
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        if device.type == "cpu":  # one view after another: its cache holds no more
            logits = sum(network(dihedral(batch, view)).float() for view in views) / len(views)
        else:
            logits = views_together(network, batch, views)
    return (logits[:, 1] - logits[:, 0])[:number]


def views_together(network: CamNetwork, batch: torch.Tensor, views: Sequence[int]) -> torch.Tensor:
    """Logits (B, classes) of patches (B, 3, S, S) averaged over views that are seen as one batch."""
    seen = network(torch.cat([dihedral(batch, view) for view in views]))
    return seen.float().view(len(views), len(batch), -1).mean(dim=0)


def _on(device: torch.device, batch: torch.Tensor) -> torch.Tensor:
    """A batch (B, ...) on a device; on a CUDA device filled up, for it prepares itself for every number of patches."""
    batch = upload(batch, device)
    return filled(batch) if batch.is_cuda else batch


def filled(batch: torch.Tensor) -> torch.Tensor:
    """A batch (B, ...) filled up to the next power of two with its first element."""
    missing = (1 << max(0, len(batch) - 1).bit_length()) - len(batch)
    return torch.cat([batch, batch[:1].expand(missing, *batch.shape[1:])]) if missing and len(batch) else batch


def embed_patches(network: CamNetwork, patches: Patches, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Features averaged over the patch, (N, C) float32, and p(mitosis), (N,) float32.

    patches: (N, 3, S, S) uint8. batch_size: as `score_patches`, but that a full memory is an error.
    """
    cores = 1
    if device_of(network).type == "cpu":
        cores, batch_size = torch.get_num_threads(), min(batch_size, CPU_BATCH)
    with on_cores(cores) as each:
        starts = range(0, len(patches), batch_size)  # as in log_odds
        parts = each(lambda at: _embed_batch(network, patches[at : at + batch_size]), starts)
    features, scores = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return features, scores


@torch.inference_mode()
def _embed_batch(network: CamNetwork, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    device, number = device_of(network), len(batch)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        maps = network.features(to_float(_on(device, batch)))
        logits = network.cam(maps).amax(dim=(2, 3)).float()
    return maps.float().mean(dim=(2, 3))[:number], torch.softmax(logits, dim=1)[:number, 1]
