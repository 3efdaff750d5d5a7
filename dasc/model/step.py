"""One step of a training: losses and gradients, then the weights.

On a CUDA device a step is some hundred small kernels, and putting them there one by one takes the CPU longer than the
device needs to compute them. So the device records a step (a CUDA graph) and replays it from then on.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from dasc.model import processes
from dasc.model.transfer import read_later

logger = logging.getLogger(__name__)

PLAIN_STEPS = 3  # of tensors of the same shapes, before they are recorded: libraries set themselves up meanwhile

Losses = Callable[..., tuple[list[Tensor], list[Tensor]]]
Average = Callable[[float | Tensor], None]


class Step:
    """A step of a training: call it for losses and gradients, then `update` the weights, or leave that out.

    losses: of the tensors that a call is given; the loss that is minimised with the parts of it that are to be known,
    scalars, and other tensors. On a CUDA device it must not read a value of a tensor, and what depends on anything but
    its tensors and their shapes stays as it was when it was recorded.
    optimizer: Adam or AdamW, its state dict loaded already where a training goes on.
    average: moves the averaged weights, see `loop.averaged`; None: there are none. decay: share of the average that
    stays, per step; less at first: min(decay, (1 + step) / (10 + step)), so that the first steps are forgotten sooner.
    """

    def __init__(
        self, losses: Losses, optimizer: torch.optim.Optimizer, average: Average | None = None, decay: float = 0.0
    ) -> None:
        self.losses, self.optimizer, self.average, self.decay = losses, optimizer, average, decay
        self.weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        self.device = self.weights[0].device
        self.records = self.device.type == "cuda" and processes.size() == 1
        self.plain: dict[tuple, int] = {}  # steps by the shapes of their tensors
        self.recordings: dict[tuple, _Recording] = {}
        self.last: _Recording | None = None  # of the step whose gradients the weights hold
        self.rate = torch.zeros((), device=self.device)  # where recordings read the learning rate
        self.kept = torch.zeros((), device=self.device)  # and the decay of the average
        self.pool = torch.cuda.graph_pool_handle() if self.records else None
        self._fit_optimizer()

    def __call__(self, *tensors: Tensor) -> tuple[list[float], list[Tensor]]:
        """The values of the losses, which a GPU hands over while it works on, and the other tensors.

        These are valid until the next call.
        """
        shapes = tuple(tensor.shape for tensor in tensors)
        if self.records and shapes not in self.recordings and self.plain.get(shapes, 0) >= PLAIN_STEPS:
            self._record(shapes, tensors)
        self.last = self.recordings.get(shapes)
        if self.last is not None:
            return self.last.replay(tensors)
        self.plain[shapes] = self.plain.get(shapes, 0) + 1
        losses, others = self.losses(*tensors)
        read = read_later(torch.stack(losses))
        self.optimizer.zero_grad()
        losses[0].backward()
        processes.add_up(self.weights)
        return read(), others

    def update(self, rate: float, number: int = 0) -> None:
        """Change the weights by the gradients of the last call, and their average.

        rate: learning rate. number: of the step in the training, from 0 on.
        """
        decay = min(self.decay, (1 + number) / (10 + number))
        if self.last is not None:
            self.rate.fill_(rate)
            self.kept.fill_(decay)
            self.last.move.replay()
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate.fill_(rate) if self.records else rate
        self.optimizer.step()
        if self.average is not None:
            self.average(decay)

    def _record(self, shapes: tuple, tensors: tuple[Tensor, ...]) -> None:
        """Record a step; where that fails, say so, and go on without."""
        stream = torch.cuda.current_stream(self.device)
        try:
            self.recordings[shapes] = _Recording(self, tensors)
        except RuntimeError as error:  # such as a network that looks at a value on the way
            torch.cuda.set_stream(stream)  # a recording that fails leaves its own
            torch.cuda.synchronize(self.device)
            self.records = False
            logger.warning("the steps cannot be recorded, training takes longer: %s", str(error).splitlines()[0])

    def _fit_optimizer(self) -> None:
        """Keep the optimizer's state where a step here needs it; another device may have saved it."""
        for group in self.optimizer.param_groups:
            group["fused"], group["capturable"] = self.records or None, self.records
        for state in self.optimizer.state.values():
            state["step"] = state["step"].to(self.device if self.records else "cpu", torch.float32)


class _Recording:
    """A step with tensors of certain shapes, recorded on a CUDA device in three parts.

    The values of the losses are read while the second part, the gradients, is computed.
    """

    def __init__(self, step: Step, tensors: tuple[Tensor, ...]) -> None:
        self.weights, self.inputs = step.weights, [tensor.clone() for tensor in tensors]
        self.forward, self.backward, self.move = (torch.cuda.CUDAGraph() for _ in range(3))
        step.optimizer.zero_grad()  # so that the gradients lie in the recording's own memory
        with torch.cuda.graph(self.forward, pool=step.pool):
            losses, self.others = step.losses(*self.inputs)
            self.values = torch.stack(losses).detach()
        with torch.cuda.graph(self.backward, pool=step.pool):
            losses[0].backward()
        self.gradients = [weight.grad for weight in self.weights]
        for group in step.optimizer.param_groups:
            group["lr"] = step.rate
        with torch.cuda.graph(self.move, pool=step.pool):
            step.optimizer.step()
            if step.average is not None:
                step.average(step.kept)

    def replay(self, tensors: tuple[Tensor, ...]) -> tuple[list[float], list[Tensor]]:
        """As a call of the step."""
        for place, tensor in zip(self.inputs, tensors, strict=True):
            place.copy_(tensor)
        self.forward.replay()
        read = read_later(self.values)
        self.backward.replay()
        return read(), self.others
