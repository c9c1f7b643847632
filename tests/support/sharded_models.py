"""A small model, and the ways to shard it."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainer.cluster.world import World


def make(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 33), nn.BatchNorm1d(33), nn.Linear(33, 1)]
    return nn.Sequential(*layers)


def parallelise(model: nn.Module, how: str, world: World) -> nn.Module:
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (world.size,))
    elif how == "hsdp":
        mesh = init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("replicate", "shard"))
    else:
        return model
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
