"""One rank of the DDP test of dynamic sparse training; each rank saves what it ends with."""

import copy
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pysparse_ticket as pst


def build(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return model, optimizer, pst.dynamic(model, optimizer, method=method, sparsity=0.7, every=2, until=20, plan="tiled")


def train(run, model, optimizer, schedule, share):
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        x, y = torch.randn(8, 2, 8, 8, generator=generator), torch.randint(5, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(run(x[share]), y[share]).backward()
        optimizer.step()
        schedule.step()


def both_methods(rank):
    found = {}
    for method in ("rigl", "set"):
        model, optimizer, schedule = build(method)
        run = DistributedDataParallel(model)
        train(run, model, optimizer, schedule, slice(4 * rank, 4 * rank + 4))
        found[method] = {"model": copy.deepcopy(model.state_dict()), "masks": schedule.masks()}
        schedule.step()
        model(torch.ones(1, 2, 8, 8)).sum().backward()
        with torch.no_grad():
            model[0].weight_parameter.copy_(torch.arange(model[0].nnz).roll(10 * rank))  # drifts apart
        try:
            schedule.step()
        except RuntimeError as error:
            found[method]["refused"] = str(error)
    return found


def main(rank, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save(both_methods(rank), out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
    os._exit(0)  # gloo's threads may outlive the interpreter
