"""The page as a file: nothing from outside, nothing of a stranger that runs, and the numbers of the runs."""

import base64
import hashlib
import html
import json
import math
import re
import struct
import tomllib
from importlib import resources
from pathlib import Path

import pytest

from sigmarep.diagnostics import lines, page, panels, report, watch
from tests.diagnostics.written import collapsing, read, row, run_folder, sweep

ROOT = Path(__file__).parents[2]


def page_of(tmp_path, *folders, most=4):
    files = report.write([str(each) for each in folders], str(tmp_path / "out.html"), most=most)
    assert len(files) == 1
    return Path(files[0]).read_text(encoding="utf-8")


def data_of(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    content = json.loads(text)
    for panel in content["panels"]:
        for line in panel["lines"]:
            raw = base64.b64decode(line["values"])
            values = struct.unpack(f"<{len(raw) // 4}f", raw)
            line["points"] = dict(zip(panel["steps"][line["steps"]], values, strict=True))
    return content


def titles(page):
    return [panel["title"] for panel in data_of(page)["panels"]]


def single(value):
    """The 32-bit float nearest to a number."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def full_rows(count=100):
    """Rows in the shape of a real run's."""
    rows = []
    for each in collapsing()[:count]:
        step = each["step"]
        each |= {
            "train/learning_rate": 0.01,
            "train/examples_per_second": 900.0 + step,
            "attention/bound/encoder/block_0": 0.01,
            "attention/max_logit/encoder/block_0": 3.0 * step,
            "spectral/sigma/encoder/block_0/attention/query": 2.0 + step / 7,
            "spectral/gamma/encoder/block_0/attention/query": 1.0 - step / 300,
            "spectral/norm/encoder/block_0/attention/query": 1.5,
            "gradient/norm/head": math.exp(-step / 50),
            "sharpness/preconditioned": 5.0,
            "sharpness/preconditioned_threshold": 9.0,
        }
        rows.append(each)
        if step % 100 == 0:
            rows.append({"step": step, "eval/test/accuracy": step / 500})
    return rows


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run with every kind of metric: its rows and its page."""
    folder = tmp_path_factory.mktemp("full")
    rows = full_rows()
    return rows, page_of(folder, run_folder(folder / "run", rows, total=500))


def test_a_run_has_its_plots_with_the_story_first(full):
    _, page = full
    assert titles(page) == [
        "Loss and lowest entropy",
        "Attention entropy of all heads",
        "Attention entropy of layers",
        "Metric: accuracy",
        "Spectral norm of the kernels",
        "Gain γ",
        "Effective norm of the kernels",
        "Largest attention logit",
        "Gradient norm",
        "Sharpness: largest eigenvalue of the preconditioned Hessian",
        "Learning rate",
        "Throughput",
    ]
    assert page.index("fell below 0.1 nats at step 340") < page.index("<figure")
    assert page.count("<figure") == 12
    # Every plot has its alternative in words.
    for words in (
        "training loss: 1 line over steps 5 to 500; lowest 1 (training loss, at 5), highest 2 (training loss, at 400).",
        "encoder/block_1 fell at step 340. encoder/block_0 fell at step 360.",
        "entropy, nats: 4 lines over steps 5 to 500; lowest 0.05 (encoder/block_0, head 0, at 360)",
    ):
        assert words in page
    assert "<summary>Settings: 2 fields</summary>" in page
    # Sentences lead to the plots that show them.
    links = dict(re.findall(r'<a href="#plot-(\d+)">(.*?)</a>', page))
    assert links == {str(i): titles(page)[i] for i in (0, 1, 5, 9, 10)}
    assert all(f'id="plot-{number}"' in page for number in links)


def test_a_short_run_is_told_to_be_short(tmp_path):
    page = page_of(tmp_path, run_folder(tmp_path / "a", [row(step, 1.0, 0.05) for step in (1, 2)], total=2))
    assert "Done after 2 steps. The run is too short to tell whether the loss rises." in page
    assert "at step 1; the run is too short to tell whether the loss rises." in page
    assert "No lasting rise" not in page


def test_the_values_are_those_of_the_metrics(full):
    rows, page = full
    content = data_of(page)
    loss, heads, layers = content["panels"][:3]
    pairs = {
        "train/loss": loss["lines"][0],
        "attention/entropy_min": loss["lines"][1],
        "attention/entropy_head/encoder/block_0/1": heads["lines"][1],
        "attention/entropy/encoder/block_1": layers["lines"][1],
        "eval/test/accuracy": content["panels"][3]["lines"][0],
        "spectral/gamma/encoder/block_0/attention/query": content["panels"][5]["lines"][0],
    }
    for name, line in pairs.items():
        expected = {each["step"]: single(each[name]) for each in rows if name in each}
        assert line["points"] == expected, name
    assert [(mark["at"], mark["kind"]) for mark in loss["marks"]] == [(400, "rose"), (340, "fell"), (360, "fell")]
    assert [line["name"] for line in heads["lines"]] == [f"encoder/block_{i}, head {j}" for i in (0, 1) for j in (0, 1)]


def test_nothing_is_fetched_and_nothing_runs_but_the_one_script(full):
    _, page = full
    assert not re.findall(
        r"<[^>]*\s(?:src|href(?!=\"#plot-\d+\")|style|on\w+)\s*=", page.split("<script>")[0].split("</style>")[1]
    )
    assert "url(" not in page
    assert "@import" not in page
    # The one address is in a comment of the library's.
    assert re.findall(r"https?://[^\s'\"]*", page) == ["https://github.com/leeoniya/uPlot"]
    assert "Copyright (c) 2022 Leon Sorokin" in page
    policy = html.unescape(re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)[1])
    directives = dict(each.strip().split(" ", 1) for each in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert "unsafe" not in policy
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    scripts = re.findall(r"<script(.*?)>(.*?)</script>", page, re.DOTALL)
    assert [attributes for attributes, _ in scripts] == [' type="application/json" id="data"', ""]
    for directive, content in (("style-src", style), ("script-src", scripts[1][1])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert directives[directive] == f"'sha256-{digest}'"


HOSTILE = ["</script><script>alert(1)</script>", "<!--<script>", "]]>&lt;", "\u2028'\"\\", "a\x00b\x1b[31m", "x" * 5000]


def test_names_of_a_stranger_are_inert_data(tmp_path):
    rows = []
    for each in collapsing():
        rows.append(
            each | {f"{kind}/{name}": 0.05 for name in HOSTILE for kind in ("attention/entropy", "spectral/sigma")}
        )
    folder = run_folder(tmp_path / "<img src=x onerror=alert(1)>", rows, config={HOSTILE[0]: HOSTILE[1]})
    page = page_of(tmp_path, folder)
    assert page.count("<script") == page.count("</script>") == 2
    assert "<!--" not in page
    assert "<img" not in page
    data = page.split('id="data">')[1].split("</script>")[0]
    assert not re.search(r"[<>&\x00-\x1f\u2028]", data)
    names = {line["name"] for panel in data_of(page)["panels"] for line in panel["lines"]}
    assert set(HOSTILE[:5]) < names
    assert max(map(len, names)) <= lines.MOST_CHARACTERS + 20


def test_several_runs_a_sweep_one_step_and_an_empty_run_have_their_plots(tmp_path):
    pair = [run_folder(tmp_path / "pair/a", collapsing()), run_folder(tmp_path / "pair/b", collapsing(9999))]
    assert titles(page_of(tmp_path, *pair))[:3] == [
        "Training loss of all runs",
        "Lowest entropy of all runs",
        "Loss and lowest entropy",
    ]
    content = data_of(page_of(tmp_path, sweep(tmp_path)))
    loss, lowest = (panel for panel in content["panels"] if panel["rates"])
    assert [line["name"] for line in loss["lines"]] == [
        *("pre_ln, median", "sigma, median", "pre_ln, seed 0", "pre_ln, seed 1", "sigma, seed 0", "sigma, seed 1")
    ]
    assert loss["lines"][2]["points"] == {0.001: 1.0, 0.01: 3.0, 0.1: math.inf}
    assert loss["lines"][5]["points"] == {0.001: single(1.01), 0.01: single(1.01), 0.1: single(1.01)}
    assert loss["lines"][1]["points"] == {0.001: single(1.005), 0.01: single(1.005), 0.1: single(1.005)}
    assert {line["legend"]: line["color"] for line in loss["lines"]} == {
        line["legend"]: line["color"] for line in content["panels"][0]["lines"]
    }, "an arm has one color on the page"
    assert [line["points"][0.01] for line in lowest["lines"][2:4]] == [single(0.01)] * 2
    one = page_of(tmp_path, run_folder(tmp_path / "one", [row(1, 1.5, 2.0)], total=1))
    assert titles(one) == ["Loss and lowest entropy", "Attention entropy of all heads", "Attention entropy of layers"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}")
    assert titles(page_of(tmp_path, tmp_path / "empty")) == []


def test_lines_of_a_sweep_are_shaded_by_rate(tmp_path):
    content = data_of(page_of(tmp_path, sweep(tmp_path), most=0))
    for panel in content["panels"][:2]:
        shades = {(line["rate"], line["shade"]) for line in panel["lines"]}
        assert shades == {("0.001", 0), ("0.01", 0.5), ("0.1", 1)}
        assert {line["legend"] for line in panel["lines"]} == {"pre_ln", "sigma"}
    # Runs of one rate have nothing to be told apart by.
    pair = [run_folder(tmp_path / "pair" / name, collapsing()) for name in "ab"]
    assert "shade" not in data_of(page_of(tmp_path, *pair, most=0))["panels"][0]["lines"][0]


def test_tasks_do_not_share_an_axis(tmp_path):
    for name in ("image_classification", "translation"):
        run_folder(tmp_path / "runs" / name, collapsing(), config={"task": name})
    assert titles(page_of(tmp_path, tmp_path / "runs", most=0)) == [
        f"{title} of all runs: {task}"
        for task in ("image_classification", "translation")
        for title in ("Training loss", "Lowest entropy")
    ]


def test_values_that_are_no_numbers_and_steps_in_any_order(tmp_path):
    rows = [row(3, 3.0), row(1, "nan"), row(2, "-inf"), row(2, 1e300), row(4, 4.0)]
    points = data_of(page_of(tmp_path, run_folder(tmp_path / "a", rows)))["panels"][0]["lines"][0]["points"]
    assert list(points) == [1, 2, 3, 4]
    assert math.isnan(points[1])
    assert [points[step] for step in (2, 3, 4)] == [math.inf, 3.0, 4.0]


def test_thinning_keeps_every_extreme_the_ends_and_the_marks():
    low = {step: 1.0 for step in range(1, 10_001)} | {4321: -7.0, 10: math.nan}
    high = {step: 2.0 for step in range(1, 10_001, 2)} | {7777: 99.0}
    thin_low, thin_high = lines.thinned([low, high], 100, always=[5000])
    assert len(thin_low) <= 103
    assert thin_low[4321] == -7.0
    assert thin_high[7777] == 99.0
    assert {1, 5000, 10_000} <= set(thin_low)
    assert set(thin_high) == {step for step in thin_low if step in high}
    assert lines.thinned([low], 10_000) == [low]
    assert lines.thinned([], 10) == []
    gone = lines.thinned([dict.fromkeys(range(100), math.nan)], 10)[0]
    assert len(gone) >= 5


def test_a_long_run_with_hundreds_of_metrics_takes_less_than_a_megabyte(tmp_path):
    names = [
        f"spectral/{kind}/encoder/block_{i}/{j}" for kind in ("sigma", "gamma") for i in range(24) for j in range(7)
    ]
    rows = [row(step, 1.0 + step % 7, 2.0) | {name: step * 0.1 for name in names} for step in range(1, 401)]
    page = page_of(tmp_path, run_folder(tmp_path / "a", rows))
    assert len(page.encode()) < 1_000_000
    panel = next(panel for panel in data_of(page)["panels"] if panel["title"] == "Gain γ")
    assert len(panel["lines"]) == 168
    assert len(panel["lines"][0]["points"]) > 250


def test_the_size_of_a_page_of_many_runs_is_bounded(tmp_path):
    names = [f"spectral/sigma/{i}" for i in range(300)]
    rows = [row(step, 1.0, 2.0) | dict.fromkeys(names, 0.5) for step in range(1, 301)]
    run, facts = read(run_folder(tmp_path / "a", rows))
    for runs in (1, 4, 20):
        drawn = [panel for _, make in panels.of_run(run, facts, runs=runs) for panel in make()]
        numbers = sum(len(line.values) for panel in drawn for line in panel.lines)
        assert numbers <= min(panels.RUN_NUMBERS, panels.PAGE_NUMBERS / runs) * 1.1
    together = panels.together([run] * 200, lambda _: "arm")
    assert sum(len(line.values) for panel in together for line in panel.lines) <= 2 * 200 * panels.MOST_STEPS


def _luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return sum(weight * each for weight, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(a, b):
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _mixed(color, other, share):
    pairs = [[int(each[i : i + 2], 16) for each in (color, other)] for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)


@pytest.mark.parametrize("theme", [0, 1])
def test_colors_meet_wcag_aa_in_light_and_dark(theme):
    style = resources.files("sigmarep.diagnostics").joinpath("assets/page.css").read_text()
    block = re.findall(r":root[^{]*\{(.*?)\}", style, re.DOTALL)[theme]
    colors = {name: value.split() for name, value in re.findall(r"--([\w-]+): ([^;]+);", block)}
    paper = colors["paper"][0]
    for name in ("ink", "quiet", "link", "fell"):
        assert _contrast(colors[name][0], paper) >= 4.5, name
    for name in [*(f"c{i}" for i in range(panels.COLORS)), "plain", "depth"]:
        for each in colors[name]:
            assert _contrast(each, paper) >= 3, name
    # The ends of the ramp of rates (assets/plot.js: shadeOf) are a quarter paper, and more than half ink.
    for i in range(panels.COLORS):
        color = colors[f"c{i}"][0]
        for other, share in ((paper, 0.25), (colors["ink"][0], 0.55)):
            assert _contrast(_mixed(color, other, share), paper) >= 3, (i, other)
    for name in ("warn", "bad", "good", "raised", "faint"):
        assert _contrast(colors["ink"][0], colors[name][0]) >= 4.5, name


def test_packages_carry_what_the_page_needs():
    # A wheel has every file of the package, of whatever kind.
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["sigmarep"]
    assert not {"exclude", "include", "only-include"} & set(wheel)
    folder = ROOT / "sigmarep/diagnostics"
    for path in (*page.STYLES, *page.SCRIPTS, *watch.SCRIPTS, page.LICENSE):
        assert (folder / path).is_file(), path
    # The library is the published one, to the byte.
    digest = hashlib.sha256((folder / "vendor/uplot/uPlot.iife.min.js").read_bytes()).hexdigest()
    assert digest == "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"
