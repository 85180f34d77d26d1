"""What a replica is made of: models that are compiled, hooked, wrapped, or cannot be opened."""

from __future__ import annotations

import pytest
import torch
from conftest import drawn, network, randomise, relative
from torch import Tensor, nn

import pxp
from pxp.network.replica import eager, replica


def small() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


class Wrapped(nn.Module):
    """The layers with code around them, which older torch needs to compile them in place; maybe a part is compiled."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.body, self.way = randomise(small()), way
        if way == "part":
            self.body[3] = torch.compile(self.body[3], backend="eager")
        elif way == "part in place":
            self.body.compile(backend="eager")
        self.run = torch.compile(lambda x: self.body(x), backend="eager") if way == "function" else self.body

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def compiled(way: str) -> nn.Module:
    """A randomised compiled model that has run once: from then on it takes no notice of new hooks."""
    model = randomise(small()) if way == "wrapper" else Wrapped(way).eval()
    if way == "method":
        model.compile(backend="eager")
    elif way == "wrapper":
        model = torch.compile(model, backend="eager")
    model(torch.zeros(1, 1, 9, 9).double())
    return model


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("way", ["method", "wrapper", "part", "part in place"])
def test_compiled_models_are_explained_and_masked_as_they_are_written(way, fresh):
    plain, model = randomise(small()), compiled(way)
    x = torch.randn(40, 1, 9, 9).double()
    with torch.no_grad():
        next(module for module in model.modules() if isinstance(module, nn.Linear)).bias -= plain(x).mean(0)
        plain[7].bias -= plain(x).mean(0)
        y = plain(x).argmax(1)
    model(x)
    units, same = (pxp.find_components(each, example=x[:1]) for each in (model, plain))
    assert [layer.size for layer in units.values()] == [6, 8]
    one = pxp.attribute(model, (x[:8], y[:8]), units, pxp.LRP("zplus"))
    two = pxp.attribute(plain, (x[:8], y[:8]), same, pxp.LRP("zplus"))
    for ours, theirs in zip(one.signed.values(), two.signed.values(), strict=True):
        assert relative(ours, theirs) < 1e-12
    assert relative(*(pxp.heatmap(each, x[:8], y[:8]) for each in (model, plain))) < 1e-12
    expected = []
    for rate in (0, 0.2, 0.4):
        with pxp.masked(plain, two.select(rate)):
            expected.append(pxp.accuracy(plain, (x, y)))
        with pxp.masked(model, one.select(rate)):
            assert pxp.accuracy(model, (x, y)) == expected[-1]
        assert pxp.accuracy(model, (x, y)) == 1
    assert pxp.pruning_curve(model, one, (x, y), rates=(0, 0.2, 0.4), allow_shared=True).runs[0] == tuple(expected)
    assert len(set(expected)) > 1


def test_a_compiled_function_inside(fresh):
    model = compiled("function")
    x = torch.randn(4, 1, 9, 9).double()
    units = pxp.find_components(model.body, example=x)
    mask = drawn(units, 0.5)
    with torch.no_grad():
        with pxp.masked(model.body, mask):
            expected = model.body(x)
            assert torch.equal(model(x), expected)
        assert relative(model(x), model.body(x)) == 0 and relative(model(x), expected) > 1e-3


def test_what_was_compiled_stays_compiled(fresh):
    runs = []

    def backend(graph, inputs):
        return lambda *values: runs.append(1) or graph(*values)

    model = Wrapped("method")
    model.compile(backend=backend)
    x = torch.randn(2, 1, 9, 9).double()
    model(x)
    units = pxp.find_components(model, example=x)
    before = len(runs)
    with pxp.masked(model, drawn(units, 0.5)):
        model(x)
    assert len(runs) == before
    model(x)
    assert len(runs) == before + 1


def test_threads_leave_what_they_found(fresh):
    """The context in which compiled code runs as it is written is one for all threads."""
    runs = []

    def backend(graph, inputs):
        return lambda *values: runs.append(1) or graph(*values)

    function = torch.compile(lambda x: x + 1, backend=backend)
    function(torch.ones(2))
    first, second = eager(), eager()
    before = len(runs)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    function(torch.ones(2))
    assert len(runs) == before
    second.__exit__(None, None, None)
    function(torch.ones(2))
    assert len(runs) == before + 1


def test_hooks_on_the_backward_pass_neither_run_nor_disturb(untouched):
    model, x, labels, units = network("vgg")
    expected = [pxp.attribute(model, (x, labels), units, criterion) for criterion in (pxp.LRP("gamma"), pxp.Taylor())]
    heat, seen = pxp.heatmap(model, x, labels), []
    for module in model.modules():
        module.register_full_backward_hook(lambda module, inputs, outputs: seen.append(1))
        module.register_full_backward_pre_hook(lambda module, outputs: tuple(2 * each for each in outputs))
    untouched(model)
    for criterion, before in zip((pxp.LRP("gamma"), pxp.Taylor()), expected, strict=True):
        found = pxp.attribute(model, (x, labels), units, criterion)
        assert all(torch.equal(found.signed[name], before.signed[name]) for name in units)
    assert torch.equal(pxp.heatmap(model, x, labels), heat) and seen == []


def test_hooks_on_the_forward_pass_come_along():
    model, x, _labels, _units = network("vgg")
    model.features[0].register_forward_hook(lambda module, inputs, output: output * 2)
    assert relative(replica(model)(x), model(x)) < 1e-12


def test_a_forward_pass_that_runs_another_objects_layers_is_refused():
    model = small().eval()
    model.forward = lambda x: model[7](model[:7](x))  # the copy's forward pass would run these layers
    x, labels = torch.rand(2, 1, 9, 9), torch.tensor([0, 1])
    for criterion in (pxp.LRP(), pxp.Taylor()):
        with pytest.raises(ValueError, match="'0' of the model itself runs inside a copy of Sequential"):
            pxp.heatmap(model, x, labels, criterion)


def quantised(way: str) -> nn.Module:
    if way == "dynamic":
        return torch.ao.quantization.quantize_dynamic(small(), {nn.Linear})
    model = nn.Sequential(torch.ao.quantization.QuantStub(), small(), torch.ao.quantization.DeQuantStub()).eval()
    if way == "aware training":
        model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        return torch.ao.quantization.prepare_qat(model.train())
    model.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    torch.ao.quantization.prepare(model, inplace=True)
    model(torch.rand(4, 1, 9, 9))
    return torch.ao.quantization.convert(model)


def sharded() -> nn.Module:
    from torch.testing._internal.two_tensor import TwoTensor

    model = small()
    model[3].weight = nn.Parameter(TwoTensor(model[3].weight.data, model[3].weight.data.clone()))
    return model


class DistributedDataParallel(nn.Module):
    """Stands for torch's, which needs several processes."""

    def __init__(self) -> None:
        super().__init__()
        self.module = small()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


CLOSED = {
    "scripted": (lambda: torch.jit.script(small()), r"the model \(RecursiveScriptModule\) is TorchScript.*that it was made of"),
    "traced": (lambda: torch.jit.trace(small().eval(), torch.rand(1, 1, 9, 9)), r"the model \(TopLevelTracedModule\) is TorchScript"),
    "a scripted part": (lambda: nn.Sequential(torch.jit.script(small()[:3]), *small()[3:]), r"'0' \(RecursiveScriptModule\) is TorchScript"),
    "dynamic quantisation": (lambda: quantised("dynamic"), r"'7' \(Linear\) is quantised and has no gradient; explain and prune .* floating point"),
    "static quantisation": (lambda: quantised("static"), r"'1\.0' \(Conv2d\) is quantised|'0' \(Quantize\) is quantised"),
    "quantisation-aware training": (lambda: quantised("aware training"), r"prepares the model for quantisation and changes with every batch"),
    "another kind of tensor": (sharded, r"the weight of '3' \(Conv2d\) is a TwoTensor .* which no rule can read"),
    "lazy convolution": (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.Linear(4, 2)), r"'0' \(LazyConv2d\) has not run yet.*on a batch first"),
    "lazy norm": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.LazyBatchNorm2d()), r"'1' \(LazyBatchNorm2d\) has not run yet"),
    "several processes": (DistributedDataParallel, r"the model \(DistributedDataParallel\) is a wrapper .*: \.module"),
}  # fmt: skip


def test_what_may_be_quantised_later_is_ordinary():
    plain = randomise(small())
    model = nn.Sequential(torch.ao.quantization.QuantStub(), plain, torch.ao.quantization.DeQuantStub()).eval()
    x, labels = torch.randn(2, 1, 9, 9).double(), torch.tensor([0, 1])
    assert torch.equal(pxp.heatmap(model, x, labels), pxp.heatmap(plain, x, labels))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CLOSED)
def test_models_that_cannot_be_opened_say_what_to_do(name):
    make, message = CLOSED[name]
    model, x = make().eval(), torch.rand(2, 1, 9, 9)
    units = pxp.find_components(small(), example=x)
    scores = pxp.attribute(small(), None, units, pxp.Random(0))
    for call in (
        lambda: pxp.find_components(model, example=x),
        lambda: pxp.heatmap(model, x, 1),
        lambda: pxp.attribute(model, (x, torch.tensor([0, 1])), units, pxp.LRP()),
        lambda: pxp.pruning_curve(model, scores, (x, torch.tensor([0, 1])), rates=[0]),
        lambda: pxp.masked(model, scores.select(0.5)).__enter__(),
    ):
        with pytest.raises(ValueError, match=message):
            call()


class Notes(nn.Module):
    """Writes down what it sees, also in evaluation mode, into every kind of place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)
        self.register_buffer("highest", torch.zeros(4))
        self.register_buffer("passes", torch.tensor(0), persistent=False)
        self.register_buffer("latest", None)
        self.last, self.seen = torch.full((4,), torch.nan), torch.zeros(4)
        with torch.inference_mode():
            self.register_buffer("made", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().mean((2, 3))
        with torch.no_grad():
            torch.maximum(self.highest, x.amax(0), out=self.highest)
            self.passes += 1
            self.seen[:2] = x[0, :2]
            self.last = self.latest = x.mean(0)
        if torch.is_inference_mode_enabled():
            self.made.add_(1)
        return self.fc(x)

    def train(self, mode: bool = True) -> None:
        super().train(mode)
        self.conv.eval()


def test_what_a_forward_pass_writes_down_stays_as_it_was(untouched):
    model = Notes().double()
    for module in model.modules():
        module.training = False
    x, y = torch.rand(6, 1, 8, 8).double(), torch.arange(6) % 3
    names = ("highest", "passes", "latest", "last", "seen", "made")
    before = {name: (value := getattr(model, name), None if value is None else value.clone()) for name in names}

    def same() -> bool:
        return all(
            getattr(model, name) is held and (held is None or torch.equal(held.nan_to_num(7), value.nan_to_num(7)))
            for name, (held, value) in before.items()
        )

    untouched(model)
    units = pxp.find_components(model, example=x[:1])
    assert same()
    assert pxp.heatmap(model, x, y).isfinite().all() and same()
    scores = pxp.attribute(model, (x, y), units, pxp.LRP())
    assert same()
    pxp.pruning_curve(model, scores, (x, y), rates=(0, 0.5), allow_shared=True)
    pxp.cost(model, x[:1])
    assert pxp.accuracy(model, (x, y)) <= 1 and same()
    with torch.inference_mode():
        pxp.accuracy(model, (x, y))
    assert same()
    pxp.compact(model, scores.select(0.5), example=x[:1])
    assert same()
    tuned = pxp.finetune(model, (x, y), epochs=1, batch_size=3)
    assert not tuned.training and same()


@pytest.mark.parametrize("inner", [nn.BatchNorm2d(4), nn.Dropout()], ids=lambda inner: type(inner).__name__)
def test_what_gives_itself_when_it_is_copied_is_named(inner, untouched):
    class Single(type(inner)):
        def __deepcopy__(self, memo):
            return self

    inner.__class__ = Single
    model = untouched(nn.Sequential(nn.Conv2d(1, 4, 3), inner, nn.Flatten(), nn.Linear(144, 3)))
    with pytest.raises(ValueError, match=r"'1' \(Single\) gives itself when it is copied"):
        pxp.find_components(model, example=torch.rand(1, 1, 8, 8))
