"""DCGAN: shapes and sizes, the paper's rules, and refusals."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.dcgan import DCGAN, Discriminator, Generator


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def noise(rows, latent, seed=1):
    return torch.randn(rows, latent, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [
    (1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (2, 10, 10), (1, 48, 48),
])  # fmt: skip
def test_dcgan_maps_noise_to_images_and_images_to_logits(shape):
    model = DCGAN(list(shape), latent=5, width=4)
    images = model(noise(3, 5))
    assert images.shape == (3, *shape)
    assert -1 <= images.min() < images.max() <= 1
    assert model.discriminator(images).shape == (3,)
    model.eval()
    z = noise(1, 5)
    assert torch.equal(model(z), model.generator(z))
    assert model.discriminator(model(z)).shape == (1,)


def test_generator_64_pixels_has_the_paper_shapes():
    with torch.device("meta"):
        model = DCGAN((3, 64, 64), latent=100, width=128)
    shapes = [tuple(layer.weight.shape) for layer in model.generator.layers[::3]]
    assert shapes == [
        (100, 1024, 4, 4), (1024, 512, 4, 4), (512, 256, 4, 4), (256, 128, 4, 4), (128, 3, 4, 4),
    ]  # fmt: skip


def test_dcgan_64_pixels_has_the_published_parameter_counts():
    with torch.device("meta"):
        model = DCGAN((3, 64, 64), latent=100)
    assert count(model.generator) == 3_576_704
    assert count(model.discriminator) == 2_765_568


def test_dcgan_8_pixels_has_two_convolutions():
    model = DCGAN((1, 8, 8), latent=64, width=64)
    assert count(model.generator) == 64 * 64 * 16 + 2 * 64 + 64 * 16
    assert count(model.discriminator) == 64 * 16 + 64 * 16


def test_generator_matches_its_documented_layers():
    model = Generator(5, 2, 3, 28).eval()
    first, norm1, _, second, norm2, _, last, _ = model.layers
    x = F.conv_transpose2d(noise(2, 5)[:, :, None, None], first.weight)
    assert x.shape == (2, 6, 7, 7)
    x = F.conv_transpose2d(norm1(x).relu(), second.weight, stride=2, padding=1)
    assert x.shape == (2, 3, 14, 14)
    x = F.conv_transpose2d(norm2(x).relu(), last.weight, stride=2, padding=1)
    torch.testing.assert_close(model(noise(2, 5)), x.tanh())


def test_discriminator_matches_its_documented_layers():
    model = Discriminator(2, 3, 28).eval()
    first, _, second, norm, _, last = model.layers
    images = noise(4, 2 * 28 * 28).view(4, 2, 28, 28)
    x = F.leaky_relu(F.conv2d(images, first.weight, stride=2, padding=1), 0.2)
    assert x.shape == (4, 3, 14, 14)
    x = F.leaky_relu(norm(F.conv2d(x, second.weight, stride=2, padding=1)), 0.2)
    assert x.shape == (4, 6, 7, 7)
    by_hand = torch.einsum("nchw,chw->n", x, last.weight[0])
    torch.testing.assert_close(model(images), by_hand)


def test_dcgan_batch_norm_is_absent_next_to_the_images():
    model = DCGAN((3, 64, 64), latent=5, width=2)
    kinds = [type(layer) for layer in model.generator.layers]
    up = [nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU]
    assert kinds == 4 * up + [nn.ConvTranspose2d, nn.Tanh]
    kinds = [type(layer) for layer in model.discriminator.layers]
    down = [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU]
    assert kinds == [nn.Conv2d, nn.LeakyReLU] + 3 * down + [nn.Conv2d]


def test_dcgan_initial_weights_match_the_paper():
    torch.manual_seed(0)
    scales = []
    for name, module in DCGAN((1, 28, 28), latent=64, width=64).named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert not module.bias.any()
            scales.append(module.weight)
        elif hasattr(module, "weight"):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert module.weight.mean().item() == pytest.approx(0, abs=2e-3), name
    scales = torch.cat(scales)
    assert scales.std().item() == pytest.approx(0.02, rel=0.2)
    assert scales.mean().item() == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("size", [8, 28, 32])
def test_gradients_reach_every_parameter(size):
    torch.manual_seed(0)
    model = DCGAN((1, size, size), latent=6, width=4)
    logits = model.discriminator(model(noise(5, 6)))
    F.binary_cross_entropy_with_logits(logits, torch.ones(5)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_dcgan_nets_share_no_parameters():
    model = DCGAN((1, 8, 8), width=2)
    assert [name for name, _ in model.named_children()] == ["generator", "discriminator"]
    assert count(model) == count(model.generator) + count(model.discriminator)


def test_discriminator_learns_to_separate_images_from_noise():
    torch.manual_seed(0)
    model = DCGAN((1, 8, 8), latent=4, width=8)
    optimizer = torch.optim.Adam(model.discriminator.parameters(), lr=1e-2)
    real = torch.linspace(-1, 1, 8).expand(16, 1, 8, 8)
    images = torch.cat([real, model(noise(16, 4)).detach()])
    labels = torch.cat([torch.ones(16), torch.zeros(16)])
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model.discriminator(images), labels)
        loss.backward()
        optimizer.step()
    assert torch.equal(model.discriminator(images) > 0, labels == 1)
    assert loss.item() < 0.3  # log(2) = 0.69 is a guess


@pytest.mark.parametrize(("arguments", "text"), [
    ({"input_shape": (1, 28, 32)}, r"input_shape=\[1, 28, 32\] must be \[channels, size, size\]"),
    ({"input_shape": (28, 28)}, r"input_shape=\[28, 28\] must be"),
    ({"input_shape": (1, 30, 30)}, "size=30: .* such as 8, 28, 32 or 64; pad or resize"),
    ({"input_shape": (1, 4, 4)}, "size=4: height and width must be"),
    ({"input_shape": (1, 7, 7)}, "size=7: height and width must be"),
    ({"input_shape": (1, 0, 0)}, "size=0: height and width must be"),
    ({"input_shape": (0, 8, 8)}, "channels=0 must be >= 1"),
    ({"latent": 0}, "latent=0 must be >= 1"),
    ({"width": 0}, "width=0 must be >= 1"),
])  # fmt: skip
def test_dcgan_rejects_impossible_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        DCGAN(**arguments)


@pytest.mark.parametrize("shape", [(2, 63), (64,), (2, 64, 1, 1)])
def test_generator_rejects_noise_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"noise is \[.*\], but must be \(N, 64\)"):
        DCGAN()(torch.zeros(shape))
