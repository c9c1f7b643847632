"""Models that a format may stumble over; each maps (N, 1, 8, 8) or what its forward says."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.resnet import BasicBlock, ResNet


def small_resnet(input_shape: list[int], classes: int) -> nn.Module:
    """A ResNet with one block a stage."""
    return ResNet(BasicBlock, (1, 1, 1, 1), input_shape, classes, "imagenet", False)


class Base(nn.Module):
    """A linear classifier of digits."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.layer = nn.Linear(64, classes)

    def logits(self, x: Tensor) -> Tensor:
        return self.layer(torch.flatten(x, 1))


class Branches(Base):
    """The values of its input decide what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x + 1
        return self.logits(x)


class Counts(Base):
    """A value becomes a size."""

    def forward(self, x: Tensor) -> Tensor:
        count = int(x[0, 0, 0, 0].abs() * 3) + 1
        return self.logits(x)[:, :count]


class Exotic(Base):
    """Has an operator that ONNX has not."""

    def forward(self, x: Tensor) -> Tensor:
        values = torch.linalg.eigvals(x[:, 0] + torch.eye(8))
        return self.logits(x) + values.real.sum(-1, keepdim=True)


class Fixed(Base):
    """Works for one batch size alone, once it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x.view(int(x.shape[0]), -1)) * float(len(x))


class Chance(Base):
    """Drops in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(F.dropout(x))


class Unscriptable(Base):
    """Uses Python that TorchScript has not: keyword arguments of any name."""

    def forward(self, x: Tensor, **rest: float) -> Tensor:
        return self.logits(x) * rest.get("scale", 1.0)


class HalfScriptable(nn.Module):
    """Branches around a part that cannot be scripted."""

    def __init__(self):
        super().__init__()
        self.inner = Unscriptable()

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if float(y.sum()) > 0:
            return y * 2
        return y


class Pair(Base):
    """Two tensors in, a tuple out."""

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits(left + right), left.mean((1, 2, 3))


class Named(Base):
    """A dict out, one of whose keys is called as the input is."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.logits(x), "x": x * 2}


class FromDict(Base):
    """A dict in, a nest of several kinds out."""

    def forward(self, batch: dict[str, Tensor], scale: float = 1.0):
        return Answer(
            self.logits(batch["image"]) * scale, (batch["image"].sum(), batch["bias"] + 1)
        )


@dataclass
class Answer:
    """A dataclass with a tuple in it."""

    logits: Tensor
    rest: tuple[Tensor, ...]


class DictTask:
    """Hands the model a dict, and a constant."""

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
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(64, 64, bias=False)
        self.out = nn.Linear(64, 64, bias=False)
        self.out.weight = self.into.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.into(torch.flatten(x, 1))))


class NoTensor(Base):
    """Returns a number."""

    def forward(self, x: Tensor):
        self.logits(x)
        return "nothing"
