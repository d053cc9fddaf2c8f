"""Picture files: every kind that Pillow reads, as the uint8 arrays that a model's transforms take."""

import os
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps

from sigmarep.errors import BadInput

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
# Pillow's modes of 16 bits a value; PNG files of them may come as "I" too.
SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")


def read(path: str | os.PathLike, channels: int) -> np.ndarray:
    """The picture of a file, uint8 (height, width, channels).

    Turned as its EXIF data say. Palettes become the colors they stand for, transparent pixels are laid over white, values
    of 16 bits are divided by 257, CMYK and the like become RGB, and of an animation the first picture is taken.

    Args:
      channels: 1 (gray) or 3 (red, green, blue).

    Raises:
      BadInput: the file cannot be read, or holds values of which nobody knows the range.
    """
    try:
        with Image.open(path) as picture:
            return convert(ImageOps.exif_transpose(picture), channels)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise BadInput(f"{os.fspath(path)}: cannot be read ({reason})") from None


def convert(picture: Image.Image, channels: int) -> np.ndarray:
    """See `read`.

    Raises:
      ValueError: the picture holds values of which nobody knows the range.
    """
    if picture.mode in SIXTEEN_BIT:
        picture = _eight_bit(picture)
    if picture.mode == "F":
        raise ValueError("holds floating-point values, whose range is not known")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    # By way of RGB: not every mode can become gray.
    direct = channels == 1 and picture.mode in ("1", "L")
    picture = picture if direct else picture.convert("RGB")
    pixels = np.asarray(picture.convert("L") if channels == 1 else picture)
    return pixels[..., None] if channels == 1 else pixels


def _eight_bit(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError(f"holds values from {values.min()} to {values.max()}; expected 0 to 65535")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def find(paths: Sequence[str]) -> Iterator[str]:
    """The files of `paths`, and all pictures in and below those that are folders, in the order of their names.

    Raises:
      BadInput: a path does not exist, or a folder has no picture.
    """
    for path in paths:
        if not os.path.isdir(path):
            if not os.path.exists(path):
                raise BadInput(f"{path}: there is no such file or folder")
            yield path
            continue
        count = 0
        for folder, below, names in os.walk(path):
            below.sort()
            for name in sorted(names):
                if os.path.splitext(name)[1].lower() in EXTENSIONS:
                    count += 1
                    yield os.path.join(folder, name)
        if not count:
            raise BadInput(f"{path}: has no picture ({', '.join(EXTENSIONS)})")
