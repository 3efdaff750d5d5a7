"""Several processes, which torchrun starts, train as one; a process alone is given back whatever it gives.

Every process goes through the same epochs and batches. It computes its part of a batch (`own`), gathers what the losses
look at (`gathered`) and computes the losses of the whole batch. A gradient that comes back to `gathered` goes on in the
process whose part it is of, so that the gradients of all processes add up to that of one (`add_up`).
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from dasc.errors import InputError
from dasc.model.draws import Draws, PartDraws
from dasc.model.watch import UnlikeError, Watch, check_alike

JOIN_S = 120.0  # the processes wait so long for each other at the start
FOREVER = timedelta(days=365)  # the watch ends a process that waits for one that is gone
PLACE = ("MASTER_ADDR", "MASTER_PORT")  # where the processes meet; torchrun sets both


@dataclass
class Group:
    """The processes of one training, as one of them sees them."""

    rank: int
    size: int
    store: "distributed.Store"
    watch: Watch
    device: torch.device | None = None  # set by `start`
    compared: int = 0  # times that `agree` was called


group: Group | None = None  # None: a process alone


@contextlib.contextmanager
def join(rank: int, size: int) -> Iterator[None]:
    """Meet the other processes, and within the block be one of them, until `finish`.

    Raises: InputError: the others are not there; an InputError of the block, with the rank before it. What another
    process has said already is not said again: then this one leaves with status 1.
    """
    global group
    store, signs = _meet(rank, size)
    group = Group(rank, size, store, Watch(rank, size, signs))
    try:
        yield
        finish()
    except Exception as error:
        if group is None:
            raise
        who = "" if isinstance(error, UnlikeError) else f"rank {rank}: "
        first = group.watch.fail(who, " ".join(str(error).split()) or type(error).__name__)
        group.watch.close()
        group = None
        if not isinstance(error, InputError):
            raise
        if not first:
            raise SystemExit(1) from error
        raise InputError(f"{who}{error}") from error


def _meet(rank: int, size: int) -> "tuple[distributed.Store, distributed.Store]":
    """The store of all processes, by two connections: for what they compare, and for their watch."""
    host, port = (os.environ.get(name, "") for name in PLACE)
    if not host or not re.fullmatch("[0-9]{1,5}", port):
        raise InputError(
            f"MASTER_ADDR {host!r} and MASTER_PORT {port!r}: expected where rank {rank} meets the other processes "
            f"({size} by WORLD_SIZE); start a training of several processes by torchrun"
        )
    patience = timedelta(seconds=JOIN_S)
    try:
        store, *_ = next(distributed.rendezvous("env://", timeout=patience))
        signs = distributed.TCPStore(host, int(port), size, False, patience, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"rank {rank}: {size} processes have not met at {host}:{port} within {JOIN_S:.0f} s ({_line(error)})"
        ) from error
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps the store when it starts them again
    return tuple(distributed.PrefixStore(f"{name} {life}", one) for name, one in (("group", store), ("watch", signs)))


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120] or type(error).__name__


def start(device: torch.device, settings: dict[str, Any]) -> None:
    """Connect the processes that have the same settings and the same kind of device.

    Raises: UnlikeError: they have not, and how they differ; InputError: a device for one process alone.
    """
    if group is None:
        return
    agree({"device": device.type, **settings})
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {device.type}: several processes need cuda or cpu")
    group.device = device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    with group.watch.exchange():
        distributed.init_process_group(backend, store=group.store, rank=group.rank, world_size=group.size)


def agree(facts: dict[str, Any]) -> None:
    """Raise UnlikeError where these facts are not the same in all processes, and say how they differ."""
    if group is None:
        return
    group.compared += 1
    keys = [f"facts {group.compared} of {rank}" for rank in range(group.size)]
    group.store.set(keys[group.rank], json.dumps(facts, default=str))
    group.store.wait(keys, FOREVER)
    check_alike([json.loads(group.store.get(key)) for key in keys])


def begin(epochs: int, *networks: torch.nn.Module) -> None:
    """Give the networks of all processes the weights of rank 0's. epochs: those that are done.

    Raises: UnlikeError: processes that have read another last.pt.
    """
    if group is None:
        return
    agree({"epochs done": epochs})
    for network in networks:
        for tensor in network.state_dict().values():
            tensor.copy_(of_first(tensor))


def finish() -> bool:
    """Whether this process goes on: of several the first does, as a process alone, and the others are done."""
    global group
    if group is None:
        return True
    rank, done = group.rank, [f"done {rank}" for rank in range(group.size)]
    group.store.set(done[rank], "")
    if rank == 0:
        group.store.wait(done, FOREVER)
    group.watch.close()
    if distributed.is_initialized():
        distributed.destroy_process_group()
    group = None
    return rank == 0


def size() -> int:
    """How many processes there are."""
    return group.size if group else 1


@contextlib.contextmanager
def writing() -> Iterator[bool]:
    """Whether this process writes what all of them have: the first does, and the others wait for it where they must."""
    if group is None or group.rank:
        yield group is None
        return
    with group.watch.alone():
        yield True


def own(number: int) -> slice:
    """Which of the rows of a batch are this process's part: nearly as many in every process, in the order of ranks."""
    return _part(group.rank, number) if group else slice(0, number)


def _part(rank: int, number: int) -> slice:
    return slice(number * rank // group.size, number * (rank + 1) // group.size)


def draws(generator: torch.Generator, number: int) -> Draws:
    """What draws for this process's part of a batch of `number` patches."""
    if group is None:
        return generator
    here = torch.zeros(number, dtype=torch.bool)
    here[own(number)] = True
    return PartDraws(generator, here)


def gathered(part: Tensor, number: int, axis: int = 0) -> Tensor:
    """The rows of all processes where each has those of its part of `number`; `axis` counts the rows."""
    if group is None:
        return part
    return _Gathered.apply(part.movedim(axis, 0), number).movedim(0, axis)


class _Gathered(torch.autograd.Function):
    """`gathered`. All processes compute the same loss of the rows, so that a part needs only its own gradient."""

    @staticmethod
    def forward(ctx, part: Tensor, number: int) -> Tensor:
        ctx.number = number
        parts = [_part(rank, number) for rank in range(group.size)]
        sent = part.to(group.device, torch.uint8 if part.dtype == torch.bool else part.dtype)
        padded = sent.new_zeros((-(-number // group.size), *part.shape[1:]))  # all processes send as much
        padded[: len(part)] = sent
        rows = [each[: of.stop - of.start] for each, of in zip(of_all(padded), parts, strict=True)]
        return torch.cat(rows).to(part.device, part.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[own(ctx.number)], None


def of_all(tensor: Tensor) -> list[Tensor]:
    """The tensors of all processes, which have one shape, in the order of ranks."""
    found = [torch.empty_like(tensor) for _ in range(group.size)]
    with group.watch.exchange():
        distributed.all_gather(found, tensor)
    return found


def total(tensor: Tensor) -> Tensor:
    """A tensor, which is overwritten, summed over the processes."""
    with group.watch.exchange():
        distributed.all_reduce(tensor)
    return tensor


def of_first(tensor: Tensor) -> Tensor:
    """The first process's tensor of these, which have one shape."""
    if group is None:
        return tensor
    sent = tensor.detach().to(group.device, memory_format=torch.contiguous_format, copy=True)
    with group.watch.exchange():
        distributed.broadcast(sent, 0)
    return sent.to(tensor.device)


@torch.no_grad()
def add_up(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give each parameter the sum of its gradients over the processes."""
    if group is None:
        return
    gradients = [one.grad for one in parameters if one.grad is not None]
    sums = total(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, summed in zip(gradients, sums.split([one.numel() for one in gradients]), strict=True):
        gradient.copy_(summed.view(gradient.shape))
