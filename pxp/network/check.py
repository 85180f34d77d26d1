"""Checked, not believed: the replica computes what the model computes, and once per model it is tried."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .layers import kind_of
from .outputs import tensors
from .replica import eager, evaluating, replica
from .trace import Trace

# relative to the largest value; folding BatchNorm rounds differently, and parts of a network in float64 may compute in
# float32 whatever they are given, such as Hugging Face's softmax
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
_checked: WeakIdKeyDictionary = WeakIdKeyDictionary()  # model → the state in which it was found right, by check


def state_of(model: nn.Module) -> tuple:
    """Changes whenever a module, a parameter, a buffer, a hook or a setting of the model does, or what it is like."""
    held = (*model.parameters(), *model.buffers())
    versions = ((t.data_ptr(), 0 if t.is_inference() else t._version) for t in held)
    modules = (
        (id(m), type(m), kind_of(m), *m._forward_hooks, *m._forward_pre_hooks, *_settings(m)) for m in model.modules()
    )
    return tuple(versions), _few_values(held), tuple(modules)


def _few_values(held: Iterable[Tensor]) -> bytes:
    """Eight values of each tensor, for what is written through ``.data`` has no version."""
    few = [
        flat[:: max(1, len(flat) // 8)].detach()
        for tensor in held
        if tensor.is_floating_point() and not tensor.is_meta and tensor.layout is torch.strided
        if (flat := tensor.flatten()).numel()
    ]
    devices = {part.device for part in few}
    return b"".join(
        torch.cat([part.float() for part in few if part.device == device]).cpu().numpy().tobytes()
        for device in sorted(devices, key=str)
    )


def _settings(module: nn.Module) -> list[tuple[str, object]]:
    plain = (bool, int, float, str, type(None))
    return [(k, v) for k, v in vars(module).items() if isinstance(v, plain) and k != "training"]


def once(model: nn.Module, what: str) -> bool:
    """Whether this check of the model, in the state that it has now, is still to be made."""
    known: dict[str, tuple] = _checked.setdefault(model, {})
    now = state_of(model)
    if known.get(what) == now:
        return False
    known[what] = now
    return True


@contextmanager
def forgotten(model: nn.Module) -> Iterator[None]:
    """A check that fails is made again next time."""
    try:
        yield
    except BaseException:
        _checked.pop(model, None)
        raise


def check_replica(model: nn.Module, twin: nn.Module, structure: Trace, images: Tensor) -> None:
    """Compare a replica's outputs with the model's.

    Raises
    ------
    ValueError
        They differ; the first module whose output does is named.
    """
    with torch.no_grad(), eager():
        with evaluating(model):
            expected, inner = _outputs(model, images)
        found, own = _outputs(twin, images)
        if same_outputs(found, expected) or not all(bool(t.isfinite().all()) for t in expected):
            return  # where the numbers overflow, the scores will show it
        unfolded = replica(model)
        nudged = images * (1 + 8 * torch.finfo(images.dtype).eps)
        if same_outputs(_outputs(unfolded, images)[0], expected) and same_outputs(
            found, expected, amplified=_outputs(unfolded, nudged)[0]
        ):
            return
    folded = {name for name, norms in structure.norms.items() if any(norms)}
    odd = next(
        (n for n, value in own.items() if n in inner and n not in folded and not same_outputs(value, inner[n])), ""
    )
    where = f"at {odd!r} ({type(twin.get_submodule(odd)).__name__})" if odd else "at its output"
    raise ValueError(
        f"{type(model).__name__} cannot be explained: pxp's copy of it computes something else, first {where}. Either "
        "its outputs are random in evaluation mode, or that module is not what it seems: register it with "
        "pxp.register_layer, or write it with modules of torch"
    )


def _outputs(network: nn.Module, images: Tensor) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Outputs of the network, and of its modules in the order in which they end."""
    found: dict[str, list[Tensor]] = {}

    def note(name: str, output: object) -> None:
        found.setdefault(name, [t.detach().clone() for t in tensors(output)])

    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: note(name, output))
        for name, module in network.named_modules()
        if name
    ]
    try:
        output = network(images.clone())
    finally:
        for handle in handles:
            handle.remove()
    return list(tensors(output)), found


def same_outputs(found: list[Tensor], expected: list[Tensor], amplified: list[Tensor] | None = None) -> bool:
    """Within the tolerance; or, for a network that makes much of a rounding, within a hundred times of that."""
    if len(found) != len(expected) or any(a.shape != b.shape for a, b in zip(found, expected, strict=True)):
        return False
    allowed = [TOLERANCE.get(tensor.dtype, 0.0) for tensor in expected]
    if amplified is not None:
        allowed = [100 * _distance(a, b) for a, b in zip(amplified, expected, strict=True)]
    return all(_distance(a, b) <= most for a, b, most in zip(found, expected, allowed, strict=True))


def _distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest expected value; infinite where only one is not a number."""
    if found.numel() == 0 or torch.equal(found, expected):
        return 0.0
    a, b = (t.double() if t.is_floating_point() else t.float() for t in (found, expected))
    both = a.isnan() & b.isnan()
    a, b = a.masked_fill(both, 0), b.masked_fill(both, 0)
    distance = float((a - b).abs().max()) / max(1e-6, float(b.abs().max()))
    return distance if distance == distance else torch.inf
