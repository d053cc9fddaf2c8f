"""Native code for pictures, where the extra `pictures` is installed: simplejpeg decodes JPEG, cykooz_resizer resizes crops.

Every function returns None for what the packages do not take, or where they are missing; Pillow does it then.
"""

import importlib
import threading
from typing import Any

import numpy as np


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


simplejpeg, cykooz_resizer = _optional("simplejpeg"), _optional("cykooz_resizer")

JPEG = b"\xff\xd8\xff"
# Marks of EXIF and XMP data, which may have an orientation, and of files with several pictures.
TURNED = (b"Exif", b"ns.adobe.com/xap", b"Orientation", b"MPF\0")
# Pillow's filters of these names; its bicubic one is the spline of Catmull and Rom too.
FILTERS = {"bilinear": "bilinear", "bicubic": "catmull_rom"}
PIXELS = {1: "U8", 3: "U8x3"}
# Input pixels per output pixel that the filters reach on each side.
REACH = 2

# A resizer keeps a buffer, which belongs to one thread.
_local = threading.local()


def decoded_jpeg(stored: bytes, channels: int | None, *, most_pixels: int) -> np.ndarray | None:
    """The pixels of a JPEG file, uint8 (height, width, channels), equal to Pillow's: both decode by libjpeg-turbo.

    None for files that may have to be turned, have another number of channels or too many pixels, and for those about
    which libjpeg-turbo as much as warns: Pillow decides what is damaged.
    """
    if simplejpeg is None or not stored.startswith(JPEG) or any(mark in stored for mark in TURNED):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(stored)
        stored_channels = {"Gray": 1, "YCbCr": 3}.get(colors)
        if stored_channels is None or channels not in (None, stored_channels) or height * width > most_pixels:
            return None
        return simplejpeg.decode_jpeg(stored, "GRAY" if stored_channels == 1 else "RGB")
    except ValueError:
        return None


def resized_box(
    image: np.ndarray, size: tuple[int, int], interpolation: str, box: tuple[int, int, int, int]
) -> np.ndarray | None:
    """The part `box` (left, top, right, bottom) of an image resized to `size` (height, width).

    The filter is Pillow's, but rows are made before columns, so that rounding differs.
    """
    channels = image.shape[-1]
    if cykooz_resizer is None or interpolation not in FILTERS or channels not in PIXELS:
        return None
    left, top, right, bottom = box
    # The filter sees pixels around the box, as Pillow's does.
    around_x, around_y = (
        int(REACH * max((stop - start) / out, 1)) + 2
        for start, stop, out in ((left, right, size[1]), (top, bottom, size[0]))
    )
    x0, y0 = max(left - around_x, 0), max(top - around_y, 0)
    part = image[y0 : bottom + around_y, x0 : right + around_x]
    pixel_type = cykooz_resizer.PixelType[PIXELS[channels]]
    source = cykooz_resizer.ImageData(part.shape[1], part.shape[0], pixel_type, part.tobytes())
    target = cykooz_resizer.ImageData(size[1], size[0], pixel_type)
    options = cykooz_resizer.ResizeOptions(
        resize_alg=cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType[FILTERS[interpolation]]),
        crop_box=cykooz_resizer.CropBox(left - x0, top - y0, right - left, bottom - top),
    )
    if not hasattr(_local, "resizer"):
        _local.resizer = cykooz_resizer.Resizer()
    _local.resizer.resize(source, target, options)
    # Pillow's arrays are read-only too.
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(*size, channels)
