"""FSDP2 in a hand-written loop with atomic checkpoints: run this file with torchrun."""

import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from trainer.checkpoint import select
from trainer.checkpoint.dcp import PerdureStorageReader, PerdureStorageWriter

folder, last_step = sys.argv[1], int(sys.argv[2])
dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
for layer in model:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

newest = select.from_path(folder)
done = newest.commit.step if newest else 0
if newest is None:
    print("from the beginning", flush=True)
else:
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, storage_reader=PerdureStorageReader(f"{folder}/step-{done}"))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
for step in range(done + 1, last_step + 1):
    torch.manual_seed(step)
    loss = model(torch.randn(16, 32)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        weights, moments = get_state_dict(model, optimizer)
        writer = PerdureStorageWriter(f"{folder}/step-{step}")
        dcp.save({"model": weights, "optimizer": moments}, storage_writer=writer)
        if dist.get_rank() == 0:
            print(f"step {step}: saved, loss {loss.item():.6f}")
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads may still hold a tensor; that they end with the interpreter aborts it
