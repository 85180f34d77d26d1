"""The criteria that LRP is compared with. Like :class:`pxp.LRP`, they only state what is computed."""

from __future__ import annotations

from dataclasses import dataclass

from .lrp.composites import check_absolute, check_start


@dataclass(frozen=True)
class Taylor:
    r"""First-order Taylor expansion: activation × gradient (Molchanov et al. 2017).

    On a ReLU network this is LRP-0 with another start.

    Parameters
    ----------
    start : {"loss", "logit", "one", "margin"}, default "loss"
        What is differentiated: the cross-entropy loss as in the source, or as for :class:`pxp.LRP`.
    absolute : {"token", "sample", "never"}, default "token"
        As for :class:`pxp.LRP`. With ``"sample"`` the score of a head is Michel et al.'s (2019) importance: the mean of
        \|∂loss/∂m\|, where m = 1 multiplies the head's output.
    """

    start: str = "loss"
    absolute: str = "token"

    def __post_init__(self) -> None:
        check_start(self.start)
        check_absolute(self.absolute)


@dataclass(frozen=True)
class IntegratedGradients:
    """Gradients at the component, averaged over images on the way from black to the image (Sundararajan et al. 2017).

    Parameters
    ----------
    steps : int, default 20
        Images on the way, the last one being the image itself; costs as many passes.
    influence : bool, default False
        False: the averaged gradient times the component's change of activation between black and the image.
        True: the averaged gradient alone, the internal influence of Leino et al. 2018, as the paper's public code does.
    start : {"logit", "one", "margin", "loss"}, default "logit"
        What is differentiated.
    """

    steps: int = 20
    influence: bool = False
    start: str = "logit"

    def __post_init__(self) -> None:
        check_start(self.start)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@dataclass(frozen=True)
class Activation:
    """Mean activation over space and samples, after the non-linearity that follows (Molchanov et al. 2017).

    Where no activation module directly takes the output (before a residual sum), the output itself. Of an attention
    head, whose channels have no preferred sign, the mean absolute output.
    """


@dataclass(frozen=True)
class Magnitude:
    """L2 norm of a component's incoming weights; looks at no image (Li et al. 2017, with L1).

    Of an attention head: of its query, key, value and output weights together.

    Parameters
    ----------
    folded : bool, default True
        Merge BatchNorm into the weights first. Raw weights compare layers on scales that BatchNorm then undoes.
    """

    folded: bool = True


@dataclass(frozen=True)
class Random:
    """Uniform random scores, the chance level.

    Parameters
    ----------
    seed : int, default 0
    """

    seed: int = 0
