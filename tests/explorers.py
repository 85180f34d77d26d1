"""Every explorer by the name of its module."""

from pxp.widgets import control_explorer, head_explorer, prune_explorer, rule_explorer, softmax_explorer

MAKERS = {
    "rules": rule_explorer,
    "softmax": softmax_explorer,
    "heads": head_explorer,
    "control": control_explorer,
    "prune": prune_explorer,
}
