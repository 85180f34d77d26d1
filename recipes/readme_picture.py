"""Draw the picture of the README: ``python recipes/readme_picture.py``."""

import matplotlib.pyplot as plt
import torch

import pxp

OUT = "book/assets/readme.png"
SEEDS = 3


def main() -> None:
    pxp.plots.use_style()
    model, data = pxp.load_model("vgg"), pxp.load_dataset("fashion-mnist")
    units = pxp.find_components(model, "filter")
    shown = pxp.reference_samples(data.eval, per_class=1, classes=[7, 8, 1, 4], seed=1)
    heat = pxp.heatmap(model, shown.images, shown.labels, pxp.LRP("epsilon", low="zplus", middle="zplus"))

    figure = plt.figure(figsize=(9, 3.6))
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.35])
    axes = left.subplots(2, len(shown.images))
    for column, (image, relevance) in enumerate(zip(shown.images, heat, strict=True)):
        limit = float(torch.quantile(relevance.abs(), 0.995))
        axes[0, column].imshow(image[0], cmap="gray", vmin=0, vmax=1)
        axes[1, column].imshow(relevance[0], cmap="seismic", vmin=-limit, vmax=limit)
    for ax in axes.flat:
        ax.set_axis_off()
    left.suptitle("what the network saw, and why", fontsize=13)

    few = pxp.reference_samples(data.eval, per_class=100)
    curves = {}
    for label, criterion in (
        ("LRP-ε", lambda seed: pxp.LRP("epsilon")),
        ("random", lambda seed: pxp.Random(seed)),
        ("weight magnitude", lambda seed: pxp.Magnitude()),
    ):
        scores = [
            pxp.attribute(model, pxp.reference_samples(data.reference, seed=seed), units, criterion(seed))
            for seed in range(SEEDS)
        ]
        curves[label] = pxp.pruning_curve(model, scores, few, rates=[0.05 * step for step in range(13)])
    ax = pxp.plots.curves(curves, right.subplots())
    ax.set_xlabel("removed filters (%)")
    figure.savefig(OUT, dpi=110)


if __name__ == "__main__":
    main()
