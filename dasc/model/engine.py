"""The engine that scores patches: torch everywhere, or OpenVINO on a CPU where it is installed and pays.

OpenVINO is optional. It takes 180 MB on disk, and it depends on openvino-telemetry, which by default reports every
import and every conversion to Google Analytics. Nothing may leave a hospital that way, so it never runs here.
"""

import importlib.util
import sys
import warnings
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dasc.errors import InputError
from dasc.model.first_look import FirstLook
from dasc.model.inference import device_of
from dasc.model.network import CamNetwork

PAYS_PX = 11_000_000  # px of images per core from which `auto` takes OpenVINO: 0.7 mm2 at 0.25 um/px. From there on it
# saves more than its start takes (2 s), with a first look; without one from a third of it.
INSTALL = "pip install --no-deps openvino"  # without its telemetry; NumPy, its other need, is here
FIRST_LOOK_PX = 256  # side of the picture that OpenVINO and torch are compared with
CLOSE = 1e-4  # p(mitosis) of the engines differs by less
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
        network = OpenVino(self.network, self.patch_size)
        first_look = self.first_look and OpenVino(self.first_look, FIRST_LOOK_PX, any_size=True)
        self.network, self.first_look = network, first_look


def is_installed() -> bool:
    """Whether OpenVINO is; it is not imported."""
    return importlib.util.find_spec("openvino") is not None


class OpenVino(nn.Module):
    """A network on the CPU that OpenVINO computes: pictures (B, 3, S, S), float in 0..1, to what the network gives.

    Several threads may call it at once, each call works on one core.

    side: S, px. any_size: pictures may have other sides, too. Attributes: name: openvino with its version.
    Raises: InputError: a network that OpenVINO cannot run, or to other log odds than torch.
    """

    def __init__(self, network: CamNetwork | FirstLook, side: int, any_size: bool = False) -> None:
        super().__init__()
        self.network = network
        pictures = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        try:
            self.name, self._compiled = _compile(network, pictures, any_size)
            self._free: deque = deque()  # requests that no thread works with
            with torch.inference_mode():
                ours, theirs = (_log_odds(each(pictures)) for each in (self, network))
        except Exception as error:  # its frontends raise anything
            reason = str(error).strip().splitlines()[0][:80] if str(error).strip() else type(error).__name__
            raise InputError(f"--engine openvino: cannot run {network.backbone_name} ({reason}); take torch") from error
        # A difference of log odds is a quarter of it in p at most.
        if not np.allclose(ours, theirs, rtol=1e-5, atol=4 * CLOSE):
            raise InputError(f"--engine openvino: gives other log odds of {network.backbone_name}; take torch")

    def forward(self, pictures: Tensor) -> Tensor:
        try:
            request = self._free.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        given = request.infer([pictures.contiguous().numpy()], share_inputs=True)[0]  # a copy: the request goes on
        self._free.append(request)
        return torch.from_numpy(given)


def _log_odds(given: Tensor) -> Tensor:
    """Log odds, of the logits (B, classes) of a network or of the map (B, h, w) of a first look."""
    return given.diff() if given.dim() == 2 else given


def _compile(network: CamNetwork | FirstLook, pictures: Tensor, any_size: bool) -> tuple[str, Any]:
    """Name and version of OpenVINO, and the network as it runs it: on any number of pictures, of these sides or any."""
    shape = [-1, 3, -1, -1] if any_size else [-1, *pictures.shape[1:]]
    sys.modules["openvino_telemetry"] = None  # importing it fails, and OpenVINO takes its own stub, which sends nothing
    import openvino  # here: it takes 0.5 s, and many runs do without

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.jit.trace, which OpenVINO converts with
        model = openvino.convert_model(network, example_input=pictures, input=shape)
    version = openvino.__version__.partition("-")[0]
    cores = torch.get_num_threads()  # a stream for each call at a time: on one stream calls wait for each other
    streams = {"NUM_STREAMS": cores, "INFERENCE_NUM_THREADS": cores}
    return f"openvino {version}", openvino.Core().compile_model(model, "CPU", SETTINGS | streams)
