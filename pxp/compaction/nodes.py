"""Operations of a traced network, one at a time."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from ..network.layers import Sequential


def run_node(node: fx.Node, root: nn.Module, values: Mapping[fx.Node, Any], images: Tensor) -> Any:
    """What one operation of a graph gives; of the first placeholder a copy of the images, of others their default."""
    args: Any = fx.map_arg(node.args, values.__getitem__)
    options: Any = fx.map_arg(node.kwargs, values.__getitem__)
    target: Any = node.target
    match node.op:
        case "placeholder":
            first = not any(other.op == "placeholder" for other in values)
            return images.clone() if first else args[0] if args else None
        case "get_attr":
            return operator.attrgetter(str(target))(root)
        case "call_module":
            return root.get_submodule(str(target))(*args, **options)
        case "call_method":
            return getattr(args[0], target)(*args[1:], **options)
        case "output":
            return args[0]
    return target(*args, **options)


def last_part(place: str, modules: Mapping[str, nn.Module]) -> str:
    """What gives the output of a place; where BatchNorm was merged, what timm's held besides."""
    while isinstance(modules[place], Sequential):
        place = f"{place}.{list(modules[place]._modules)[-1]}"
    return place
