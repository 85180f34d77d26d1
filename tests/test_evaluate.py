"""Accuracy, pruning curves and the comparison of two of them."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import timm
import torch
from conftest import Grouped, network, randomise, same, snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pxp
from pxp.evaluate import RATES
from pxp.models import VGG, SmallResNet
from pxp.sweep import silenced


class Fixed(nn.Module):
    """Logits that are the input itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x


LOGITS = torch.tensor([[3.0, 2.0, 1.0], [0.0, 2.0, 5.0], [-3.0, -2.0, -1.0], [9.0, 0.0, 8.0], [1.0, 2.0, 3.0]])


LABELS = torch.tensor([0, 1, 1, 2, 2])


def test_accuracy_by_hand():
    assert pxp.accuracy(Fixed(), (LOGITS, LABELS)) == pytest.approx(2 / 5)
    # classes 1 and 2: samples 1–4; logits (2,5) (−2,−1) (0,8) (2,3), labels 1 1 2 2
    assert pxp.accuracy(Fixed(), (LOGITS, LABELS), classes=[1, 2]) == pytest.approx(2 / 4)
    assert pxp.accuracy(Fixed(), (LOGITS, LABELS), classes=[2, 1]) == pytest.approx(2 / 4)
    # classes 0 and 1: (3,2) (0,2) (−3,−2): all right, although all logits of the last are negative
    assert pxp.accuracy(Fixed(), (LOGITS, LABELS), classes=(0, 1)) == 1.0
    assert pxp.accuracy(Fixed(), (LOGITS, LABELS), classes=[2]) == 1.0
    for data in (TensorDataset(LOGITS, LABELS), DataLoader(TensorDataset(LOGITS, LABELS), batch_size=2)):
        assert pxp.accuracy(Fixed(), data) == pytest.approx(2 / 5)
        assert pxp.accuracy(Fixed(), data, classes=[1, 2], batch_size=3) == pytest.approx(2 / 4)


def test_accuracy_keeps_the_models_state():
    model, x, labels, _ = network("vgg")
    expected = pxp.accuracy(model, (x, labels))
    model.train()
    model.features[4].eval()
    before = snapshot(model)
    assert pxp.accuracy(model, (x, labels)) == expected
    assert same(before, snapshot(model))
    model.features[8].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    before = snapshot(model)
    with pytest.raises(KeyError, match="stop"):
        pxp.accuracy(model, (x, labels))
    assert same(before, snapshot(model))


class SharedConv(nn.Module):
    """A convolution that runs twice with two BatchNorms, which cannot be folded into it; another behind no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 8, 3, bias=False), nn.Conv2d(8, 8, 3, padding=1)
        self.norm0, self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.last, self.fc = nn.Conv2d(8, 6, 3), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.stem(x)).relu()
        x = self.norm2(self.conv(self.norm1(self.conv(x)).relu())).relu()
        return self.fc(self.last(x).relu().mean((2, 3)))


class Skip(nn.Module):
    """Pre-activation: BatchNorm and a skip connection take the same convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.fc((self.two(self.norm(x).relu()) + x).mean((2, 3)))


NETS = {
    "vgg": (VGG, 1, 28),
    "resnet": (SmallResNet, 1, 28),
    "shared": (SharedConv, 1, 16),
    "skip": (Skip, 1, 16),
    "grouped": (Grouped, 3, 18),
    "timm": (lambda: timm.create_model("test_efficientnet", num_classes=10), 3, 32),
}


@pytest.mark.parametrize("name", NETS)
def test_the_fast_curve_is_the_loop_with_masked(name):
    make, channels, side = NETS[name]
    model = randomise(make()).float()
    images = torch.randn(30, channels, side, side)
    units = pxp.find_components(model, example=images)
    with torch.no_grad():
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        last.bias -= model(images).mean(0)  # otherwise every image is of one class
        labels = model(images).argmax(1)  # so that accuracy starts at 1 and falls
    scores = pxp.attribute(model, (images[:8], labels[:8]), units, pxp.LRP("zplus"))
    model.train()
    before = snapshot(model)
    rates = (0.0, 0.05, 0.1, 0.2, 0.5, 0.8)
    curve = pxp.pruning_curve(model, scores, (images, labels), rates=rates, allow_shared=True)
    by_hand = []
    for rate in rates:
        with pxp.masked(model, scores.select(rate)):
            by_hand.append(pxp.accuracy(model, (images, labels)))
    assert same(before, snapshot(model))
    assert curve.accuracy.tolist() == by_hand
    assert pxp.accuracies(model, [scores.select(rate) for rate in rates], (images, labels)) == by_hand
    several = (scores.select(rate) for rate in rates)  # any iterable
    assert pxp.accuracies(model, several, (images, labels)) == by_hand
    assert pxp.accuracies(model, [], (images, labels)) == []
    for wrong, kind in ((scores.select(0.1), "str"), ([scores], "Scores"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"masks must be a list of pxp.Mask, got .* of {kind}$"):
            pxp.accuracies(model, wrong, (images, labels))
    with pytest.raises(ValueError, match="components"):
        pxp.accuracies(torch.nn.Linear(3, 3), [scores.select(0.1)], (images, labels))
    assert by_hand[0] == 1.0 and len(set(by_hand)) > 2
    # not only as many hits: the same logits
    mask = scores.select(0.3)
    model.double().eval()
    with pxp.masked(model, mask), silenced(model, mask) as fast, torch.no_grad():
        torch.testing.assert_close(fast(images.double()), model(images.double()), rtol=1e-9, atol=1e-9)
    with silenced(model, mask) as fast, pxp.masked(model, mask), torch.no_grad():
        torch.testing.assert_close(fast(images.double()), model(images.double()), rtol=1e-9, atol=1e-9)


def test_curve_options_reach_select_and_accuracy():
    model, x, labels, units = network("vgg", samples=40)
    scores = [pxp.attribute(model, (x, labels), units, rule) for rule in (pxp.Taylor(), pxp.LRP("gamma"))]
    options = {"by": "signed", "order": "most", "scope": "layer", "min_keep": 2, "cost": "flops"}
    curve = pxp.pruning_curve(
        model, scores, (x, labels), rates=(0, 0.5, 1), classes=[0, 3], allow_shared=True, **options
    )
    assert curve.settings == options and curve.rates == (0, 0.5, 1) and len(curve.runs) == 2
    for one, run in zip(scores, curve.runs, strict=True):
        for rate, found in zip(curve.rates, run, strict=True):
            with pxp.masked(model, one.select(rate, **options)):
                assert found == pxp.accuracy(model, (x, labels), classes=[0, 3])
    assert curve.criterion == repr(pxp.Taylor())


def test_a_users_mask_stays_in_the_curve():
    model, x, labels, units = network("vgg", samples=30)
    labels = model(x).argmax(1)
    one, two = (pxp.attribute(model, None, units, pxp.Random(seed)) for seed in (0, 1))
    with pxp.masked(model, one.select(0.2)):
        curve = pxp.pruning_curve(model, two, (x, labels), rates=(0, 0.1))
        expected = [pxp.accuracy(model, (x, labels))]
        with pxp.masked(model, two.select(0.1)):
            expected.append(pxp.accuracy(model, (x, labels)))
    assert list(curve.accuracy) == expected and expected[0] < 1


def test_the_default_rates_are_the_papers():
    assert RATES == (0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85,
                     0.9, 0.95)  # fmt: skip


CURVE = pxp.Curve((0.0, 0.25, 0.5), ((1.0, 0.96, 0.2), (0.8, 0.8, 0.4)), "LRP", {"by": "magnitude"})


def test_numbers_of_a_curve_by_hand():
    np.testing.assert_allclose(CURVE.accuracy, [0.9, 0.88, 0.3])
    assert CURVE.a_pr == pytest.approx((0.9 + 0.88 + 0.3) / 3)
    np.testing.assert_allclose(CURVE.a_pr_runs, [2.16 / 3, 2.0 / 3])
    assert CURVE.area == pytest.approx(0.25 * (0.9 + 0.88) / 2 + 0.25 * (0.88 + 0.3) / 2)
    assert CURVE.top_pr() == 0.25
    assert CURVE.top_pr(0.99) == 0.0 and CURVE.top_pr(0.3) == 0.5
    perfect = pxp.Curve(RATES, ((1.0,) * 20,))
    assert perfect.a_pr == 1.0 and perfect.area == pytest.approx(0.95) and perfect.top_pr() == 0.95


def test_some_rates_of_a_curve():
    right = np.random.default_rng(0).random((3, 4, 50)) < 0.7
    whole = pxp.Curve.of_hits((0.0, 0.2, 0.4, 0.8), right, "these", criterion="LRP", draws=("a", "b", "c"))
    some = whole.at(0.2, 0.8)
    assert some.rates == (0.2, 0.8) and some.draws == whole.draws and some.criterion == "LRP"
    np.testing.assert_array_equal(some.right, right[:, [1, 3]])
    assert some.hits.images == "these" and some.a_pr == pytest.approx(right[:, [1, 3]].mean())
    np.testing.assert_allclose(whole.at(0.4).interval(), np.stack(whole.interval())[:, [2]])
    plain = pxp.Curve((0.0, 0.5), ((0.9, 0.4), (0.8, 0.3))).at(0.5)
    assert plain.runs == ((0.4,), (0.3,)) and plain.hits is None
    with pytest.raises(ValueError, match=r"no rate 0\.3; it has 0\.0, 0\.2, 0\.4, 0\.8"):
        whole.at(0.3)
    with pytest.raises(ValueError, match="grow|higher"):
        whole.at(0.4, 0.2)


def test_top_pr_stops_at_the_first_fall():
    assert pxp.Curve((0.0, 0.1, 0.2), ((1.0, 0.95, 0.9),)).top_pr() == 0.1  # just that share is enough
    assert pxp.Curve((0.0, 0.1, 0.2), ((0.5, 0.25, 0.2),)).top_pr(0.5) == 0.1
    assert pxp.Curve((0.0, 0.1, 0.2, 0.3), ((1.0, 0.96, 0.5, 0.99),)).top_pr() == 0.1


def test_a_curve_that_starts_later_says_so():
    late = pxp.Curve((0.3, 0.6, 0.9), ((0.8, 0.77, 0.1),), "LRP")
    assert repr(late) == "Curve(LRP, 1 run: A_PR 0.557 from 30% on, Top-PR 60%, relative to 0.800 at 30%)"
    three = pxp.Curve((0.3,), ((0.8,), (0.8,), (0.8,)))
    assert repr(three) == (
        "Curve(unnamed, 3 runs: A_PR 0.800 [0.800, 0.800] from 30% on, Top-PR 30%, relative to 0.800 at 30%; "
        "below 10 draws the interval may be too short)"
    )
    assert "from" not in repr(CURVE) and "unpruned 0.900" in repr(CURVE)


def test_curve_file_and_repr(tmp_path):
    path = tmp_path / "curve.json"
    CURVE.save(path)
    assert pxp.Curve.load(path) == CURVE
    assert json.loads(path.read_text())["criterion"] == "LRP"
    assert repr(CURVE) == ("Curve(LRP, 2 runs: A_PR 0.693, Top-PR 25%, unpruned 0.900; no interval below 3 draws)")
    for text in ("{", "[]", '{"rates": [0]}', '{"rates": [0], "runs": 3, "criterion": "", "settings": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"curve\.json is no curve written by pxp"):
            pxp.Curve.load(path)
    with pytest.raises(ValueError, match="every run needs one accuracy for each of the 2 rates"):
        pxp.Curve((0, 0.5), ((1.0,),))
    with pytest.raises(ValueError, match="every run"):
        pxp.Curve((0, 0.5), ())


def test_files_of_several_curves(tmp_path):
    path = tmp_path / "curves.json"
    curves = {"LRP": CURVE, 'a "quoted" name': pxp.Curve((0.0,), ((0.4,),))}
    pxp.save_curves(curves, path)
    assert pxp.load_curves(path) == curves and list(pxp.load_curves(str(path))) == list(curves)
    for text in ("", "[]", '{"LRP": {}}', '{"LRP": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"curves\.json holds no curves written by pxp"):
            pxp.load_curves(path)
    with pytest.raises(FileNotFoundError, match="no file nothing and nothing shipped of this name; shipped curves: "):
        pxp.load_curves("nothing")


def test_least_relevant_first_beats_most_relevant_first_and_random(vgg, data):
    units = pxp.find_components(vgg)
    refs = pxp.reference_samples(data.reference, per_class=5)
    images, labels = data.eval.images[::10], data.eval.labels[::10]
    scores = pxp.attribute(vgg, refs, units, pxp.LRP("epsilon"))
    rates = (0.0, 0.1, 0.2, 0.3)
    least, most = (
        pxp.pruning_curve(vgg, scores, (images, labels), rates=rates, order=order) for order in ("least", "most")
    )
    chance = pxp.pruning_curve(vgg, pxp.attribute(vgg, None, units, pxp.Random()), (images, labels), rates=rates)
    assert least.accuracy[0] == most.accuracy[0] == chance.accuracy[0] > 0.85
    assert least.accuracy[1] > 0.85
    assert least.a_pr > chance.a_pr + 0.05 > most.a_pr + 0.1
    # the trap: silencing only the convolution leaves β − γμ/σ behind
    mask = scores.select(0.2)
    trap = copy.deepcopy(vgg)
    for layer, kept in mask.items():
        trap.get_submodule(layer).weight.data[~kept] = 0
        trap.get_submodule(layer).bias.data[~kept] = 0
    with pxp.masked(vgg, mask):
        right = pxp.accuracy(vgg, (images, labels))
    assert right == least.accuracy[2] > pxp.accuracy(trap, (images, labels))
