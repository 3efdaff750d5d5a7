"""The engine that scores patches: torch everywhere, or OpenVINO on a CPU where it is installed and pays.

OpenVINO is optional. It takes 180 MB on disk, and it depends on openvino-telemetry, which by default reports every
import and every conversion to Google Analytics. Nothing may leave a hospital that way, so it never runs here.
"""

import importlib.util
import sys
import warnings
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dasc.errors import InputError
from dasc.model.first_look import FirstLook, Step
from dasc.model.inference import device_of
from dasc.model.network import CamNetwork

PAYS_PX = 14_000_000  # px of images per core from which `auto` takes OpenVINO: 0.9 mm2 at 0.25 um/px. From there on it
# saves more than its start takes (2 to 3 s), with a first look; without one from a quarter of it.
INSTALL = "pip install --no-deps openvino"  # without its telemetry; NumPy, its other need, is here
FIRST_LOOK_PX = 256  # side of the picture that OpenVINO and torch are compared with
CLOSE = 1e-4  # p(mitosis) of the engines differs by less
BATCH = 16  # patches scored together by one core: more than 16, or fewer than 8, take longer each
SETTINGS = {  # of OpenVINO's plugin
    "INFERENCE_PRECISION_HINT": "f32",  # by default bfloat16 or float16 where the CPU has it: p would differ by 0.02
    "ENABLE_CPU_PINNING": False,  # several runs on one machine would be pinned to the same core
}


class PatchEngine:
    """Decides which engine scores the patches of a run.

    network: as it scores with torch. asked: auto, torch or openvino. patch_size: px. images: that are to be scanned.
    first_look: of the detector, or None.
    Attributes: used: the engines so far, in their order: torch, or openvino with its version. first_look: as the engine
    of the last image runs it.
    Raises: InputError: OpenVINO is asked for on another device than the CPU, where it is not installed, or for a
    network that it cannot run.
    """

    def __init__(
        self, network: CamNetwork, asked: str, patch_size: int, images: int, first_look: FirstLook | None = None
    ) -> None:
        self.network, self.patch_size, self.images, self.used = network, patch_size, images, []
        self.first_look = first_look
        device, installed = device_of(network).type, is_installed()
        if asked == "openvino":
            if device != "cpu":
                raise InputError(f"--engine openvino: runs on the CPU, not on {device}; add --device cpu")
            if not installed:
                raise InputError(f"--engine openvino: not installed; {INSTALL}, or leave out --engine")
            self._take_openvino()
        self.may_change = asked == "auto" and device == "cpu" and installed

    def network_for(self, px: int) -> nn.Module:
        """What scores the patches of the next image, which has so many px, as those after it probably will.

        It says which engine that is where it is another than before.
        """
        if self.may_change and px * self.images >= PAYS_PX * torch.get_num_threads():
            self.may_change = False
            try:
                self._take_openvino()
            except InputError as error:
                tqdm.write(f"OpenVINO is not taken: {error}", file=sys.stderr)
        name = self.network.name if isinstance(self.network, OpenVino) else "torch"
        if self.images and name not in self.used:
            self.used.append(name)
            tqdm.write(f"engine: {name}")
        self.images = max(self.images - 1, min(self.images, 1))
        return self.network

    def _take_openvino(self) -> None:
        network, side = self.network, self.patch_size
        network = OpenVino(network, [_random(side)], network.backbone_name)
        first_look = self.first_look and OpenVinoLook(self.first_look)
        self.network, self.first_look = network, first_look


def is_installed() -> bool:
    """Whether OpenVINO is; it is not imported."""
    return importlib.util.find_spec("openvino") is not None


class OpenVino(nn.Module):
    """A network on the CPU that OpenVINO computes.

    Several threads may call it at once, each call works on one core.

    network: of maps (B, C, H, W), one or more. examples: such maps; others may have another B, with any_size also other
    H and W. backbone: named where it fails. Attributes: name: openvino with its version.
    Raises: InputError: a network that OpenVINO cannot run, or to something else than torch.
    """

    def __init__(self, network: nn.Module, examples: list[Tensor], backbone: str, any_size: bool = False) -> None:
        super().__init__()
        self.network, self.cpu_batch = network, BATCH
        try:
            self.name, self._compiled = _compile(network, examples, any_size)
            self._free: deque = deque()  # requests that no thread works with
            with torch.inference_mode():
                ours, theirs = (each(*examples) for each in (self, network))
        except Exception as error:  # its frontends raise anything
            reason = str(error).strip().splitlines()[0][:80] if str(error).strip() else type(error).__name__
            raise InputError(f"--engine openvino: cannot run {backbone} ({reason}); take torch") from error
        if not np.allclose(ours, theirs, rtol=1e-5, atol=2 * CLOSE):  # of log odds: each logit may differ so much
            raise InputError(f"--engine openvino: gives other log odds of {backbone}; take torch")

    def forward(self, *maps: Tensor) -> Tensor:
        try:
            request = self._free.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        given = request.infer([each.contiguous().numpy() for each in maps], share_inputs=True)[0]
        self._free.append(request)  # what it gave is a copy
        return torch.from_numpy(given)


class OpenVinoLook(nn.Module):
    """A first look whose steps OpenVINO computes. Raises: InputError: as OpenVino."""

    def __init__(self, first_look: FirstLook) -> None:
        super().__init__()
        self.first_look, self._steps = first_look, []
        maps = {1: _random(FIRST_LOOK_PX)}  # by px per cell
        for step in first_look.steps():
            examples = [maps[px] for px in step.reads]
            network = OpenVino(step.network, examples, first_look.backbone_name, any_size=True)
            self._steps.append(replace(step, network=network))
            maps[step.gives] = network(*examples)

    def steps(self) -> list[Step]:
        """As FirstLook.steps."""
        return self._steps


def _random(side: int) -> Tensor:
    """Two pictures (2, 3, side, side) in 0..1."""
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def _compile(network: nn.Module, examples: list[Tensor], any_size: bool) -> tuple[str, Any]:
    """Name and version of OpenVINO, and the network as it runs it: on any number of maps, of these sides or any."""
    shapes = [[-1, each.shape[1], *([-1, -1] if any_size else each.shape[2:])] for each in examples]
    sys.modules["openvino_telemetry"] = None  # importing it fails, and OpenVINO takes its own stub, which sends nothing
    import openvino  # here: it takes 0.5 s, and many runs do without

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.jit.trace, which OpenVINO converts with
        model = openvino.convert_model(network, example_input=tuple(examples), input=shapes)
    version = openvino.__version__.partition("-")[0]
    cores = torch.get_num_threads()  # a stream for each call at a time: on one stream calls wait for each other
    streams = {"NUM_STREAMS": cores, "INFERENCE_NUM_THREADS": cores}
    return f"openvino {version}", openvino.Core().compile_model(model, "CPU", SETTINGS | streams)
