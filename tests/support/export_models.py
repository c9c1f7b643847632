"""Models that some formats cannot export; the input is (N, 1, 8, 8) unless documented."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from models.resnet import BasicBlock, ResNet


def small_resnet(input_shape: list[int], classes: int) -> nn.Module:
    """A ResNet with one block per stage."""
    return ResNet(BasicBlock, (1, 1, 1, 1), input_shape, classes, "imagenet", False)


class Base(nn.Module):
    """A linear classifier of digits."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.layer = nn.Linear(64, classes)

    def logits(self, x: Tensor) -> Tensor:
        return self.layer(torch.flatten(x, 1))


class Branches(Base):
    """Branch on the values of the input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x + 1
        return self.logits(x)


class Counts(Base):
    """Use a value as a size."""

    def forward(self, x: Tensor) -> Tensor:
        count = int(x[0, 0, 0, 0].abs() * 3) + 1
        return self.logits(x)[:, :count]


class Exotic(Base):
    """Use an operator that ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        values = torch.linalg.eigvals(x[:, 0] + torch.eye(8))
        return self.logits(x) + values.real.sum(-1, keepdim=True)


class Fixed(Base):
    """Fix the batch size when traced."""

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x.view(int(x.shape[0]), -1)) * float(len(x))


class Chance(Base):
    """Apply dropout in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(F.dropout(x))


class Unscriptable(Base):
    """Use `**kwargs`, which TorchScript does not support."""

    def forward(self, x: Tensor, **rest: float) -> Tensor:
        return self.logits(x) * rest.get("scale", 1.0)


class HalfScriptable(nn.Module):
    """Branch around a submodule that cannot be scripted."""

    def __init__(self):
        super().__init__()
        self.submodule = Unscriptable()

    def forward(self, x: Tensor) -> Tensor:
        y = self.submodule(x)
        if float(y.sum()) > 0:
            return y * 2
        return y


class Pair(Base):
    """Two tensors in, a tuple out."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits(a + b), a.mean((1, 2, 3))


class Named(Base):
    """Return a dict with a key equal to the input name."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.logits(x), "x": x * 2}


class FromDict(Base):
    """Take a dict, return a nested dataclass."""

    def forward(self, batch: dict[str, Tensor], scale: float = 1.0):
        return Answer(
            self.logits(batch["image"]) * scale, (batch["image"].sum(), batch["bias"] + 1)
        )


@dataclass
class Answer:
    """A dataclass with a tuple field."""

    logits: Tensor
    rest: tuple[Tensor, ...]


class DictTask:
    """Call the model with a dict and a constant."""

    def loss(self, model, batch):
        images, labels = batch
        answer = model({"image": images, "bias": labels.float()}, scale=2.0)
        return F.cross_entropy(answer.logits, labels), answer.logits

    def train_metrics(self, outputs, batch):
        return {}

    def metrics(self):
        return {}

    def update(self, metrics, outputs, batch):
        return None


class Tied(nn.Module):
    """Two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(64, 64, bias=False)
        self.out = nn.Linear(64, 64, bias=False)
        self.out.weight = self.into.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.into(torch.flatten(x, 1))))


class NoTensor(Base):
    """Return a string."""

    def forward(self, x: Tensor):
        self.logits(x)
        return "nothing"


class Normalized(nn.Module):
    """Layers with parametrized weights."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(),
            parametrizations.weight_norm(nn.Linear(64, 16)),
            parametrizations.spectral_norm(nn.Linear(16, 10)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class TwoLengths(nn.Module):
    """Compare two sequences of vectors, (N, S, 4) and (N, T, 4)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, a: Tensor, b: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        a = self.layer(a) if mask is None else self.layer(a) * mask.unsqueeze(-1)
        scores = (a @ b.transpose(1, 2)).softmax(-1)
        return {"scores": scores, "mean": a.mean(1), "all": torch.cat([a, b], 1)}


def tiny_t5() -> nn.Module:
    """A T5 of transformers, encoder and decoder, with random weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
            decoder_start_token_id=0,
        )
    )  # fmt: skip
