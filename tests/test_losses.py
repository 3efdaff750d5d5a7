"""The losses of stages 4 and 8 against naive loops and another library's, and where there is nothing to compare."""

import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import SupConLoss

from dasc.model.losses import (
    generalised_cross_entropy,
    graded_cross_entropy,
    localisation,
    subclass_contrastive,
    subclass_temperatures,
    supervised_contrastive,
)


def batch(number: int = 24, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(number, 8, generator=generator, dtype=torch.float64), dim=1)
    labels = torch.randint(0, 2, (number,), generator=generator)
    groups = labels * 3 + torch.randint(0, 3, (number,), generator=generator)
    t, t2, weights = 0.05 + torch.rand(3, number, generator=generator, dtype=torch.float64)
    return features, labels, groups, t, t2, weights


def naive_mean(features, i, positives, compared, temperature):
    """Minus the mean over p of log( exp(z_i.z_p / t) / sum over a of exp(z_i.z_a / t) ), one anchor at a time."""
    if not positives:
        return 0.0
    similar = {a: math.exp(float(features[i] @ features[a]) / float(temperature)) for a in compared}
    return -sum(math.log(similar[p] / sum(similar.values())) for p in positives) / len(positives)


def test_supervised_contrastive_is_the_naive_loop_and_the_other_librarys():
    features, labels, *_ = batch()
    number = range(len(labels))
    terms = [
        naive_mean(
            features, i, [p for p in number if p != i and labels[p] == labels[i]], [a for a in number if a != i], 0.1
        )
        for i in number
    ]
    ours = supervised_contrastive(features, labels, 0.1)
    assert ours.item() == pytest.approx(sum(terms) / len(terms), rel=1e-9)
    assert ours.item() == pytest.approx(SupConLoss(temperature=0.1)(features, labels).item(), rel=1e-6)


def test_subclass_contrastive_is_the_naive_loop():
    features, labels, groups, t, t2, weights = batch()
    number, total = range(len(labels)), 0.0
    for i in number:
        near = [p for p in number if p != i and groups[p] == groups[i]]
        far = [p for p in number if labels[p] == labels[i] and groups[p] != groups[i]]
        outside = [a for a in number if groups[a] != groups[i]]
        term = naive_mean(features, i, near, [a for a in number if a != i], t[i])
        term += 0.25 * naive_mean(features, i, far, outside, t2[i])
        total += term * float(weights[i])
    ours = subclass_contrastive(features, labels, groups, t, t2, weights, 0.25)
    assert ours.item() == pytest.approx(total / float(weights.sum()), rel=1e-9)


@pytest.mark.parametrize(
    ("labels", "groups"),
    [
        ([0, 1], [0, 1]),  # anchors without positives
        ([1, 1, 1, 1], [2, 2, 2, 2]),  # one label, one subclass: nothing lies outside it
        ([0, 0, 0, 1], [0, 1, 2, 3]),  # subclasses of one patch
        ([0], [0]),
    ],
)
def test_nothing_to_compare_is_finite(labels, groups):
    labels, groups = torch.tensor(labels), torch.tensor(groups)
    source = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    features, ones = F.normalize(source, dim=1), torch.ones(len(labels))
    loss = supervised_contrastive(features, labels, 0.1)
    loss = loss + subclass_contrastive(features, labels, groups, 0.1 * ones, 0.1 * ones, ones, 0.25)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(source.grad).all()
    if len(labels) < 3:
        assert loss.item() == 0


def test_contrastive_losses_fall_when_alike_moves_together():
    features, labels, groups, *_ = batch()
    together = F.normalize(F.one_hot(groups, 8).double() + 0.01 * features, dim=1)
    t, ones = torch.full((24,), 0.1, dtype=torch.float64), torch.ones(24, dtype=torch.float64)
    assert supervised_contrastive(F.one_hot(labels, 8).double(), labels, 0.1) < supervised_contrastive(
        features, labels, 0.1
    )
    assert subclass_contrastive(together, labels, groups, t, t, ones, 0.25) < subclass_contrastive(
        features, labels, groups, t, t, ones, 0.25
    )


def test_generalised_cross_entropy():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 60.0], [-200.0, 200.0]]), torch.tensor([0, 1, 0])
    p = logits.double().softmax(dim=1)[range(3), labels]
    for q in (0.3, 0.7, 1.0):
        assert torch.allclose(generalised_cross_entropy(logits, labels, q).double(), (1 - p**q) / q, atol=1e-6)
    assert torch.equal(generalised_cross_entropy(logits, labels, 0), F.cross_entropy(logits, labels, reduction="none"))
    logits.requires_grad_()
    generalised_cross_entropy(logits, labels, 0.7).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_graded_cross_entropy_picks_the_loss_by_hardness():
    logits, labels = torch.tensor([[1.0, -1.0]] * 3), torch.tensor([1, 1, 1])
    for hardness, expected in (
        (0, F.cross_entropy(logits, labels)),
        (2 / 3, F.cross_entropy(logits, labels, label_smoothing=0.1)),
        (1, generalised_cross_entropy(logits, labels, 0.7).mean()),
    ):
        graded = graded_cross_entropy(logits, labels, torch.full((3,), hardness), 0.1, 0.7)
        assert graded.item() == pytest.approx(expected.item(), rel=1e-6)


def test_localisation_is_the_distance_to_the_activation():
    cam = torch.full((3, 4, 4), -9.0)
    cam[:, 1, 2] = 9.0  # with cells of 16 px its centre is x 39.5, y 23.5
    points = torch.tensor([[39.5, 23.5], [42.5, 27.5], [math.nan, math.nan]])
    assert localisation(cam, points, 64).item() == pytest.approx((0 + 5) / 2, abs=1e-3)
    cam.requires_grad_()
    loss = localisation(cam, points[2:].expand(3, 2), 64)
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(cam.grad).all()


def test_subclass_temperatures_follow_the_spread():
    phi = torch.tensor([0.1, 0.2, 0.3, 0.4, 2.0], dtype=torch.float64)
    temperatures = subclass_temperatures(phi, 0.1)
    clipped = phi.clamp(*torch.quantile(phi, torch.tensor([0.2, 0.8], dtype=torch.float64)))
    assert torch.allclose(temperatures, 0.1 * clipped / clipped.mean())
    assert (temperatures.diff() >= 0).all()
    assert torch.equal(subclass_temperatures(torch.zeros(2), 0.1), torch.tensor([0.1, 0.1]))
