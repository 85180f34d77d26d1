"""pxp: prune vision networks by explaining them (Hatefi et al. 2024, arXiv:2408.12568).

The names below follow the data flow: model and reference images → attribute → scores → select → mask → evaluate.
Rules and criteria are values: ``eval(repr(x)) == x`` after ``from pxp import *``.
"""

from . import plots, widgets
from .ablation import Ablation
from .attribute import attribute, attribute_draws, heatmap
from .bars import progress
from .budget import latencies, within_budget
from .compaction.compact import compact, load_compact, save_compact
from .comparisons import Comparison, Comparisons, compare, compare_all
from .conservation import Conservation, conservation
from .cost import Cost, compare_costs, cost
from .criteria import Activation, Criterion, IntegratedGradients, Magnitude, Random, Taylor
from .curve import Curve, load_curves, save_curves
from .data import load_dataset, load_evidence, load_photographs, reference_samples
from .evaluate import accuracies, accuracy, pruning_curve
from .exercises import exercise
from .lrp.composites import LRP, depth_groups
from .lrp.rules import AlphaBeta, Epsilon, Flat, Gamma, WSquare, ZBox, ZPlus
from .lrp.softmax import CPLRP, AttnLRP, SoftmaxZPlus
from .masks import Mask, masked
from .models import device, load_model, model_card
from .network.attentions import register_attention
from .network.components import Components, find_components
from .network.layers import register_layer
from .recover import finetune, prune_gradually
from .repair import repair
from .rivals import Fisher, GeometricMedian, Variance, WeightedActivation
from .scores import Scores
from .search.space import search_space
from .search.studies import load_study, save_study, tuned_curve, winner
from .search.tune import tune
from .sensitivity import Sensitivity, sensitivity

__version__ = "0.2.0"

__all__ = [
    "CPLRP",
    "LRP",
    "Ablation",
    "Activation",
    "AlphaBeta",
    "AttnLRP",
    "Comparison",
    "Comparisons",
    "Components",
    "Conservation",
    "Cost",
    "Criterion",
    "Curve",
    "Epsilon",
    "Fisher",
    "Flat",
    "Gamma",
    "GeometricMedian",
    "IntegratedGradients",
    "Magnitude",
    "Mask",
    "Random",
    "Scores",
    "Sensitivity",
    "SoftmaxZPlus",
    "Taylor",
    "Variance",
    "WSquare",
    "WeightedActivation",
    "ZBox",
    "ZPlus",
    "accuracies",
    "accuracy",
    "attribute",
    "attribute_draws",
    "compact",
    "compare",
    "compare_all",
    "compare_costs",
    "conservation",
    "cost",
    "depth_groups",
    "device",
    "exercise",
    "find_components",
    "finetune",
    "heatmap",
    "latencies",
    "load_compact",
    "load_curves",
    "load_dataset",
    "load_evidence",
    "load_model",
    "load_photographs",
    "load_study",
    "masked",
    "model_card",
    "plots",
    "progress",
    "prune_gradually",
    "pruning_curve",
    "reference_samples",
    "register_attention",
    "register_layer",
    "repair",
    "save_compact",
    "save_curves",
    "save_study",
    "search_space",
    "sensitivity",
    "tune",
    "tuned_curve",
    "widgets",
    "winner",
    "within_budget",
]
