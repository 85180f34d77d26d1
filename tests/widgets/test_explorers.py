"""Explorers: what their modules compute is what the package computes; each stands alone, and is small."""

from __future__ import annotations

import json
import random
import re
from itertools import product

import numpy as np
import pytest
import torch
from explorers import MAKERS
from torch import nn

import pxp
from pxp.widgets import Explorer, control_explorer, head_explorer, page, prune_explorer, rule_explorer, softmax_explorer
from pxp.widgets.prune import CRITERIA, MASKS, RATES, ranked, unpacked


@pytest.fixture(scope="module", params=MAKERS)
def explorer(request) -> Explorer:
    return MAKERS[request.param]()


def apart(one, other) -> float:
    """Largest difference of two answers of one form."""
    if isinstance(other, dict):
        assert one.keys() == other.keys()
        return max((apart(one[key], value) for key, value in other.items()), default=0.0)
    if isinstance(other, list | tuple):
        assert len(one) == len(other)
        return max((apart(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if isinstance(other, str):
        assert one == other
        return 0.0
    return abs(one - other)


def numbers(seed: int, spread: float, size: int) -> list[float]:
    dice = random.Random(seed)
    return [round(dice.uniform(-spread, spread), 2) for _ in range(size)]


def rule_states() -> list[dict]:
    states = []
    for seed in range(60):
        values = numbers(seed, 4, 11)
        states.append(
            {
                "x": values[:2],
                "first": [values[2:4], values[4:6]],
                "bias": values[6:8],
                "second": values[8:10],
                "last": values[10],
                "gamma": abs(numbers(seed, 4, 1)[0]),
                "epsilon": abs(numbers(seed, 2, 1)[0]),
                "alpha": 1 + abs(numbers(seed, 3, 1)[0]),
            }
        )
    return states


def test_rules_are_those_of_the_package(computed):
    explorer = rule_explorer()
    states = rule_states()
    for state, found in zip(states, computed("rules", explorer.data, states), strict=True):
        expected = explorer.answer(state)
        size = max(1.0, *(abs(r) for rule in expected["rules"] for r in (*rule["middle"], *rule["inputs"])))
        assert apart(found, expected) < 1e-4 * size


def test_softmax_and_layer_norm_are_those_of_the_package(computed):
    explorer = softmax_explorer()
    states = [{"x": numbers(s, 3, 3), "v": numbers(s + 99, 8, 3), "y": numbers(s + 999, 5, 6)} for s in range(60)]
    for state, found in zip(states, computed("softmax", explorer.data, states), strict=True):
        assert apart(found, explorer.answer(state)) < 2e-4


def test_every_choice_of_where_or_which_is_what_the_curves_say(computed):
    explorer = control_explorer()
    states = [
        {"task": task, "scope": scope, "repair": repair, "rate": rate, "other": other}
        for task, scopes in explorer.data["tasks"].items()
        for scope, repairs in scopes.items()
        for repair, section in repairs.items()
        for rate, other in zip(section["rates"], ["", *explorer.data["others"]], strict=False)
    ]
    assert len(states) > 100
    answers = computed("control", explorer.data, states)
    assert max(apart(found, explorer.answer(s)) for s, found in zip(states[::7], answers[::7], strict=True)) < 1e-9


def test_logits_without_heads_are_the_model_s(computed):
    explorer = head_explorer()
    dice = random.Random(0)
    states = [{"image": n % 5, "gone": dice.sample(range(48), n % 3)} for n in range(60)]
    for state, found in zip(states, computed("heads", explorer.data, states), strict=True):
        assert apart(found, explorer.answer(state)) < 0.0061  # they are kept in hundredths
    (refused,) = computed("heads", explorer.data, [{"image": 0, "gone": [1, 2, 3]}])
    assert refused == {"error": "at most 2 heads can be away here"}


def prune_states(**changes) -> list[dict]:
    start = prune_explorer().data["start"]
    return [start | dict(zip(changes, values, strict=True)) for values in zip(*changes.values(), strict=True)]


@pytest.mark.parametrize("step", [0, 5, 12])
def test_the_network_in_the_page_is_the_network(computed, step):
    """All sixty images, by both rules: logits within 1e-3, heatmaps within 1e-2 of the largest pixel of PyTorch's."""
    explorer = prune_explorer()
    (state,) = prune_states(step=[step])
    (found,) = computed("prune", explorer.data, [state], "sixty.mjs")
    model = pxp.load_model("vgg")
    units = pxp.find_components(model, "filter")
    mask = unpacked(explorer_masks()["LRP-epsilon"]["own"]["global"], units)[step]
    images = pxp.reference_samples(pxp.load_dataset().eval, 6).images
    with pxp.masked(model, mask):
        with torch.no_grad():
            logits = model(images)
        targets = logits.argmax(1)
        assert targets.tolist() == found["targets"]
        assert (logits - torch.tensor(found["logits"])).abs().max() < 1e-3
        for rule in ("epsilon", "zplus"):
            heat = pxp.heatmap(model, images, targets, pxp.LRP(rule)).flatten(1)
            largest = heat.abs().max()  # z⁺ leaves the pixels little: compare with that
            assert (heat - torch.tensor(found[rule])).abs().max() < 1e-2 * min(1.0, largest), rule


def explorer_masks() -> dict:
    return json.loads(MASKS.read_text(encoding="utf8"))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_repair_control_and_scope_are_the_package_s(computed, criterion):
    explorer = prune_explorer()
    states = prune_states(
        scope=["global", "layer"], control=[False, True], step=[4, 12], repair=[True, True], criterion=[criterion] * 2
    )
    drawn = states[0] | {"pixels": np.linspace(0, 1, 784).round(3).tolist()}
    for state, found in zip([*states, drawn], computed("prune", explorer.data, [*states, drawn]), strict=True):
        expected = explorer.answer(state)
        assert found["kept"] == expected["kept"] and found["right"] == expected["right"]
        assert apart(found["logits"], expected["logits"]) < 1e-3
        assert apart(found["heat"], expected["heat"]) < 1e-2


def test_the_shipped_masks_are_those_of_the_criteria():
    data, model = pxp.load_dataset(), pxp.load_model("vgg")
    units = pxp.find_components(model, "filter")
    anew = ranked(model, pxp.reference_samples(data.reference, 10), units)
    shipped = explorer_masks()
    for criterion, kind, scope in product(CRITERIA, ("own", "shuffled"), ("global", "layer")):
        pairs = zip(*(unpacked(m[criterion][kind][scope], units) for m in (anew, shipped)), strict=True)
        differ = sum(int((a[layer] != b[layer]).sum()) for a, b in pairs for layer in a)
        assert differ <= 4, (criterion, kind, scope)  # near ties on another machine
    mask = unpacked(shipped["random"]["own"]["global"], units)[RATES.index(0.5)]
    assert mask.rate == 0.5 and sum(int(kept.sum()) for kept in mask.values()) == 208


def test_an_explorer_stands_alone(explorer):
    text = page.document(explorer.name, explorer.title, explorer.data)
    script = text.split('<script type="module">')[1]
    assert not re.search(r"^(import|export) ", script, re.MULTILINE)
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)", text)
    assert text.count("<script") == text.count("</script>") == 2
    assert len(explorer.html()) < (1_200_000 if explorer.name == "prune" else 300_000)
    assert page.module(explorer.name).count("export default") == 1


def test_data_cannot_end_the_script():
    text = page.document("rules", "a & b", {"start": {}, "text": "</script><b>"})
    assert "</script><b>" not in text and "\\u003c/script>\\u003cb>" in text and "<title>a &amp; b</title>" in text


def test_an_explorer_shows_a_frame_and_a_still(explorer, figures, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda each, **_: shown.append(each))
    explorer._ipython_display_()
    first, *numbers = shown
    assert first["text/html"].startswith('<iframe class="pxp-frame" title="') and first["text/plain"] == repr(explorer)
    assert len(numbers) == 1 and "<table>" in numbers[0]._repr_html_()


def test_live_python_answers(explorer):
    live = explorer.live()
    state = explorer.data["start"]
    live.state = state | {"unused": 1}
    assert live.live and live.answer == explorer.answer(state)


def test_a_network_of_one_s_own(computed):
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    explorer = rule_explorer(net, torch.tensor([0.5, -1.0]))
    (found,) = computed("rules", explorer.data, [explorer.data["start"]])
    with torch.no_grad():
        assert found["output"] == pytest.approx(float(net(torch.tensor([[0.5, -1.0]]))), abs=1e-3)
    for wrong in (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), nn.Sequential(nn.Linear(2, 2))):
        with pytest.raises(ValueError, match=r"network must be Sequential\(Linear\(2, 2\), ReLU, Linear\(2, 1\)\)"):
            rule_explorer(wrong)
    with pytest.raises(ValueError, match=r"x must have shape \(2,\), got \(3,\)"):
        rule_explorer(x=torch.zeros(3))


def test_other_networks_are_shown_live():
    data = pxp.load_dataset()
    refs, some = pxp.reference_samples(data.reference, 1), pxp.reference_samples(data.eval, 1)
    explorer = prune_explorer(pxp.load_model("resnet"), refs, some)
    with pytest.raises(ValueError, match=r"needs Python: show it with \.live\(\)"):
        explorer.html()
    found = explorer.answer(explorer.data["start"] | {"repair": True})
    assert len(found["kept"]) == 20 and 0 <= found["right"] <= 10
    with pytest.raises(ValueError, match=r"images must have shape \(images, 1, side, side\), got \(2, 3, 8, 8\)"):
        prune_explorer(None, refs, (torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)))


def test_another_transformer_s_heads():
    data = pxp.load_dataset()
    explorer = head_explorer(pxp.load_model("vit"), pxp.reference_samples(data.eval, 1, [2, 4]))
    assert explorer.data["labels"] == [2, 4] and len(explorer.data["relevance"][0]) == 48
    assert explorer.answer({"image": 1, "gone": [0, 1, 2, 3]})["logits"]
    with pytest.raises(ValueError, match="images must have shape"):
        head_explorer(None, (torch.zeros(1, 3, 28, 28), torch.zeros(1, dtype=torch.long)))


def test_curves_of_one_s_own_need_all_three_lines():
    curves = pxp.load_curves("repair-vgg")
    explorer = control_explorer({"mine": curves})
    assert explorer.data["start"]["task"] == "mine" and explorer.data["names"]["mine"] == "mine"
    del curves["random, none, layer"], curves["random, mean, layer"]
    del curves["random, statistics, layer"], curves["random, least_squares, layer"]
    with pytest.raises(ValueError, match="'mine' needs curves named"):
        control_explorer({"mine": curves})


def test_softmax_of_one_s_own():
    explorer = softmax_explorer(torch.zeros(4), torch.ones(4))
    assert explorer.answer(explorer.data["start"])["softmax"]["weights"] == [0.25] * 4
    with pytest.raises(ValueError, match=r"logits and values must have one shape \(keys,\)"):
        softmax_explorer(torch.zeros(4), torch.ones(3))
    with pytest.raises(ValueError, match=r"entering must have shape \(6,\), got \(5,\)"):
        softmax_explorer(entering=torch.zeros(5))


def test_only_what_the_page_computes_is_shown_there():
    data = pxp.load_dataset()
    refs, some = pxp.reference_samples(data.reference, 1), pxp.reference_samples(data.eval, 1)

    class Doubled(pxp.models.VGG):
        def forward(self, x):
            return 2 * super().forward(x)

    other = pxp.load_model("vgg")
    other.features[2] = nn.GELU()
    for model in (Doubled().eval(), other):
        with pytest.raises(ValueError, match="needs Python"):
            prune_explorer(model, refs, some).html()
    assert prune_explorer(pxp.load_model("vgg"), refs, some).alone
    double = prune_explorer(pxp.load_model("vgg").double(), refs, some)
    assert double.alone and double.answer(double.data["start"])["kept"]
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\], got values from -1 to 1"):
        prune_explorer(pxp.load_model("vgg"), refs, (2 * some.images - 1, some.labels))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 224}, "as many heads"),
        (
            "vit_tiny_patch16_224",
            {"img_size": 32, "patch_size": 8, "class_token": False, "global_pool": "avg"},
            "one class token",
        ),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "patch_size": 8}, "one class token"),
    ],
)
def test_transformers_without_a_grid_behind_a_class_token_are_refused(name, options, message):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=10, in_chans=1, **options).eval()
    images = torch.rand(1, 1, options["img_size"], options["img_size"])
    with pytest.raises(ValueError, match=message):
        head_explorer(model, (images, torch.tensor([1])))
