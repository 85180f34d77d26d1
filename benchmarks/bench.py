"""Cost of attribution and of the pruning sweep, side by side with zennit: ``python benchmarks/bench.py [--quick]``.

All figures are ratios to ``plain``, measured in turn in one process on one thread: one forward and one backward pass of
the same model with the gradient of the input only. zennit gets a model whose BatchNorms are merged already, because its
own merge fails on PyTorch 2.10 and later.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from importlib.metadata import version

import torch
import torchvision
import zennit.composites
import zennit.layer
import zennit.rules
import zennit.torchvision
import zennit.types
from torch import nn

import pxp
from pxp.cost import peak_memory
from pxp.lrp.balance import check_balance
from pxp.lrp.composites import EXACT
from pxp.network.check import check_replica
from pxp.network.fold import fold_batch_norm
from pxp.network.replica import replica
from pxp.probe import Probe

MODELS = {
    "vgg16_bn": "torchvision/vgg16_bn",
    "resnet18": "torchvision/resnet18",
    "resnet50": "torchvision/resnet50",
    "vit_b_16": "torchvision/vit_b_16",
    "timm vit_b_16": "timm/vit_base_patch16_224",
}
CRITERIA = {
    "epsilon": pxp.LRP("epsilon"),
    "zplus": pxp.LRP("zplus"),
    "gamma": pxp.LRP("gamma"),
    "softmax zplus": pxp.LRP("epsilon", softmax="zplus"),
    "IG, 20 steps": pxp.IntegratedGradients(20),
}
TARGETS = {
    ("vgg16_bn", "epsilon"): 1.15,
    ("vgg16_bn", "zplus"): 1.8,
    ("vgg16_bn", "gamma"): 1.9,
    ("resnet18", "epsilon"): 1.15,
    ("resnet18", "zplus"): 1.8,
    ("resnet18", "gamma"): 1.9,
    ("resnet18", "IG, 20 steps"): 20.5,
    ("resnet50", "epsilon"): 1.25,
    ("resnet50", "zplus"): 1.8,
    ("resnet50", "gamma"): 1.9,
    ("vit_b_16", "epsilon"): 0.8,
    ("vit_b_16", "softmax zplus"): 2.5,
    ("vit_b_16", "gamma"): 2.5,
    ("timm vit_b_16", "epsilon"): 1.15,
}
MEMORY_TARGET = 1.5
ZENNIT_RULES = {
    "epsilon": zennit.rules.Epsilon,
    "zplus": zennit.rules.ZPlus,
    "gamma": zennit.rules.Gamma,
}


def plain(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def run() -> None:
        x = images.clone().requires_grad_()
        torch.autograd.grad(model(x).gather(1, labels[:, None]).sum(), x)

    return run


def with_zennit(model: nn.Module, rule: str, images: torch.Tensor, labels: torch.Tensor, units) -> Callable[[], None]:
    merged = replica(model)
    fold_batch_norm(merged, units.trace)
    layer_map = [
        (zennit.types.Activation, zennit.rules.Pass()),
        (zennit.types.AvgPool, zennit.rules.Norm()),
        (zennit.types.Linear, ZENNIT_RULES[rule]()),
    ]
    canonizers = [zennit.torchvision.ResNetCanonizer()] if isinstance(model, torchvision.models.ResNet) else []
    layer_map.append((zennit.layer.Sum, zennit.rules.Norm()))
    composite = zennit.composites.LayerMapComposite(layer_map, canonizers=canonizers)

    def run() -> None:
        seen = []
        with composite.context(merged) as attributed:
            modules = dict(attributed.named_modules())
            handles = [
                modules[name].register_forward_hook(lambda module, inputs, output: seen.append(output))
                for name in units
            ]
            x = images.clone().requires_grad_()
            logits = attributed(x).gather(1, labels[:, None])
            grads = torch.autograd.grad(logits, [x, *seen], logits.detach())
            _ = [grad.flatten(2).sum(2) for grad in grads[1:]]
            for handle in handles:
                handle.remove()

    return run


def medians(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Seconds of CPU time, all candidates in turn so that drift hits them alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if repeat:  # the first round warms up
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def prepared(name: str, batch: int) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor], pxp.Components]:
    """A network with random weights, random images, and its filters or its heads and neurons."""
    torch.manual_seed(0)
    model = pxp.load_model(MODELS[name])
    for head in (m for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.any()):
        nn.init.normal_(head.weight, std=0.02)  # torchvision's transformers start with an all-zero head
    units = pxp.find_components(model, ("head", "neuron") if "vit" in name else "filter")
    return model, (torch.rand(batch, 3, 224, 224), torch.arange(batch)), units


def attribution(names: list[str], repeats: int, batch: int) -> None:
    print(f"\nAttribution of all filters, or of all heads and neurons, relative to plain; batch {batch}, 224 x 224,")
    print(f"one thread, median of {repeats}")
    print(f"{'model':<14} {'rule':<13} {'pxp':>6} {'target':>7} {'zennit':>7}")
    for name in names:
        model, refs, units = prepared(name, batch)
        for rule in (rule for each, rule in TARGETS if each == name):
            score = partial(pxp.attribute, model, refs, units, CRITERIA[rule], progress=False)
            runs = {"plain": plain(model, *refs), "pxp": score}
            if rule in ZENNIT_RULES and "vit" not in name:  # zennit has no rule for attention
                runs["zennit"] = with_zennit(model, rule, *refs, units)
            found = medians(runs, max(2, repeats // 3) if rule.startswith("IG") else repeats)
            zennit_ratio = f"{found['zennit'] / found['plain']:7.2f}" if "zennit" in found else f"{'-':>7}"
            print(
                f"{name:<14} {rule:<13} {found['pxp'] / found['plain']:6.2f} {TARGETS[name, rule]:7.2f} {zennit_ratio}",
                flush=True,
            )


def checks(names: list[str], repeats: int) -> None:
    """Made once per model and state; here before each call, and in no other section more than once."""
    print("\nWhat is checked once per model: its replica (at most two images), and conservation (one image, float64),")
    print("each relative to plain with as many images and the same dtype; both relative to one attribution of eight")
    print(f"{'model':<14} {'replica':>8} {'balance':>8} {'of 8':>6}")
    for name in names:
        model, (images, labels), units = prepared(name, 8)
        probe = Probe(model, units.trace, units, (images, labels), 8)
        twin = probe.twin
        found = medians(
            {
                "two": plain(model, images[:2], labels[:2]),
                "one": plain(deepcopy(model).double(), images[:1].double(), labels[:1]),
                "replica": partial(check_replica, model, twin, units.trace, images[:2]),
                "balance": partial(check_balance, model, units.trace, images[:1], labels[:1], EXACT.composite),
                "eight": partial(pxp.attribute, model, (images, labels), units, CRITERIA["epsilon"], progress=False),
            },
            repeats,
        )
        both = (found["replica"] + found["balance"]) / found["eight"]
        ratios = found["replica"] / found["two"], found["balance"] / found["one"]
        print(f"{name:<14} {ratios[0]:8.2f} {ratios[1]:8.2f} {both:6.2f}", flush=True)


def memory(names: list[str], batch: int = 8) -> None:
    """At a batch at which activations decide, and not the copy of the weights into which BatchNorm is merged."""
    print(f"\nPeak memory, relative to plain; batch {batch} (target: at most {MEMORY_TARGET})")
    print(f"{'model':<14} {'rule':<13} {'pxp':>6}")
    for name in names:
        model, refs, units = prepared(name, batch)
        base = peak_memory(plain(model, *refs))
        for rule in (rule for each, rule in TARGETS if each == name and not rule.startswith("IG")):
            used = peak_memory(partial(pxp.attribute, model, refs, units, CRITERIA[rule], progress=False))
            print(f"{name:<14} {rule:<13} {used / base:6.2f}", flush=True)


def sweep() -> None:
    """What is left without all of the components bounds what compaction alone can reach: 20 times as much."""
    print("\nPruning curve with 20 rates, in evaluations of the unpruned model (target: 8 for filters and neurons);")
    print("same batch: of the unpruned model at the curve's batch size, which serves the cache best;")
    print("rest: 20 evaluations of the network without all of these components")
    print(f"{'':<15} {'curve':>6} {'same batch':>11} {'rest':>6}")
    data = pxp.load_dataset()
    images = pxp.reference_samples(data.eval, per_class=100)
    for name, kind in (("vgg", "filter"), ("resnet", "filter"), ("vgg", "neuron"), ("vit", "neuron"), ("vit", "head")):
        model = pxp.load_model(name)
        units = pxp.find_components(model, kind)
        scores = pxp.attribute(model, pxp.reference_samples(data.reference, 2), units, pxp.LRP())
        rest = pxp.compact(model, scores.select(1.0))
        found = medians(
            {
                "plain": partial(pxp.accuracy, model, images),
                "same batch": partial(pxp.accuracy, model, images, batch_size=100),
                "rest": partial(pxp.accuracy, rest, images, batch_size=100),
                "curve": partial(pxp.pruning_curve, model, scores, images, progress=False),
            },
            5,
        )
        curve, same = found["curve"] / found["plain"], found["curve"] / found["same batch"]
        rest_share = 20 * found["rest"] / found["same batch"]
        print(f"{name + ', ' + kind + 's':<15} {curve:6.1f} {same:11.1f} {rest_share:6.1f}", flush=True)


def leave_one_out() -> None:
    """Ablation computes once what does not depend on the silenced component."""
    print("\nLeave-one-out of all components on 200 images, in as many evaluations of the unpruned model")
    print("(target: 0.5 for the VGG's filters, 0.6 for the ViT's heads)")
    data = pxp.load_dataset()
    images = pxp.reference_samples(data.eval, per_class=20)
    for name, kind in (("vgg", "filter"), ("vit", "head")):
        model = pxp.load_model(name)
        units = pxp.find_components(model, kind)
        found = medians(
            {
                "plain": partial(pxp.accuracy, model, images),
                "all": partial(pxp.attribute, model, images, units, pxp.Ablation(), progress=False),
            },
            3,
        )
        print(f"{name + ', ' + kind + 's':<15} {found['all'] / found['plain'] / units.total:.2f}", flush=True)


def repair() -> None:
    """Each layer is refitted on what the layers before it deliver, in one walk through both networks."""
    print("\nRepair by least squares with 32 images, ViT-B/16, half of the neurons, in forward passes of the images")
    print("(target: 3 and the Gram matrices); Gram: what the products for the normal equations alone take")
    model = torchvision.models.vit_b_16().eval()
    units = pxp.find_components(model, "neuron")
    mask = pxp.attribute(model, None, units, pxp.Random()).select(0.5)
    images = torch.randn(32, 3, 224, 224)
    hidden = torch.rand(32 * 197, 3072)

    @torch.no_grad()
    def forward() -> None:
        model(images)

    def gram() -> None:
        for _ in range(12):
            hidden.T @ hidden

    runs = {
        "forward": forward,
        "gram": gram,
        "repair": partial(pxp.repair, model, mask, images, "least_squares", progress=False),
    }
    found = medians(runs, 3)
    print(f"repair {found['repair'] / found['forward']:.1f}, Gram {found['gram'] / found['forward']:.1f}", flush=True)


def search() -> None:
    """Workers are processes that start from nothing, so their imports count; every worker has one thread."""
    data, model = pxp.load_dataset(), pxp.load_model("vgg")
    refs, images = pxp.reference_samples(data.reference, 10), pxp.reference_samples(data.tune, 30)
    start = time.perf_counter()
    study = pxp.tune(model, refs, pxp.find_components(model), images, 6, sampler="random", progress=False)
    wall = time.perf_counter() - start
    work = sum(sum(trial.user_attrs["seconds"].values()) for trial in study.trials)
    print(f"\nA search of 6 trials takes {wall / work:.2f} of its attributions and sweeps (target: at most 1.05)")

    def workers(number: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pxp", "tune", "--storage", f"{folder}/s.journal", "--study", "s"]
            command += ["--trials", "40", "--tune-per-class", "30", "--sampler", "random"]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            start = time.perf_counter()
            processes = [
                subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet) for _ in range(number)
            ]
            for process in processes:
                process.wait()
            return time.perf_counter() - start

    alone = workers(1)
    print(
        f"2 workers take {workers(2) / alone:.2f} of one worker's time for 40 trials (target: at most 0.6)", flush=True
    )


def import_time() -> None:
    def seconds(code: str) -> float:
        return statistics.median(
            float(subprocess.run([sys.executable, "-c", template], capture_output=True, text=True, check=True).stdout)
            for template in [f"import time; a = time.perf_counter(); {code}; print(time.perf_counter() - a)"] * 5
        )

    extra = seconds("import torch, torchvision, pxp") - seconds("import torch, torchvision")
    print(f"\nimport pxp adds {extra:.2f} s to torch and torchvision (target: at most 0.3)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ResNet-18 only, three repeats")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: all")
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = arguments.models or (["resnet18"] if arguments.quick else list(MODELS))
    print(f"torch {torch.__version__}, zennit {version('zennit')}")
    attribution(models, 3 if arguments.quick else 7, arguments.batch)
    checks(models, 3)
    memory(models)
    sweep()
    leave_one_out()
    repair()
    search()
    import_time()
