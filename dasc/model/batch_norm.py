"""Batch norm over the parts of a batch that several processes hold: mean and variance are those of the whole batch."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dasc.model import processes


def batch_norms() -> contextlib.AbstractContextManager:
    """The context in which a network trains: its batch norms have mean and variance of the batch of all processes."""
    return _BatchNorms() if processes.size() > 1 else contextlib.nullcontext()


class _BatchNorms(TorchFunctionMode):
    """Takes the place of F.batch_norm, which every batch norm calls, timm's with an activation too.

    torch.nn.SyncBatchNorm refuses a CPU, and takes the place of modules, whose activation would be lost.
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
        found = torch.stack(processes.of_all(torch.cat([mean, spread, number])))
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
        sums = processes.total(torch.stack([of_bias, of_weight])) / number
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
