"""What physical removal gains, side by side with Torch-Pruning: ``python benchmarks/removal.py [--quick]``.

Half of the components of every layer are removed at random from networks with random weights. Latencies are relative to
the whole network, measured in turn in one process on one thread. *built* is a network that has those sizes from the
start: without BatchNorm, as pxp merges it, and, where residual branches differ in width, with sums over slices.
Torch-Pruning keeps BatchNorm, as the whole network does.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from bench import medians
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import vgg, vision_transformer

import pxp

try:
    import torch_pruning
except ImportError:
    torch_pruning = None

STAGES = ("layer1", "layer2", "layer3", "layer4")
BUILT_TARGET = 1.1
ERROR_TARGET = 1e-5


# --- networks that have the size from the start -----------------------------------------------------------------------


def built_vgg(mask: pxp.Mask) -> nn.Module:
    sizes = [int(kept.sum()) for kept in mask.values()]
    remaining = iter(sizes)
    features = vgg.make_layers([width if width == "M" else next(remaining) for width in vgg.cfgs["D"]])
    model = vgg.VGG(features, init_weights=False)
    model.classifier[0] = nn.Linear(sizes[-1] * 49, 4096)
    return model.eval()


def _sum(x: Tensor, y: Tensor, width: int) -> Tensor:
    """Add two tensors to one of ``width`` channels: the one from its start, the other to its end."""
    if x.shape[1] < width:
        x = F.pad(x, (0, 0, 0, 0, 0, width - x.shape[1]))
    if y.shape[1] == width:
        return x.add_(y)
    x[:, width - y.shape[1] :] += y
    return x


class Block(nn.Module):
    """A basic block whose convolutions and shortcut have any widths."""

    def __init__(self, widths: tuple[int, int, int, int], shortcut: int | None, stride: int) -> None:
        super().__init__()
        before, middle, branch, self.width = widths
        self.conv1 = nn.Conv2d(before, middle, 3, stride, 1)
        self.conv2 = nn.Conv2d(middle, branch, 3, 1, 1)
        self.shortcut = nn.Identity() if shortcut is None else nn.Conv2d(before, shortcut, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu_(self.conv1(x)))
        return F.relu_(_sum(self.shortcut(x), y, self.width))


def built_resnet(mask: pxp.Mask) -> nn.Module:
    """ResNet-18 whose stream carries in each block only the channels that something was written to."""
    stream = mask["conv1"]
    layers: list[nn.Module] = [nn.Conv2d(3, int(stream.sum()), 7, 2, 3), nn.ReLU(True), nn.MaxPool2d(3, 2, 1)]
    for stage in STAGES:
        for block in (f"{stage}.0", f"{stage}.1"):
            projected = mask.get(f"{block}.downsample.0")
            after = mask[f"{block}.conv2"] | (stream if projected is None else projected)
            widths = (stream, mask[f"{block}.conv1"], mask[f"{block}.conv2"], after)
            shortcut, stride = (None, 1) if projected is None else (int(projected.sum()), 2)
            layers.append(Block(tuple(int(kept.sum()) for kept in widths), shortcut, stride))
            stream = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(int(stream.sum()), 1000)).eval()


class Heads(nn.Module):
    """Self-attention of which the heads together are narrower than the tokens, called as torch's own is."""

    def __init__(self, heads: int, width: int, each: int) -> None:
        super().__init__()
        self.each = each
        self.qkv, self.out = nn.Linear(width, 3 * heads * each), nn.Linear(heads * each, width)

    def forward(self, x: Tensor, *_: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.each)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


def built_vit(mask: pxp.Mask) -> nn.Module:
    model = vision_transformer.vit_b_16()
    for name, kept in mask.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, vision_transformer.MLPBlock):
            parent[0], parent[3] = nn.Linear(768, int(kept.sum())), nn.Linear(int(kept.sum()), 768)
        else:
            parent.self_attention = Heads(int(kept.sum()), 768, 64)
    return model.eval()


# --- what is removed --------------------------------------------------------------------------------------------------


def half(units: pxp.Components, groups: tuple[tuple[str, ...], ...] = ()) -> pxp.Mask:
    """Keep half of every layer at random; the layers of a group keep the same channels."""
    generator = torch.Generator().manual_seed(0)
    first = {name: group[0] for group in groups for name in group}
    kept: dict[str, Tensor] = {}
    for name, layer in units.items():
        chosen = torch.randperm(layer.size, generator=generator) < layer.size // 2
        kept[name] = kept.get(first.get(name, ""), chosen)
    return pxp.Mask(units, kept)


def coupled(units: pxp.Components) -> pxp.Mask:
    """One choice for all that is added to the same residual stream."""
    groups = [
        tuple(name for name in units if name.startswith(stage) and not name.endswith("conv1")) for stage in STAGES
    ]
    groups[0] = ("conv1", *groups[0])
    return half(units, tuple(groups))


def inside(units: pxp.Components) -> pxp.Mask:
    """Only the blocks' first convolutions, which no residual sum reads."""
    mask = half(units)
    for name in mask:
        if not name.startswith("layer") or not name.endswith("conv1"):
            mask[name][:] = True
    return mask


@dataclass(frozen=True)
class Removal:
    """A row of the table; ``target`` is the latency that the best peer reaches, where one can do it."""

    model: str
    kinds: str | tuple[str, ...]
    choose: Callable[[pxp.Components], pxp.Mask]
    build: Callable[[pxp.Mask], nn.Module]
    target: float | None = None


ROWS = {
    "vgg16_bn, filters": Removal("vgg16_bn", "filter", half, built_vgg, 0.32),
    "resnet18, independent": Removal("resnet18", "filter", half, built_resnet),
    "resnet18, coupled": Removal("resnet18", "filter", coupled, built_resnet, 0.36),
    "resnet18, in blocks": Removal("resnet18", "filter", inside, built_resnet, 0.62),
    "vit_b_16, neurons": Removal("vit_b_16", "neuron", half, built_vit, 0.69),
    "vit_b_16, heads + neurons": Removal("vit_b_16", ("head", "neuron"), half, built_vit),
}


def by_torch_pruning(model: nn.Module, mask: pxp.Mask, images: Tensor) -> nn.Module:
    """The same removal; of a group that its dependency graph holds together, the first layer's choice."""
    assert torch_pruning is not None
    made = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says which parameters belong to no layer
        graph = torch_pruning.DependencyGraph().build_dependency(made, images)
    for name, kept in mask.items():
        layer, remove, each = made.get_submodule(name), torch_pruning.prune_linear_out_channels, 1
        if isinstance(layer, nn.Conv2d):
            remove = torch_pruning.prune_conv_out_channels
        elif isinstance(layer, nn.MultiheadAttention):
            remove, each = torch_pruning.prune_multihead_attention_out_channels, layer.head_dim
        gone = (~kept).repeat_interleave(each).nonzero().flatten().tolist()
        if gone and len(kept) * each == graph.get_out_channels(layer):
            graph.get_pruning_group(layer, remove, idxs=gone).prune()
    return made.eval()


# --- the table --------------------------------------------------------------------------------------------------------


def prepared(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    """A network with random weights, in which no BatchNorm is the identity, and random images."""
    torch.manual_seed(0)
    model = pxp.load_model(f"torchvision/{name}")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.6, 1.4), (module.bias, -0.2, 0.2),
                (module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 1.5),
            ):  # fmt: skip
                nn.init.uniform_(tensor, low, high)
        elif isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)  # torchvision's transformers start with an all-zero head
    return model, torch.rand(batch, 3, 224, 224)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def row(name: str, batch: int, repeats: int) -> str | None:
    """Measure and print a row; returns what Torch-Pruning fails with."""
    removal = ROWS[name]
    model, images = prepared(removal.model, batch)
    mask = removal.choose(pxp.find_components(model, removal.kinds))
    start = time.process_time()
    small = pxp.compact(model, mask)
    seconds = time.process_time() - start
    candidates = {"dense": model, "pxp": small, "built": removal.build(mask)}
    with torch.no_grad(), pxp.masked(model, mask):
        expected = model(images)
    failure = difference = None
    if torch_pruning is not None:
        try:
            other = by_torch_pruning(model, mask, images)
            with torch.no_grad():
                difference = error(other(images), expected)
        except Exception as problem:  # whatever it is, it is its answer
            failure = f"{type(problem).__name__}: {problem}"
        else:
            candidates["peer"] = other
            if difference > 1e-3:
                failure = f"another network than the masked one, relative error {difference:.2f}"
    with torch.no_grad():
        wrong = error(small(images), expected)
        found = medians({key: partial(each, images) for key, each in candidates.items()}, repeats)
    ratio = {key: value / found["dense"] for key, value in found.items()}
    target = "-" if removal.target is None else f"{removal.target:.2f}"
    peer = "-" if torch_pruning is None else "cannot" if failure else f"{ratio['peer']:.2f}"
    off = "-" if difference is None else f"{difference:.0e}"
    print(
        f"{name:<26} {ratio['pxp']:5.2f} {target:>6} {peer:>9} {wrong:9.0e} {off:>9} {ratio['built']:6.2f} "
        f"{ratio['pxp'] / ratio['built']:10.2f} {seconds:8.1f}",
        flush=True,
    )
    return failure


def table(names: list[str], batch: int, repeats: int) -> None:
    print(f"Half of all components removed at random; latency relative to the whole network, batch {batch}, 224 x 224,")
    print(f"one thread, median of {repeats}; errors relative to the masked network, float32")
    print(f"{'':<26} {'':>5} {'':>6} {'Torch-':>9} {'error':>9} {'error':>9} {'':>6} {'pxp /':>10} {'pxp':>8}")
    print(
        f"{'':<26} {'pxp':>5} {'target':>6} {'Pruning':>9} {'pxp':>9} {'T.-P.':>9} {'built':>6} {'built':>10} "
        f"{'seconds':>8}"
    )
    failures = {name: row(name, batch, repeats) for name in names}
    print(f"targets: error of pxp at most {ERROR_TARGET:.0e}, pxp / built at most {BUILT_TARGET}, seconds a few")
    for name, failure in failures.items():
        if failure:
            print(f"Torch-Pruning, {name}: {failure}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ResNet-18 only, seven repeats")
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"default: all of {'; '.join(ROWS)}")
    parser.add_argument("--batch", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        peer = version("torch-pruning")
    except PackageNotFoundError:
        peer = "is not installed: pip install torch-pruning==1.6.1"
    print(f"torch {torch.__version__}, Torch-Pruning {peer}")
    rows = [name for name in ROWS if "resnet18" in name] if arguments.quick else list(ROWS)
    table(arguments.rows or rows, arguments.batch, 7 if arguments.quick else 21)
