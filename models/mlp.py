"""A multilayer perceptron."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them; 784-128-64-10 by default.

    Input (N, *input_shape) float, flattened; output (N, classes): logits.

    Args:
        input_shape: shape of one input.
        hidden: widths of the hidden layers.
        classes: number of outputs.
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (1, 28, 28),
        hidden: Sequence[int] = (128, 64),
        classes: int = 10,
    ) -> None:
        super().__init__()
        widths = [prod(input_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, *input_shape) to logits (N, classes)."""
        return self.layers(x)
