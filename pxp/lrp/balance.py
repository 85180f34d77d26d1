"""The structural self-test: under LRP-0 the input's relevance and that of all constants add up to the logit.

A network that is explained is, at one image, linear in its input and in everything that is added on the way: biases,
shifts, tokens, position embeddings, what an activation gives for 0. So one ordinary backward pass must satisfy
Σ x · ∂ + Σ constant · ∂ = logit. Where it does not, something on the way is not what it seems. A rule that was not
applied to a linear layer stays unseen, since LRP-0 is the derivative there; the table of layers is what sees that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from zennit.core import Composite

from ..network.fold import fold_batch_norm
from ..network.layers import LAYERS, LINEAR, kind_of, kind_of_function
from ..network.outputs import logits_of, tensors
from ..network.replica import eager, replica
from ..network.signals import Signals
from ..network.trace import Trace
from .passes import FUNCTIONS

TOLERANCE = 1e-5  # of the logit
ROUNDING = 1e-9  # of all terms of the sum
LOOSE, LOOSE_ROUNDING = 1e-2, 1e-4  # where the network computes in float32 whatever it is given


def check_balance(
    model: nn.Module,
    structure: Trace,
    image: Tensor,
    label: Tensor,
    exact: Callable[[nn.Module, Trace], Composite],
) -> None:
    """Try the sum on one image.

    Parameters
    ----------
    model : nn.Module
    structure : Trace
    image, label : Tensor
        One sample, (1, …) and (1,).
    exact : callable
        Makes, of the model and its structure, the composite of LRP-0 in which attention weights are constants.

    Raises
    ------
    ValueError
        It does not hold; the first module in which relevance is lost or made is named.
    """
    found, tolerance, rounding = None, TOLERANCE, ROUNDING
    # a forward pass may ask for one dtype; what autograd refuses in both, explaining it will tell
    for dtype in (torch.float64, image.dtype):
        with suppress(RuntimeError):
            found = _summed(model, structure, image.to(dtype), label, exact)
            break
        tolerance, rounding = LOOSE, LOOSE_ROUNDING
    if found is None:
        return
    constants, sums, logit, terms, modules = found
    total = float(terms.sum())
    if not math.isfinite(logit + total + constants.total):
        return  # the numbers overflow, which the scores will show
    allowed = tolerance * abs(logit) + rounding * (constants.size + float(terms.abs().sum()))
    if abs(total + constants.total - logit) <= allowed:
        return
    hint = ""
    for name in constants.ended:
        inside, outside = sums.get(name, (0.0, 0.0))
        if abs(outside - inside - constants.by_module.get(name, 0.0)) > allowed:
            where = f"{name!r} ({type(modules[name]).__name__})"
            kind = kind_of(modules[name])
            if kind is not None and kind.passes == "normalisation":
                hint = f"; a {kind.name} has its gain as 'weight', its shift as 'bias' and its epsilon as 'eps'"
            break
    else:
        where = f"{type(model).__name__} itself"
    raise ValueError(
        f"{type(model).__name__} cannot be explained: under LRP-0 relevance is not conserved in {where}, which "
        "computes something that pxp does not know. Write it with modules of torch, or tell what it is like with "
        f"pxp.register_layer{hint}"
    )


def _summed(
    model: nn.Module, structure: Trace, image: Tensor, label: Tensor, exact: Callable[[nn.Module, Trace], Composite]
) -> tuple[_Constants, dict[str, list[float]], float, Tensor, dict[str, nn.Module]] | None:
    """Constants, sums by module, the logit and x · ∂ in the image's precision; None if it has no gradient."""
    twin = replica(model)
    fold_batch_norm(twin, structure)
    twin = twin.to(image.dtype)  # a new dtype gives the replica parameters of its own
    modules = dict(twin.named_modules())
    hooks = {name: _hooks(module) for name, module in modules.items()}  # the user's: no rule is in place yet
    shields = [
        modules[site].register_forward_hook(lambda _, inputs, output: output.clone())
        for name in structure.overwritten
        for site in structure.site(name)
    ]
    everything = {name: module for name, module in modules.items() if name}
    with exact(model, structure).context(twin), boundaries(everything) as sums, eager():
        point = image.clone().requires_grad_()
        given = point.clone()  # which a network may change
        constants = _Constants(twin, given, hooks)
        with constants.watching():
            logits = constants.logits(logits_of(twin(given)))
        target = logits.gather(1, label[:, None]).sum()
        if not target.requires_grad:
            return None
        (gradient,) = torch.autograd.grad(target, point)
    for shield in shields:
        shield.remove()
    return constants, sums, float(target.detach()), point.detach() * gradient, modules


@contextmanager
def boundaries(modules: dict[str, nn.Module], carried: bool = False) -> Iterator[dict[str, list[float]]]:
    """Module → [relevance at its inputs that came through it, relevance at its outputs], after a backward pass.

    What arrives at an output is what the layer's own rule has not rescaled yet.
    """
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in modules}
    waiting: dict[str, RemovableHandle] = {}  # modules that have begun

    def watch(name: str, side: int, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        seen, value = tensor.view_as(tensor), tensor.detach()
        if not seen.requires_grad:  # without gradients inside
            return tensor

        def add(flow: Tensor) -> None:
            sums[name][side] += float((flow if carried else flow * value).sum(dtype=torch.float64))

        seen.register_hook(add)
        return seen

    def each(name: str, side: int, values: object) -> object:
        if isinstance(values, Tensor):
            return watch(name, side, values) if values.is_floating_point() else values
        return type(values)(each(name, side, v) for v in values) if type(values) in (tuple, list) else values  # type: ignore

    def enter(name: str, module: nn.Module, inputs: tuple) -> object:
        def leave(module: nn.Module, inputs: tuple, output: object) -> object:
            waiting.pop(name).remove()
            return each(name, 1, output)

        if name in waiting:  # a pass before that was broken off
            waiting[name].remove()
        # now, so that it comes behind the rules, whenever they are placed
        waiting[name] = module.register_forward_hook(leave)
        return each(name, 0, inputs)

    handles = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: enter(name, module, inputs))
        for name, module in modules.items()
    ]
    try:
        yield sums
    finally:
        for handle in (*handles, *waiting.values()):
            handle.remove()


def _hooks(module: nn.Module) -> list[Callable]:
    """A module's forward hooks, (module, inputs, options, output) → output."""

    def whole(key: int, hook: Callable) -> Callable:
        if key in module._forward_hooks_with_kwargs:
            return hook
        return lambda module, inputs, options, output: hook(module, inputs, output)

    return [whole(key, hook) for key, hook in module._forward_hooks.items()]


class _Constants(Signals):
    """Adds up constant · gradient over everything that an operation gives for inputs of 0."""

    def __init__(self, twin: nn.Module, images: Tensor, hooks: dict[str, list[Callable]]) -> None:
        super().__init__(twin, images, FUNCTIONS)
        self.hooks = hooks
        self.total = self.size = 0.0
        self.by_module: dict[str, float] = {}
        self.ended: dict[str, None] = {}  # modules in the order in which they ended

    def leave(self, name: str, args: tuple, options: dict, output: object) -> None:
        self.ended[name] = None
        module = self.modules[name]
        x = next(tensors([args, options]), None)
        kind = self.kinds[name]
        if kind is not None and kind.passes == "identity" and x is not None and len([*tensors([args, options])]) == 1:
            self._need_elementwise(name, x, args, options)
        leaf = None if module._modules else self.kinds[name]
        if leaf is not None and x is not None and self.of(x) is not None and isinstance(output, Tensor):
            if type(module) in LAYERS and not self.hooks[name]:  # without running it
                ahead = () if isinstance(module, LINEAR) else (1,) * (module.weight.ndim - 2)
                nothing = None if module.bias is None else module.bias.detach().reshape(-1, *ahead).clone()
            else:
                with self._at_zero(name):
                    nothing = self._module_at_zero(name, x, args, options)
                    if leaf.passes == "identity":
                        nothing = torch.where(x == 0, nothing, 0)
            if nothing is not None:
                self._note(nothing, output)
        super().leave(name, args, options, output)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        options = kwargs or {}
        given = list(tensors([*args, *options.values()]))
        signals = [t for t in given if self.of(t) is not None]
        inside = self.inside[-1]
        whole = self.kinds[inside] is not None and not self.modules[inside]._modules
        if not signals or whole:
            return super().__torch_function__(func, types, args, kwargs)
        kind = kind_of_function(func)
        # now, for it may write into what it is given
        at_rest = signals[0].detach() == 0 if kind is not None and kind.passes == "identity" else None
        before, shapes = [_version(t) for t in given], [t.shape for t in signals]
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, Tensor) and result.requires_grad:
            writes = any(version is None or version != _version(t) for t, version in zip(given, before, strict=True))
            zeros = {id(t): t.new_zeros(shape) for t, shape in zip(signals, shapes, strict=True)}

            def at_zero(value: object) -> object:
                if isinstance(value, Tensor):
                    return zeros.get(id(value), value.detach().clone() if writes else value.detach())
                return type(value)(map(at_zero, value)) if type(value) in (tuple, list) else value  # type: ignore

            with self._at_zero(inside):
                nothing = func(*at_zero(args), **{key: at_zero(value) for key, value in options.items()})  # type: ignore
                if nothing.untyped_storage().data_ptr() in {t.untyped_storage().data_ptr() for t in given}:
                    nothing = nothing.clone()  # whoever writes there later shall not change what was given now
                nothing = nothing if at_rest is None else torch.where(at_rest, nothing, 0)
            self._note(nothing, result)
        return result

    def _module_at_zero(self, name: str, x: Tensor, args: tuple, options: dict) -> Tensor:
        """What a module, and its hooks behind it, give for inputs of 0; a mask silences the bias too."""
        module, zero = self.modules[name], torch.zeros_like(x)
        zeros = tuple(zero if value is x else value for value in args)
        named = {key: zero if value is x else value for key, value in options.items()}
        nothing = module.forward(*zeros, **named)
        for hook in self.hooks[name]:
            changed = hook(module, zeros, named, nothing)
            nothing = nothing if changed is None else changed
        return nothing

    @contextmanager
    def _at_zero(self, name: str) -> Iterator[None]:
        """An error in what only this check computes is a refusal: what cannot be tried is not believed."""
        try:
            with torch.no_grad():
                yield
        except Exception as error:
            where = f"{name!r} ({type(self.modules[name]).__name__})"
            raise ValueError(
                f"{where} cannot be explained: what it adds is what it gives for inputs of 0, and that fails: {error}. "
                "Let it, and the hooks on it, accept zeros"
            ) from error

    @torch.no_grad()
    def _need_elementwise(self, name: str, x: Tensor, args: tuple, options: dict) -> None:
        """x · (f(x) / x) is conserved whatever f is, but an activation gives in a place what it is given there."""
        module = self.modules[name]
        generator = torch.Generator().manual_seed(0)
        half = torch.randint(2, x.shape, generator=generator).bool().to(x.device)

        def given(values: Tensor) -> Tensor:
            those = tuple(values if value is x else value for value in args)
            return module.forward(*those, **{key: values if value is x else value for key, value in options.items()})

        before = given(x.clone())
        for changed in (half, ~half):
            after = given(torch.where(changed, x + 1, x))
            if before.shape != x.shape or not torch.allclose(after[~changed], before[~changed], equal_nan=True):
                raise ValueError(
                    f"{name!r} ({type(module).__name__}) is no activation: what it gives in one place depends on "
                    "others. Tell what it is like with pxp.register_layer, or write it with modules of torch"
                )

    def _note(self, nothing: Tensor, output: Tensor) -> None:
        if not output.requires_grad or not bool(nothing.any()):
            return
        where = list(self.inside)

        def add(flow: Tensor) -> None:
            terms = flow * nothing
            total = float(terms.sum())
            self.total += total
            self.size += float(terms.abs().sum())
            for name in where:
                self.by_module[name] = self.by_module.get(name, 0.0) + total

        output.register_hook(add)


def _version(tensor: Tensor) -> int | None:
    """Changes when it is written into; None where nobody counts."""
    return None if tensor.is_inference() else tensor._version
