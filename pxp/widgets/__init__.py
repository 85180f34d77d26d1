"""Explorers: figures to touch, in a page without a kernel or live in a notebook.

Each is a JavaScript module with a thin Python face. The module computes by itself from data that stand in the page;
live, Python does, on the reader's own model.
"""

from .control import control_explorer
from .explorer import Explorer
from .heads import head_explorer
from .prune import prune_explorer
from .rules import rule_explorer
from .softmax import softmax_explorer

__all__ = ["Explorer", "control_explorer", "head_explorer", "prune_explorer", "rule_explorer", "softmax_explorer"]
