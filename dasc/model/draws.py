"""Random numbers per patch, drawn on the CPU, so that every device and any number of processes see the same views."""

import torch
from torch import Tensor


class PartDraws:
    """A generator of a process that holds a part of a batch: it draws for the whole batch and gives what is the part's.

    generator: in the same state in every process. here: (B,) bool, which patches of the batch the process holds.
    """

    def __init__(self, generator: torch.Generator, here: Tensor) -> None:
        self.generator, self.here = generator, here

    def rand(self, shape: tuple[int, ...], axis: int) -> Tensor:
        """As `rand`."""
        whole = torch.rand(*shape[:axis], len(self.here), *shape[axis + 1 :], generator=self.generator)
        return whole.index_select(axis, self.here.nonzero()[:, 0])


Draws = torch.Generator | PartDraws


def rand(draws: Draws, shape: tuple[int, ...], axis: int = 0) -> Tensor:
    """Numbers in 0..1 of this shape, in which `axis` counts the patches."""
    return draws.rand(shape, axis) if isinstance(draws, PartDraws) else torch.rand(shape, generator=draws)


def in_two(draws: Draws, number: int) -> list[tuple[Tensor, Draws]]:
    """Patches dealt at random to two groups: of each the mask (number,) bool, and what draws for it."""
    if not isinstance(draws, PartDraws):
        drawn = torch.rand(number, generator=draws) < 0.5
        return [(drawn, draws), (~drawn, draws)]
    drawn, here = torch.rand(len(draws.here), generator=draws.generator) < 0.5, draws.here
    return [(group[here], PartDraws(draws.generator, here[group])) for group in (drawn, ~drawn)]
