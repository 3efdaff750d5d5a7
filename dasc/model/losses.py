"""Losses of stage 8. B patches in a batch, D features; every loss is the mean over its anchors or patches.

What has nothing to compare itself with (an anchor without positives, a batch without mitoses) adds 0, never NaN, and
the gradient stays finite.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def supervised_contrastive(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, equation 2, positives outside the logarithm).

    -1 / |P(i)| sum over p in P(i) of log( exp(z_i.z_p / t) / sum over a != i of exp(z_i.z_a / t) ), P(i) the other
    patches of i's label; mean over the anchors i that have any.

    Args:
        features: z (B, D), L2-normalised. labels: (B,) int64.
    """
    others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positives = (labels[:, None] == labels) & others
    terms = _contrast(features @ features.T / temperature, positives, others)
    return terms.sum() / positives.any(dim=1).sum().clamp(min=1)


def subclass_contrastive(
    features: Tensor,
    labels: Tensor,
    subclasses: Tensor,
    temperature: Tensor,
    subclass_temperature: Tensor,
    weights: Tensor,
    gamma: float,
) -> Tensor:
    """Subclass-balancing contrastive loss (Hou et al., ICCV 2023, equation 4) with a temperature and weight per anchor.

    For anchor i with subclass s and label c:
    - mean over p in s, p != i, of log softmax over all a != i of z_i.z_a / t(i), at a = p,
    - gamma times the mean over p in c outside s of log softmax over all a outside s of z_i.z_a / t2(i), at a = p.
    Weighted mean over the anchors.

    Args:
        features: z (B, D), L2-normalised. labels, subclasses: (B,) int64; a subclass lies inside one label.
        temperature: t (B,), > 0. subclass_temperature: t2 (B,), > 0. weights: (B,), > 0.
    """
    others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    inside = subclasses[:, None] == subclasses
    similarity = features @ features.T
    temperatures = torch.stack([temperature, subclass_temperature])[:, :, None]
    positives = torch.stack([inside & others, (labels[:, None] == labels) & ~inside])
    near, far = _contrast(similarity / temperatures, positives, torch.stack([others, ~inside]))
    return ((near + gamma * far) * weights).sum() / weights.sum()


def _contrast(logits: Tensor, positives: Tensor, compared: Tensor) -> Tensor:
    """Minus the mean log softmax over `compared` at `positives`, per anchor (..., B); 0 for one without positives.

    Args:
        logits: (..., B, B). positives, compared: (..., B, B) bool; every positive is compared.
    """
    # Finite where nothing is compared: the gradient of a logsumexp over minus infinity alone is NaN.
    logits = logits.masked_fill(~compared, torch.finfo(logits.dtype).min)
    count = positives.sum(dim=-1)
    of_positives = logits.masked_fill(~positives, 0).sum(dim=-1) / count.clamp(min=1)
    return torch.where(count > 0, logits.logsumexp(dim=-1) - of_positives, 0)


def subclass_temperatures(concentration: Tensor, temperature: float) -> Tensor:
    """Temperature t2 (S,) of every subclass: t2(s) = t phi(s) / mean phi, a tighter subclass gets a lower one.

    phi is clipped to its 20th to 80th percentile first (Hou et al., ICCV 2023, section 3.3; Li et al., PCL, 2021).

    Args:
        concentration: phi (S,), >= 0, see `clusters.concentration`. All of them 0: every temperature is t.
    """
    low, high = torch.quantile(concentration, torch.tensor([0.2, 0.8], dtype=concentration.dtype))
    clipped = concentration.clamp(low, high)
    mean = clipped.mean()
    # A subclass of identical patches has phi 0, which would divide by 0 in the loss.
    return temperature * (clipped / mean).clamp(min=0.1) if mean > 0 else torch.full_like(concentration, temperature)


def generalised_cross_entropy(logits: Tensor, labels: Tensor, q: float) -> Tensor:
    """Generalised cross entropy (1 - p^q) / q of every row, (B,); q = 0 is its limit, cross entropy.

    The higher q, the less a patch pulls whose label the network does not believe, which is what a wrong label is
    (Zhang & Sabuncu 2018).

    Args:
        logits: (B, C). labels: (B,) int64. q: 0..1.
    """
    cross_entropy = F.cross_entropy(logits, labels, reduction="none")
    # p^q = exp(q log p): log p stays finite where p rounds to 0, and so does the gradient
    return (1 - (-q * cross_entropy).exp()) / q if q else cross_entropy


def graded_cross_entropy(logits: Tensor, labels: Tensor, hardness: Tensor, smoothing: float, q: float) -> Tensor:
    """Classification loss by difficulty, mean over the batch.

    clean patches: cross entropy; hard ones: cross entropy with smoothed labels; those of the hardest level, where most
    wrong labels are left: generalised cross entropy.

    Args:
        logits: (B, C). labels: (B,) int64. hardness: (B,), 0 clean to 1 the hardest level.
    """
    plain = F.cross_entropy(logits, labels, reduction="none")
    smooth = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    generalised = generalised_cross_entropy(logits, labels, q)
    graded = torch.where(hardness == 1, generalised, smooth)
    return torch.where(hardness == 0, plain, graded).mean()


def localisation(cam: Tensor, points_px: Tensor, patch_size: int, sharpness: float = 10.0) -> Tensor:
    """Distance in px between the centre of mass of sigmoid(sharpness cam) and the annotated point, mean over patches.

    Args:
        cam: (B, h, w), activation map of class mitosis in logits. points_px: (B, 2), x and y in the patch; NaN:
        no point, the patch is left out.
    """
    known = points_px.isfinite().all(dim=1)
    weight = torch.sigmoid(sharpness * cam.float())
    mass = weight.sum(dim=(1, 2)).clamp(min=1e-6)
    rows, columns = (
        (torch.arange(side, device=cam.device) + 0.5) * (patch_size / side) - 0.5 for side in cam.shape[1:]
    )
    x = (weight.sum(dim=1) * columns).sum(dim=1) / mass
    y = (weight.sum(dim=2) * rows).sum(dim=1) / mass
    squared = (torch.stack([x, y], dim=1) - torch.where(known[:, None], points_px, 0)).square().sum(dim=1)
    distance = (squared + 1e-6).sqrt()  # the root of 0 has no gradient
    return torch.where(known, distance, 0).sum() / known.sum().clamp(min=1)
