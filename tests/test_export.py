"""A smaller network leaves Python: onnxruntime, torch.export and torch.compile give its logits, whatever the batch."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache

import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
from conftest import Grouped, drawn, randomise, relative
from onnx.numpy_helper import to_array
from torch import Tensor, nn

import pxp
from pxp.compaction.channels import Affine, Constant, Expand, Join, Select


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=5)


def mobilenet() -> nn.Module:
    shorter = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]  # than the original, for the time the export takes
    return torchvision.models.mobilenet_v2(num_classes=5, inverted_residual_setting=shorter)


def vit_tiny() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)


HEADS = ("head", "neuron")
# shape of an image, kinds of components, share of them removed, and how the network is made if it is not shipped
CASES: dict[str, tuple[tuple[int, ...], str | tuple[str, ...], float, Callable[[], nn.Module] | None]] = {
    "vgg": ((1, 28, 28), ("filter", "neuron"), 0.5, None),
    "resnet": ((1, 28, 28), "filter", 0.5, None),
    "resnet, no stem": ((1, 28, 28), "filter", 0, None),
    "vit": ((1, 28, 28), HEADS, 0.5, None),
    "vit, nothing kept": ((1, 28, 28), HEADS, 1, None),
    "torchvision resnet18": ((3, 32, 32), "filter", 0.5, resnet18),
    "torchvision mobilenet_v2": ((3, 32, 32), "filter", 0.5, mobilenet),
    "timm vit_tiny": ((3, 32, 32), HEADS, 0.5, vit_tiny),
    "timm vit_tiny, nothing kept": ((3, 32, 32), HEADS, 1, vit_tiny),
    "grouped": ((3, 18, 18), "filter", 0.5, Grouped),
}
PLAIN = [name for name in CASES if "," not in name]


@cache
def compacted(name: str) -> nn.Module:
    shape, kinds, rate, make = CASES[name]
    torch.manual_seed(0)
    model = pxp.load_model(name.split(",")[0]) if make is None else randomise(make()).float()
    example = torch.rand(1, *shape)
    mask = drawn(pxp.find_components(model, kinds, example=example), rate)
    if name.endswith("no stem"):  # a constant then stands in the middle of the network
        mask["conv1"][:] = False
    return pxp.compact(model, mask, example=example)


@cache
def exported(name: str) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    return torch.export.export(compacted(name), (images(name, 3),), dynamic_shapes=({0: batch},))


def images(name: str, number: int) -> Tensor:
    return torch.rand(number, *CASES[name][0], generator=torch.Generator().manual_seed(number))


@torch.no_grad()
def check(run: Callable[[Tensor], Tensor], name: str) -> None:
    """Compare at the batch size of the export and at others."""
    for number in (3, 1, 5):
        x = images(name, number)
        assert relative(run(x), compacted(name)(x)) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_onnx(name):
    program = torch.onnx.export(exported(name), (), dynamo=True, verbose=False)
    made = program.model_proto
    onnx.checker.check_model(made, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert isinstance(given.shape[0], str) and tuple(given.shape[1:]) == CASES[name][0]
    check(lambda x: torch.from_numpy(session.run(None, {given.name: x.numpy()})[0]), name)
    # what was removed is not in the file either
    weights = sum(p.numel() for p in (*compacted(name).parameters(), *compacted(name).buffers()))
    assert sum(to_array(stored).size for stored in made.graph.initializer) <= weights + 100


@pytest.mark.parametrize("name", CASES)
def test_torch_export(name):
    file = io.BytesIO()
    torch.export.save(exported(name), file)
    file.seek(0)
    check(torch.export.load(file).module(), name)


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "resnet"])  # that one is in test_compact.py
def test_compile(name):
    compiled, x = torch.compile(compacted(name), backend="aot_eager", fullgraph=True, dynamic=False), images(name, 2)
    with torch.no_grad():
        assert relative(compiled(x), compacted(name)(x)) < 1e-5


def test_every_small_layer_was_exported():
    used = {type(module) for name in CASES for module in compacted(name).modules()}
    assert used >= {Affine, Constant, Expand, Join, Select}
