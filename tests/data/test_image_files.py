"""Picture files of every kind that has surprised somebody, as the arrays that a model takes."""

import io
import resource
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from sigmarep.data import sources
from sigmarep.data.images import files, transforms
from sigmarep.errors import BadInput

RED, GREEN = (255, 0, 0), (0, 255, 0)
GRAY, COLOR, PALETTE, GRAY_ALPHA, COLOR_ALPHA = 0, 2, 3, 4, 6


def png(size, bits, kind, row, **chunks):
    """The bytes of a PNG file of one row, as its specification (ISO/IEC 15948) lays them out."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, 0)
    others = b"".join(chunk(name.encode(), content) for name, content in chunks.items())
    data = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + others + data + chunk(b"IEND", b"")


def words(*values):
    return struct.pack(f">{len(values)}H", *values)


# Bytes of a file, and the values of its pixels in a row: numbers for gray, triples for color.
PNGS = {
    "gray of 1 bit": (png((4, 1), 1, GRAY, b"\xa0"), [255, 0, 255, 0]),
    "gray of 2 bits": (png((4, 1), 2, GRAY, b"\x1b"), [0, 85, 170, 255]),
    "gray of 4 bits": (png((2, 1), 4, GRAY, b"\x1f"), [17, 255]),
    "gray of 16 bits": (png((3, 1), 16, GRAY, words(0x12FF, 0, 65535)), [0x12, 0, 255]),
    "color of 16 bits": (png((1, 1), 16, COLOR, words(0x12FF, 0x3400, 65535)), [(0x12, 0x34, 255)]),
    "color and opacity": (
        png((2, 1), 8, COLOR_ALPHA, bytes((200, 40, 40, 255, 200, 40, 40, 0))),
        [(200, 40, 40), (255, 255, 255)],
    ),
    "color and opacity of 16 bits": (
        png((2, 1), 16, COLOR_ALPHA, words(0xC800, 0x2800, 0x2800, 65535, 0, 0, 0, 0)),
        [(200, 40, 40), (255, 255, 255)],
    ),
    "gray and opacity": (png((3, 1), 8, GRAY_ALPHA, bytes((40, 255, 40, 0, 40, 51))), [40, 255, 212]),
    "gray and opacity of 16 bits": (png((2, 1), 16, GRAY_ALPHA, words(0x28FF, 65535, 0, 0)), [40, 255]),
    "a palette": (png((2, 1), 8, PALETTE, b"\1\0", PLTE=bytes((*RED, *GREEN))), [GREEN, RED]),
    "a palette of 1 bit": (png((2, 1), 1, PALETTE, b"\x40", PLTE=bytes((*RED, *GREEN))), [RED, GREEN]),
    "a palette with opacity": (
        png((2, 1), 8, PALETTE, b"\1\0", PLTE=bytes((*RED, *GREEN)), tRNS=b"\0"),
        [GREEN, (255, 255, 255)],
    ),
    "a transparent gray of 1 bit": (png((2, 1), 1, GRAY, b"\x80", tRNS=words(0)), [255, 255]),
    "a transparent gray of 2 bits": (png((4, 1), 2, GRAY, b"\x1b", tRNS=words(1)), [0, 255, 170, 255]),
    "a transparent gray": (png((2, 1), 8, GRAY, bytes((7, 9)), tRNS=words(7)), [255, 9]),
    "a transparent gray of 16 bits": (png((2, 1), 16, GRAY, words(0x700, 0x900), tRNS=words(0x700)), [255, 9]),
    "a transparent color": (
        png((2, 1), 8, COLOR, bytes((7, 8, 9, 1, 2, 3)), tRNS=words(7, 8, 9)),
        [(255, 255, 255), (1, 2, 3)],
    ),
    "a transparent color of 16 bits": (
        png((2, 1), 16, COLOR, words(0x700, 0x800, 0x900, 0x100, 0x200, 0x300), tRNS=words(0x700, 0x800, 0x900)),
        [(255, 255, 255), (1, 2, 3)],
    ),
}


def encoded(picture, kind, **options):
    stored = io.BytesIO()
    picture.save(stored, format=kind, **options)
    return stored.getvalue()


def turned():
    """A JPEG file, black on the left and white on the right, whose EXIF data ask for a half turn."""
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = np.zeros((8, 32, 3), np.uint8)
    pixels[:, 16:] = 255
    return encoded(Image.fromarray(pixels), "JPEG", exif=exif)


def animated():
    """A GIF file of a red and a green picture."""
    pictures = [Image.new("RGB", (2, 2), color) for color in (RED, GREEN)]
    return encoded(pictures[0], "GIF", save_all=True, append_images=pictures[1:])


def rgb(path):
    return files.read(path, 3)


def test_a_palette_is_looked_up(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([*RED, *GREEN])
    picture.putdata([0, 1])
    picture.save(tmp_path / "p.png")
    np.testing.assert_array_equal(rgb(tmp_path / "p.png"), [[RED, GREEN]])
    grey = files.read(tmp_path / "p.png", 1)
    assert grey.shape == (1, 2, 1)
    # ITU-R 601-2: 0.299 R + 0.587 G + 0.114 B.
    np.testing.assert_array_equal(grey[0, :, 0], [76, 150])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_white(tmp_path, mode):
    path = tmp_path / "t.png"
    if mode == "P":
        picture = Image.new("P", (2, 1))
        picture.putpalette([0, 0, 0, 0, 0, 0])
        picture.putdata([0, 1])
        picture.save(path, transparency=1)
    else:
        picture = Image.new(mode, (2, 1))
        picture.putdata([(0, 0, 0, 255), (0, 0, 0, 0)] if mode == "RGBA" else [(0, 255), (0, 0)])
        picture.save(path)
    np.testing.assert_array_equal(rgb(path), [[(0, 0, 0), (255, 255, 255)]])
    np.testing.assert_array_equal(files.read(path, 1)[..., 0], [[0, 255]])


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (1, 1), (255, 0, 0, 128)).save(tmp_path / "h.png")
    np.testing.assert_allclose(rgb(tmp_path / "h.png")[0, 0], [255, 127, 127], atol=1)


@pytest.mark.parametrize("kind", PNGS)
def test_every_kind_of_png_gives_its_specifications_values(kind):
    stored, values = PNGS[kind]
    np.testing.assert_array_equal(files.decode(stored, 3), in_color(values))
    # Pillow opens gray with opacity of 16 bits as color.
    np.testing.assert_array_equal(np.broadcast_to(files.decode(stored), (1, len(values), 3)), in_color(values))


def in_color(values):
    """Pixels (1, width, 3) of a row of `PNGS`."""
    return np.broadcast_to(np.array(values, np.uint8).reshape(1, len(values), -1), (1, len(values), 3))


class Surprises(tfds.core.GeneratorBasedBuilder):
    """Pictures of all kinds as a prepared data set has them: the bytes of their files."""

    VERSION = tfds.core.Version("1.0.0")
    SKIP_REGISTERING = True

    def _info(self):
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)}
        features["file_name"] = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        whole = [stored for stored, _ in PNGS.values()]
        cut = encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-200]
        return {
            "train": self._generate_examples([*whole, turned(), animated(), cmyk()]),
            "cut": self._generate_examples([whole[0], cut]),
        }

    def _generate_examples(self, pictures):
        for i, stored in enumerate(pictures):
            yield i, {"image": io.BytesIO(stored), "label": 0, "file_name": f"n0_{i}.JPEG"}


def cmyk():
    return encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)


def test_prepared_data_sets_are_decoded_alike(tmp_path):
    source = sources.open_source(f"{__name__}.Surprises", "train", data_dir=str(tmp_path))
    assert len(source) == len(PNGS) + 3
    for i, (stored, values) in enumerate(PNGS.values()):
        pixels = source[i]["image"]
        np.testing.assert_array_equal(np.broadcast_to(pixels, (1, len(values), 3)), in_color(values))
        (tmp_path / "one.png").write_bytes(stored)
        # What training is given is what a trained model is given.
        for channels in (1, 3):
            alone = files.read(tmp_path / "one.png", channels)
            np.testing.assert_array_equal(transforms.with_channels(pixels, channels), alone)
    photograph, animation, printed = (source[len(PNGS) + i]["image"] for i in range(3))
    assert photograph[:, :12].min() > 250
    assert photograph[:, 20:].max() < 5
    np.testing.assert_array_equal(animation, np.broadcast_to(RED, (2, 2, 3)))
    np.testing.assert_allclose(printed[4, 4].astype(int), RED, atol=3)


def test_a_cut_off_picture_of_a_prepared_data_set_is_named(tmp_path):
    source = sources.open_source(f"{__name__}.Surprises", "cut", data_dir=str(tmp_path))
    assert source[0]["image"].shape == (1, 4, 1)
    with pytest.raises(
        BadInput, match=r"Surprises': example 1 \(n0_1\.JPEG\) of the split 'cut' has a picture.*truncated"
    ) as error:
        list(source)
    assert "\n" not in str(error.value)


def test_a_huge_picture_is_refused_by_its_header(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for side in (11_600, 30_000):
        (tmp_path / "huge.png").write_bytes(png((side, side), 8, COLOR, b""))
        with pytest.raises(BadInput, match=r"huge\.png: cannot be read \(has .* pixels") as error:
            rgb(tmp_path / "huge.png")
        assert "\n" not in str(error.value)
    # Kibibytes; one byte a pixel of the smaller would be 131,000.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_small_file_takes_little_memory_to_read_and_an_enormous_one_is_refused(tmp_path, monkeypatch):
    (tmp_path / "small.png").write_bytes(png((30_000, 30_000), 8, COLOR, b""))
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match="pixels"):
            rgb(tmp_path / "small.png")
        # Bytes asked for, even those that the system never gave because nobody touched them.
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    monkeypatch.setattr(files, "MOST_BYTES", 20)
    with pytest.raises(BadInput, match=r"small\.png: cannot be read \(has more than 20 bytes\)"):
        rgb(tmp_path / "small.png")


def test_sixteen_bits_are_scaled_and_not_cut(tmp_path):
    values = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "s.png")
    np.testing.assert_array_equal(files.read(tmp_path / "s.png", 1)[..., 0], [[0, 100, 255]])
    np.testing.assert_array_equal(rgb(tmp_path / "s.png")[0, 1], [100, 100, 100])
    Image.fromarray(values).save(tmp_path / "s.tif")
    np.testing.assert_array_equal(files.read(tmp_path / "s.tif", 1)[..., 0], [[0, 100, 255]])


def test_one_bit_and_grey_stay_black_and_white(tmp_path):
    picture = Image.new("1", (2, 1))
    picture.putdata([0, 255])
    picture.save(tmp_path / "b.png")
    np.testing.assert_array_equal(files.read(tmp_path / "b.png", 1)[..., 0], [[0, 255]])
    np.testing.assert_array_equal(rgb(tmp_path / "b.png")[0], [(0, 0, 0), (255, 255, 255)])


def test_cmyk_becomes_colors(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=100)
    np.testing.assert_allclose(rgb(tmp_path / "c.jpg")[4, 4].astype(int), RED, atol=3)


def test_a_turned_photograph_is_upright(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    # 6: to be turned a quarter clockwise; the left side is then the top.
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "e.png", exif=exif)
    upright = rgb(tmp_path / "e.png")
    assert upright.shape == (16, 8, 3)
    assert upright[:8].min() == 255
    assert upright[8:].max() == 0


def test_what_cannot_be_read_is_named_on_one_line(tmp_path):
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture\nat all")
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "float.tif")
    for name, reason in (
        ("cut.png", "cannot be read"),
        ("text.png", "cannot identify image file"),
        ("none.png", "No such file or directory"),
        ("float.tif", "floating-point values"),
    ):
        with pytest.raises(BadInput) as error:
            rgb(tmp_path / name)
        assert reason in str(error.value)
        assert str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)


def test_folders_are_searched_in_order(tmp_path):
    for name in ("b/2.png", "b/1.JPG", "a.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    paths = [str(tmp_path / name) for name in ("a.webp", "b/1.JPG", "b/2.png")]
    assert list(files.find([str(tmp_path)])) == paths
    assert list(files.find([paths[2], str(tmp_path / "notes.txt")])) == [paths[2], str(tmp_path / "notes.txt")]
    with pytest.raises(BadInput, match="there is no such file or folder"):
        list(files.find([str(tmp_path / "c")]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="has no picture"):
        list(files.find([str(tmp_path / "empty")]))
