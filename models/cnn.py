"""The classic convolutional net for MNIST."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CNN(nn.Module):
    """Two 3x3 convolutions, max-pool, dropout, two linear layers.

    Input (N, C, H, W) float; output (N, classes): logits. With the defaults (1, 28, 28), 32 and
    64 channels and 128 hidden units this is the net of PyTorch's MNIST example, 1.2 M parameters.

    Args:
        input_shape: (C, H, W) of one input; H and W at least 6.
        channels: channels of the two convolutions.
        hidden: width of the first linear layer.
        classes: number of outputs.
        dropout: probability of dropping a channel after the pooling; the hidden units are
            dropped with twice this probability.
        batch_norm: normalise after each convolution.
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (1, 28, 28),
        channels: Sequence[int] = (32, 64),
        hidden: int = 128,
        classes: int = 10,
        dropout: float = 0.25,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        depth, height, width = input_shape
        if min(height, width) < 6:
            raise ValueError(f"input_shape={list(input_shape)}: height and width must be >= 6")
        if not 0 <= dropout <= 0.5:
            raise ValueError(f"dropout={dropout} must be in 0 … 0.5")
        first, second = channels
        self.conv1 = nn.Conv2d(depth, first, kernel_size=3)
        self.norm1 = nn.BatchNorm2d(first) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(first, second, kernel_size=3)
        self.norm2 = nn.BatchNorm2d(second) if batch_norm else nn.Identity()
        self.dropout1 = nn.Dropout2d(dropout)
        self.fc1 = nn.Linear(second * ((height - 4) // 2) * ((width - 4) // 2), hidden)
        self.dropout2 = nn.Dropout(2 * dropout)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to logits (N, classes)."""
        x = F.relu(self.norm1(self.conv1(x)))  # (N, first, H-2, W-2)
        x = F.relu(self.norm2(self.conv2(x)))  # (N, second, H-4, W-4)
        x = self.dropout1(F.max_pool2d(x, 2))  # (N, second, (H-4)//2, (W-4)//2)
        x = F.relu(self.fc1(torch.flatten(x, 1)))  # (N, hidden)
        return self.fc2(self.dropout2(x))
