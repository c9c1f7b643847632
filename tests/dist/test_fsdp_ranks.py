"""FSDP2 strategy: training steps equal those of the unsharded model under all options."""

import numpy as np
import pytest
import torch
from torch import nn

from trainer.cluster.world import World
from trainer.config.schema import Parallel
from trainer.errors import ConfigError
from trainer.training import parallel


class Tied(nn.Module):
    """Two uses of one parameter, blocks in a list, a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.head(self.norm(x))


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randint(0, 11, (24,)), torch.randint(0, 11, (24,))


def steps(world: World, options: Parallel | None):
    """Three steps of two microbatches, clipped; return norms, weights and this rank's buffers."""
    torch.manual_seed(0)
    model = Tied()
    wrapped = model if options is None else parallel.wrap(model, world, options)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
    norms = []
    for seed in range(3):
        tokens, targets = batch(seed)
        for part in range(2):
            inputs, labels = tokens.chunk(2)[part], targets.chunk(2)[part]
            if options is not None:  # BatchNorm sees the same samples everywhere: all ranks, all
                assert parallel.is_sharded(wrapped)
            with parallel.reducing(wrapped, last=part == 1):
                (nn.functional.cross_entropy(wrapped(inputs), labels) / 2).backward()
        norms.append(parallel.clip(wrapped.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    weights = {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().numpy().copy()
        for name, t in wrapped.state_dict().items()
    }
    return norms, weights


def test_three_steps_match_plain_model(on_ranks):
    norms, weights = steps(World(), None)
    for options in (
        Parallel(strategy="fsdp", min_parameters=50),
        Parallel(strategy="fsdp", blocks=["BatchNorm1d"], reshard_after_forward=False),
    ):
        for rank_norms, rank_weights in on_ranks(2, steps, options):
            np.testing.assert_allclose(rank_norms, norms, rtol=1e-5)
            assert rank_weights.keys() == weights.keys()
            for name, value in weights.items():
                np.testing.assert_allclose(
                    rank_weights[name], value, rtol=1e-4, atol=1e-6, err_msg=name
                )


def halved(world: World):
    """bf16 in the blocks, fp32 in what is stored and in BatchNorm."""
    torch.manual_seed(0)
    model = parallel.wrap(
        Tied(), world, Parallel(strategy="fsdp", min_parameters=50, param_dtype="bf16")
    )
    seen = {}
    model.blocks[0].register_forward_hook(lambda m, i, o: seen.update(block=o.dtype))
    model.norm.register_forward_hook(lambda m, i, o: seen.update(norm=m.weight.dtype))
    loss = model(batch(0)[0]).float().square().mean()
    loss.backward()
    stored = {parameter.dtype for parameter in model.parameters()}
    summed = {parameter.grad.dtype for parameter in model.parameters()}
    return str(seen["block"]), str(seen["norm"]), *map(str, stored | summed)


def buffers(world: World):
    """Broadcast buffers: every rank has rank 0's before each forward pass in training."""
    model = parallel.wrap(Tied(), world, Parallel(strategy="fsdp"))
    model.norm.running_mean.fill_(float(world.rank))
    model(batch(world.rank)[0])
    first = model.norm.running_mean.clone()
    model.norm.momentum = 0.0
    model(batch(0)[0])
    return first.tolist(), model.norm.running_mean.tolist()


def both(world: World):
    return halved(world), buffers(world)


def test_mixed_precision_and_buffers(on_ranks):
    answers = on_ranks(2, both)
    for dtypes, _ in answers:
        assert dtypes == ("torch.bfloat16", "torch.float32", "torch.float32")
    (_, (_, zero)), (_, (_, one)) = answers
    assert zero == one  # rank 1 received rank 0's buffers


# --- sharded blocks ------------------------------------------------------------------------------


def names(model: nn.Module, **options) -> list[str]:
    blocks = parallel._blocks(model, Parallel(strategy="fsdp", **options))
    by_id = {id(module): name for name, module in model.named_modules()}
    return [by_id[id(module)] for module in blocks]


def test_blocks_are_chosen_by_size_or_by_class():
    model = Tied()
    assert names(model, min_parameters=70) == ["blocks.2", "blocks.1", "blocks.0"]
    assert names(model, min_parameters=80) == []  # a list has no forward; tied ones are the root's
    assert names(model, blocks=["BatchNorm1d"]) == ["norm"]
    nested = nn.Sequential(nn.Sequential(nn.Linear(9, 9), nn.Linear(3, 3)), nn.Linear(2, 2))
    assert names(nested, min_parameters=80) == ["0.0"]
    assert names(nested, min_parameters=12) == ["0.1", "0.0"]
    assert names(nested, min_parameters=91) == ["0"]
    with pytest.raises(ConfigError, match=r"of class Linaer \(did you mean 'Linear'\?\)"):
        names(nested, blocks=["Linaer"])
