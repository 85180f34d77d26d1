"""What explorers show without a kernel and would take a page too long: ``python recipes/explorers.py``.

Writes ``pxp/assets/explorers``: the VGG's masks by five criteria, from one draw of references; and of the ViT's heads
the attention, the relevance and the logits without any one or two of them, for a few images.
"""

from __future__ import annotations

import json

import pxp
from pxp.widgets import heads, prune


def main() -> None:
    data = pxp.load_dataset()
    vgg, vit = pxp.load_model("vgg"), pxp.load_model("vit")
    prune.MASKS.parent.mkdir(exist_ok=True)
    masks = prune.ranked(vgg, pxp.reference_samples(data.reference, 10), pxp.find_components(vgg, "filter"))
    prune.MASKS.write_text(json.dumps(masks, indent=1) + "\n", encoding="utf8")
    looked = heads.measured(vit, *heads.images_shown(), pxp.find_components(vit, "head"))
    heads.FILE.write_text(json.dumps(looked, ensure_ascii=False, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
