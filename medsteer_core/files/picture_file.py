"""An image file as 8-bit RGB, as its maker meant it to be seen: upright, in its whole range, in its own colours.

What can't be told (several frames, numbers without a range) is an error and not a guess.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy
from PIL import Image, ImageCms, ImageOps

from ..errors import MedSteerError
from .inside import shown

_SIXTEEN_BITS = 65535


def read_picture(source: Path | bytes, name: str = "") -> Image.Image:
    """The one picture in a file, or in its bytes, in Pillow's mode RGB.

    EXIF rotation is applied, CMYK goes through its colour profile, 16-bit grey is scaled and not clipped, what is
    transparent is laid on black. MedSteerError names the file (``name``, for bytes) that is no image, is cut short,
    holds several frames, or numbers whose range nothing tells.
    """
    called = f"'{shown(name or str(source), 300)}'"
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            if (frames := getattr(picture, "n_frames", 1)) > 1:
                raise MedSteerError(
                    f"{called} holds {frames} frames; an image of one was expected. Save the frame that you mean alone."
                )
            picture.load()
            return _as_rgb(ImageOps.exif_transpose(picture), called)
    except MedSteerError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, ImageCms.PyCMSError) as error:
        words = " ".join(str(error).split())
        raise MedSteerError(f"{called} is not a readable image ({shown(words, 120)}). Replace or remove it.") from error


def _as_rgb(picture: Image.Image, called: str) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        return _scaled(picture, called)
    if picture.mode == "CMYK" and (profile := picture.info.get("icc_profile")):
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(picture, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        clear = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, (0, 0, 0, 255)), clear).convert("RGB")
    return picture.convert("RGB")


def _scaled(picture: Image.Image, called: str) -> Image.Image:
    """Grey of 16 bits, which Pillow holds in wider numbers and would clip at 255."""
    values = numpy.array(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() > _SIXTEEN_BITS:
        raise MedSteerError(
            f"{called} holds numbers from {values.min():.4g} to {values.max():.4g}, and nothing tells their range; "
            "grey of 8 or 16 bits was expected. Save it as an 8-bit PNG, windowed as it is to be seen."
        )
    return Image.fromarray((values * (255 / _SIXTEEN_BITS)).round().astype(numpy.uint8)).convert("RGB")
