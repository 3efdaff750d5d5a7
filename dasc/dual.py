"""The dual network of stage 4: a branch on a weak and one on a strong view of the same patch, and a fused head."""

import torch
from torch import Tensor, nn

from dasc.network import CLASSES, SearchNetwork


class DualNetwork(nn.Module):
    """Two search networks with weights of their own, and a 1x1 convolution on their concatenated feature maps.

    Arguments and errors as `SearchNetwork`.
    """

    def __init__(self, backbone: str, stride: int = 16, pretrained: bool = False) -> None:
        super().__init__()
        self.weak = SearchNetwork(backbone, stride, pretrained)
        self.strong = SearchNetwork(backbone, stride, pretrained)
        self.width = self.weak.cam_head.in_channels + self.strong.cam_head.in_channels
        self.fused_head = nn.Conv2d(self.width, len(CLASSES), kernel_size=1)

    def forward(self, weak: Tensor, strong: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (3, B, classes) of the weak, the strong and the fused head, and pooled features (B, width).

        Args:
            weak, strong: views (B, 3, H, W) of the same patches, float in 0..1, RGB.
        """
        weak_map, strong_map = self.weak.features(weak), self.strong.features(strong)
        both = torch.cat([weak_map, strong_map], dim=1)
        cams = self.weak.cam(weak_map), self.strong.cam(strong_map), self.fused_head(both)
        return torch.stack([cam.amax(dim=(2, 3)) for cam in cams]), both.mean(dim=(2, 3))
