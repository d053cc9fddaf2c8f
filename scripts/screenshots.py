"""Makes the pictures of docs/report.md: the page of two runs in light and dark, on a phone and on a screen.

    python scripts/collapse.py --workdir runs/collapse --seeds 1
    python scripts/screenshots.py runs/collapse --output docs/pictures

Needs Chromium (Debian: apt install chromium), which is driven as the tests of the page do. Pictures have 256 colors.
"""

import os
import sys
import tempfile

from absl import flags

from sigmarep import command
from sigmarep.errors import BadInput

OUTPUT = flags.DEFINE_string("output", None, "Folder of the pictures.")
# Name: width and height of the window, theme, and the plot that is scrolled to; -1 is the top.
STATES = {
    "light": (1200, 900, False, -1),
    "dark": (1200, 900, True, 2),
    "wide": (1200, 1100, False, 2),
    "phone": (400, 860, False, -1),
    "phone_dark": (400, 860, True, 2),
}
COLORS = 256


def main(folders: list[str]) -> None:
    output = command.required("output", OUTPUT.value)
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
    from PIL import Image

    from sigmarep.diagnostics import report
    from tests.diagnostics import browser

    if not browser.CHROMIUM:
        raise BadInput("no Chromium is installed; on Debian: apt install chromium")
    os.makedirs(output, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, browser.browser() as opened:
        page = os.path.join(folder, "page.html")
        report.write(folders, page, most=4)
        for name, (width, height, dark, plot) in STATES.items():
            path = os.path.join(output, f"report_{name}.png")
            opened.open(page, width=width, height=height, dark=dark)
            opened.value("figures.forEach(build)")
            if plot >= 0:
                opened.value(f"figures[{plot}].scrollIntoView({{behavior: 'instant'}})")
            opened.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            opened.picture(path)
            with Image.open(path) as picture:
                picture.convert("RGB").quantize(COLORS).save(path, optimize=True)
            print(f"{path}: {os.path.getsize(path) / 1000:.0f} kB")


if __name__ == "__main__":
    command.run(main, positional=True)
