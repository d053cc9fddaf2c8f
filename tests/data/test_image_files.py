"""Picture files of every kind that has surprised somebody, as the arrays that a model takes."""

import numpy as np
import pytest
from PIL import Image

from sigmarep.data.images import files
from sigmarep.errors import BadInput

RED, GREEN = (255, 0, 0), (0, 255, 0)


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
