"""Follow each channel of a traced network from the convolution that makes it to the layers that read it."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

_CHANNELWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.Mish, nn.GELU, nn.Softplus,
    nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Tanh, nn.Identity, nn.Dropout, nn.Dropout2d,
)  # fmt: skip
_POOL_MODULES = (
    nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.ZeroPad2d,
)  # fmt: skip
_CHANNELWISE = {
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "silu", "mish", "gelu", "softplus", "sigmoid",
    "hardsigmoid", "hardswish", "hardtanh", "tanh", "dropout", "dropout2d", "abs", "neg", "square", "clamp", "clip",
    "contiguous", "clone", "detach", "to", "float", "double", "half", "bfloat16",
}  # fmt: skip
_POOLS = {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate"}
_COUPLING = {"add", "iadd", "sub", "isub", "mul", "imul", "maximum", "minimum"}
_BY_A_NUMBER = {*_COUPLING, "truediv", "itruediv", "div", "true_divide"}
_REDUCTIONS = {"mean", "sum", "amax", "amin"}
_CONCATENATIONS = {"cat", "concat", "concatenate"}
_SHAPES = {"flatten", "reshape", "getitem", "pad"}
_NAMES = {
    getattr(home, spelled): name
    for home in (operator, torch, F)
    for name in (*_CHANNELWISE, *_POOLS, *_BY_A_NUMBER, *_REDUCTIONS, *_CONCATENATIONS, *_SHAPES)
    for spelled in (name, f"{name}_")
    if hasattr(home, spelled)
}
_WORDS = {"add": "added to", "sub": "subtracted from", "mul": "multiplied with"}


@dataclass(frozen=True)
class Value:
    """What a node returns. ``atoms`` has one number a channel, in the order of dimension 1.

    flat    ``[N, features]``, else ``[N, C, H, W]``
    repeat  features a channel of a flat value; None until a linear layer tells
    why     set where channels cannot be followed: what the value is instead
    """

    atoms: tuple[int, ...] = ()
    flat: bool = False
    repeat: int | None = 1
    why: str = ""


@dataclass(frozen=True)
class Shape:
    """``x.shape`` of a value."""

    of: Value


SCALAR = object()  # a number that no channel enters, such as the batch size


def trace(model: nn.Module) -> torch.fx.Graph:
    """The model's graph; ValueError with the reason when it cannot be traced."""
    try:
        return torch.fx.Tracer().trace(model)
    except Exception as error:  # tracing runs the user's code and may raise anything
        raise ValueError(
            f"{type(model).__name__} cannot be traced, so its filters cannot be pruned: {error}"
        ) from error


class Follower:
    """Fills ``producers``, ``readers`` and ``norms`` {module name: atoms}, and ``pins`` [(atom, why it stays)].

    Atoms that ``find`` maps to one number stay or go together. Whatever is not known to keep channels apart pins what
    it is given, so an unknown operation costs filters, never correctness.
    """

    def __init__(self, model: nn.Module, graph: torch.fx.Graph) -> None:
        self.graph, self.modules, self._model = graph, dict(model.named_modules()), model
        self.producers: dict[str, tuple[int, ...]] = {}
        self.readers: dict[str, tuple[int, ...]] = {}
        self.norms: dict[str, tuple[int, ...]] = {}
        self.pins: list[tuple[int, str]] = []
        self.refused: dict[str, str] = {}
        self._parent: list[int] = []
        self._values: dict[torch.fx.Node, object] = {}
        self._tied = self._not_one_call_one_owner(model)

    def run(self) -> None:
        for node in self.graph.nodes:
            self._values[node] = self._follow(node)

    def find(self, atom: int) -> int:
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = self._parent[atom]
        return atom

    def _not_one_call_one_owner(self, model: nn.Module) -> dict[str, str]:
        """{module name: why its weights cannot be cut}."""
        tied: dict[str, str] = {}
        calls = [node.target for node in self.graph.nodes if node.op == "call_module"]
        read = [node.target for node in self.graph.nodes if node.op == "get_attr"]
        names: dict[nn.Module, int] = {}
        for _, module in model.named_modules(remove_duplicate=False):
            names[module] = names.get(module, 0) + 1
        owners: dict[nn.Parameter, int] = {}
        for module in self.modules.values():
            for parameter in module.parameters(recurse=False):
                owners[parameter] = owners.get(parameter, 0) + 1
        for name, module in self.modules.items():
            if calls.count(name) > 1:
                tied[name] = f"{name} is called more than once"
            elif names[module] > 1 or any(owners[p] > 1 for p in module.parameters(recurse=False)):
                tied[name] = f"{name} shares its weights with another module"
            elif any(target.rpartition(".")[0] == name for target in read):
                tied[name] = f"the weights of {name} are read past the module"
        return tied

    def _fresh(self, count: int) -> tuple[int, ...]:
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return tuple(range(start, start + count))

    def _pin(self, value: object, why: str) -> None:
        if isinstance(value, Shape):
            value = value.of
        if isinstance(value, Value):
            self.pins.extend((atom, why) for atom in value.atoms)

    def _inputs(self, node: torch.fx.Node) -> list[object]:
        return [self._values[other] for other in node.all_input_nodes]

    def _unknown(self, node: torch.fx.Node, what: str, why: str = "") -> Value:
        """Pin all inputs and go on with a value that has no channels."""
        for value in self._inputs(node):
            self._pin(value, why or f"its output goes into {what}, through which channels are not followed")
        return Value(why=f"the output of {what}")

    def _follow(self, node: torch.fx.Node) -> object:
        if node.op == "placeholder":
            return Value(why="the network's input")
        if node.op == "get_attr":
            tensor = operator.attrgetter(node.target)(self._model)
            single = isinstance(tensor, Tensor) and tensor.numel() == 1 and tensor.dim() < 2
            return SCALAR if single else Value(why=f"the tensor {node.target}")
        if node.op == "output":
            return self._unknown(node, "the network's output", "its output is the network's own")
        if node.op == "call_module":
            return self._module(node)
        if node.op == "call_method":
            return self._call(node, node.target.rstrip("_"))
        if node.target is getattr and node.args[1] == "shape":
            x = self._values[node.args[0]]
            return Shape(x) if isinstance(x, Value) else self._unknown(node, "shape")
        if node.target is getattr and node.args[1] in ("dtype", "device", "ndim"):
            return SCALAR
        if node.target in _NAMES:
            return self._call(node, _NAMES[node.target])
        return self._unknown(node, getattr(node.target, "__name__", str(node.target)))

    def _module(self, node: torch.fx.Node) -> Value:
        name, module = node.target, self.modules[node.target]
        what = f"{name}, a {type(module).__name__}"
        plain = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], torch.fx.Node)
        x = self._values[node.args[0]] if plain else None
        if not isinstance(x, Value):
            return self._unknown(node, what)
        if isinstance(module, _CHANNELWISE_MODULES) or (type(module) is nn.PReLU and module.num_parameters == 1):
            return x
        if isinstance(module, _POOL_MODULES):
            return self._unknown(node, what) if x.flat or getattr(module, "return_indices", False) else x
        if type(module) is nn.Flatten:
            return self._flatten(node, x, module.start_dim, module.end_dim)
        if type(module) is nn.Conv2d:
            return self._conv(node, name, module, x)
        if name in self._tied:
            return self._unknown(node, what, self._tied[name])
        if type(module) is nn.Linear and x.atoms and x.flat:
            repeat, rest = divmod(module.in_features, len(x.atoms))
            if not rest and x.repeat in (None, repeat):
                self.readers[name] = tuple(atom for atom in x.atoms for _ in range(repeat))
                return Value(why=f"the output of {what}")
        if type(module) is nn.BatchNorm2d and len(x.atoms) == module.num_features and not x.flat:
            self.norms[name] = x.atoms
            return x
        if type(module) is nn.BatchNorm2d and not x.atoms:
            return x
        return self._unknown(node, what)

    def _conv(self, node: torch.fx.Node, name: str, conv: nn.Conv2d, x: Value) -> Value:
        depthwise = conv.groups == conv.in_channels > 1
        reason = self._tied.get(name, "")
        if conv.padding_mode != "zeros":
            reason = f"{name} pads with {conv.padding_mode!r}, which is not run compactly"
        elif conv.groups > 1 and not depthwise:
            reason = f"{name} has {conv.groups} groups, which have to stay of one size"
        elif "weight" not in conv._parameters:
            reason = f"the weight of {name} is computed from other tensors"
        elif depthwise and not x.atoms:
            reason = f"{name} is depthwise and reads {x.why}"
        if not reason and x.atoms and (x.flat or len(x.atoms) != conv.in_channels):
            reason = f"the channels that {name} reads could not be followed"
        if reason:
            self.refused[name] = reason
            return self._unknown(node, name, reason)
        if depthwise:
            multiplier = conv.out_channels // conv.in_channels
            atoms = tuple(atom for atom in x.atoms for _ in range(multiplier))
        else:
            atoms = self._fresh(conv.out_channels)
            if x.atoms:
                self.readers[name] = x.atoms
        self.producers[name] = atoms
        return Value(atoms)

    def _call(self, node: torch.fx.Node, name: str) -> object:
        args = [self._values.get(a) if isinstance(a, torch.fx.Node) else a for a in node.args]
        values = [v for v in self._inputs(node) if v is not SCALAR]
        x = args[0] if args and isinstance(args[0], Value) else None
        if name in _CONCATENATIONS:
            return self._concatenate(node, args)
        if name == "getitem" and isinstance(args[0], Shape):
            return self._size(node, args[0], args[1])
        if name in _BY_A_NUMBER and len(values) == 1 and isinstance(values[0], Value):
            by_number = name in _COUPLING or (x is not None and args[1] is not x)
            return values[0] if by_number else self._unknown(node, name)
        if name in _COUPLING and len(args) == 2 and all(isinstance(v, Value) for v in args):
            return self._couple(args[0], args[1], name.removeprefix("i"))
        if x is None or len(values) != 1:
            return self._unknown(node, name)
        if name in _CHANNELWISE:
            return x
        if name in _POOLS:
            return self._unknown(node, name) if x.flat or node.kwargs.get("return_indices") else x
        if name == "size":
            where = args[1] if len(args) > 1 else node.kwargs.get("dim")
            return Shape(x) if where is None else self._size(node, Shape(x), where)
        if name == "flatten":
            start = args[1] if len(args) > 1 else node.kwargs.get("start_dim", 0)
            return self._flatten(node, x, start, args[2] if len(args) > 2 else node.kwargs.get("end_dim", -1))
        if name in ("view", "reshape"):
            sizes = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
            sizes = [self._values.get(s) if isinstance(s, torch.fx.Node) else s for s in sizes]
            if len(sizes) == 2 and sizes[0] is SCALAR and sizes[1] == -1:
                return self._flatten(node, x, 1, -1)
            return self._unknown(node, name)
        if name in _REDUCTIONS:
            return self._reduce(node, name, x, args)
        if name == "pad" and not x.flat and len(args) > 1 and isinstance(args[1], tuple | list) and len(args[1]) <= 4:
            return x
        return self._unknown(node, name)

    def _size(self, node: torch.fx.Node, shape: Shape, where: object) -> object:
        """Sizes that are not the channels' are numbers like any other."""
        rank = 2 if shape.of.flat else 4
        if isinstance(where, int) and where % rank != 1:
            return SCALAR
        if not shape.of.flat and where == slice(2, None):
            return SCALAR
        return self._unknown(node, "a calculation with its channels' number") if node.users else SCALAR

    def _flatten(self, node: torch.fx.Node, x: Value, start: object, end: object) -> Value:
        if start != 1 or end not in (-1, 1 if x.flat else 3):
            return self._unknown(node, "flatten")
        return x if x.flat else replace(x, flat=True, repeat=None)

    def _reduce(self, node: torch.fx.Node, name: str, x: Value, args: list) -> Value:
        dims = args[1] if len(args) > 1 else node.kwargs.get("dim")
        keep = args[2] if len(args) > 2 else node.kwargs.get("keepdim", False)
        if x.flat or not isinstance(dims, tuple | list) or sorted(d % 4 for d in dims) != [2, 3]:
            return self._unknown(node, name)
        return x if keep else replace(x, flat=True)

    def _couple(self, a: Value, b: Value, how: str) -> Value:
        if not a.atoms and not b.atoms:
            return a
        if (len(a.atoms), a.flat, a.repeat) == (len(b.atoms), b.flat, b.repeat):
            for i, j in zip(a.atoms, b.atoms, strict=True):
                first, second = sorted((self.find(i), self.find(j)))
                self._parent[second] = first
            return a
        words = _WORDS.get(how, f"combined by {how} with")
        for value, other in ((a, b), (b, a)):
            self._pin(value, f"its output is {words} {other.why or 'a tensor of another shape'}")
        return Value(why=f"a result of {how}")

    def _concatenate(self, node: torch.fx.Node, args: list) -> Value:
        parts = [self._values.get(n) for n in node.args[0]] if node.args and isinstance(args[0], tuple | list) else []
        dim = args[1] if len(args) > 1 else node.kwargs.get("dim", 0)
        if parts and all(isinstance(p, Value) and p.atoms for p in parts):
            flat = {p.flat for p in parts}
            if flat == {False} and dim in (1, -3):
                return Value(tuple(atom for p in parts for atom in p.atoms))
            if flat == {True} and dim in (1, -1) and all(p.repeat == 1 for p in parts):
                return Value(tuple(atom for p in parts for atom in p.atoms), flat=True)
        return self._unknown(node, "a concatenation", "its output is concatenated with channels that are not followed")
