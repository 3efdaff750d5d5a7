"""A step of a training: plain on a CPU, and where it cannot be recorded."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F

from dasc.model import loop, step
from dasc.model.network import CamNetwork
from dasc.model.step import PLAIN_STEPS, Step

RATES = [1e-3, 5e-4, 2e-4, 1e-4, 5e-5]


def small() -> CamNetwork:
    torch.manual_seed(0)
    return CamNetwork("resnet10t", 16).train()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 1, 0])) for _ in RATES]


def step_of(network: CamNetwork, **more) -> Step:
    def losses(views, truth):
        logits = network(views)
        return [F.cross_entropy(logits, truth)], [logits.detach()]

    return Step(losses, torch.optim.Adam(network.parameters(), lr=1e-4), **more)


def test_a_step_is_that_of_a_plain_loop():
    network, other = small(), small()
    ema, average = loop.averaged(network)
    one = step_of(network, average=average, decay=0.2)
    optimizer = torch.optim.Adam(other.parameters())
    mean = copy.deepcopy(other)
    for number, (rate, (views, truth)) in enumerate(zip(RATES, batches(), strict=True)):
        (loss,), (logits,) = one(views, truth)
        one.update(rate, number)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        expected = F.cross_entropy(plain := other(views), truth)
        expected.backward()
        optimizer.step()
        assert loss == float(expected.detach()) and torch.equal(logits, plain)
        decay = min(0.2, (1 + number) / (10 + number))
        with torch.no_grad():
            for kept, weight in zip(mean.parameters(), other.parameters(), strict=True):
                kept.lerp_(weight, 1 - decay)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    assert all(torch.allclose(a, b) for a, b in zip(ema.parameters(), mean.parameters(), strict=True))


def test_a_step_left_out_changes_nothing():
    network = small()
    one, before = step_of(network), loop.copy_of(dict(network.named_parameters()))
    one(*batches()[0])
    assert all(torch.equal(before[name], weight) for name, weight in network.named_parameters())


def test_the_decay_of_an_average_may_be_a_tensor():
    """As a recording reads it; counts of batch norm go with it."""
    network = small()
    (one, by_number), (other, by_tensor) = loop.averaged(network), loop.averaged(network)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(1)
        network(batches()[0][0])
    by_number(0.75)
    by_tensor(torch.tensor(0.75))
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor)
    assert any(name.endswith("num_batches_tracked") and int(tensor) for name, tensor in one.state_dict().items())


def test_a_training_goes_on_that_a_gpu_began():
    """A GPU keeps the learning rate and the counts of Adam as tensors, and says that it can be recorded."""
    network = small()
    began = step_of(network)
    for rate, batch in zip(RATES[:2], batches(), strict=False):
        began(*batch)
        began.update(rate)
    saved = copy.deepcopy(began.optimizer.state_dict())
    saved["param_groups"][0] |= {"lr": torch.tensor(1e-3), "capturable": True, "fused": True}
    other = copy.deepcopy(network)
    optimizer = torch.optim.Adam(other.parameters(), lr=1e-4)
    optimizer.load_state_dict(saved)
    goes_on = Step(lambda views, truth: ([F.cross_entropy(other(views), truth)], []), optimizer)
    for one in (began, goes_on):
        one(*batches()[2])
        one.update(RATES[2])
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    assert not optimizer.param_groups[0]["capturable"] and optimizer.param_groups[0]["lr"] == RATES[2]


def test_what_cannot_be_recorded_is_said_once_and_trained_all_the_same(monkeypatch, caplog):
    for name in ("current_stream", "set_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)

    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nSearch for it")

    monkeypatch.setattr(step, "_Recording", refuse)
    network, other = small(), small()
    one, plain = step_of(network), step_of(other)
    one.records = True
    with caplog.at_level(logging.WARNING):
        for number, (rate, batch) in enumerate(zip(RATES, batches(), strict=True)):
            assert one(*batch)[0] == pytest.approx(plain(*batch)[0], abs=1e-5)
            one.update(rate)
            plain.update(rate)
            assert one.records == (number < PLAIN_STEPS)
    assert [record.getMessage() for record in caplog.records] == [
        "the steps cannot be recorded, training takes longer: operation not permitted when stream is capturing"
    ]
