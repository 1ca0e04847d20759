"""Nothing in a training step of ours waits for the device: on a GPU it could not be captured in a CUDA graph."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import batch, resnet
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pysparse_ticket as pst
from pysparse_ticket.models import build
from pysparse_ticket.ops import masked_conv2d_tiles, masked_linear_tiles
from pysparse_ticket.ops.conv_tiles import ConvTiles
from pysparse_ticket.ops.library import backend_of, kernel_module, use_backend
from pysparse_ticket.ops.tile_mask import TileMask

ATEN = torch.ops.aten
READS = {  # ops whose result, or its size, the host has to wait for
    ATEN._local_scalar_dense,
    ATEN.item,
    ATEN.is_nonzero,
    ATEN.equal,
    ATEN.nonzero,
    ATEN.nonzero_numpy,
    ATEN.masked_select,
    ATEN.bincount,
    ATEN._unique2,
    ATEN.unique_dim,
    ATEN.unique_consecutive,
}
INDEXED = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_, ATEN._unsafe_index}


class NoHostSync(TorchDispatchMode):
    """Fails on the first op that would stop the host until a GPU is done."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        counted = packet is ATEN.repeat_interleave and kwargs.get("output_size") is None
        by_mask = packet in INDEXED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        assert packet not in READS and not counted and not by_mask, f"{func} waits for the device"
        return func(*args, **kwargs)


class NoCopyToHost(TorchFunctionMode):
    """The same for what reads a CPU tensor's memory without an op."""

    READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in self.READS, f"{func.__name__} waits for the device"
        return func(*args, **(kwargs or {}))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 40), nn.ReLU(), nn.Linear(40, 24), nn.GELU(), nn.Linear(24, 10))


def masked_step(model, optimizer, x, y):
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


TICKETS = {
    "layer": (resnet, {"score": "random", "granularity": "layer", "remove": 3}),
    "filter": (resnet, {"score": "magnitude", "granularity": "filter", "remove": 150}),
    "weight": (resnet, {"score": "magnitude", "granularity": "weight", "sparsity": 0.9}),
    "2:4": (resnet, {"score": "magnitude", "granularity": "2:4"}),
    "weight of an mlp": (mlp, {"score": "magnitude", "granularity": "weight", "sparsity": 0.9}),
    "block of an mlp": (mlp, {"score": "magnitude", "granularity": "block:4x4", "sparsity": 0.75}),
    "depthwise": (lambda: small_mobile(), {"score": "magnitude", "granularity": "filter", "remove": 5}),
}


def small_mobile():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


def sparse_and_optimizer(name, plan, make=lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)):
    build_model, options = TICKETS[name]
    model = build_model()
    ticket = pst.at_init(model, batch(), **options)
    sparse = pst.sparsify(model, ticket, plan=plan).train()
    return sparse, make(sparse.parameters())


@pytest.mark.parametrize("plan", ["packed", "dense", "blocks"])
@pytest.mark.parametrize("ticket", TICKETS)
def test_a_training_step_never_waits_for_the_device(ticket, plan):
    model, optimizer = sparse_and_optimizer(ticket, plan)
    x, y = batch()
    with use_backend("reference"):
        masked_step(model, optimizer, x, y)  # the optimizer's state is made in the first step
        with NoHostSync(), NoCopyToHost():
            masked_step(model, optimizer, x, y)


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_a_step_with_fused_norms_never_waits_for_the_device(momentum):
    """The Python side of filter_conv2d_norm: the kernels run, interpreted where there is no GPU, inside of ops."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, momentum=momentum), nn.ReLU(), nn.Conv2d(6, 4, 3)),
        *(nn.BatchNorm2d(4, momentum=momentum), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    ticket = pst.at_init(model, score="magnitude", granularity="filter", remove=2)
    model = pst.sparsify(model.to(device), ticket, plan="fused norm").train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x, y = batch(2)
    x, y = x.to(device), y.to(device)
    with use_backend("triton"):
        masked_step(model, optimizer, x, y)
        with NoHostSync(), NoCopyToHost():
            masked_step(model, optimizer, x, y)
    assert backend_of("filter_conv2d_norm") == "triton" and int(model[1].num_batches_tracked) == 2


class Launched:
    """In place of a kernel: remembers that it was launched."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.grids.append(grid)


@pytest.mark.parametrize("clean", [False, True], ids=["masked", "clean"])
def test_the_launches_over_tiles_never_wait_for_the_device(clean, monkeypatch):
    pytest.importorskip("triton")
    kernels = {}
    for module, names in {
        "masked_linear": ("matmul_tiles", "weight_grad_boxes", "weight_grad_gather", "sum_splits", "mask_tiles"),
        "masked_conv2d_tiles": ("conv_tiles", "conv_weight_grad"),
    }.items():
        for name in names:
            kernels[name] = Launched()
            monkeypatch.setattr(kernel_module(module), name, kernels[name])
    mask = torch.rand(40, 40, 3, 3) < 0.5
    conv = ConvTiles.from_mask(mask, (16, 16), (2, 2), (1, 1))
    x, values, grad = torch.randn(64, 40, 16, 16), torch.randn(conv.tiles, 16, 16), torch.randn(64, 40, 8, 8)
    facts = list(conv.tensors), conv.shape, conv.tile, conv.stride, conv.padding, conv.dilation
    linear = TileMask.from_mask(mask[:, :, 0, 0], (16, 16))
    flat, of_linear = torch.randn(64, 40), (list(linear.tensors), linear.shape, linear.tile, "")
    with NoHostSync(), NoCopyToHost():
        masked_conv2d_tiles._run(x, values, None, *facts, clean, True)
        masked_conv2d_tiles._run_backward(grad, x, values, *facts, torch.float32, True, True)
        masked_linear_tiles._run(flat, values[: linear.tiles], None, *of_linear, clean, True)
        masked_linear_tiles._run_backward(
            flat, flat, values[: linear.tiles], None, *of_linear, torch.float32, True, True, True
        )
    assert (len(kernels["conv_tiles"].grids), len(kernels["conv_weight_grad"].grids)) == (2, 1)
    assert len(kernels["matmul_tiles"].grids) == 2 and len(kernels["mask_tiles"].grids) == (0 if clean else 2)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.sum().tolist(),
        lambda x: torch.repeat_interleave(x, torch.ones(len(x), dtype=torch.int64), 0),
        lambda x: x.masked_select(x > 0),
    ],
    ids=["item", "bool", "nonzero", "bool index", "tolist", "repeat_interleave", "masked_select"],
)
def test_what_waits_is_seen(wait):
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSync(), NoCopyToHost():
        wait(torch.arange(4))


def small_resnet(size):
    torch.manual_seed(0)
    return build("resnet14", 10, (3, size, size))


CAPTURED = {
    "layer": ("resnet", {"score": "random", "granularity": "layer", "remove": 3}, "auto", "sgd"),
    "filter": ("resnet", {"score": "magnitude", "granularity": "filter", "remove": 60}, "auto", "sgd"),
    "fused norm": ("resnet", {"score": "magnitude", "granularity": "filter", "remove": 60}, "fused norm", "sgd"),
    "weight": ("resnet", {"score": "magnitude", "granularity": "weight", "sparsity": 0.9}, "packed", "sgd"),
    "blocks": ("resnet", {"score": "random", "granularity": "block:16x16", "sparsity": 0.75}, "blocks", "sgd"),
    "masked layers": ("mlp", {"score": "magnitude", "granularity": "weight", "sparsity": 0.9}, "packed", "adam"),
    "masked layers that run dense": (
        "mlp",
        {"score": "magnitude", "granularity": "weight", "sparsity": 0.9},
        "dense",
        "adam",
    ),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 1e-3, capturable=True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CAPTURED)
def test_a_captured_step_trains_as_the_eager_one(case):
    """Five steps by replay of a CUDA graph against five eager ones, from the same state."""
    kind, options, plan, optimize = CAPTURED[case]
    x, y = (t.cuda() for t in batch(32, 16))
    model = small_resnet(16).cuda() if kind == "resnet" else nn.Sequential(nn.Flatten(), *wide_mlp()).cuda()
    ticket = pst.at_init(model, (x, y), **options)
    model = pst.sparsify(model, ticket, plan=plan).train()
    eager = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())

    optimizer = OPTIMIZERS[optimize](model.parameters())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            masked_step(model, optimizer, x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        masked_step(model, optimizer, x, y)
    for _ in range(5):
        graph.replay()

    other = OPTIMIZERS[optimize](eager.parameters())
    for _ in range(8):  # three before the capture, which itself runs nothing
        masked_step(eager, other, x, y)
    after, expected = model.state_dict(), eager.state_dict()
    for name, before in start.items():
        moved, wanted = (state[name].double() - before.double() for state in (after, expected))
        # atomics add in any order, and eight steps grow the difference; a step left out or doubled is an eighth
        assert (moved - wanted).norm() <= 0.05 * wanted.norm() + 1e-5 * (before.double().norm() + 1), name


def wide_mlp():
    torch.manual_seed(0)
    return nn.Linear(768, 96), nn.ReLU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 10)
