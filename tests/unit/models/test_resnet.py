"""ResNets: torchvision's names and shapes, the paper's arithmetic, and refusals."""

import pytest
import torch
from torch.nn import functional as F

from models.resnet import BasicBlock, Bottleneck, ResNet, resnet18, resnet34, resnet50

DEPTHS = {resnet18: (2, 2, 2, 2), resnet34: (3, 4, 6, 3), resnet50: (3, 4, 6, 3)}


def norm(prefix, width):
    vectors = {f"{prefix}.{name}": (width,) for name in ("weight", "bias")}
    vectors |= {f"{prefix}.running_{name}": (width,) for name in ("mean", "var")}
    return vectors | {f"{prefix}.num_batches_tracked": ()}


def expected(make):
    """Return the names and shapes of the published files of weights."""
    bottleneck = make is resnet50
    expansion = 4 if bottleneck else 1
    actual = {"conv1.weight": (64, 3, 7, 7)} | norm("bn1", 64)
    inputs = 64
    for stage, (depth, width) in enumerate(zip(DEPTHS[make], (64, 128, 256, 512), strict=True), 1):
        outputs = width * expansion
        for index in range(depth):
            prefix = f"layer{stage}.{index}"
            if bottleneck:
                shapes = [(width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1)]
            else:
                shapes = [(width, inputs, 3, 3), (width, width, 3, 3)]
            for number, shape in enumerate(shapes, 1):
                actual[f"{prefix}.conv{number}.weight"] = shape
                actual |= norm(f"{prefix}.bn{number}", shape[0])
            if index == 0 and (stage > 1 or bottleneck):
                actual[f"{prefix}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                actual |= norm(f"{prefix}.downsample.1", outputs)
            inputs = outputs
    return actual | {"fc.weight": (1000, 512 * expansion), "fc.bias": (1000,)}


@pytest.mark.parametrize(("make", "parameters", "entries"), [
    (resnet18, 11_689_512, 122), (resnet34, 21_797_672, 218), (resnet50, 25_557_032, 320),
])  # fmt: skip
def test_resnet_names_and_shapes_match_the_published_weights(make, parameters, entries):
    with torch.device("meta"):
        model = make()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    actual = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert actual == expected(make)
    assert len(actual) == entries


def by_hand(block, x):
    """Compute a block in evaluation from its state dict alone."""
    values = block.state_dict()

    def conv(x, name, stride=1):
        weight = values[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(x, name):
        weight, bias, mean, var = (
            values[f"{name}.{part}"][:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    skip = norm(conv(x, "downsample.0", 2), "downsample.1")
    if isinstance(block, BasicBlock):
        h = norm(conv(x, "conv1", 2), "bn1").relu()
        return (norm(conv(h, "conv2"), "bn2") + skip).relu()
    h = norm(conv(x, "conv1"), "bn1").relu()
    h = norm(conv(h, "conv2", 2), "bn2").relu()
    return (norm(conv(h, "conv3"), "bn3") + skip).relu()


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_block_matches_its_documented_layers(kind):
    generator = torch.Generator().manual_seed(0)
    block = kind(6, 4, stride=2).double().eval()
    for name, value in block.state_dict().items():
        if "bn" in name or "downsample.1" in name:  # else all are the identity
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    x = torch.randn(2, 6, 7, 8, generator=generator, dtype=torch.float64)
    assert block(x).shape == (2, 4 * kind.expansion, 4, 4)
    torch.testing.assert_close(block(x), by_hand(block, x))


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_block_skip_path_is_the_identity_if_shapes_match(kind):
    block = kind(4 * kind.expansion, 4)
    assert block.downsample is None
    torch.nn.init.zeros_(list(block.parameters())[-2])  # the last batch norm's scale
    x = torch.rand(2, 4 * kind.expansion, 5, 5)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(("shape", "stem", "stages"), [
    ((3, 64, 64), "imagenet", (16, 8, 4, 2)), ((3, 32, 32), "cifar", (32, 16, 8, 4)),
    ((1, 8, 8), "cifar", (8, 4, 2, 1)), ((1, 28, 28), "imagenet", (7, 4, 2, 1)),
])  # fmt: skip
def test_resnet_stem_determines_stage_sizes(shape, stem, stages):
    model = resnet18(list(shape), 5, stem).eval()
    assert model.conv1.in_channels == shape[0]
    sizes = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage.register_forward_hook(lambda _module, _inputs, x: sizes.append(tuple(x.shape[2:])))
    with torch.no_grad():
        assert model(torch.zeros(2, *shape)).shape == (2, 5)
    assert sizes == [(size, size) for size in stages]


def test_resnet_cifar_stem_changes_only_the_first_convolution():
    with torch.device("meta"):
        large, small = resnet18(), resnet18(stem="cifar")
    large, small = (
        {name: tuple(value.shape) for name, value in model.state_dict().items()}
        for model in (large, small)
    )
    assert small == large | {"conv1.weight": (64, 3, 3, 3)}


def test_convolutions_start_with_the_variance_of_their_fan_out():
    torch.manual_seed(0)
    model = ResNet(BasicBlock, (1, 1, 1, 1), (3, 8, 8), 10)
    weight = model.layer3[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    assert weight.mean().item() == pytest.approx(0, abs=1e-3)
    assert torch.equal(model.bn1.weight, torch.ones(64))


@pytest.mark.parametrize(("kind", "last"), [(BasicBlock, "bn2"), (Bottleneck, "bn3")])
@pytest.mark.parametrize("zero", [False, True])
def test_blocks_can_start_as_the_identity(kind, last, zero):
    model = ResNet(kind, (1, 1, 1, 1), (1, 8, 8), 2, zero_init_residual=zero)
    for name, value in model.named_parameters():
        if "bn" in name and name.endswith("weight"):
            is_last = name.startswith("layer") and last in name
            assert bool((value == (0 if zero and is_last else 1)).all()), name


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_gradients_reach_every_parameter(kind):
    torch.manual_seed(0)
    model = ResNet(kind, (1, 1, 1, 1), (2, 16, 16), 3, stem="cifar")
    F.cross_entropy(model(torch.randn(4, 2, 16, 16)), torch.tensor([0, 1, 2, 0])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("arguments", "text"), [
    ({"stem": "mnist"}, "stem='mnist' is unknown; use 'imagenet', or 'cifar'"),
    ({"input_shape": (28, 28)}, r"input_shape=\[28, 28\] must be \[channels, height, width\]"),
    ({"input_shape": (0, 8, 8)}, r"input_shape=\[0, 8, 8\] must be"),
    ({"classes": 0}, "classes=0 must be >= 1"),
])  # fmt: skip
@pytest.mark.parametrize("make", [resnet18, resnet34, resnet50])
def test_resnet_rejects_impossible_arguments(make, arguments, text):
    with pytest.raises(ValueError, match=text):
        make(**arguments)


@pytest.mark.parametrize("depths", [(2, 2, 2), (2, 2, 2, 0)])
def test_resnet_has_four_stages(depths):
    with pytest.raises(ValueError, match=r"depths=.* must be four numbers of blocks"):
        ResNet(BasicBlock, depths)
