"""The memory units against a history computed by hand, a loop per patch, and what training may do to them."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from dasc.model.checkpoint import save_checkpoint
from dasc.model.memory import (
    STATES,
    UNSEEN,
    VIEWS,
    Memory,
    Settings,
    centroid_distance,
    noise_score,
    start,
    thresholds,
    update,
)

PAPER = Settings(confidence_start=0.25)
CORRECTED = Settings(confidence_start=0.25, confidence_momentum=0.9, bias_correction=True, distance_momentum=0.8)


def epochs(number: int, patches: int = 40, width: int = 12, seed: int = 0):
    """Labels, and per epoch probabilities (3, N, 2) and features (N, D), at random."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(patches, generator=generator) < 0.3).long()
    history = []
    for _ in range(number):
        logits = 2 * torch.randn(3, patches, 2, generator=generator)
        history.append((logits.softmax(dim=2), torch.rand(patches, width, generator=generator) < 0.4))
    return labels, history


def run(labels, history, settings, count_after=0, score_after=0, memory=None, first=0):
    memory = start(len(labels), settings) if memory is None else memory
    states = []
    for epoch, (probabilities, features) in enumerate(history, start=first):
        memory, state = update(
            memory, labels, probabilities, features, settings, epoch >= count_after, epoch >= score_after
        )
        states.append(state)
    return memory, torch.stack(states)


def assert_same(first: Memory, second: Memory, **tolerance) -> None:
    for name in vars(first):
        one, other = getattr(first, name), getattr(second, name)
        assert one.dtype == other.dtype and torch.allclose(one.double(), other.double(), **tolerance), name


def test_three_epochs_by_hand():
    """Four patches, momentum 0.5, start 1/4, counting after the first epoch; every figure worked out on paper."""
    labels = torch.tensor([1, 1, 0, 0])
    settings = Settings(confidence_start=0.25, confidence_momentum=0.5, distance_momentum=0.5)
    of_label = torch.tensor(  # epoch, view, patch: p_v[label]
        [
            [[0.75, 0.25, 0.125, 0.75], [0.75, 0.5, 0.125, 0.25], [0.75, 0.25, 0.125, 0.5]],
            [[0.75, 0.5, 0.75, 0.5], [0.25, 0.75, 0.25, 0.25], [0.625, 0.5, 0.75, 0.25]],
            [[1.0, 0.25, 0.625, 0.5], [1.0, 0.25, 0.75, 0.75], [1.0, 0.25, 0.75, 0.75]],
        ]
    )
    probabilities = torch.stack([1 - of_label, of_label], dim=3)
    probabilities = torch.where((labels == 1)[:, None], probabilities, probabilities.flip(3))
    # Label 1: patch 0 is [1, 1], patch 1 is [1, 0]: both half a unit from their mean, so is label 0's first pair.
    # Patch 3 in the second epoch is [1, 1], patch 2 [0, 0]: both sqrt(1/2) from their mean, the farthest, so 1.
    near = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]]).bool()
    far = torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1]]).bool()
    history = list(zip(probabilities, (near, far, near), strict=True))
    memory, states = run(labels, history, settings, count_after=1)
    # Thresholds: 1/4 at first; then half the old and half the larger probability of the two labels.
    #   weak   0: .25 .5 .625 .8125   1: .25 .5 .5 .625    2: .25 .5625 .65625 .640625   3: .25 .5 .5 .5
    #   strong 0: .25 .5 .625 .8125   1: .25 .375 .5625 .65625  2: .25 .5625 .65625 .703125  3: .25 .5 .625 .6875
    #   fused  0: .25 .5 .5625 .78125  1: .25 .5 .5 .625   2: .25 .5625 .65625 .703125   3: .25 .375 .5625 .65625
    # "Greater than" is strict: p 0.25 against 0.25, and 0.5 against 0.5, is not selected.
    clean, hard, noisy = range(3)
    assert states.tolist() == [[clean, hard, noisy, hard], [hard, hard, hard, noisy], [clean, noisy, hard, hard]]
    assert memory.confidence.tolist() == [
        [0.8125, 0.625, 0.640625, 0.5],
        [0.8125, 0.65625, 0.703125, 0.6875],
        [0.78125, 0.625, 0.703125, 0.65625],
    ]
    assert memory.clean.tolist() == [1, 0, 0, 0]
    assert memory.hard.tolist() == [1, 1, 2, 1]
    assert memory.noisy.tolist() == [0, 1, 0, 1]
    assert memory.learned.tolist() == [2, 0, 2, 1]  # fused, epochs 1 and 2
    assert memory.forgotten.tolist() == [0, 2, 0, 1]
    # d: all equally far is 0, then 1 for the second label, then 0: 1 -> 1/2 -> 1/4 or 3/4 -> 1/8 or 3/8.
    assert memory.distance.tolist() == pytest.approx([0.125, 0.125, 0.375, 0.375])
    mean = of_label.mean(dim=(0, 1))
    assert noise_score(memory).tolist() == pytest.approx((1 - mean).tolist())
    assert noise_score(memory)[0].item() == pytest.approx(1 - 6.875 / 9)


def naive(labels, history, settings, count_after, score_after):
    """One patch and one view after the other, plain numbers only."""
    rows = []
    for patch, label in enumerate(labels.tolist()):
        row = dict.fromkeys(("clean", "hard", "noisy", "learned", "forgotten", "scored", "updates"), 0)
        row |= {"confidence": [settings.confidence_start] * 3, "probability": [0.0] * 3, "distance": 1.0}
        for epoch, (probabilities, features) in enumerate(history):
            distances = []
            for other, other_label in enumerate(labels.tolist()):
                same = [features[k].double().tolist() for k in range(len(labels)) if labels[k] == other_label]
                centre = [sum(column) / len(same) for column in zip(*same, strict=True)]
                distances.append(math.dist(features[other].double().tolist(), centre))
            distance = (distances[patch] - min(distances)) / (max(distances) - min(distances))
            selected = []
            for view in range(3):
                m, momentum = row["confidence"][view], settings.confidence_momentum
                if settings.bias_correction and epoch:
                    m = (m - momentum**epoch * settings.confidence_start) / (1 - momentum**epoch)
                p = probabilities[view, patch].double().tolist()
                selected.append(p[label] > m)
                row["confidence"][view] = momentum * row["confidence"][view] + (1 - momentum) * max(p)
                if epoch >= score_after:
                    row["probability"][view] += p[label]
            row["distance"] = settings.distance_momentum * row["distance"] + (1 - settings.distance_momentum) * distance
            row["updates"] += 1
            row["scored"] += epoch >= score_after
            if epoch >= count_after:
                row["clean"] += selected[0] and selected[1]
                row["hard"] += selected[0] != selected[1]
                row["noisy"] += not selected[0] and not selected[1]
                row["learned" if selected[2] else "forgotten"] += 1
        rows.append(row)
    return rows


@pytest.mark.parametrize("settings", [PAPER, CORRECTED], ids=["paper", "corrected"])
def test_as_a_loop_per_patch(settings):
    labels, history = epochs(5, patches=17)
    memory, _ = run(labels, history, settings, count_after=2, score_after=1)
    rows = naive(labels, history, settings, 2, 1)
    for name in vars(memory):
        expected = np.array([row[name] for row in rows]).T
        assert np.allclose(getattr(memory, name).numpy(), expected, rtol=0, atol=1e-9), name
    assert all(getattr(memory, name).sum() > 0 for name in (*STATES, "learned", "forgotten"))


def test_shuffled_rows_give_the_same_rows():
    labels, history = epochs(4)
    whole, states = run(labels, history, CORRECTED, count_after=1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    shuffled, shuffled_states = run(labels[order], [(p[:, order], f[order]) for p, f in history], CORRECTED, 1)
    assert torch.equal(shuffled_states, states[:, order])
    assert_same(
        shuffled, Memory(**{name: tensor[..., order] for name, tensor in vars(whole).items()}), rtol=0, atol=1e-12
    )


def test_saved_and_resumed_is_the_same(tmp_path):
    labels, history = epochs(6)
    whole, _ = run(labels, history, CORRECTED, count_after=2)
    half, _ = run(labels, history[:3], CORRECTED, count_after=2)
    save_checkpoint(tmp_path / "last.pt", {"memory": vars(half)})
    read = Memory(**torch.load(tmp_path / "last.pt", weights_only=True)["memory"])
    resumed, _ = run(labels, history[3:], CORRECTED, count_after=2, memory=read, first=3)
    assert_same(resumed, whole, rtol=0, atol=0)


def test_state_goes_in_and_comes_out():
    """An update leaves the memory it was given as it was."""
    labels, history = epochs(1)
    memory = start(len(labels), PAPER)
    before = {name: tensor.clone() for name, tensor in vars(memory).items()}
    after, _ = update(memory, labels, *history[0], PAPER)
    assert_same(memory, Memory(**before), rtol=0, atol=0)
    assert not torch.equal(after.confidence, memory.confidence)


def test_a_skipped_step_leaves_its_patches_alone():
    labels, history = epochs(2, patches=20)
    probabilities, features = history[1]
    seen = torch.arange(20) % 5 != 0
    before, _ = run(labels, history[:1], PAPER)
    after, state = update(before, labels, torch.where(seen[:, None], probabilities, torch.nan), features, PAPER)
    part = Memory(**{name: tensor[..., seen] for name, tensor in vars(before).items()})
    expected, _ = update(part, labels[seen], probabilities[:, seen], features[seen], PAPER)
    for name, tensor in vars(after).items():
        assert torch.equal(tensor[..., seen], getattr(expected, name)), name
        assert torch.equal(tensor[..., ~seen], getattr(before, name)[..., ~seen]), name
    assert (state[~seen] == UNSEEN).all() and (state[seen] != UNSEEN).all()
    nothing, state = update(before, labels, torch.full_like(probabilities, torch.nan), features, PAPER)
    assert_same(nothing, before, rtol=0, atol=0)
    assert (state == UNSEEN).all()


def test_every_counted_epoch_is_counted_once():
    labels, history = epochs(7)
    memory, _ = run(labels, history, PAPER, count_after=3)
    assert (memory.clean + memory.hard + memory.noisy == 4).all()
    assert (memory.learned + memory.forgotten == 4).all()
    assert (memory.scored == 7).all() and (memory.updates == 7).all()


def test_bias_correction_is_the_weighted_mean_of_what_was_seen():
    """Where the largest probability never changes, the corrected threshold is that probability at once."""
    labels = torch.tensor([0, 1])
    constant = torch.tensor([0.7, 0.3]).expand(3, 2, 2)
    memory = start(2, CORRECTED)
    assert torch.equal(thresholds(memory, CORRECTED), memory.confidence)
    for _ in range(3):
        memory, _ = update(memory, labels, constant, torch.ones(2, 4).bool(), CORRECTED)
        assert torch.allclose(thresholds(memory, CORRECTED), torch.tensor(0.7, dtype=torch.float64), atol=1e-6)
    plain = dataclasses.replace(CORRECTED, bias_correction=False)
    assert (thresholds(memory, plain) < 0.5).all()


def test_centroid_distance_knows_the_stranger():
    """A patch that carries the other label's features is the farthest of all."""
    labels = torch.tensor([0] * 20 + [1] * 20)
    features = torch.zeros(40, 8, dtype=torch.bool)
    features[:20, :4], features[20:, 4:] = True, True
    features[3] = features[25]
    distance = centroid_distance(features, labels)
    assert distance.argmax() == 3 and distance.max() == 1 and distance.min() == 0


def test_centroid_distance_stays_finite():
    for features, labels in (
        (torch.ones(5, 3).bool(), torch.tensor([0, 0, 1, 1, 1])),
        (torch.eye(4).bool(), torch.tensor([0, 0, 0, 0])),
        (torch.ones(1, 3).bool(), torch.tensor([1])),
    ):
        assert torch.equal(centroid_distance(features, labels), torch.zeros(len(labels), dtype=torch.float64))


def test_distance_memory_stays_between_0_and_1():
    labels, history = epochs(60)
    memory, _ = run(labels, history, Settings(confidence_start=0.5, distance_momentum=0.5))
    assert memory.distance.min() >= 0 and memory.distance.max() <= 1


def test_noise_score_ranks_wrong_labels_first_and_is_nan_without_an_epoch():
    labels, history = epochs(5)
    right = torch.nn.functional.one_hot(labels, 2).float() * 0.8 + 0.1
    wrong = torch.arange(len(labels)) % 7 == 0
    right[wrong] = right[wrong].flip(1)
    memory, _ = run(labels, [(right.expand(3, -1, -1), features) for _, features in history], PAPER, score_after=2)
    score = noise_score(memory)
    assert score[wrong].min() > 0.89 and score[~wrong].max() < 0.11
    assert noise_score(start(3, PAPER)).isnan().all()


def test_shapes_that_do_not_fit_are_refused():
    labels, [(probabilities, features)] = epochs(1)
    for bad in (
        (start(39, PAPER), labels, probabilities, features),
        (start(40, PAPER), labels[1:], probabilities, features),
        (start(40, PAPER), labels, probabilities[: len(VIEWS) - 1], features),
        (start(40, PAPER), labels, probabilities, features[1:]),
    ):
        with pytest.raises(ValueError, match=r"expected \(N,\)"):
            update(*bad, PAPER)
