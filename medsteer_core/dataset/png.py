"""Images as PNG files that say whether they are synthetic. Equal pixels and texts give equal bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .records import SYNTHETIC

XMP_KEY = "XML:com.adobe.xmp"
# XMP specification, part 1 (ISO 16684-1): the packet's marks; the property is of IPTC's photo metadata standard.
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType="{}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


def in_levels(image: Tensor) -> np.ndarray:
    """An image ``(H, W, 3)`` in 0..1 as 8 bits a channel, cut off as ComfyUI's Save Image does it."""
    return np.clip(255.0 * image.detach().float().cpu().numpy(), 0, 255).astype(np.uint8)


def image_png(levels: np.ndarray, texts: Mapping[str, str] | None = None, source: str | None = SYNTHETIC) -> bytes:
    """A picture ``(H, W, 3)`` of 8-bit levels with texts in chunks of these names, beside the marking.

    ``source``: its IPTC digital source type; None for a real image, which is not marked.
    """
    return _png(Image.fromarray(levels), texts or {}, source)


def mask_png(mask: Tensor, texts: Mapping[str, str] | None = None) -> bytes:
    """A mask ``(H, W)`` bool as a grey PNG, 255 where it is true."""
    return _png(Image.fromarray(mask.cpu().numpy().astype(np.uint8) * 255), texts or {}, SYNTHETIC)


def _png(picture: Image.Image, texts: Mapping[str, str], source: str | None) -> bytes:
    about = PngInfo()
    if source is not None:
        about.add_itxt(XMP_KEY, XMP.format(source))
    for name, text in texts.items():
        about.add_text(name, text)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=about, compress_level=4)
    return buffer.getvalue()
