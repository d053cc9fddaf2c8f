"""Picture files: every kind that Pillow reads, as the uint8 arrays that a model's transforms take.

Every picture is decoded here: those that are classified, those of a folder, and those of prepared data sets.
"""

import io
import os
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from sigmarep.data.images import native
from sigmarep.errors import BadInput, one_line

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
# Pillow's modes of 16 bits a value; PNG files of them may come as "I" too.
SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
GRAY = ("1", "L", "LA", "La", *SIXTEEN_BIT)
# Pixels of the largest picture that is decoded, half a gigabyte as RGB. Pillow's own limit is above it, its warning below.
MOST_PIXELS = 2**27
# No file of so many pixels is larger: 16 bits a value and four channels.
MOST_BYTES = 8 * MOST_PIXELS
# Bytes of a file that are read at a time.
BLOCK_BYTES = 2**18
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class PictureError(ValueError):
    """A picture cannot be decoded; the message is a reason on one line."""


class TooLarge(PictureError):
    """A picture has more than `MOST_PIXELS`, by its header, or more than `MOST_BYTES`; nothing of it was decoded."""


def read(path: str | os.PathLike, channels: int) -> np.ndarray:
    """The picture of a file, uint8 (height, width, channels); see `decode`.

    Raises:
      BadInput: the file cannot be read, or holds values of which nobody knows the range.
    """
    try:
        return decode(contents(path), channels)
    except PictureError as error:
        raise BadInput(f"{os.fspath(path)}: cannot be read ({error})") from None
    except OSError as error:
        raise BadInput(f"{os.fspath(path)}: cannot be read ({error.strerror})") from None


def contents(path: str | os.PathLike) -> bytes:
    """The bytes of a picture's file.

    Raises:
      OSError: the file cannot be read.
      TooLarge: it has more than `MOST_BYTES`.
    """
    blocks: list[bytes] = []
    size = 0
    with open(path, "rb") as file:
        # Python allocates what it is asked to read, whatever the file has.
        while block := file.read(BLOCK_BYTES):
            blocks.append(block)
            size += len(block)
            if size > MOST_BYTES:
                raise TooLarge(f"has more than {MOST_BYTES} bytes")
    return b"".join(blocks)


def decode(stored: bytes, channels: int | None = None) -> np.ndarray:
    """The picture of a file's bytes, uint8 (height, width, channels).

    Turned as its EXIF data say. Palettes become the colors they stand for, transparent pixels are laid over white, of 16
    bits the upper 8 are taken, CMYK and the like become RGB, and of an animation the first picture is taken.

    Args:
      channels: 1 (gray) or 3 (red, green, blue); None for 1 if the picture is gray, else 3.

    Raises:
      PictureError: the bytes are no whole picture, or hold values of which nobody knows the range.
    """
    pixels = native.decoded_jpeg(stored, channels, most_pixels=MOST_PIXELS)
    if pixels is not None:
        return pixels
    try:
        with Image.open(io.BytesIO(stored)) as picture:
            width, height = picture.size
            if width * height > MOST_PIXELS:
                raise TooLarge(f"has {width} × {height} pixels; expected at most {MOST_PIXELS}")
            _scale_color_key(picture)
            ImageOps.exif_transpose(picture, in_place=True)
            return _pixels(picture, channels)
    except PictureError:
        raise
    except Image.DecompressionBombError:
        raise TooLarge(f"has more pixels than {MOST_PIXELS}") from None
    except UnidentifiedImageError:
        # Pillow's own text has an object's address.
        raise PictureError("cannot identify image file" if stored else "is empty") from None
    except Exception as error:
        # Pillow's readers raise whatever their parsing meets in damaged bytes, struct.error and KeyError among others.
        raise PictureError(one_line(error)) from None


def _pixels(picture: Image.Image, channels: int | None) -> np.ndarray:
    if channels is None:
        channels = 1 if picture.mode in GRAY else 3
    if picture.mode in SIXTEEN_BIT:
        picture = _eight_bit(picture)
    if picture.mode == "F":
        raise PictureError("holds floating-point values, whose range is not known")
    if picture.has_transparency_data:
        picture = on_white(picture.convert("RGBA"))
    # By way of RGB: not every mode can become gray.
    direct = channels == 1 and picture.mode in ("1", "L")
    picture = picture if direct or picture.mode == "RGB" else picture.convert("RGB")
    pixels = np.asarray(picture.convert("L") if channels == 1 else picture)
    return pixels[..., None] if channels == 1 else pixels


def on_white(picture: Image.Image) -> Image.Image:
    """An RGBA picture laid over white."""
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)


def _scale_color_key(picture: Image.Image) -> None:
    """Scales the transparent color of a PNG file as Pillow scales its pixels, which it leaves undone."""
    key = picture.info.get("transparency")
    tiles = picture.tile if isinstance(picture, PngImagePlugin.PngImageFile) else ()
    encoding = tiles[0][3] if tiles else None
    if encoding in ("L;2", "L;4") and isinstance(key, int):
        picture.info["transparency"] = key * (85 if encoding == "L;2" else 17)
    elif encoding == "RGB;16B" and isinstance(key, tuple):
        picture.info["transparency"] = tuple(value >> 8 for value in key)


def _eight_bit(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise PictureError(f"holds values from {values.min()} to {values.max()}; expected 0 to 65535")
    # The upper byte, as Pillow takes it of 16-bit color.
    upper = (values >> 8).astype(np.uint8)
    if (transparent := picture.info.get("transparency")) is not None:
        upper[values == transparent] = 255
    return Image.fromarray(upper)


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
