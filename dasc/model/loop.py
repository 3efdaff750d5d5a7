"""What the training loops share: the order of an epoch, the learning rate, and how a network does on val."""

import numpy as np
import torch
from sklearn.metrics import precision_recall_curve
from torch import Tensor

from dasc.data.tables import LABELS
from dasc.errors import InputError


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Indices of one epoch: as many as there are patches, half of each label, every patch as evenly as can be."""
    halves = []
    for label in LABELS:
        members = torch.nonzero(labels == label).flatten()
        wanted = len(labels) // 2
        rounds = [members[torch.randperm(len(members), generator=generator)] for _ in range(-(-wanted // len(members)))]
        halves.append(torch.cat(rounds)[:wanted])
    both = torch.cat(halves)
    return both[torch.randperm(len(both), generator=generator)]


def batches(order: Tensor, batch_size: int) -> list[Tensor]:
    """An epoch's order in batches; a last one of a single patch, which batch norm cannot take, joins its neighbour."""
    parts = list(order.split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def check_batch(batch_size: int, patch_size: int, stride: int) -> None:
    """Raise InputError where batch norm would have one value per channel: batches of one patch, maps of one cell."""
    if batch_size == 1 and patch_size <= stride:
        raise InputError(
            f"--batch_size 1: patches of {patch_size} px at stride {stride} give one value per channel, and batch norm "
            "needs two; expected 2 or more"
        )


def cosine(progress: float) -> float:
    """Falls from 1 to 0 as progress goes from 0 to 1."""
    return 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi))))


def best_f1(labels: np.ndarray, scores: np.ndarray) -> float:
    """F1 at the best threshold for these patches: labels (N,) 0 or 1, scores (N,).

    Raises:
        InputError: scores that are not finite, as those of a network whose last step went too far.
    """
    if not np.isfinite(scores).all():
        raise InputError("the network's probabilities on val are not finite: the training has diverged; lower --lr")
    precision, recall, _ = precision_recall_curve(labels, scores)
    return float((2 * precision * recall / (precision + recall).clip(min=1e-12)).max())
