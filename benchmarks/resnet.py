"""ResNet-20 for images of 32 x 32 pixels, by the names under which its weights are published."""

from __future__ import annotations

from torch import Tensor, nn


class ResNet20(nn.Module):
    """He et al., "Deep residual learning for image recognition", 2016, section 4.2, with n = 3 and shortcuts A."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_Residual(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(*(_Residual(32 if step else 16, 32, 1 if step else 2) for step in range(3)))
        self.layer3 = nn.Sequential(*(_Residual(64 if step else 32, 64, 1 if step else 2) for step in range(3)))
        self.linear = nn.Linear(64, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`(b, 3, 32, 32)` -> logits `(b, 10)`."""
        hidden = self.bn1(self.conv1(pixel_values)).relu()
        logits: Tensor = self.linear(self.layer3(self.layer2(self.layer1(hidden))).mean((2, 3)))
        return logits


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride, self.missing = stride, outputs - inputs

    def forward(self, hidden: Tensor) -> Tensor:
        """`(b, c, h, w)`."""
        inner = self.bn2(self.conv2(self.bn1(self.conv1(hidden)).relu()))
        half = self.missing // 2
        kept = nn.functional.pad(hidden[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        summed: Tensor = (inner + kept).relu()
        return summed
