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
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.overrides import TorchFunctionMode

from dasc.errors import InputError
from dasc.model.draws import Draws, PartDraws
from dasc.model.watch import Unlike, Watch, check_alike

JOIN_S = 120.0  # the processes wait so long for each other at the start
PLACE = ("MASTER_ADDR", "MASTER_PORT")  # where the processes meet; torchrun sets both


@dataclass
class Group:
    """The processes of one training, as one of them sees them."""

    rank: int
    size: int
    store: distributed.Store
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
        first = group.watch.fail(" ".join(str(error).split()) or type(error).__name__)
        group.watch.close()
        group = None
        if not isinstance(error, InputError):
            raise
        if not first:
            raise SystemExit(1) from error
        raise error if isinstance(error, Unlike) else InputError(f"rank {rank}: {error}") from error


def _meet(rank: int, size: int) -> tuple[distributed.Store, distributed.Store]:
    """The store of all processes, by two connections: for what they compare, and for their watch."""
    host, port = (os.environ.get(name, "") for name in PLACE)
    if not host or not re.fullmatch("[0-9]{1,5}", port):
        raise InputError(
            f"rank {rank}: MASTER_ADDR {host!r} and MASTER_PORT {port!r} must say where {size} processes meet; start "
            "them by torchrun"
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

    Raises: Unlike: they have not, and how they differ; InputError: a device for one process alone.
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
    """Raise Unlike where these facts are not the same in all processes, and say how they differ."""
    if group is None:
        return
    group.compared += 1
    keys = [f"facts {group.compared} of {rank}" for rank in range(group.size)]
    group.store.set(keys[group.rank], json.dumps(facts, default=str))
    group.store.wait(keys, timedelta(days=7))  # the watch ends this process where one is missing
    check_alike([json.loads(group.store.get(key)) for key in keys])


def begin(epochs: int, *networks: torch.nn.Module) -> None:
    """Give the networks of all processes the weights of rank 0's. epochs: those that are done.

    Raises: Unlike: processes that have read another last.pt.
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
    rank = group.rank
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
    @staticmethod
    def forward(ctx, part: Tensor, number: int) -> Tensor:
        ctx.number = number
        parts = [_part(rank, number) for rank in range(group.size)]
        sent = part.to(group.device, torch.uint8 if part.dtype == torch.bool else part.dtype)
        padded = sent.new_zeros((-(-number // group.size), *part.shape[1:]))  # all processes send as much
        padded[: len(part)] = sent
        rows = [each[: of.stop - of.start] for each, of in zip(_all_gather(padded), parts, strict=True)]
        return torch.cat(rows).to(part.device, part.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[own(ctx.number)], None


def _all_gather(tensor: Tensor) -> list[Tensor]:
    found = [torch.empty_like(tensor) for _ in range(group.size)]
    with group.watch.exchange():
        distributed.all_gather(found, tensor)
    return found


def _sum(tensor: Tensor) -> Tensor:
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
    sums = _sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, total in zip(gradients, sums.split([one.numel() for one in gradients]), strict=True):
        gradient.copy_(total.view(gradient.shape))


def batch_norms() -> contextlib.AbstractContextManager:
    """The context in which a network trains: its batch norms have mean and variance of the batch of all processes."""
    return _BatchNorms() if group else contextlib.nullcontext()


class _BatchNorms(TorchFunctionMode):
    """Takes the place of F.batch_norm, which every batch norm calls, timm's with an activation too.

    torch.nn.SyncBatchNorm refuses a CPU, and would take the place of the modules.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (_batch_norm if function is F.batch_norm else function)(*args, **(kwargs or {}))


def _batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> Tensor:  # the names of F.batch_norm
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    normalised, mean, variance, number = _Normalised.apply(input, weight, bias, eps)
    if running_mean is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((variance * (number / (number - 1))).to(running_var), momentum)
    return normalised


class _Normalised(torch.autograd.Function):
    """Batch norm of the batch of which this process has a part (b, C, ...), b may be 0; also mean, variance, number."""

    @staticmethod
    def forward(ctx, part: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        axes, values = _axes(part), _full(part)
        number = values.new_full((1,), part.numel() // part.shape[1])
        mean = values.sum(axes) / number.clamp(min=1)
        spread = (values - _along(mean, part)).square().sum(axes)
        found = torch.stack(_all_gather(torch.cat([mean, spread, number])))
        means, spreads, numbers = found.split([len(mean), len(mean), 1], dim=1)
        number = numbers.sum()
        mean = (means * numbers).sum(dim=0) / number
        variance = (spreads + (means - mean).square() * numbers).sum(dim=0) / number
        ctx.save_for_backward(part, weight, mean, (variance + eps).rsqrt(), number)
        ctx.mark_non_differentiable(mean, variance, number)
        return F.batch_norm(part, mean, variance, weight, bias, False, 0.0, eps), mean, variance, number

    @staticmethod
    def backward(ctx, gradient: Tensor, *_):
        part, weight, mean, scale, number = ctx.saved_tensors
        values = (_full(part) - _along(mean, part)) * _along(scale, part)
        gradient = _full(gradient)
        of_bias, of_weight = gradient.sum(_axes(part)), (gradient * values).sum(_axes(part))  # of this part
        sums = _sum(torch.stack([of_bias, of_weight])) / number
        rest = gradient - _along(sums[0], part) - values * _along(sums[1], part)
        of_part = rest * _along(scale if weight is None else scale * weight, part)
        _, to_weight, to_bias, _ = ctx.needs_input_grad
        return of_part.to(part.dtype), of_weight if to_weight else None, of_bias if to_bias else None, None


def _full(tensor: Tensor) -> Tensor:
    """A tensor in which sums are exact enough."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _axes(part: Tensor) -> list[int]:
    """All axes but that of the channels."""
    return [axis for axis in range(part.ndim) if axis != 1]


def _along(values: Tensor, part: Tensor) -> Tensor:
    """Values (C,) laid along the channels of a part (b, C, ...)."""
    return values.view(1, -1, *[1] * (part.ndim - 2))
