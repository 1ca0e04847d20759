"""One rank of the DDP test: two steps on its half of each batch; rank 0 saves the weights."""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pysparse_ticket as pst


def network(plan):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    ticket = pst.at_init(model, score="magnitude", granularity="weight", sparsity=0.7)
    return pst.sparsify(model, ticket, plan=plan)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 2, 8, 8, generator=generator), torch.randint(5, (8,), generator=generator)) for _ in range(2)
    ]


def train(model, share):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for x, y in batches():
        optimizer.zero_grad()
        F.cross_entropy(model(x[share]), y[share]).backward()
        optimizer.step()


def main(rank, store, plan, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = network(plan)
    train(DistributedDataParallel(model), slice(4 * rank, 4 * rank + 4))
    if rank == 0:
        torch.save(model.state_dict(), out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4])
    os._exit(0)  # gloo's threads may outlive the interpreter
