"""Dynamic memory units: what training says about every patch, epoch by epoch (stage 4). Pure: state in, state out.

A patch is a row, the place of the patch among the training rows of its manifest. N patches, C classes, D features;
v runs over VIEWS. One epoch gives every row at most one set of probabilities.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

VIEWS = ("weak", "strong", "fused")  # the order of the first axis of everything kept per view
STATES = ("clean", "hard", "noisy")  # the state of a patch in one epoch: 0, 1, 2
UNSEEN = -1  # the state of a patch whose step was skipped
CHUNK = 1024  # rows turned into float at once: they stay in the processor's cache, six times as fast as all at once


@dataclass(frozen=True)
class Settings:
    """How the memory moves. confidence_start is m_v before the first epoch."""

    confidence_start: float
    confidence_momentum: float = 0.99
    bias_correction: bool = False
    distance_momentum: float = 0.99


@dataclass(frozen=True)
class Memory:
    """State after some epochs: tensors on the CPU, so that `vars(memory)` goes into a checkpoint as it is."""

    confidence: Tensor  # (3, N) float64: m_v, not corrected
    distance: Tensor  # (N,) float64: d
    probability: Tensor  # (3, N) float64: sum of p_v[label] over the scored epochs
    updates: Tensor  # (N,) int64, as all below: epochs that moved m_v and d
    scored: Tensor  # epochs summed in probability
    clean: Tensor  # counted epochs in that state
    hard: Tensor
    noisy: Tensor
    learned: Tensor  # counted epochs in which the fused view selected the patch
    forgotten: Tensor  # counted epochs in which it did not


def start(number: int, settings: Settings) -> Memory:
    """The memory of `number` patches before the first epoch: m_v = confidence_start, d = 1, nothing counted."""
    confidence = torch.full((len(VIEWS), number), settings.confidence_start, dtype=torch.float64)
    counts = {name: torch.zeros(number, dtype=torch.int64) for name in Memory.__dataclass_fields__}
    return Memory(
        **{
            **counts,
            "confidence": confidence,
            "distance": torch.ones(number, dtype=torch.float64),
            "probability": torch.zeros_like(confidence),
        }
    )


def thresholds(memory: Memory, settings: Settings) -> Tensor:
    """What p_v[label] must exceed, (3, N): m_v, or with bias correction the weighted mean that m_v is moving to.

    With momentum a, start s and t updates, (m_v - a^t s) / (1 - a^t) takes the start out of the exponential average
    (Kingma & Ba 2015, section 3; the correction is ours). Before the first update it is the start.
    """
    if not settings.bias_correction:
        return memory.confidence
    left = settings.confidence_momentum ** memory.updates.double()
    corrected = (memory.confidence - left * settings.confidence_start) / (1 - left).clamp(min=1e-12)
    return torch.where(memory.updates > 0, corrected, memory.confidence)


def centroid_distance(features: Tensor, labels: Tensor) -> Tensor:
    """Static centroid distance (N,) float64, 0..1 over the epoch: how far a patch lies from the mean of its label.

    d = ||b - mean of b over the label||, b = 1 where a feature is above 0, then min-max over all patches
    (Forouzesh & Thiran, arXiv 2307.10718). All patches equally far: 0.

    Args:
        features: (N, D) bool, pooled features above 0. labels: (N,) int64.
    """
    members = torch.nn.functional.one_hot(labels).double()
    chunks = list(zip(features.split(CHUNK), members.split(CHUNK), strict=True))
    sums = sum(part.T @ chunk.double() for chunk, part in chunks)  # whole numbers, so exact in any order
    means = sums / members.sum(dim=0).clamp(min=1)[:, None]
    # b is 0 or 1, so ||b - mean||^2 = b . (1 - 2 mean) + ||mean||^2: one product instead of N x D differences.
    squared = torch.cat([((chunk.double() @ (1 - 2 * means).T) * part).sum(dim=1) for chunk, part in chunks])
    distance = (squared + means.square().sum(dim=1)[labels]).clamp(min=0).sqrt()
    smallest, largest = distance.min(), distance.max()
    # Rounding must not be stretched over 0..1 where all patches are equally far.
    return (distance - smallest) / (largest - smallest) if largest - smallest > 1e-6 else torch.zeros_like(distance)


def update(
    memory: Memory,
    labels: Tensor,
    probabilities: Tensor,
    features: Tensor,
    settings: Settings,
    counted: bool = True,
    scored: bool = True,
) -> tuple[Memory, Tensor]:
    """Close one epoch: the memory after it, and the state (N,) of every patch in it (clean, hard, noisy or unseen).

    selected_v = p_v[label] > threshold_v, before m_v moves; clean: weak and strong, hard: one of them, noisy:
    neither. Then m_v <- a m_v + (1 - a) max_c p_v[c] (Li et al., CVPR 2023: dynamic instance-specific selection).
    d <- b d + (1 - b) centroid distance, which the paper's release subtracts and so drives below 0.
    A patch is learned where the fused view selected it, else forgotten: by "weak or strong" instead, no patch that
    was never noisy could ever be forgotten, and the forget rate of all hard patches would be 0.

    Args:
        labels: (N,) int64. probabilities: (3, N, C); a row with a value that is not finite was not seen, and keeps
        its memory. features: (N, D) bool, pooled features above 0.
        counted: the states of this epoch count. scored: p_v[label] of this epoch enters the noise score.
    """
    number = len(labels)
    if probabilities.shape[:2] != (len(VIEWS), number) or len(features) != number or memory.updates.shape != (number,):
        raise ValueError(
            f"{number} labels, probabilities {tuple(probabilities.shape)}, features {tuple(features.shape)}, memory of "
            f"{len(memory.updates)}; expected (N,), ({len(VIEWS)}, N, C), (N, D) and N"
        )
    seen = probabilities.isfinite().all(dim=2).all(dim=0)
    state = torch.full((number,), UNSEEN)
    if not seen.any():
        return memory, state
    probabilities = probabilities.double()
    of_label = probabilities.gather(2, labels.expand(len(VIEWS), -1)[:, :, None])[:, :, 0]
    selected = of_label > thresholds(memory, settings)  # False where not finite
    state[seen] = (2 - selected[0].long() - selected[1].long())[seen]

    distance = memory.distance.clone()
    whole = bool(seen.all())
    distance[seen] = settings.distance_momentum * distance[seen] + (1 - settings.distance_momentum) * centroid_distance(
        features if whole else features[seen], labels[seen]
    )
    momentum = settings.confidence_momentum
    moved = momentum * memory.confidence + (1 - momentum) * probabilities.amax(dim=2)
    counts = seen & counted
    changes = {
        "confidence": torch.where(seen, moved, memory.confidence),
        "distance": distance,
        "probability": memory.probability + torch.where(seen & scored, of_label, 0.0),
        "updates": memory.updates + seen,
        "scored": memory.scored + (seen & scored),
        "learned": memory.learned + (counts & selected[2]),
        "forgotten": memory.forgotten + (counts & ~selected[2]),
    }
    for index, name in enumerate(STATES):
        changes[name] = getattr(memory, name) + (counts & (state == index))
    return dataclasses.replace(memory, **changes), state


def noise_score(memory: Memory) -> Tensor:
    """How probably the label is wrong, (N,) float64 in 0..1: 1 - mean over scored epochs and views of p_v[label].

    A patch without a scored epoch gets NaN.
    """
    return 1 - memory.probability.mean(dim=0) / memory.scored
