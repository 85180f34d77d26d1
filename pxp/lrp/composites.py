"""Composites: which rule each layer gets. One rule per depth group, as in the paper's search space."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torchvision.models import ResNet
from zennit.core import Composite, Hook

from ..baseline import Baseline, as_baseline
from ..criteria import Criterion, as_count, check_absolute, check_start
from ..network.attention import SUPPORTED, unsupported_attention
from ..network.bake import need_weight
from ..network.check import forgotten, once
from ..network.layers import CONVOLUTIONS, RELU, passes
from ..network.replica import hooked, replica
from ..network.trace import Trace, trace_model
from .balance import check_balance
from .passes import FUNCTIONS, Identity, Normalisation
from .rules import Epsilon, InputRule, Rule, as_zero_params, make_rule
from .softmax import AttentionRule, make_softmax_rule

if TYPE_CHECKING:
    from ..probe import Probe

GROUPS = ("low", "middle", "high", "fc")


def depth_groups(model: nn.Module, structure: Trace) -> dict[str, str]:
    """Assign every layer to ``"low"``, ``"middle"``, ``"high"`` or ``"fc"``.

    The first 25 % of the hidden layers (rounded up) are low, the last 25 % (rounded up) high, the rest middle; hidden
    layers are the convolutions (in a network without any: all linear layers but the last), the others are fc. For
    VGG-16 this gives the paper's convolutions 1–4, 5–9, 10–13. torchvision's ResNets are grouped by stage, as in the
    paper: conv1 and layer1, layer2 and layer3, layer4. A transformer is grouped by blocks, for ViT-B/16 0–2, 3–8 and
    9–11; what runs before them is low, what runs between two (Swin's merging of patches) goes with the first, what runs
    after them is fc (Hatefi et al. 2024, as the method is reported).

    Returns
    -------
    dict
        Layer name → group, in the order in which the layers run.
    """
    if structure.heads:
        return _by_block(structure)
    modules = dict(model.named_modules())
    hidden = [name for name in structure.order if isinstance(modules[name], CONVOLUTIONS)] or list(structure.order[:-1])
    edge = math.ceil(len(hidden) / 4)
    low, high = set(hidden[:edge]), set(hidden[max(edge, len(hidden) - edge) :])
    stages = {
        f"{prefix}{'.' if prefix else ''}{stage}": group
        for prefix, module in modules.items()
        if isinstance(module, ResNet)
        for stage, group in (("layer2", "middle"), ("layer3", "middle"), ("layer4", "high"), ("", "low"))
    }
    groups = {}
    for name in structure.order:
        stage = next((group for start, group in stages.items() if name.startswith(start)), None)
        by_depth = "low" if name in low else "high" if name in high else "middle"
        groups[name] = "fc" if name not in hidden else stage or by_depth
    return groups


def _by_block(structure: Trace) -> dict[str, str]:
    blocks = list(dict.fromkeys(_block(attention, structure) for attention in structure.heads))
    edge = math.ceil(len(blocks) / 4)
    groups: dict[str, str] = {}
    group, seen = "low", -1
    for name in structure.order:
        inside = [i for i, block in enumerate(blocks) if name.startswith(f"{block}.")]
        if inside:
            seen = max(seen, inside[0])
            group = "low" if inside[0] < edge else "high" if inside[0] >= len(blocks) - edge else "middle"
        elif seen == len(blocks) - 1:
            group = "fc"
        groups[name] = group
    return groups


def _block(attention: str, structure: Trace) -> str:
    """The innermost module around an attention that has layers of no attention too: those of the block's MLP."""
    others = [n for n in structure.order if not any(n.startswith(f"{one}.") for one in structure.heads)]
    parts = attention.split(".")
    around = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
    found = (block for block in around if any(n.startswith(f"{block}.") for n in others))
    return next(found, around[0] if around else attention)


class LayerComposite(Composite):
    """A zennit composite that places rules by layer name; prints which rule each layer got.

    Attributes
    ----------
    rules : dict
        Layer name → hook.
    groups : dict
        Layer name → depth group.
    functions : dict
        How what a model computes by functions lets relevance pass, see :class:`pxp.network.signals.Signals`.
    input_layer : str or None
        The first layer, if it has a rule for inputs whose relevance does not contain them as a factor.
    """

    functions = FUNCTIONS

    def __init__(self, rules: dict[str, Hook], groups: dict[str, str]) -> None:
        super().__init__(module_map=lambda ctx, name, module: rules.get(name))
        self.rules = rules
        self.groups = groups
        first = next(iter(groups), None)
        self.input_layer = first if first is not None and isinstance(rules[first], InputRule) else None

    def __repr__(self) -> str:
        width = max(len("layer"), *(len(name) for name in self.groups))
        rows = [f"{'layer':<{width}}  {'group':<6}  rule"]
        rows += [f"{name:<{width}}  {group:<6}  {self.rules[name]!r}" for name, group in self.groups.items()]
        return "\n".join(rows)


@dataclass(frozen=True, init=False)
class LRP(Criterion):
    """Layer-wise relevance propagation with one rule per depth group.

    Parameters
    ----------
    rule : str or Rule, optional
        One rule for all groups that are not named; default ``"epsilon"``.
    low, middle, high, fc : str or Rule, optional
        Rule of the first 25 % of the hidden layers, the middle 50 %, the last 25 %, and the fully connected head; see
        :func:`depth_groups`. A name (``"epsilon"``, ``"gamma"``, ``"zplus"``, ``"alpha2beta1"``) takes the paper's
        parameters: ε = 1e-6; γ = 0.25 for convolutions and 0.05 for linear layers; α = 2, β = 1.
    input : str or Rule, optional
        Rule of the very first layer, for heatmaps: ``pxp.ZBox(0, 1)``, ``"flat"``, ``"wsquare"``. It changes no
        component's score. A model may normalise its images first, pixel by pixel: relevance passes that as it is, and
        the bounds of ``ZBox`` are those of the normalised values. Where it does more before that layer (resizes,
        normalises by what other pixels are), :func:`pxp.heatmap` refuses these rules.
    softmax : {"attnlrp", "cp", "zplus"} or AttentionRule, default "attnlrp"
        How relevance passes the attention's softmax: :class:`pxp.AttnLRP`, :class:`pxp.CPLRP`,
        :class:`pxp.SoftmaxZPlus`.
    start : {"logit", "one", "margin", "loss"}, default "logit"
        What the relevance of a sample starts with: the target's logit; 1, as in the paper's public code (the logit's
        relevance divided by the logit, unstable near 0); the logit minus the largest other one; minus the cross-entropy
        loss. Positive always means useful for the target.
    path_steps : int, default 1
        Average the relevance over this many images on the straight way from black to the image; costs as many passes.
    baseline : float or tuple of float, default 0.0
        Where that way begins: the value of black, see :class:`pxp.IntegratedGradients`.
    zero_params : "bias", optional
        For the rules given by name: leave biases out of the denominators. Under ε and γ these can then be almost 0
        where the outputs are not, and relevance of both signs grows from layer to layer; where it overflows, that is
        an error.
    absolute : {"token", "sample"}, default "token"
        ``scores`` are means of absolute values: taken per token, as in the paper, or per sample, after summing over
        its tokens (filters have one token, so there is no difference). To rank by the mean with its sign, select
        ``by="signed"``.
    **parameters
        Parameters of a group's rule that is given by name, as ``<group>_<parameter>``: ``low_epsilon``,
        ``middle_gamma``, ``high_alpha`` (β = α − 1), ``fc_zero_params`` and so on. It is how :func:`pxp.tune` writes a
        setting down: ``LRP(middle="gamma", middle_gamma=0.1)`` is ``LRP(middle=pxp.Gamma(0.1))``.

    Notes
    -----
    In transformers, GELU and SiLU pass relevance on unchanged, LayerNorm divides by a constant, and residual sums share
    it in proportion. What reaches the class token, register tokens, position embedding or a bias stays there. Of two
    signals that are multiplied, one that ends in a sigmoid, tanh or softmax is a gate, a constant factor; otherwise
    each gets half. This holds for modules and for functions. An operation on the way to the output that is in no table
    (``pxp.network.layers``) is an error that names it, and once per model its copy is compared with it and
    conservation is tried on one image (``pxp.lrp.balance``).

    Raises
    ------
    ValueError
        Unknown rule, start, zero_params or absolute; ``path_steps`` below 1; a parameter that the group's rule does not
        have; a baseline that is not finite, does not fit the images' channels, or has no path to begin.
    TypeError
        A baseline that is neither a number nor a tuple of numbers.

    Examples
    --------
    >>> import pxp
    >>> pxp.LRP("epsilon", low="zplus")
    LRP(low='zplus', middle='epsilon', high='epsilon', fc='epsilon')
    """

    low: str | Rule
    middle: str | Rule
    high: str | Rule
    fc: str | Rule
    input: str | Rule | None
    start: str
    path_steps: int
    zero_params: str | None
    softmax: str | AttentionRule
    absolute: str
    baseline: Baseline

    def __init__(
        self,
        rule: str | Rule = "epsilon",
        *,
        low: str | Rule | None = None,
        middle: str | Rule | None = None,
        high: str | Rule | None = None,
        fc: str | Rule | None = None,
        input: str | Rule | None = None,
        start: str = "logit",
        path_steps: int = 1,
        zero_params: str | None = None,
        softmax: str | AttentionRule = "attnlrp",
        absolute: str = "token",
        baseline: Baseline = 0.0,
        **parameters: Any,
    ) -> None:
        given = dict(zip(GROUPS, (low, middle, high, fc), strict=True))
        for group, chosen in given.items():
            chosen = rule if chosen is None else chosen
            own = {key: parameters.pop(key) for key in list(parameters) if key.startswith(f"{group}_")}
            if own:
                own = {key.removeprefix(f"{group}_"): value for key, value in own.items()}
                chosen = make_rule(chosen, **{"zero_params": zero_params, **own})
            object.__setattr__(self, group, chosen)
        if parameters:
            selects = "; options of Scores.select are no part of a criterion: pxp.winner(study) gives both"
            about = selects if parameters.keys() & {"by", "order", "scope", "min_keep", "cost"} else ""
            raise TypeError(f"LRP has no parameter {', '.join(map(repr, parameters))}{about}")
        for name, value in (
            ("input", input),
            ("start", start),
            ("path_steps", as_count("path_steps", path_steps)),
            ("zero_params", as_zero_params(zero_params)),
            ("softmax", softmax),
            ("absolute", absolute),
            ("baseline", as_baseline(baseline)),
        ):
            object.__setattr__(self, name, value)
        check_start(start)
        check_absolute(absolute)
        make_softmax_rule(softmax, zero_params)
        if path_steps == 1 and self.baseline != 0:
            raise ValueError(f"a baseline begins a path, got baseline={self.baseline} with path_steps=1")
        self._rules()  # a wrong name is an error here, not at the first use

    def _rules(self) -> dict[str, Rule]:
        chosen = {group: getattr(self, group) for group in (*GROUPS, "input")}
        return {
            group: make_rule(rule, self.zero_params if isinstance(rule, str) else None)
            for group, rule in chosen.items()
            if rule is not None
        }

    def values(self, probe: Probe) -> Iterator[dict[str, Tensor]]:
        composite = self.composite(probe.model, probe.structure)
        without = [rule for rule in composite.rules.values() if isinstance(rule, Rule) and rule.zero_params]
        overflown = None
        with probe.rules(composite):
            for images, labels in probe.batches():
                found = self._relevance(probe, images, labels)
                if probe.samples == 0 and once(
                    probe.model, "balance"
                ):  # behind the errors of the pass itself, which say more
                    with forgotten(probe.model):
                        check_balance(probe.model, probe.structure, images[:1], labels[:1], EXACT.composite)
                overflown = next((n for n in found if not bool(found[n].isfinite().all())), None) if without else None
                if overflown is not None:
                    break
                yield found
        if overflown is None:
            return
        for rule in without:
            rule.zero_params = None
        with probe.rules(composite):
            again = self._relevance(probe, images, labels)
        if all(bool(value.isfinite().all()) for value in again.values()):
            raise ValueError(
                f"relevance by {self!r} overflows, on its way from the output first at {overflown!r}, and with biases "
                "in the denominators it does not: without them (zero_params='bias') a denominator can be almost 0 "
                "where the output is not, so that relevance of both signs grows from layer to layer. Leave zero_params "
                "out, or give the rules a larger epsilon, as in pxp.Gamma(zero_params='bias', epsilon=0.01); float64 "
                "only holds larger numbers"
            )
        yield found  # the biases are not the reason, and who reads these numbers refuses them

    def _relevance(self, probe: Probe, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return probe.relevance(images, labels, start=self.start, steps=self.path_steps, baseline=self.baseline)

    def composite(self, model: nn.Module, structure: Trace | None = None) -> LayerComposite:
        """The zennit composite for one model; its ``repr`` shows which rule each layer got.

        Parameters
        ----------
        model : nn.Module
        structure : Trace, optional
            Default: found by running the model once.

        Returns
        -------
        LayerComposite
            Its rules work in the form x ⊙ g and must not be mixed with zennit's own, which pass relevance itself on.
            Of a transformer it names the layers of the replica, in which attentions show their parts.

        Raises
        ------
        ValueError
            An attention of a class that there is no rule for; an operation on the way to the output for which there is
            none; a layer whose weight depends on the input, or that computes something else than its class does.
        """
        if structure is None:
            structure = trace_model(model)
        twin = replica(model)
        unsupported = unsupported_attention(twin, structure.attentions)
        if unsupported:
            name, its_class = next(iter(unsupported.items()))
            raise ValueError(f"there is no LRP rule for {name!r} ({its_class}); supported are {SUPPORTED}")
        modules = dict(twin.named_modules())
        for name, found in structure.functions.items():
            raise ValueError(
                f"{name!r} ({type(modules[name]).__name__}) computes {', '.join(found)}, for which there is no LRP "
                "rule; let it call a module of torch, or tell what it is like with pxp.register_layer"
            )
        for name in structure.order:
            need_weight(name, modules[name])
        groups = depth_groups(twin, structure)
        by_group = self._rules()
        hooks: dict[str, Hook] = {}
        for position, (name, group) in enumerate(groups.items()):
            rule = by_group["input" if position == 0 and "input" in by_group else group].copy()
            activation = structure.activations.get(name)
            between = [modules[part] for part in (name, *structure.site(name), activation) if part is not None]
            rule.rectified = (
                activation is not None
                and type(modules[activation]) is RELU
                and not any(hooked(part) for part in between)  # which may lift what is below 0
            )
            hooks[name] = rule
        for name in structure.heads:
            hooks[name] = make_softmax_rule(self.softmax, self.zero_params)
        for name, module in modules.items():
            match passes(module):
                case "identity":
                    hooks[name] = Identity()
                case "normalisation":
                    hooks[name] = Normalisation()
        return LayerComposite(hooks, groups)

    def __repr__(self) -> str:
        rules = [getattr(self, group) for group in GROUPS]
        parts = (
            [repr(rules[0])]
            if all(rule == rules[0] for rule in rules)
            else [f"{group}={getattr(self, group)!r}" for group in GROUPS]
        )
        parts += [f"input={self.input!r}"] if self.input is not None else []
        parts += [f"start={self.start!r}"] if self.start != "logit" else []
        parts += [f"path_steps={self.path_steps}"] if self.path_steps != 1 else []
        parts += [f"baseline={self.baseline}"] if self.baseline != 0 else []
        parts += [f"zero_params={self.zero_params!r}"] if self.zero_params else []
        parts += [f"softmax={self.softmax!r}"] if self.softmax != "attnlrp" else []
        parts += [f"absolute={self.absolute!r}"] if self.absolute != "token" else []
        return f"LRP({', '.join(parts)})"


EXACT = LRP(Epsilon(0), softmax="cp")  # the derivative of every layer, attention weights as constants
