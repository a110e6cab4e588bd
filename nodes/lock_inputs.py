"""The inputs of a structure lock, of the nodes that have one; in tooltips and defaults they differ."""

from __future__ import annotations

from comfy_api.latest import io

from ..medsteer_core.host.sampling.pair_request import COMPUTED, IN_MASK, LOCKS


def lock_input(default: str, tooltip: str) -> io.Combo.Input:
    return io.Combo.Input("lock", options=list(LOCKS), default=default, tooltip=tooltip)


def threshold_input(default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        "lock_threshold", default=default, min=0.0, max=1.0, step=0.01, advanced=True, tooltip=tooltip
    )


def dilation_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("lock_dilation", default=1, min=0, max=64, advanced=True, tooltip=tooltip)


def smoothing_input(tooltip: str, optional: bool) -> io.Int.Input:
    return io.Int.Input("lock_smoothing", default=0, min=0, max=16, optional=optional, advanced=True, tooltip=tooltip)


def start_input(default: float, tooltip: str, optional: bool) -> io.Float.Input:
    return io.Float.Input(
        "counterfactual_start", default=default, min=0.0, max=1.0, step=0.01, optional=optional, tooltip=tooltip
    )


def mask_input() -> io.Mask.Input:
    return io.Mask.Input(
        "mask",
        optional=True,
        tooltip="The image may change only where this is white. To add a finding in one place, give one.",
    )


def computed_tokens_input(optional: bool) -> io.Combo.Input:
    return io.Combo.Input(
        "computed_tokens",
        options=list(COMPUTED),
        default=IN_MASK,
        optional=optional,
        advanced=True,
        tooltip=(
            "in the mask: under a lock or mask only the tokens in the mask are computed, which is faster, "
            "where the model allows it (PixArt). all: every token."
        ),
    )
