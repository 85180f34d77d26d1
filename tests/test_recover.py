"""Scoring again while pruning, and fine-tuning."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field

import pytest
import torch
from conftest import network, snapshot
from torch.nn import functional as F
from zennit.composites import EpsilonPlus

import pxp


def test_one_step_is_one_shot(untouched):
    model, x, labels, units = network("vgg", samples=6)
    untouched(model)
    scores = pxp.attribute(model, (x, labels), units, pxp.LRP())
    for by in ("magnitude", "signed"):
        mask = pxp.prune_gradually(model, (x, labels), units, pxp.LRP(), 0.4, steps=1, by=by)
        expected = scores.select(0.4, by=by)
        assert all(torch.equal(mask[name], expected[name]) for name in units)


@pytest.mark.parametrize(
    "criterion", [pxp.LRP("gamma"), pxp.Taylor(), pxp.Activation(), pxp.Random(3), pxp.Magnitude()]
)
def test_steps_are_nested_and_see_the_pruned_network(criterion, untouched):
    model, x, labels, units = network("resnet", samples=4)
    untouched(model)
    half = pxp.prune_gradually(model, (x, labels), units, criterion, 0.2, steps=1)
    both = pxp.prune_gradually(model, (x, labels), units, criterion, 0.4, steps=2)
    assert all(bool((half[name] | ~both[name]).all()) for name in units)
    assert both.kept == units.total - round(0.4 * units.total)
    once = pxp.attribute(model, (x, labels), units, criterion).select(0.4)
    looks = not isinstance(criterion, pxp.Random | pxp.Magnitude)
    assert looks == any(not torch.equal(both[name], once[name]) for name in units)


@dataclass(frozen=True)
class Fickle(pxp.Criterion):
    """Says something else each time, and says most for what is silent."""

    seen: list = field(default_factory=list, compare=False)

    def values(self, probe):
        for images, _ in probe.batches():
            self.seen.append(0)
            generator = torch.Generator().manual_seed(len(self.seen))
            yield {
                name: torch.rand(len(images), 1, layer.size, generator=generator) for name, layer in probe.units.items()
            }


def test_what_is_pruned_stays_so_whatever_the_criterion_says_then():
    model, x, labels, units = network("vgg", samples=2)
    arguments = (model, (x, labels), units)
    half = pxp.prune_gradually(*arguments, Fickle(), 0.3, steps=1)
    both = pxp.prune_gradually(*arguments, Fickle(), 0.6, steps=2)
    assert all(bool((half[name] | ~both[name]).all()) for name in units)
    assert both.kept == units.total - round(0.6 * units.total)


def test_min_keep_holds_in_every_step():
    model, x, labels, units = network("vgg", samples=3)
    mask = pxp.prune_gradually(model, (x, labels), units, pxp.LRP("gamma"), 0.9, steps=3, min_keep=4)
    assert min(int(kept.sum()) for kept in mask.values()) >= 4


def task():
    """A compact network and images that it can learn."""
    model, _, _, units = network("vgg")
    model = model.float()
    small = pxp.compact(model, pxp.attribute(model, None, units, pxp.Random()).select(0.5))
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    images = torch.rand(60, 1, 28, 28) + labels[:, None, None, None]
    return model, small, images, labels


def loss(model, images, labels) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(images), labels))


def test_finetuning_learns_and_leaves_its_arguments(untouched):
    model, small, images, labels = task()
    model.train()
    untouched(model)
    before = snapshot(small)
    trained = pxp.finetune(small, (images, labels), epochs=6, batch_size=20)
    again = pxp.finetune(small, (images, labels), epochs=6, batch_size=20)
    assert loss(trained, images, labels) < 0.5 * loss(small, images, labels) and not trained.training
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))
    after = snapshot(small)
    assert all(torch.equal(before[key][0], after[key][0]) for key in before if key.startswith("tensor"))
    taught = pxp.finetune(small, (images, labels), epochs=2, batch_size=20, teacher=model)
    assert any(not torch.equal(a, b) for a, b in zip(taught.parameters(), trained.parameters(), strict=True))


def test_a_teacher_is_imitated():
    model, small, images, labels = task()
    goal = model.eval()(images).detach()

    def distance(student):
        with torch.no_grad():
            return float(
                F.kl_div(student(images).log_softmax(1), goal.log_softmax(1), log_target=True, reduction="batchmean")
            )

    wrong = (labels + 1) % 3
    alone, taught = (
        pxp.finetune(small, (images, wrong), epochs=6, batch_size=20, teacher=teacher) for teacher in (None, model)
    )
    assert distance(taught) < distance(alone)


def changes(before, after) -> dict[str, float]:
    """Parameter → how far it moved, at most."""
    moved = dict(after.named_parameters())
    return {name: float((moved[name] - value).abs().max().detach()) for name, value in before.named_parameters()}


@pytest.mark.parametrize(("epochs", "batch_size"), [(1, 60), (1, 30), (3, 60)])
def test_a_few_steps_train_too(epochs, batch_size):
    """AdamW's first step moves a weight by about the learning rate."""
    _, small, images, labels = task()
    moved = changes(small, pxp.finetune(small, (images, labels), epochs=epochs, batch_size=batch_size, lr=1e-3))
    assert max(moved.values()) > 3e-4
    steps = epochs * -(-60 // batch_size)
    shares = [pxp.recover._share(step, steps) for step in range(steps)]
    assert min(shares) > 0.05 and 0.4 < sum(shares) / steps < 0.9


def test_the_learning_rate_rises_and_falls():
    shares = [pxp.recover._share(step, 100) for step in range(100)]
    assert max(shares) == shares[30] > 0.99 and shares[0] < 0.02 and shares[-1] < 0.001
    assert shares[:31] == sorted(shares[:31]) and shares[30:] == sorted(shares[30:], reverse=True)


class WithNorm(torch.nn.Module):
    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = torch.nn.Conv2d(1, 4, 5, stride=4), torch.nn.BatchNorm2d(4, affine=affine)
        self.drop, self.head = torch.nn.Dropout(0.5), torch.nn.Linear(4, 3)
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.detach())
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


def test_what_is_frozen_stays():
    _, _, images, labels = task()
    model = WithNorm()
    model.conv.requires_grad_(False)
    model.norm.requires_grad_(False)
    trained = pxp.finetune(model, (images, labels), batch_size=20)
    moved = changes(model, trained)
    assert {name for name, most in moved.items() if most} == {"head.weight", "head.bias"}
    assert torch.equal(trained.norm.running_mean, model.norm.running_mean) and trained.norm.num_batches_tracked == 0
    model.norm.weight.requires_grad_()
    trained = pxp.finetune(model, (images, labels), batch_size=20)
    assert trained.norm.num_batches_tracked == 3 and changes(model, trained)["norm.bias"] == 0
    assert pxp.finetune(WithNorm(affine=False), (images, labels)).norm.num_batches_tracked == 1
    with pytest.raises(ValueError, match="WithNorm has only frozen parameters"):
        pxp.finetune(model.requires_grad_(False), (images, labels))


def test_what_is_frozen_stays_frozen_when_it_is_compacted():
    model, _, _, units = network("vgg")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("features.0") and not name.startswith("features.1."))
    small = pxp.compact(model, pxp.attribute(model, None, units, pxp.Random()).select(0.5))
    learns = {name: parameter.requires_grad for name, parameter in small.named_parameters()}
    assert {name for name, does in learns.items() if not does} == {"features.0.weight", "features.0.bias"}
    images, labels = torch.rand(20, 1, 28, 28).double(), torch.arange(20) % 3
    moved = changes(small, pxp.finetune(small, (images, labels)))
    assert {name for name, most in moved.items() if not most} == {"features.0.weight", "features.0.bias"}


def test_dropout_is_random_and_a_norm_measures():
    _, _, images, labels = task()
    model = WithNorm().eval()
    trained = pxp.finetune(model, (images, labels), lr=1e-9, batch_size=60)  # as good as no step
    expected = model.conv(images).mean((0, 2, 3))
    assert torch.allclose(trained.norm.running_mean, 0.1 * expected, atol=1e-5) and not trained.norm.training
    less = pxp.finetune(model, (images, labels), seed=1, batch_size=60)
    more = pxp.finetune(model, (images, labels), seed=2, batch_size=60)  # another order of one batch changes nothing
    assert max(changes(less, more).values()) > 1e-4


def test_every_epoch_has_an_order_of_its_own_and_no_batch_of_one():
    _, _, images, labels = task()
    images = torch.arange(41.0)[:, None, None, None].expand(41, 1, 9, 9)
    model = WithNorm()
    seen = pxp.finetune(model, (images, labels[:41]), epochs=2, batch_size=20).seen
    orders = [[int(value) for x in seen[start : start + 2] for value in x[:, 0, 0, 0]] for start in (0, 2)]
    assert [len(x) for x in seen] == [20, 21, 20, 21]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(range(41))
    again = pxp.finetune(model, (images, labels[:41]), epochs=2, batch_size=20).seen
    assert all(torch.equal(a, b) for a, b in zip(seen, again, strict=True))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        pxp.finetune(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(81), torch.nn.Linear(81, 3)),
                     (images[:3], labels[:3]), batch_size=1)  # fmt: skip


def test_the_divergence_has_the_scale_of_the_cross_entropy():
    """Its gradient is T²·(softmax(z/T) − softmax(t/T))/T per sample, about that of T = 1 (Hinton et al. 2015, eq. 4)."""
    torch.manual_seed(0)
    logits, goal = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64)
    for temperature in (1.0, 2.0, 8.0):
        (gradient,) = torch.autograd.grad(pxp.recover._divergence(logits, goal, temperature), logits)
        soft, target = (logits / temperature).softmax(1), (goal / temperature).softmax(1)
        assert torch.allclose(gradient, temperature * (soft - target) / 5)


class Stop(Exception):
    pass


def stopping_after(number, monkeypatch):
    """Let the process "end" while it writes the state after this one."""
    original, calls = torch.save, []

    def save(content, path):
        calls.append(path)
        original(content, path)
        if len(calls) == number + 1:
            path.write_bytes(path.read_bytes()[:100])
            raise Stop

    monkeypatch.setattr(torch, "save", save)
    return calls


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    _, small, images, labels = task()
    options = {"epochs": 3, "batch_size": 20, "state": tmp_path / "state.pt"}
    whole = pxp.finetune(small, (images, labels), epochs=3, batch_size=20)
    calls = stopping_after(1, monkeypatch)
    with pytest.raises(Stop):
        pxp.finetune(small, (images, labels), **options)
    resumed = pxp.finetune(small, (images, labels), **options)
    assert len(calls) == 4  # the second epoch was trained twice
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    again = pxp.finetune(small, (images, labels), **options)
    assert len(calls) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_gradual_pruning_goes_on(tmp_path, monkeypatch):
    model, x, labels, units = network("vgg", samples=3)
    arguments = (model, (x, labels), units, pxp.LRP(), 0.4)
    whole = pxp.prune_gradually(*arguments, steps=3)
    scored = []
    monkeypatch.setattr("pxp.recover.attribute", lambda *a, **k: scored.append(1) or pxp.attribute(*a, **k))
    calls = stopping_after(1, monkeypatch)
    with pytest.raises(Stop):
        pxp.prune_gradually(*arguments, steps=3, state=tmp_path / "state.pt")
    for attributions in (2 + 2, 2 + 2):
        resumed = pxp.prune_gradually(*arguments, steps=3, state=tmp_path / "state.pt")
        assert all(torch.equal(resumed[name], whole[name]) for name in units)
        assert len(scored) == attributions and len(calls) == 4
    for options, what in (
        ({"steps": 4}, "steps"),
        ({"steps": 3, "by": "signed", "min_keep": 1}, "by, min_keep"),
        ({"rate": 0.3}, "rate"),
        ({"criterion": pxp.LRP("gamma")}, "criterion"),
        ({"refs": (x, labels.flip(0) + 1)}, "references"),
        ({"refs": None}, "references"),
        ({"units": units.without("features.0")}, "components"),
        ({"model": network("vgg", seed=1)[0]}, "network"),
    ):
        changed = dict(zip(("model", "refs", "units", "criterion", "rate"), arguments, strict=True)) | {"steps": 3}
        with pytest.raises(ValueError, match=rf"state\.pt is the state of another run: {what} differ"):
            pxp.prune_gradually(**{**changed, **options}, state=tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt is no state that this function has written"):
        pxp.finetune(model, (x, labels), state=tmp_path / "state.pt")


@pytest.mark.parametrize(
    "make", [
        lambda value: pxp.LRP(pxp.ZPlus(epsilon=value)),
        lambda value: pxp.LRP("gamma", high=pxp.Gamma(0.1, epsilon=value)),
        lambda value: EpsilonPlus(epsilon=value),
    ],
)  # fmt: skip
def test_a_state_is_of_one_criterion_with_all_its_values(make, tmp_path, monkeypatch):
    model, x, labels, units = network("vgg", samples=3)
    arguments = {"rate": 0.4, "steps": 3, "state": tmp_path / "state.pt"}
    stopping_after(1, monkeypatch)
    with pytest.raises(Stop):
        pxp.prune_gradually(model, (x, labels), units, make(1e-6), **arguments)
    with pytest.raises(ValueError, match=r"state\.pt is the state of another run: criterion differ"):
        pxp.prune_gradually(model, (x, labels), units, make(0.1), **arguments)
    resumed = pxp.prune_gradually(model, (x, labels), units, make(1e-6), **arguments)
    whole = pxp.prune_gradually(model, (x, labels), units, make(1e-6), 0.4, steps=3)
    assert all(torch.equal(resumed[name], whole[name]) for name in units)


def test_states_of_the_first_format(tmp_path, monkeypatch):
    """They knew a criterion by a text that left out the parameters of rule objects."""
    model, x, labels, units = network("vgg", samples=3)
    path = tmp_path / "state.pt"

    def run(criterion, **options):
        return pxp.prune_gradually(model, (x, labels), units, criterion, 0.4, steps=3, state=path, **options)

    for criterion, old, by, goes_on in (
        (
            pxp.LRP("gamma", low="zplus"),
            "LRP(low='zplus', middle='gamma', high='gamma', fc='gamma')",
            "magnitude",
            True,
        ),
        (pxp.Taylor(), "Taylor(start='loss', absolute='token')", "magnitude", True),
        (pxp.Taylor(), "Taylor(start='loss', absolute='token')", "signed", False),  # the sign was the other one
        (pxp.LRP(pxp.ZPlus()), "LRP(ZPlus())", "magnitude", False),  # of any epsilon
        (pxp.LRP("gamma"), "LRP('zplus')", "magnitude", False),
    ):
        whole = run(criterion, by=by)
        saved = torch.load(path)
        saved["about"]["criterion"], saved["done"] = old, 2
        del saved["format"]
        torch.save(saved, path)
        if goes_on:
            assert all(torch.equal(run(criterion, by=by)[name], whole[name]) for name in units)
        else:
            with pytest.raises(ValueError, match=r"state\.pt is the state of another run: criterion differ"):
                run(criterion, by=by)
        torch.save({**saved, "format": 3}, path)
        with pytest.raises(ValueError, match=r"state\.pt has format 3, which a newer pxp wrote"):
            run(criterion, by=by)
        path.unlink()


def test_a_state_needs_a_criterion_that_can_be_told(tmp_path):
    class Own(pxp.Random):
        """Made anew by each call of a function, so that its name tells nothing."""

    model, x, labels, units = network("vgg", samples=3)
    with pytest.raises(ValueError, match=r"a state needs a criterion that can be told from others by its values, got "):
        pxp.prune_gradually(model, (x, labels), units, Own(), 0.4, state=tmp_path / "state.pt")
    assert not (tmp_path / "state.pt").exists()


def test_a_state_is_of_one_run_only(tmp_path):
    model, small, images, labels = task()
    state = tmp_path / "state.pt"
    options = {"batch_size": 20, "teacher": model, "state": state}
    pxp.finetune(small, (images, labels), **options)
    other = task()[1]
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)
    for network_, data, changed, what in (
        (small, (images, labels), {"epochs": 2}, "epochs"),
        (small, (images, labels), {"lr": 2e-3}, "lr"),
        (small, (images, labels), {"seed": 1}, "seed"),
        (small, (images, labels), {"batch_size": 30}, "batch_size"),
        (small, (images, labels), {"temperature": 3.0}, "temperature"),
        (small, (images, labels), {"teacher": None}, "teacher"),
        (small, (images, labels), {"teacher": small}, "teacher"),
        (small, (images * 0, labels), {}, "data"),
        (small, (images, labels * 0), {}, "data"),
        (other, (images, labels), {}, "network"),
        (model, (images, labels), {}, "network"),
    ):
        with pytest.raises(ValueError, match=rf"state\.pt is the state of another run: {what} differ"):
            pxp.finetune(network_, data, **{**options, **changed})


@pytest.mark.parametrize("content", ["truncated", "text", "empty", "foreign", "tensor"])
def test_what_is_no_state_is_refused(content, tmp_path):
    _, small, images, labels = task()
    state = tmp_path / "state.pt"
    pxp.finetune(small, (images, labels), state=state)
    written = state.read_bytes()
    if content in ("foreign", "tensor"):
        torch.save({"a": 1} if content == "foreign" else torch.zeros(3), state)
    else:
        state.write_bytes({"truncated": written[: len(written) // 2], "text": b"hello", "empty": b""}[content])
    with pytest.raises(ValueError, match=r"state\.pt is no state that this function has written, or it is damaged"):
        pxp.finetune(small, (images, labels), state=state)


def test_the_folder_of_a_state_is_looked_for_before_the_work(tmp_path, monkeypatch):
    model, small, images, labels = task()
    monkeypatch.setattr(torch.optim.AdamW, "step", None)
    with pytest.raises(FileNotFoundError, match=r"no folder for the state .*nowhere.state\.pt"):
        pxp.finetune(small, (images, labels), state=tmp_path / "nowhere" / "state.pt")
    monkeypatch.setattr("pxp.recover.attribute", None)
    units = pxp.find_components(model)
    with pytest.raises(FileNotFoundError, match=r"no folder for the state .*nowhere.state\.pt"):
        pxp.prune_gradually(model, (images, labels), units, pxp.LRP(), 0.5, state=tmp_path / "nowhere" / "state.pt")
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        pxp.finetune(small, (images, labels), state=tmp_path)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_finetuning_works_where_gradients_are_off(mode):
    model, small, images, labels = task()
    expected = pxp.finetune(small, (images, labels), batch_size=20, teacher=model)
    with mode():
        seen = images.clone(), labels.clone()
        copied = copy.deepcopy(small)
        trained = pxp.finetune(copied, seen, batch_size=20, teacher=model)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), trained.parameters(), strict=True))
    assert not any(tensor.is_inference() for tensor in trained.state_dict().values())


def test_weights_that_are_not_finite_are_an_error(tmp_path):
    _, small, images, labels = task()
    options = {"batch_size": 20, "epochs": 2, "state": tmp_path / "state.pt"}
    with pytest.raises(ValueError, match=r"weights are infinite or NaN after epoch 1 of 2; lower lr=1e\+30"):
        pxp.finetune(small, (images, labels), lr=1e30, **options)
    assert not list(tmp_path.iterdir())


def test_nothing_to_train():
    _, _, images, labels = task()
    with pytest.raises(ValueError, match="Identity has no parameters, so there is nothing to train"):
        pxp.finetune(torch.nn.Identity(), (images, labels))


def test_errors(monkeypatch):
    model, x, labels, units = network("vgg")
    with monkeypatch.context() as patched:
        patched.setattr("pxp.recover.attribute", None)  # what is wrong is found before the work
        for options, message in (
            ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
            ({"steps": 2.5}, "steps must be a whole number of at least 1, got 2.5"),
            ({"rate": 1.2}, r"rate must be in \[0, 1\]"),
            ({"by": "magnitud"}, "by must be one of 'magnitude', 'signed', got 'magnitud'"),
            ({"min_keep": -1}, "min_keep must not be negative"),
        ):
            with pytest.raises(ValueError, match=message):
                pxp.prune_gradually(model, (x, labels), units, pxp.LRP(), **{"rate": 0.5, **options})
    for name in ("epochs", "batch_size"):
        for value in (0, 1.5):
            with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {value}"):
                pxp.finetune(model, (x, labels), **{name: value})
    for name in ("lr", "temperature"):
        for value in (0, -1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"{name} must be positive and finite, got {value}"):
                pxp.finetune(model, (x, labels), **{name: value})
