"""The page in a real Chromium; left out where there is none."""

import json

import pytest

from sigmarep.diagnostics import report
from tests.diagnostics import browser
from tests.diagnostics.test_page import HOSTILE, full_rows
from tests.diagnostics.written import run_folder, sweep

pytestmark = pytest.mark.skipif(not browser.CHROMIUM, reason="no Chromium is installed")

NAMES = [*HOSTILE, "encoder/block_0/attention/key", "encoder/block_1/attention/query"]
LOSS = "document.querySelectorAll('figure')[0]"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    rows = [each | {f"spectral/sigma/{name}": 1.0 for name in NAMES} for each in full_rows()]
    run = run_folder(folder / "<img src=x onerror=alert(1)>", rows, total=500)
    report.write([str(run)], str(folder / "run.html"), most=1)
    report.write([str(sweep(folder))], str(folder / "sweep.html"), most=1)
    (folder / "empty").mkdir()
    (folder / "empty/config.json").write_text("{}")
    report.write([str(folder / "empty")], str(folder / "empty.html"), most=1)
    return folder


@pytest.fixture(scope="module")
def chromium():
    with browser.browser() as opened:
        yield opened
        assert opened.messages == []
        assert {address.split(":")[0] for address in opened.requests} == {"file"}


def settle(chromium):
    chromium.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def box(chromium, selector, figure=0):
    """Left, top, width and height of an element of a plot."""
    element = f"document.querySelectorAll('figure')[{figure}].querySelector('{selector}')"
    chromium.wait(f"Boolean({element})")
    chromium.value(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    settle(chromium)
    return chromium.value(
        f"(() => {{const {{x, y, width, height}} = {element}.getBoundingClientRect(); return [x, y, width, height]}})()"
    )


def tip(chromium, figure=0):
    text = f"document.querySelectorAll('figure')[{figure}].querySelector('.tip:not([hidden])')?.textContent"
    chromium.wait(f"Boolean({text})")
    return chromium.value(text)


def test_value_and_name_are_under_the_pointer(chromium, pages):
    chromium.open(pages / "run.html")
    left, top, width, height = box(chromium, ".u-over")
    # The loss is 1 until step 400, which is at its axis' bottom.
    chromium.mouse("mouseMoved", left + width * 195 / 495, top + height - 3)
    assert tip(chromium) == "training loss: 1\nstep 200"
    assert "training loss1" in chromium.value(f"{LOSS}.querySelector('.legend').textContent")
    left, top, *_ = box(chromium, ".chart")
    label = chromium.value("plots.values().next().value.labeled[0]")
    chromium.mouse("mouseMoved", left + (label["from"] + label["to"]) / 2, top + label["base"] - 3)
    assert tip(chromium) == label["text"]
    left, top, width, height = box(chromium, "canvas", figure=1)
    chromium.mouse("mouseMoved", left + width / 2, top + 25)
    assert tip(chromium, 1).startswith("encoder/block_0, head 0: 2 nats\nstep 25")


def test_dragging_zooms_all_plots_of_the_run_and_a_double_click_resets(chromium, pages):
    chromium.open(pages / "run.html")
    left, top, width, _ = box(chromium, ".u-over")
    places = [left + width * share for share in (0.4, 0.5, 0.6)]
    chromium.mouse("mouseMoved", places[0], top + 50)
    chromium.mouse("mousePressed", places[0], top + 50, button="left", clickCount=1)
    for place in places:
        chromium.mouse("mouseMoved", place, top + 50, button="left", buttons=1)
    chromium.mouse("mouseReleased", places[-1], top + 50, button="left", clickCount=1)
    ranges = "[...plots.values()].map(plot => plot.chartOf ? plot.chartOf.scales.x.min : plot.range()[0])"
    settle(chromium)
    starts = chromium.value(ranges)
    assert len(starts) > 2
    assert all(start == pytest.approx(5 + 0.4 * 495, abs=3) for start in starts)
    for count in (1, 2):
        for kind in ("mousePressed", "mouseReleased"):
            chromium.mouse(kind, places[0], top + 50, button="left", clickCount=count)
    settle(chromium)
    assert set(chromium.value(ranges)) == {5}


def test_everything_is_in_reach_of_the_keyboard(chromium, pages):
    chromium.open(pages / "run.html")
    box(chromium, ".u-over")
    chromium.value(f"{LOSS}.querySelector('.chart').focus()")
    for name in ("ArrowRight", "ArrowRight"):
        chromium.key(name)
    assert tip(chromium) == "training loss: 1\nstep 10"
    chromium.key("ArrowDown")
    assert tip(chromium) == "lowest entropy of any layer: 2\nstep 10"
    assert (
        chromium.value(f"{LOSS}.querySelector('[aria-live]').textContent") == "lowest entropy of any layer: 2\nstep 10"
    )
    chromium.key("+")
    assert chromium.value("plots.values().next().value.range()") == [128.75, 376.25]
    chromium.key("0")
    assert chromium.value("plots.values().next().value.range()") == [5, 500]
    names = chromium.value(
        "[...document.querySelectorAll('button, input, summary')].every(each => each.tabIndex === 0)"
    )
    assert names is True


def test_legend_logarithm_smoothing_and_words_change_the_lines(chromium, pages):
    chromium.open(pages / "run.html")
    box(chromium, ".u-over")
    shown = "plots.values().next().value.chartOf.series.slice(1).map(({show}) => show)"
    chromium.value(f"{LOSS}.querySelector('.legend button').click()")
    assert chromium.value(shown) == [False, True]
    assert chromium.value(f"{LOSS}.querySelector('.legend button').ariaPressed") == "false"
    chromium.value(f"{LOSS}.querySelector('.legend button').click()")
    # One quantity has one kind of axis on the page.
    kinds = chromium.value("content.panels.flatMap(({axes}) => axes).map(axis => [axis.label, logs(axis)])")
    assert len({label for label, _ in kinds}) == len({tuple(each) for each in kinds})
    log = f"[...{LOSS}.querySelectorAll('.tools button')].find(({{textContent}}) => textContent.startsWith('Log'))"
    chromium.value(f"{log}.click()")
    assert chromium.value("plots.values().next().value.chartOf.scales.y0.distr") == 3
    slider = f"{LOSS}.querySelector('input[type=range]')"
    chromium.value(f"{slider}.value = 0.9; {slider}.dispatchEvent(new Event('input'))")
    # The mean of a constant is that constant, and a jump is followed slowly.
    data = chromium.value("plots.values().next().value.chartOf.data[1]")
    assert data[50] == pytest.approx(1)
    assert 1 < data[80] < 1.2
    spectra = next(
        i for i in range(20) if "Spectral" in chromium.value(f"document.querySelectorAll('figure')[{i}].textContent")
    )
    box(chromium, "input[type=search]", spectra)
    search = f"document.querySelectorAll('figure')[{spectra}].querySelector('input[type=search]')"
    chromium.value(f"{search}.value = 'block_0 query'; {search}.dispatchEvent(new Event('input'))")
    figure = f"plots.get(document.querySelectorAll('figure')[{spectra}])"
    assert sum(chromium.value(f"{figure}.chartOf.series.slice(1).map(({{show}}) => show)")) == 1


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["run", "sweep", "empty"])
def test_every_plot_is_drawn_at_any_width_and_theme(chromium, pages, name, width, dark):
    chromium.open(pages / f"{name}.html", width=width, dark=dark)
    chromium.value("figures.forEach(build)")
    settle(chromium)
    assert chromium.value("document.documentElement.scrollWidth") <= width
    expected = chromium.value("document.querySelectorAll('figure').length")
    assert chromium.value("plots.size") == expected
    assert (expected > 0) == (name != "empty")
    # Words of marks stand above the plot, in its width, and none lies on another.
    labels = chromium.value(
        "[...plots.values()].filter(plot => plot.labeled).map(({labeled, chartOf, width}) =>"
        " ({labeled, top: chartOf.over.offsetTop, width}))"
    )
    for plot in labels:
        for i, each in enumerate(plot["labeled"]):
            assert each["base"] < plot["top"]
            assert 0 <= each["from"] < each["to"] <= plot["width"] + 1
            assert not any(
                each["base"] == other["base"] and each["from"] < other["to"] and other["from"] < each["to"]
                for other in plot["labeled"][:i]
            )
    assert any(plot["labeled"] for plot in labels) == (name == "run")
    # Every canvas has something drawn on it.
    blank = "[...document.querySelectorAll('.chart > canvas, .u-wrap > canvas')].filter(each => !each.getContext('2d')"
    blank += ".getImageData(0, 0, each.width, each.height).data.some(value => value)).length"
    assert chromium.value(blank) == 0
    assert chromium.value("getComputedStyle(document.body).backgroundColor") == (
        "rgb(21, 23, 26)" if dark else "rgb(255, 255, 255)"
    )


def test_names_of_a_stranger_are_text(chromium, pages):
    chromium.open(pages / "run.html")
    chromium.value(
        "figures.forEach(build); document.querySelectorAll('details').forEach(each => { each.open = true; })"
    )
    settle(chromium)
    assert chromium.value("document.querySelectorAll('img, script').length") == 2
    names = chromium.value("[...document.querySelectorAll('figure tbody th')].map(({textContent}) => textContent)")
    assert HOSTILE[0] in names
    # What is not the page's own script does not run.
    chromium.value("document.body.append(Object.assign(document.createElement('script'), {id: 'added'}))")
    with pytest.raises(RuntimeError, match="TrustedScript"):
        chromium.value("document.getElementById('added').text = 'window.strange = 1'")
    assert chromium.value("window.strange === undefined")
    chromium.messages.clear()


def test_a_printed_page_is_light_and_whole(chromium, pages):
    chromium.open(pages / "run.html", dark=True)
    chromium.value("dispatchEvent(new Event('beforeprint'))")
    assert chromium.value("theme.paper") == "#ffffff"
    assert chromium.value("plots.size === figures.length")
    assert chromium.value("Math.max(...[...document.querySelectorAll('canvas')].map(each => each.clientWidth))") == 700
    chromium.value("dispatchEvent(new Event('afterprint'))")
    assert chromium.value("theme.paper") == "#15171a"
    assert json.loads(chromium.value("document.getElementById('data').textContent"))["panels"]


@pytest.mark.parametrize(
    ("low", "high", "numbers"),
    [
        (24, 4e5, [100, 1e3, 1e4, 1e5]),
        (24, 600, [50, 100, 200, 500]),
        (0.004, 0.05, [0.005, 0.01, 0.02, 0.05]),
        (2.2, 4.6, [3, 4]),
        (2.2, 2.9, [2.2, 2.4, 2.6, 2.8]),
    ],
)
def test_a_logarithmic_axis_has_round_numbers_wherever_it_begins(chromium, pages, low, high, numbers):
    chromium.open(pages / "run.html")
    assert chromium.value(f"round(logarithmic({low}, {high})).filter((tick) => tick !== null)") == numbers


@pytest.fixture(scope="module")
def swept(chromium, pages):
    chromium.open(pages / "sweep.html")
    chromium.value("figures.forEach(build)")
    settle(chromium)
    return chromium


RATES = "[...plots.values()].find(({panel}) => panel.rates)"


def test_every_tried_rate_has_its_number(swept):
    axis = f"{RATES}.chartOf.axes[0]"
    assert swept.value(f"{axis}._values") == ["0.001", "0.01", "0.1"]
    assert swept.value(f"{axis}._rotate || 0") == 0
    # Rates too close for numbers side by side have them turned, and none is lost until even these touch.
    place = "(rate) => 100 * Math.log10(rate)"
    assert swept.value(f"crowded([1, 1.2, 10], ['1', '1.2', '10'], {place})")
    assert not swept.value(f"crowded([1, 3, 10], ['1', '3', '10'], {place})")
    assert swept.value(f"legible([1, 1.2, 1.5, 10], {place})") == [1, None, 1.5, 10]


def test_rates_are_chosen_in_a_legend_of_their_own(swept):
    rates = f"{LOSS}.querySelectorAll('.legend')[1]"
    assert swept.value(f"{rates}.textContent") == "learning rate:0.0010.010.1"
    shown = "[...plots.values()][0].chartOf.series.filter(({show}) => show).length"
    before = swept.value(shown)
    swept.value(f"{rates}.querySelector('button').click()")
    assert swept.value(shown) == before - 4
    assert swept.value(f"{rates}.querySelector('button').ariaPressed") == "false"
    swept.value(f"{rates}.querySelector('button').click()")
    assert swept.value(shown) == before
    strokes = swept.value("[...plots.values()][0].panel.lines.map(({color, shade}) => colorOf(color, shade))")
    assert len(set(strokes)) == 6, "two arms at three rates"


def test_words_of_levels_stand_right_of_what_is_drawn(swept):
    plot = "[...plots.values()][1]"
    right = f"({plot}.chartOf.bbox.left + {plot}.chartOf.bbox.width) / uPlot.pxRatio"
    assert swept.value(f"{plot}.panel.levels[0].text") == "0.1 nats"
    assert swept.value(f"{plot}.width - {plot}.margin() >= {right} - 1")
    wide = (
        f"Math.max(...broken('0.1 nats', 0).map((text) => {plot}.chartOf.ctx.measureText(text).width)) / uPlot.pxRatio"
    )
    assert swept.value(f"{plot}.margin() > {wide}")
    assert swept.value("[0, 1].map((axis) => broken('0.1 nats', axis))") == [["0.1 nats"], ["0.1", "nats"]]


@pytest.mark.parametrize("width", [400, 1200])
def test_what_is_cut_says_so_and_commands_break_between_words(chromium, pages, width):
    chromium.open(pages / "sweep.html", width=width)
    settle(chromium)
    settle(chromium)
    cut = (
        "[...document.querySelectorAll('.table, pre')].filter((box) => box.offsetParent && "
        "(box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1) !== "
        "box.previousElementSibling.textContent.startsWith('There is more: scroll')).length"
    )
    assert chromium.value(cut) == 0
    assert chromium.value("[...document.querySelectorAll('pre')].length") > 0
    hinted = "[...document.querySelectorAll('.hint')].some((hint) => hint.textContent.includes('sideways'))"
    assert width == 1200 or chromium.value(hinted)
    words = "[...document.querySelectorAll('pre span')].every((word) => word.getClientRects().length === 1)"
    assert chromium.value(words)
    assert chromium.value("document.documentElement.scrollWidth") <= width
