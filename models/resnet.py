"""Residual nets: He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition, CVPR 2016.

Parameters and buffers have torchvision's names and shapes, so that its weights load strictly.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEMS = ("imagenet", "cifar")


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    # No bias: the batch norm after it has one.
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """Return the projection of the skip path, or None where the identity fits."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip path, as ResNet-18 and ResNet-34 use.

    Input (N, inputs, H, W) float; output (N, width, H / stride, W / stride), rounded up.

    Args:
        inputs: channels of the input.
        width: channels of both convolutions and of the output.
        stride: stride of the first convolution and of the skip path.
    """

    expansion: ClassVar[int] = 1

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, width, H / stride, W / stride)."""
        skip: Tensor = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + skip)


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1 and a skip path, as ResNet-50 uses.

    Input (N, inputs, H, W) float; output (N, 4 * width, H / stride, W / stride), rounded up. The
    3x3 convolution has the stride, as in torchvision; in the paper the first 1x1 has it.

    Args:
        inputs: channels of the input.
        width: channels of the first two convolutions.
        stride: stride of the 3x3 convolution and of the skip path.
    """

    expansion: ClassVar[int] = 4

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = _convolution(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _convolution(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, 4 * width, H / stride, W / stride)."""
        skip: Tensor = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + skip)


class ResNet(nn.Module):
    """A stem, four stages of residual blocks of 64, 128, 256 and 512 channels, one linear layer.

    Input (N, C, H, W) float; output (N, classes): logits. Height and width are free: they are
    averaged away before the linear layer. Convolutions start normal with the standard deviation
    of He et al. 2015 for their fan-out, batch norms as the identity.

    Args:
        block: BasicBlock or Bottleneck.
        depths: number of blocks in each of the four stages.
        input_shape: (C, H, W) of one input.
        classes: number of outputs.
        stem: "imagenet" is a 7x7 convolution of stride 2 and a max-pool, and divides height and
            width by 32 in all; "cifar" is a 3x3 convolution of stride 1 and divides them by 8,
            for images of about 32 pixels. With "cifar", `conv1.weight` is not torchvision's.
        zero_init_residual: start every block as the identity, by a zero scale in its last batch
            norm (Goyal et al. 2017).

    Raises:
        ValueError: an argument is not one of the above.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        input_shape: Sequence[int] = (3, 224, 224),
        classes: int = 1000,
        stem: str = "imagenet",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        _check(depths, input_shape, classes, stem)
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(input_shape[0], 64, 7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = _convolution(input_shape[0], 64, 3)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(64)
        expansion = block.expansion
        self.layer1 = _stage(block, 64, 64, depths[0], 1)
        self.layer2 = _stage(block, 64 * expansion, 128, depths[1], 2)
        self.layer3 = _stage(block, 128 * expansion, 256, depths[2], 2)
        self.layer4 = _stage(block, 256 * expansion, 512, depths[3], 2)
        self.fc = nn.Linear(512 * expansion, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif zero_init_residual and isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to logits (N, classes)."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))  # (N, 64, H/4, W/4)
        x = self.layer2(self.layer1(x))  # (N, 128 * expansion, H/8, W/8)
        x = self.layer4(self.layer3(x))  # (N, 512 * expansion, H/32, W/32)
        logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def _check(depths: Sequence[int], input_shape: Sequence[int], classes: int, stem: str) -> None:
    if len(depths) != 4 or min(depths) < 1:
        raise ValueError(f"depths={list(depths)} must be four numbers of blocks, each >= 1")
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(
            f"input_shape={list(input_shape)} must be [channels, height, width], each >= 1"
        )
    if classes < 1:
        raise ValueError(f"classes={classes} must be >= 1")
    if stem not in STEMS:
        raise ValueError(
            f"stem={stem!r} is unknown; use 'imagenet', or 'cifar' for images of about 32 pixels"
        )


def _stage(
    block: type[BasicBlock] | type[Bottleneck], inputs: int, width: int, depth: int, stride: int
) -> nn.Sequential:
    """Return `depth` blocks, the first of which has the stride."""
    rest = (block(width * block.expansion, width) for _ in range(depth - 1))
    return nn.Sequential(block(inputs, width, stride), *rest)


def resnet18(
    input_shape: Sequence[int] = (3, 224, 224),
    classes: int = 1000,
    stem: str = "imagenet",
    zero_init_residual: bool = False,
) -> ResNet:
    """Return ResNet-18; the arguments are those of `ResNet`. 11.7 M parameters by default."""
    return ResNet(BasicBlock, (2, 2, 2, 2), input_shape, classes, stem, zero_init_residual)


def resnet34(
    input_shape: Sequence[int] = (3, 224, 224),
    classes: int = 1000,
    stem: str = "imagenet",
    zero_init_residual: bool = False,
) -> ResNet:
    """Return ResNet-34; the arguments are those of `ResNet`. 21.8 M parameters by default."""
    return ResNet(BasicBlock, (3, 4, 6, 3), input_shape, classes, stem, zero_init_residual)


def resnet50(
    input_shape: Sequence[int] = (3, 224, 224),
    classes: int = 1000,
    stem: str = "imagenet",
    zero_init_residual: bool = False,
) -> ResNet:
    """Return ResNet-50; the arguments are those of `ResNet`. 25.6 M parameters by default."""
    return ResNet(Bottleneck, (3, 4, 6, 3), input_shape, classes, stem, zero_init_residual)
