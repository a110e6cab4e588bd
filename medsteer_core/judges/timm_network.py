"""Networks of timm whose weights are safetensors: a classifier, and a segmenter on a timm encoder.

Nothing is downloaded and nothing in a file can run: the architecture is built by its name and every tensor must fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import MedSteerError
from ..files.inside import shown
from .card import Card, SegmenterCard


def classifier_from(data: bytes, file: str, card: Card, device: str = "cpu") -> nn.Module:
    """The classifier of a card with the weights in ``data``; ``file`` names them. ``images -> logits (n, labels)``."""
    size = card.preprocessing.input_size
    network = _named(card, lambda name: new_classifier(name, len(card.labels), size))
    return _filled(network, data, file, card).to(device)


def segmenter_from(data: bytes, file: str, card: SegmenterCard, device: str = "cpu") -> nn.Module:
    """The segmenter of a card with the weights in ``data``. ``images -> logits (n, labels, h, w)``."""
    size = card.preprocessing.input_size
    network = _named(card, lambda name: Segmenter(name, len(card.labels), size, card.head, card.head_width))
    return _filled(network, data, file, card).to(device)


def new_classifier(architecture: str, labels: int, input_size: tuple[int, int]) -> nn.Module:
    """A timm classifier with random weights. MedSteerError for a name that timm does not have."""
    return _new(architecture, input_size, num_classes=labels)


class Segmenter(nn.Module):
    """A timm encoder and a head. ``forward(images (n, 3, H, W)) -> logits (n, labels, h, w)``, at its finest level.

    Head "linear": a 1x1 convolution on the encoder's last features. "unet": from the last level up, features are
    upsampled, joined to those of the level above and convolved (Ronneberger et al., 2015), all ``head_width`` wide.
    """

    def __init__(
        self, architecture: str, labels: int, input_size: tuple[int, int], head: str = "unet", head_width: int = 64
    ):
        super().__init__()
        self.encoder = _new(architecture, input_size, features_only=True)
        channels = self.encoder.feature_info.channels()
        self.joins = nn.ModuleList()
        if head == "unet":
            below = channels[-1]
            for above in reversed(channels[:-1]):
                self.joins.append(_Join(below, above, head_width))
                below = head_width
        self.out = nn.Conv2d(head_width if self.joins else channels[-1], labels, 1)

    def forward(self, images: Tensor) -> Tensor:
        levels = self.encoder(images)
        if str(getattr(self.encoder, "output_fmt", "")).endswith("NHWC"):  # Swin and its kind
            levels = [level.movedim(-1, 1) for level in levels]
        x = levels[-1]
        for join, level in zip(self.joins, reversed(levels[:-1]), strict=False):
            x = join(x, level)
        return self.out(x)


class _Join(nn.Module):
    """Upsampled features beside those of the level above, through two 3x3 convolutions with group norm."""

    def __init__(self, below: int, above: int, width: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(below + above, width, 3, padding=1), nn.GroupNorm(8, width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width)

    def forward(self, x: Tensor, above: Tensor) -> Tensor:
        x = F.interpolate(x, size=above.shape[-2:], mode="bilinear", align_corners=False)
        x = F.silu(self.norm1(self.conv1(torch.cat([x, above], dim=1))))
        return F.silu(self.norm2(self.conv2(x)))


def load_strictly(network: nn.Module, tensors: Mapping[str, Tensor], file: str, what: str) -> None:
    """Copy ``tensors`` into the network. MedSteerError unless names, shapes and kinds of number are the network's."""
    own = network.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        some = "; ".join(
            f"{len(names)} {word} ('{shown(names[0])}'{' ...' if len(names) > 1 else ''})"
            for word, names in (("missing", missing), ("unexpected", unexpected))
            if names
        )
        raise MedSteerError(f"'{file}' does not fit {what}: of its tensors are {some}. Name the architecture it is of.")
    for name, tensor in own.items():
        given = tensors[name]
        if given.shape != tensor.shape:
            raise MedSteerError(
                f"'{file}' does not fit {what}: '{name}' has the shape {tuple(given.shape)}, {tuple(tensor.shape)} was "
                "expected. Check architecture, labels and input_size."
            )
        if given.is_floating_point() != tensor.is_floating_point() or given.is_complex():
            raise MedSteerError(f"'{file}' has '{name}' as {given.dtype}; {tensor.dtype} was expected.")
        if not given.float().isfinite().all():
            raise MedSteerError(f"'{file}' has values in '{name}' that are not finite. Save the weights again.")
    network.load_state_dict(dict(tensors))


def tensors_of(data: bytes, file: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. MedSteerError for anything else."""
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        kind = "empty" if not data else "a zip archive or a pickle" if data[:1] in (b"P", b"\x80") else "damaged"
        raise MedSteerError(
            f"'{file}' is not a readable safetensors file (it is {kind}: {shown(str(error), 200)}). Save the weights "
            "with safetensors."
        ) from error


def _filled(network: nn.Module, data: bytes, file: str, card: Card) -> nn.Module:
    load_strictly(network, tensors_of(data, file), file, f"{card.architecture} with {len(card.labels)} labels")
    return network.eval().requires_grad_(False)


def _named(card: Card, make: Callable[[str], nn.Module]) -> nn.Module:
    """What ``make`` makes of the card's architecture."""
    if card.architecture is None:
        raise MedSteerError(f"'{card.path}' lacks architecture: the name in timm that the weights beside it are of.")
    try:
        return make(card.architecture)
    except MedSteerError as error:
        raise MedSteerError(f"'{card.path}' says an architecture that does not fit. {error}") from error


def config_of(architecture: str) -> Any:
    """What timm knows of an architecture's weights: input_size, mean, std, interpolation, classifier and more.

    MedSteerError for a name that timm does not have, or that points to a file or a hub.
    """
    timm = timm_package()
    config = None
    # "hf-hub:" and "local-dir:" names would read what they point to
    if ":" not in architecture and "/" not in architecture and timm.is_model(architecture):
        try:
            config = timm.get_pretrained_cfg(architecture)
        except RuntimeError:  # a tag that the model does not have
            config = None
    if config is None:
        near = get_close_matches(architecture, timm.list_models() + timm.list_pretrained(), 3)
        hint = f" Near it: {', '.join(near)}." if near else ""
        raise MedSteerError(
            f"timm {timm.__version__} has no model '{architecture}'; a name of timm's was expected.{hint}"
        )
    return config


def _new(architecture: str, input_size: tuple[int, int], **options) -> nn.Module:
    """A timm model with random weights; nothing is downloaded and the global random state stays as it is."""
    if config_of(architecture).fixed_input_size:
        options["img_size"] = input_size
    with torch.random.fork_rng(devices=[]):
        try:
            return timm_package().create_model(architecture, pretrained=False, **options)
        except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, KeyError) as error:
            words = " ".join(str(error).split())
            raise MedSteerError(
                f"timm cannot build '{architecture}' for {input_size[0]}x{input_size[1]} pixels with "
                f"{', '.join(options)} ({words:.160}). Choose another architecture or input_size."
            ) from error


def timm_package() -> Any:
    """timm. MedSteerError where it is not installed."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise MedSteerError(
            "timm is not installed; judges whose weights are .safetensors need it. Install it for the Python that runs "
            "ComfyUI: pip install timm"
        ) from error
    return timm
