"""Shapes, sizes and refusals of the shipped models."""

import pytest
import torch
from torch.nn import functional as F

from models.cnn import CNN
from models.mlp import MLP


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_mlp_default_is_784_128_64_10():
    model = MLP()
    assert count(model) == (784 * 128 + 128) + (128 * 64 + 64) + (64 * 10 + 10) == 109_386
    assert model(torch.zeros(5, 1, 28, 28)).shape == (5, 10)


def test_mlp_is_linear_layers_with_relu_between():
    model = MLP((3,), (4,), 2)
    (w1, b1), (w2, b2) = (
        (layer.weight, layer.bias) for layer in model.layers if isinstance(layer, torch.nn.Linear)
    )
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    by_hand = (x @ w1.T + b1).clamp(min=0) @ w2.T + b2
    torch.testing.assert_close(model(x), by_hand)


@pytest.mark.parametrize(("shape", "hidden", "classes"), [
    ((4,), (), 3), ((2, 3, 4), (5,), 7), ([1, 8, 8], [32, 16, 8], 1),
])  # fmt: skip
def test_mlp_accepts_any_sizes(shape, hidden, classes):
    model = MLP(shape, hidden, classes)
    assert model(torch.zeros(2, *shape)).shape == (2, classes)
    assert sum(isinstance(layer, torch.nn.Linear) for layer in model.layers) == len(hidden) + 1


def test_cnn_default_is_the_classic_mnist_net():
    model = CNN()
    assert count(model) == 1_199_882
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


@pytest.mark.parametrize(("shape", "channels", "hidden", "classes"), [
    ((1, 8, 8), (32, 64), 128, 10), ((3, 32, 20), (4, 8), 16, 5), ((2, 6, 6), (1, 1), 1, 2),
    ((1, 7, 9), (2, 3), 4, 1),
])  # fmt: skip
@pytest.mark.parametrize("batch_norm", [False, True])
def test_cnn_accepts_other_sizes(shape, channels, hidden, classes, batch_norm):
    model = CNN(shape, channels, hidden, classes, batch_norm=batch_norm)
    assert model(torch.zeros(2, *shape)).shape == (2, classes)
    depth, (first, second) = shape[0], channels
    rows, columns = (shape[1] - 4) // 2, (shape[2] - 4) // 2
    convolutions = (depth * 9 + 1) * first + (first * 9 + 1) * second
    linear = (second * rows * columns + 1) * hidden + (hidden + 1) * classes
    assert count(model) == convolutions + linear + 2 * (first + second) * batch_norm


def test_cnn_matches_its_documented_layers():
    model = CNN((1, 8, 8), (3, 4), 5, 2).eval()
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    h = F.conv2d(x, model.conv1.weight, model.conv1.bias).relu()
    h = F.conv2d(h, model.conv2.weight, model.conv2.bias).relu()
    h = F.max_pool2d(h, 2).flatten(1)
    h = (h @ model.fc1.weight.T + model.fc1.bias).relu()
    torch.testing.assert_close(model(x), h @ model.fc2.weight.T + model.fc2.bias)


def test_dropout_is_random_in_training_and_off_in_evaluation():
    model = CNN((1, 8, 8), dropout=0.25)
    x = torch.ones(4, 1, 8, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    still = CNN((1, 8, 8), dropout=0.0)
    assert torch.equal(still(x), still(x))


def test_hidden_units_are_dropped_with_twice_the_probability():
    model = CNN((1, 8, 8), dropout=0.5)  # so all of them
    outputs = model(torch.ones(4, 1, 8, 8))
    assert torch.equal(outputs, model.fc2.bias.expand(4, -1))


@pytest.mark.parametrize(("arguments", "text"), [
    ({"input_shape": (1, 5, 28)}, "height and width must be >= 6"),
    ({"input_shape": (1, 28, 5)}, "height and width must be >= 6"),
    ({"input_shape": (28, 28)}, "unpack"),
    ({"channels": (1, 2, 3)}, "unpack"),
    ({"dropout": -0.1}, "dropout=-0.1 must be in 0"),
    ({"dropout": 0.6}, "dropout=0.6 must be in 0"),
])  # fmt: skip
def test_cnn_rejects_impossible_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        CNN(**arguments)
