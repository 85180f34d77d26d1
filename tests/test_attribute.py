"""Attribution: what is summed and averaged, every criterion by hand, and a model that is left bit for bit as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import zennit.composites
import zennit.rules
from by_hand import close, flows, sites, target_sum
from by_zennit import TINY, zennit_relevance
from conftest import Grouped, mlp, network, randomise, relative, same, snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.vision_transformer import VisionTransformer
from zennit.canonizers import SequentialMergeBatchNorm

import pxp
from pxp.cost import peak_memory
from pxp.models import VGG, SmallResNet

CRITERIA = [
    pxp.LRP("epsilon"),
    pxp.LRP("gamma", low="zplus", fc="alpha2beta1"),
    pxp.LRP("epsilon", start="margin", path_steps=3),
    pxp.Taylor(),
    pxp.IntegratedGradients(steps=3),
    pxp.IntegratedGradients(steps=3, influence=True),
    pxp.Activation(),
    pxp.Magnitude(),
    pxp.Random(3),
]


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
def test_a_batch_equals_its_samples_averaged(criterion):
    model, x, labels, units = network("resnet", samples=8)
    whole = pxp.attribute(model, (x, labels), units, criterion)
    if whole.samples == 0:
        assert isinstance(criterion, pxp.Magnitude | pxp.Random)
        return
    assert whole.samples == 8
    singles = [pxp.attribute(model, (x[i : i + 1], labels[i : i + 1]), units, criterion) for i in range(8)]
    for layer in units:
        assert relative(whole[layer], torch.stack([s[layer] for s in singles]).mean(0)) < 1e-9
        assert relative(whole.signed[layer], torch.stack([s.signed[layer] for s in singles]).mean(0)) < 1e-9


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
def test_batch_size_loader_dataset_and_repetition_change_nothing(criterion):
    model, x, labels, units = network("vgg", samples=7)
    expected = pxp.attribute(model, (x, labels), units, criterion)
    pairs = TensorDataset(x, labels)
    assert close(pxp.attribute(model, (x, labels), units, criterion, batch_size=3), expected)
    assert close(pxp.attribute(model, DataLoader(pairs, batch_size=2), units, criterion), expected)
    assert close(pxp.attribute(model, pairs, units, criterion, batch_size=5), expected)
    assert close(pxp.attribute(model, [x, labels], units, criterion), expected)
    assert close(pxp.attribute(model, (x.float().double(), labels), units, criterion), expected, 1e-4)
    again = pxp.attribute(model, (x, labels), units, criterion)
    assert all(torch.equal(again[k], expected[k]) and torch.equal(again.signed[k], expected.signed[k]) for k in units)


@pytest.mark.parametrize("name", ["vgg", "resnet", "grouped", "conv1d"])
def test_sum_over_space_then_absolute_then_mean_over_samples(name):
    model, x, labels, units = network(name, samples=5)
    outputs, gradients = flows(model, x, labels, sites(units), target_sum)
    scores = pxp.attribute(model, (x, labels), units, pxp.LRP(pxp.Epsilon(0)))
    for layer in units:
        per_sample = (outputs[layer] * gradients[layer]).detach().flatten(2).sum(2)
        assert relative(scores.signed[layer], per_sample.mean(0)) < 1e-9
        assert relative(scores[layer], per_sample.abs().mean(0)) < 1e-9
        assert relative(scores[layer], per_sample.mean(0).abs()) > 1e-3


def test_neurons_take_the_absolute_value_per_token():
    model = randomise(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.Flatten(), nn.Linear(12, 3)))
    x, labels = torch.randn(5, 3, 6).double(), torch.tensor([0, 1, 2, 0, 1])
    units = pxp.find_components(model, "neuron", example=x)
    outputs, gradients = flows(model, x, labels, {"0": "0"}, target_sum)
    per_token = (outputs["0"] * gradients["0"]).detach()  # (samples, tokens, neurons)
    scores = pxp.attribute(model, (x, labels), units, pxp.LRP(pxp.Epsilon(0)))
    assert relative(scores.signed["0"], per_token.sum(1).mean(0)) < 1e-12
    assert relative(scores["0"], per_token.abs().sum(1).mean(0)) < 1e-12


STARTS = {
    "logit": target_sum,
    "one": lambda logits, labels: (
        logits.gather(1, labels[:, None]) / logits.gather(1, labels[:, None]).detach()
    ).sum(),
    "margin": lambda logits, labels: sum(
        row[c] - max(row[k] for k in range(len(row)) if k != c) for row, c in zip(logits, labels.tolist(), strict=True)
    ),
    "loss": lambda logits, labels: (
        -sum(  # positive is useful
            row.exp().sum().log() - row[c] for row, c in zip(logits, labels.tolist(), strict=True)
        )
    ),
}


@pytest.mark.parametrize("start", STARTS)
def test_starts(start):
    model, x, labels, units = network("vgg", samples=4)
    outputs, gradients = flows(model, x, labels, sites(units), STARTS[start])
    scores = pxp.attribute(model, (x, labels), units, pxp.LRP(pxp.Epsilon(0), start=start))
    taylor = pxp.attribute(model, (x, labels), units, pxp.Taylor(start=start))
    gradients_of_path = pxp.attribute(
        model, (x, labels), units, pxp.IntegratedGradients(1, influence=True, start=start)
    )
    for layer in units:
        expected = (outputs[layer] * gradients[layer]).detach().flatten(2).sum(2)
        assert relative(scores.signed[layer], expected.mean(0)) < 1e-9
        assert relative(scores[layer], expected.abs().mean(0)) < 1e-9
        # on a ReLU network, LRP-0 is activation × gradient
        assert relative(taylor.signed[layer], expected.mean(0)) < 1e-9
        assert relative(gradients_of_path.signed[layer], gradients[layer].flatten(2).sum(2).mean(0)) < 1e-9


def test_starting_with_one_divides_by_the_logit():
    model, x, labels, units = network("resnet", samples=1)
    logit = float(model(x)[0, labels[0]].detach())
    a = pxp.attribute(model, (x, labels), units, pxp.LRP("zplus"))
    b = pxp.attribute(model, (x, labels), units, pxp.LRP("zplus", start="one"))
    assert max(relative(b.signed[k] * logit, a.signed[k]) for k in units) < 1e-10


def test_path_steps_average_over_darker_images():
    model, x, labels, units = network("vgg")
    found = pxp.attribute(model, (x, labels), units, pxp.LRP("gamma", path_steps=4))
    parts = [pxp.attribute(model, (x * k / 4, labels), units, pxp.LRP("gamma")) for k in (1, 2, 3, 4)]
    for layer in units:
        assert relative(found.signed[layer], sum(p.signed[layer] for p in parts) / 4) < 1e-9
    heat = pxp.heatmap(model, x, labels, pxp.LRP("gamma", path_steps=4))
    by_hand = sum(pxp.heatmap(model, x * k / 4, labels, pxp.LRP("gamma")) for k in (1, 2, 3, 4)) / 4
    assert relative(heat, by_hand) < 1e-9


def _zennit_like(gamma: float = 0.25):
    return zennit.composites.LayerMapComposite(
        [
            (zennit.types.Activation, zennit.rules.Pass()),
            (zennit.types.AvgPool, zennit.rules.Norm(TINY)),
            (zennit.types.Convolution, zennit.rules.Gamma(gamma, stabilizer=TINY)),
            (nn.Linear, zennit.rules.Epsilon(TINY)),
        ],
        canonizers=[SequentialMergeBatchNorm()],
    )


@pytest.mark.parametrize("name", ["vgg", "conv1d"])
def test_a_zennit_composite_in_place_of_ours(name, untouched):
    model, x, labels, units = network(name)
    untouched(model)
    composite = _zennit_like()
    ours = pxp.LRP(pxp.Gamma(0.25, epsilon=TINY), fc=pxp.Epsilon(TINY))
    expected = pxp.attribute(model, (x, labels), units, ours)
    for _ in range(2):  # it can be used again
        assert close(pxp.attribute(model, (x, labels), units, composite), expected, 1e-8)
        assert relative(pxp.heatmap(model, x, labels, composite), pxp.heatmap(model, x, labels, ours)) < 1e-8
    assert pxp.attribute(model, (x, labels), units, composite).criterion == "LayerMapComposite"


def test_zennits_epsilon_gamma_box():
    model, x, labels, units = network("vgg")
    box = zennit.composites.EpsilonGammaBox(-5.0, 5.0, epsilon=TINY, gamma=0.25, stabilizer=TINY)
    ours = pxp.LRP(pxp.Gamma(0.25, epsilon=TINY), fc=pxp.Epsilon(TINY), input=pxp.ZBox(-5.0, 5.0, epsilon=TINY))
    assert relative(pxp.heatmap(model, x, labels, ours), pxp.heatmap(model, x, labels, box)) < 1e-8
    expected = pxp.attribute(model, (x, labels), units, box)
    assert close(pxp.attribute(model, (x, labels), units, ours), expected, 1e-8)


def test_zennits_resnet_canonizer():
    from zennit.torchvision import ResNetCanonizer

    model, x, labels, units = network("resnet")
    composite = zennit.composites.LayerMapComposite(
        [
            (zennit.types.Activation, zennit.rules.Pass()),
            (zennit.layer.Sum, zennit.rules.Norm(TINY)),
            (zennit.types.AvgPool, zennit.rules.Norm(TINY)),
            (zennit.types.Linear, zennit.rules.ZPlus(stabilizer=TINY)),
        ],
        canonizers=[ResNetCanonizer()],
    )
    expected = pxp.attribute(model, (x, labels), units, pxp.LRP(pxp.ZPlus(epsilon=TINY)))
    assert close(pxp.attribute(model, (x, labels), units, composite), expected, 1e-8)


def _hook(*_):
    return None


def _prepared(name: str, **changes) -> tuple[nn.Module, Tensor, Tensor, pxp.Components]:
    """In training mode in parts, with hooks of the user's, gradients and frozen parameters."""
    model, x, labels, units = network(name)
    model.train()
    for index, (module, parameter) in enumerate(zip(model.modules(), model.parameters(), strict=False)):
        module.training = index % 3 != 0
        parameter.requires_grad_(index % 4 != 0)
        if index % 2:
            parameter.grad = torch.full_like(parameter, 0.5)
    for module in list(model.modules())[::2]:
        module.register_forward_hook(_hook)
        module.register_forward_pre_hook(_hook)
        module.register_full_backward_hook(_hook)
    for module in list(model.modules())[1::3]:
        module.register_forward_hook(lambda module, args, kwargs, output: None, with_kwargs=True)
        module.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    return model, x, labels, units


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
@pytest.mark.parametrize("name", ["vgg", "resnet", "grouped"])
def test_any_state_of_the_model_is_fine_and_kept(name, criterion, untouched):
    clean, x, labels, units = network(name)
    expected = pxp.attribute(clean, (x, labels), units, criterion)
    model, *_ = _prepared(name)
    untouched(model)
    images = x.clone().requires_grad_()
    assert close(pxp.attribute(model, (images, labels), units, criterion), expected, 1e-12)
    assert images.grad is None and images.requires_grad
    if isinstance(criterion, pxp.LRP | pxp.Taylor | pxp.IntegratedGradients):
        assert relative(pxp.heatmap(model, x, labels, criterion), pxp.heatmap(clean, x, labels, criterion)) < 1e-12


class Fails(nn.Module):
    """An activation that raises in the second batch."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.calls, self.error = 0, error

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise self.error("the second batch is bad")
        return F.relu(x)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize(
    "criterion",
    [c for c in CRITERIA if not isinstance(c, pxp.Magnitude | pxp.Random)] + [_zennit_like()],
    ids=lambda criterion: repr(criterion).partition(" object at")[0],
)
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(criterion, error):
    model, x, labels, units = _prepared("vgg")
    model.features[9] = Fails(error)
    before, classes = snapshot(model), _classes()
    with pytest.raises((error, ValueError), match="the second batch is bad"):
        pxp.attribute(model, (x, labels), units, criterion, batch_size=1)
    assert same(before, snapshot(model))
    if isinstance(criterion, pxp.LRP):
        with pytest.raises((error, ValueError), match="the second batch is bad"):
            pxp.heatmap(model, x, labels, criterion, batch_size=1)
        assert same(before, snapshot(model))
    assert _classes() == classes
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    model.features[9] = nn.ReLU()
    fresh, *_ = network("vgg")
    if isinstance(criterion, pxp.LRP):
        again = pxp.attribute(model, (x, labels), units, criterion)
        assert close(again, pxp.attribute(fresh, (x, labels), units, criterion), 1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
def test_without_gradients_around_the_call(criterion, mode):
    model, x, labels, units = network("resnet")
    expected = pxp.attribute(model, (x, labels), units, criterion)
    with mode():
        assert close(pxp.attribute(model, (x.clone(), labels.clone()), units, criterion), expected, 1e-12)
        assert torch.is_grad_enabled() is False
        if isinstance(criterion, pxp.LRP):
            heat = pxp.heatmap(model, x.clone(), labels, criterion)
    if isinstance(criterion, pxp.LRP):
        assert relative(heat, pxp.heatmap(model, x, labels, criterion)) < 1e-12


class Functional(nn.Module):
    """What people write: functional in-place ReLU and a residual sum in place."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace_forward = inplace
        self.conv1, self.norm1 = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv3, self.fc = nn.Conv2d(6, 6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.inplace_forward:
            x = F.relu(self.norm1(self.conv1(x)), inplace=True)
            out = self.norm2(self.conv2(x))
            out += x
            out = self.conv3(out.relu_())
            out *= 2
            return self.fc(torch.relu_(out).mean((2, 3)))
        x = F.relu(self.norm1(self.conv1(x)))
        return self.fc(F.relu(2 * self.conv3(F.relu(self.norm2(self.conv2(x)) + x))).mean((2, 3)))


@pytest.mark.parametrize("criterion", CRITERIA[:-2], ids=repr)
def test_in_place_operations_change_nothing(criterion):
    a, b = randomise(Functional(True)), randomise(Functional(False))
    x, labels = torch.randn(4, 1, 9, 9).double(), torch.tensor([0, 1, 2, 1])
    units = pxp.find_components(a, example=x)
    assert pxp.find_components(b, example=x)["conv2"] == units["conv2"]
    found, expected = (pxp.attribute(m, (x, labels), units, criterion) for m in (a, b))
    assert close(found, expected, 1e-12)
    if isinstance(criterion, pxp.LRP):
        assert relative(pxp.heatmap(a, x, labels, criterion), pxp.heatmap(b, x, labels, criterion)) < 1e-12


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"net": net})

    def forward(self, images: Tensor) -> Tensor:
        return self.inner["net"](images)


def test_a_model_made_in_inference_mode():
    model, x, labels, units = network("vgg")
    with torch.inference_mode():
        made = copy.deepcopy(model)
    assert all(p.is_inference() for p in made.parameters())
    expected = pxp.attribute(model, (x, labels), units, pxp.LRP("gamma"))
    with torch.inference_mode():
        inside = pxp.find_components(made, "filter")
    found = pxp.attribute(made, (x, labels), inside, pxp.LRP("gamma"))
    assert all(torch.equal(found[name], expected[name]) for name in units)
    assert torch.equal(pxp.heatmap(made, x, labels), pxp.heatmap(model, x, labels))


def test_layers_called_by_keyword_are_named():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.conv(input=x).mean((2, 3)))

    for example in (None, torch.zeros(1, 1, 8, 8)):
        with pytest.raises(TypeError, match=r"'conv' is called by keyword; .* write layer\(x\)"):
            pxp.find_components(Keyword(), "filter", example=example)


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_wrapped_and_nested_models(name):
    model, x, labels, units = network(name)
    lrp = pxp.LRP("gamma", low="zplus", fc="alpha2beta1")
    expected = pxp.attribute(model, (x, labels), units, lrp)
    for outer, prefix in ((Wrapped(model), "inner.net."), (nn.Sequential(nn.Sequential(model)), "0.0.")):
        wrapped = pxp.find_components(outer, example=x)
        assert list(wrapped) == [prefix + n for n in units]
        scores = pxp.attribute(outer, (x, labels), wrapped, lrp)
        assert max(relative(scores.signed[prefix + k], expected.signed[k]) for k in units) < 1e-12
    with pytest.raises(ValueError, match="of another model: this one has no module"):
        pxp.attribute(outer, (x, labels), units, lrp)


def test_channels_last_and_float32(untouched):
    model, x, labels, units = network("resnet")
    expected = pxp.attribute(model, (x, labels), units, pxp.LRP("zplus"))
    last = untouched(copy.deepcopy(model).to(memory_format=torch.channels_last))
    images = x.to(memory_format=torch.channels_last)
    assert close(pxp.attribute(last, (images, labels), units, pxp.LRP("zplus")), expected, 1e-10)
    assert relative(pxp.heatmap(last, images, labels), pxp.heatmap(model, x, labels)) < 1e-10
    single = untouched(copy.deepcopy(model).float())
    assert close(pxp.attribute(single, (x, labels), units, pxp.LRP("zplus")), expected, 1e-3)


def test_cached_tensors_and_stored_outputs_do_not_matter():
    """Grad-CAM style: the model keeps an output that has a graph; a hook keeps another."""
    model, x, labels, units = network("vgg")
    expected = pxp.attribute(model, (x, labels), units, pxp.LRP())
    model.last = model(x)
    kept = []
    handle = model.features[5].register_forward_hook(lambda m, i, o: kept.append(o))
    model(x)
    before = len(kept)
    assert close(pxp.attribute(model, (x, labels), units, pxp.LRP()), expected, 1e-12)
    assert model.last.grad_fn is not None and before == 1
    handle.remove()


def test_a_mask_in_place_is_respected():
    """Scores of the masked model: those of the network whose filters are physically zero."""
    for name in ("vgg", "resnet", "grouped"):
        model, x, labels, units = network(name)
        for rule in (pxp.Epsilon(TINY), "zplus", "gamma"):
            mask = pxp.attribute(model, None, units, pxp.Random(1)).select(0.3)
            zeroed = copy.deepcopy(model)
            for layer, kept in mask.items():
                site = zeroed.get_submodule(units[layer].site[0])
                for part in (site.weight, site.bias):
                    part.data[~kept] = 0
                if hasattr(site, "running_mean"):
                    site.running_mean[~kept] = 0
            expected = pxp.attribute(zeroed, (x, labels), units, pxp.LRP(rule))
            with pxp.masked(model, mask):
                found = pxp.attribute(model, (x, labels), units, pxp.LRP(rule))
                heat = pxp.heatmap(model, x, labels, pxp.LRP(rule))
            assert close(found, expected, 1e-9), (name, rule)
            assert all(bool((found[k][~kept] == 0).all()) for k, kept in mask.items())
            assert relative(heat, pxp.heatmap(zeroed, x, labels, pxp.LRP(rule))) < 1e-9


def _classes() -> dict:
    """What a careless library patches: classes of torch and zennit, and torch's global switches."""
    watched = [nn.Module, nn.ReLU, nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.AdaptiveAvgPool2d, torch.Tensor,
               torch.autograd.Function, zennit.core.Hook, zennit.core.BasicHook, zennit.core.Composite]  # fmt: skip
    state: dict = {f"{c.__module__}.{c.__name__}": {k: id(v) for k, v in vars(c).items()} for c in watched}
    for module in (F, zennit.rules, torch.nn.modules.batchnorm):
        state[module.__name__] = {k: id(v) for k, v in vars(module).items()}
    state["switches"] = (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(), torch.is_autocast_enabled("cpu"),
        len(torch.nn.modules.module._global_forward_hooks), len(torch.nn.modules.module._global_backward_hooks),
        len(torch.nn.modules.module._global_forward_pre_hooks),
    )  # fmt: skip
    return state


def test_nothing_is_patched_process_wide():
    model, x, labels, units = network("grouped")
    before, random = _classes(), torch.get_rng_state()
    for criterion in (*CRITERIA, _zennit_like()):
        scores = pxp.attribute(model, (x, labels), units, criterion)
    pxp.heatmap(model, x, labels)
    pxp.pruning_curve(model, scores, (x, labels), rates=(0, 0.5), allow_shared=True)
    assert _classes() == before
    assert torch.equal(torch.get_rng_state(), random)


def test_importing_patches_nothing():
    import subprocess
    import sys

    program = (
        "import torch, torchvision, zennit.core, zennit.rules; from torch import nn; "
        "watched = [nn.Module, nn.ReLU, nn.Conv2d, nn.Linear, nn.BatchNorm2d, torch.Tensor, zennit.core.Hook, "
        "zennit.core.BasicHook, zennit.core.Composite, torchvision.models.ResNet]; "
        "state = lambda: [{k: id(v) for k, v in vars(c).items()} for c in watched] + [torch.get_default_dtype(), "
        "torch.get_num_threads(), torch.is_grad_enabled(), bytes(torch.get_rng_state().numpy()), "
        "torch.backends.cudnn.benchmark]; "
        "before = state(); import pxp; assert state() == before; "
        "import sys; assert 'matplotlib.pyplot' not in sys.modules and 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_heatmap_form():
    model, x, labels, _ = network("vgg")
    heat = pxp.heatmap(model, x.float(), labels)
    assert heat.shape == x.shape and heat.dtype == torch.float32 and not heat.requires_grad
    one = pxp.heatmap(model, x, 2)
    assert torch.equal(one, pxp.heatmap(model, x, torch.full((len(x),), 2)))
    assert relative(pxp.heatmap(model, x, labels, batch_size=1), pxp.heatmap(model, x, labels)) < 1e-12
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(target_sum(copy.deepcopy(model)(point), labels), point)
    assert relative(pxp.heatmap(model, x, labels, pxp.LRP(pxp.Epsilon(0))), x * gradient) < 1e-10
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(copy.deepcopy(model)(point), labels, reduction="sum"), point)
    assert relative(pxp.heatmap(model, x, labels, pxp.Taylor()), -x * gradient) < 1e-10


def test_black_pixels_stay_black_without_an_input_rule():
    model, x, labels, _ = network("vgg")
    x = x.clamp(min=0)
    heat = pxp.heatmap(model, x, labels, pxp.LRP("gamma"))
    assert float(heat[x == 0].abs().max()) < 1e-9 * float(heat.abs().max())


def test_the_relevance_of_a_deeper_layer_needs_no_input_gradient():
    """Units above the first layer: same scores, and nothing below them is differentiated."""
    model, x, labels, units = network("vgg")
    _, signed, _ = zennit_relevance(model, x, labels, lambda layer: zennit.rules.Epsilon(TINY))
    top = units.only("features.17")
    scores = pxp.attribute(model, (x, labels), top, pxp.LRP(pxp.Epsilon(TINY)))
    assert relative(scores.signed["features.17"], signed["features.17"]) < 1e-8


def test_users_hooks_run_and_stay_in_effect():
    """A hook that changes an output changes the explanation as it changes the prediction."""
    model, x, labels, units = network("vgg")
    model.features[8].register_forward_hook(lambda m, i, o: 2 * o)
    doubled = copy.deepcopy(model)
    doubled.features[8]._forward_hooks.clear()
    for part in (doubled.features[8].weight, doubled.features[8].bias):
        part.data *= 2
    expected = pxp.attribute(doubled, (x, labels), units, pxp.LRP(pxp.Epsilon(TINY)))
    found = pxp.attribute(model, (x, labels), units, pxp.LRP(pxp.Epsilon(TINY)))
    assert relative(found.signed["features.0"], expected.signed["features.0"]) < 1e-9


def test_models_of_every_kind_are_left_alone(untouched):
    for make, x in ((VGG, torch.randn(2, 1, 28, 28)), (SmallResNet, torch.randn(2, 1, 28, 28)),
                    (Grouped, torch.randn(2, 3, 18, 18)), (mlp, torch.randn(2, 12))):  # fmt: skip
        model = untouched(make())  # as it comes: training mode, float32, in-place activations
        kind = "neuron" if make is mlp else "filter"
        units = pxp.find_components(model, kind, example=x)
        assert model.training
        scores = pxp.attribute(model, (x, torch.tensor([0, 1])), units, pxp.LRP())
        pxp.pruning_curve(model, scores, (x, torch.tensor([0, 1])), rates=(0, 0.5), allow_shared=True)
        with pxp.masked(model, scores.select(0.5)):
            pxp.accuracy(model, (x, torch.tensor([0, 1])))
        scores.units.check(model)
        pxp.LRP("gamma").composite(model, units.trace)


RULES = [pxp.LRP(rule) for rule in ("epsilon", "gamma", "zplus", "alpha2beta1")] + [pxp.LRP(softmax="zplus")]


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    model = randomise(VisionTransformer(28, 4, 6, 3, 48, 96, num_classes=5))
    return model, torch.rand(3, 3, 28, 28, dtype=torch.float64), torch.tensor([0, 3, 1])


@pytest.mark.parametrize("kind", ["neuron", "mlp_output"])
@pytest.mark.parametrize("criterion", RULES, ids=repr)
def test_what_is_masked_takes_no_relevance(criterion, kind):
    """Attribution inside of a mask is that of the network without these neurons or outputs."""
    model, x, labels = transformer()
    units = pxp.find_components(model, ("head", "neuron", "mlp_output"))
    mask = pxp.attribute(model, None, units.of_kind(kind), pxp.Random()).select(0.5)
    without = copy.deepcopy(model)
    for name, kept in mask.items():
        layer = without.get_submodule(name)
        for parameter in layer.parameters():
            parameter.data[~kept] = 0
    with pxp.masked(model, mask):
        found = pxp.attribute(model, (x, labels), units, criterion)
    expected = pxp.attribute(without, (x, labels), units, criterion)
    assert close(found, expected) and not any(found[name][~kept].any() for name, kept in mask.items())


@pytest.mark.parametrize("criterion", RULES, ids=repr)
def test_memory_of_a_transformer(criterion):
    """At most half more than a forward and a backward pass of the model hold."""
    model, x, labels = transformer()
    model, x = model.float(), x.float()
    units = pxp.find_components(model, ("head", "neuron"))

    def plain() -> None:
        image = x.clone().requires_grad_()
        torch.autograd.grad(target_sum(model(image), labels), image)

    model.requires_grad_(False)
    pxp.attribute(model, (x[:1], labels[:1]), units, criterion)  # the checks, which are made once
    used = peak_memory(lambda: pxp.attribute(model, (x, labels), units, criterion, progress=False))
    assert used < 1.5 * peak_memory(plain)
