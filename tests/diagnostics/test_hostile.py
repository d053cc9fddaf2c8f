"""The report on folders that no run of this project wrote: no traceback, and one bad run costs its own row alone."""

import functools
import html
import json
import os
import re
from pathlib import Path

import orjson
import pytest

from sigmarep.diagnostics import files, findings, plots, report, runs
from sigmarep.training import metrics as metrics_files

LAYER = "attention/entropy/encoder/block_0"
ROWS = [{"step": i, "train/loss": 2.0 / i, LAYER: 1.5, "attention/entropy_min": 1.5} for i in (1, 2, 3)]
LINES = [json.dumps(row).encode() for row in ROWS]
CONFIG = b'{"task": "image_classification", "seed": 0}'
ENVIRONMENT = b'{"total_steps": 3}'
DEEP = b"[" * 200_000


def metrics(*lines, end=b"\n"):
    """Files of a run with these lines between its first and its last ones."""
    return {"metrics.jsonl": b"\n".join([LINES[0], *lines, *LINES[1:]]) + end}


def config(**values):
    return {"config.json": json.dumps(values).encode()}


def named(name):
    """Rows whose layer has this name."""
    rows = [{**row, f"attention/entropy/{name}": 0.05, f"spectral/sigma/{name}": 1.0} for row in ROWS]
    return {"metrics.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in rows)}


def valued(**values):
    return json.dumps({**ROWS[1], **{name.replace("__", "/"): value for name, value in values.items()}}).encode()


LAYER_NAMES = {
    "layer_mathematics": r"a$\frac$b",
    "layer_one_dollar": "$",
    "layer_brackets": "<img src=x onerror=alert(1)>",
    "layer_underscore": "_hidden",
    "layer_empty": "",
    "layer_control": "a\nb\x00c\x1b[31m",
    "layer_surrogate": "\ud800",
    "layer_long": "x" * 500,
}
# Files of each run, and its state and number of lines that are damaged.
HOSTILE = {
    "nul_block": (metrics(b"\0" * 4096), "done", 1),
    "glued_halves": (metrics(LINES[0][:20] + LINES[1]), "done", 1),
    "glued_wholes": (metrics(LINES[0] + LINES[1]), "done", 1),
    "not_utf8": (metrics(b'{"step": 2, "train/\xff\xfe": 1.0}'), "done", 1),
    "utf16": ({"metrics.jsonl": "\n".join(map(bytes.decode, LINES)).encode("utf-16") + b"\n"}, "unfinished", 3),
    "byte_order_mark": ({"metrics.jsonl": b"\xef\xbb\xbf" + b"\n".join(LINES) + b"\n"}, "done", 1),
    "a_list": (metrics(b"[1]"), "done", 1),
    "an_empty_object": (metrics(b"{}"), "done", 1),
    "a_number": (metrics(b"17"), "done", 1),
    "a_string": (metrics(b'"step"'), "done", 1),
    "null": (metrics(b"null"), "done", 1),
    "deep": (metrics(DEEP), "done", 1),
    "crlf": ({"metrics.jsonl": b"\r\n".join(LINES) + b"\r\n"}, "done", 0),
    "half_a_line": (metrics(end=b'\n{"step": 4, "tra'), "done", 0),
    "no_newline_at_all": ({"metrics.jsonl": LINES[0]}, "unfinished", 0),
    "empty": ({"metrics.jsonl": b""}, "unfinished", 0),
    "only_newlines": ({"metrics.jsonl": b"\n" * 50}, "unfinished", 0),
    "step_text": (metrics(b'{"step": "two", "train/loss": 1.0}'), "done", 1),
    "step_float": (metrics(b'{"step": 2.5, "train/loss": 1.0}'), "done", 1),
    "step_true": (metrics(b'{"step": true, "train/loss": 1.0}'), "done", 1),
    "step_null": (metrics(b'{"step": null}'), "done", 1),
    "step_negative": (metrics(b'{"step": -7}'), "done", 1),
    "step_huge": (metrics(b'{"step": 1' + b"0" * 400 + b"}"), "done", 1),
    "step_of_digits": (metrics(b'{"step": 1' + b"0" * 9000 + b"}"), "done", 1),
    "steps_backwards": ({"metrics.jsonl": b"\n".join(LINES[::-1]) + b"\n"}, "unfinished", 0),
    "steps_repeated": (metrics(*LINES), "done", 0),
    "loss_text": (metrics(valued(train__loss="two")), "done", 1),
    "loss_list": (metrics(valued(train__loss=[1.0])), "done", 1),
    "loss_object": (metrics(valued(train__loss={"a": 1})), "done", 1),
    "loss_null": (metrics(valued(train__loss=None)), "done", 1),
    "loss_true": (metrics(valued(train__loss=True)), "done", 1),
    "loss_huge": (metrics(valued(train__loss=1e308), valued(train__loss=-1e308)), "done", 0),
    "loss_beyond": (metrics(b'{"step": 2, "train/loss": 1e999}'), None, None),
    "loss_whole_and_huge": (metrics(b'{"step": 2, "train/loss": 1' + b"0" * 350 + b"}"), None, None),
    "entropy_text": (metrics(valued(**{LAYER: "low", "attention/entropy_min": "low"})), "done", 1),
    "entropy_huge": (metrics(valued(**{LAYER: 1e300, "attention/entropy_min": -1e300})), "done", 0),
    "spikes_huge": (metrics(*(b'{"step": 2, "train/loss": %de%d}' % (i, i) for i in range(300))), "done", 0),
    "gradient_text": (metrics(valued(train__gradient_norm="steep")), "done", 1),
    "sharpness_half": (metrics(valued(sharpness__hessian=1.0, sharpness__threshold="inf")), "done", 0),
    **{key: (named(name), "done" if name != "\ud800" else None, None) for key, name in LAYER_NAMES.items()},
    "layer_numbered": (named("block_" + "9" * 6000), None, None),
    "eval_text": (metrics(b'{"step": 3, "eval/test/accuracy": "good"}'), "done", 1),
    "config_broken": ({**metrics(), "config.json": b'{"task": '}, "done", None),
    "config_list": ({**metrics(), "config.json": b"[1, 2]"}, "done", None),
    "config_not_utf8": ({**metrics(), "config.json": b'{"task": "\xff"}'}, "done", None),
    "config_deep": ({**metrics(), "config.json": b'{"a":' * 900 + b"1" + b"}" * 900}, None, None),
    "config_deeper": ({**metrics(), "config.json": DEEP}, "done", None),
    "config_alone": (config(task=["a"], seed={}), "unfinished", 0),
    "config_types": (
        {**metrics(), **config(divergence_factor="3", intervention="x", total_steps="many", model=None, task=7)},
        "done",
        0,
    ),
    "config_intervention": (
        {
            **metrics(),
            **config(intervention={"at_steps": "1", "attention_temperature": [], "learning_rate_factor": None}),
        },
        "done",
        0,
    ),
    "config_huge": (
        {**metrics(), "config.json": b'{"intervention": {"at_steps": 1e999}, "seed": 1' + b"0" * 5000 + b"}"},
        "done",
        0,
    ),
    "environment_types": (
        {
            **metrics(),
            "environment.json": b'{"total_steps": "x", "packages": [1], "devices": "gpu", "git_revision": 12}',
        },
        "unfinished",
        0,
    ),
    "environment_huge": (
        {**metrics(), "environment.json": b'{"total_steps": 1e999, "primary_metric": {}}'},
        "unfinished",
        0,
    ),
    "environment_list": ({**metrics(), "environment.json": b"[]"}, "unfinished", None),
    "diagnosis_types": ({**metrics(), "diagnosis.json": b'{"step": "x", "reason": {"a": "\\u0000"}}'}, "diverged", 0),
    "diagnosis_broken": ({**metrics(), "diagnosis.json": b"{"}, "done", 0),
    "stopped_types": (
        {**metrics(), "stopped.json": b'{"step": [], "total_steps": "x", "reason": null}'},
        "stopped early",
        0,
    ),
    "stopped_list": ({**metrics(), "stopped.json": b"[1]"}, "done", 0),
    "stopped_deep": ({**metrics(), "stopped.json": DEEP}, "done", 0),
}
NAMES = ["a$\\frac$b", "_first", "<b>&", "new\nline", "d\udcff", "x" * 200, "$" * 30, "%s{0}", "-rf"]


def write(folder, content):
    os.makedirs(folder)
    for name, text in {"config.json": CONFIG, "environment.json": ENVIRONMENT, **content}.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(text)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of all hostile runs and a good one, without its report."""
    top = tmp_path_factory.mktemp("hostile")
    for name, (content, _, _) in HOSTILE.items():
        write(top / "runs" / name, content)
    for name in NAMES:
        write(f"{top}/runs/{name}", metrics())
    os.mkfifo(top / "runs/nul_block/log.txt")
    for name in ("metrics.jsonl", "config.json"):
        (top / f"runs/pipe_{name}").mkdir()
        os.mkfifo(top / f"runs/pipe_{name}" / name)
        (top / f"runs/folder_{name}" / name).mkdir(parents=True)
        (top / f"runs/link_{name}").mkdir()
        (top / f"runs/link_{name}" / name).symlink_to("/nowhere")
    write(top / "runs/good", metrics())
    return top


@pytest.fixture(scope="module")
def page(place):
    """The page of all runs."""
    written, *_ = report.write([str(place / "runs")], str(place / "page.html"), most=2)
    text = Path(written).read_text(encoding="utf-8")
    assert "could not be drawn" not in text
    return text


def table_row(page, name):
    """The cells of a run in the table, without tags."""
    escaped = html.escape(name).replace(",", ",<wbr>")
    (cells,) = re.findall(rf'<tr><th scope="row">{re.escape(escaped)}</th>(.*?)</tr>', page)
    return [re.sub("<.*?>", "", cell) for cell in re.findall("<td.*?</td>", cells)]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_run_has_its_row(name, page):
    _, state, damaged = HOSTILE[name]
    cells = table_row(page, name)
    assert len(cells) == 9
    if state is not None:
        assert cells[0] == state
    if damaged is not None:
        notes = re.findall(rf">{name}: metrics\.jsonl: (\d+) of \d+ lines are damaged", page)
        assert [int(count) for count in notes] == [damaged] * (damaged > 0)


def test_the_good_run_among_them_is_told_as_if_it_were_alone(page):
    assert table_row(page, "good") == [
        "done",
        "3/3",
        "–",
        "0.6667",
        "1.5 in encoder/block_0 at step 1",
        "–",
        "–",
        "–",
        "–",
    ]


def test_files_that_cannot_be_read_are_named(page):
    for name in ("pipe", "folder"):
        assert f"{name}_metrics.jsonl: metrics.jsonl cannot be read (metrics.jsonl is no file)." in page
        assert f"{name}_config.json: config.json cannot be read (config.json is no file)." in page
    assert "config_list: config.json holds a list; expected an object." in page
    assert re.search(r"config_broken: config\.json cannot be read \(Expecting value", page)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(name, page):
    shown = name.replace("\n", " ").replace("\udcff", "?")
    assert table_row(page, shown)[:2] == ["done", "3/3"]


def test_nothing_of_a_stranger_is_markup(page):
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", page)


def test_hostile_names_and_numbers_can_be_drawn(place, tmp_path):
    rows = [json.loads(line) for line in named("block_" + "9" * 600)["metrics.jsonl"].splitlines()]
    for name in LAYER_NAMES:
        for each in rows:
            each |= {f"attention/entropy/{name}": 0.5, f"spectral/sigma/{name}": 1.0}
    write(tmp_path / "$$", {"metrics.jsonl": b"".join(json.dumps(each).encode() + b"\n" for each in rows)})
    drawn = ("loss_huge", "loss_beyond", "entropy_huge", "spikes_huge", "sharpness_half", "config_huge", "good")
    folders = [str(tmp_path / "$$"), *(f"{place}/runs/{name}" for name in drawn)]
    written, *pictures = report.write(folders, str(tmp_path / "page.html"), most=100, static="png")
    assert len(set(pictures)) == len(pictures) > len(folders)
    for picture in pictures:
        assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert "could not be drawn" not in Path(written).read_text()


def test_labels_are_no_mathematics_and_stay_in_the_legend():
    figure, (axes,) = plots.new_figure([1.0])
    names = [r"a$\frac$b", "$", "$x$", r"\$", "_hidden", "two\nlines"]
    for name in names:
        axes.plot([1, 2], [1, 2], label=plots.plain(name))
    plots.add_legend(axes, len(names))
    texts = axes.get_legend().get_texts()
    assert len(texts) == len(names)
    figure.draw_without_rendering()
    assert [text._preprocess_math(text.get_text())[1] for text in texts] == [False] * len(names)


RECORD = {
    "inside": {"state": "done", "point": {"learning_rate": 0.1, "seed": 0}},
    "/etc": {"state": "done", "point": {}},
    "../outside": {"state": "done", "point": {"learning_rate": 0.2}},
    "..": {"state": "done", "point": {}},
    ".": {"state": "done", "point": {}},
    "": {"state": "done", "point": {}},
    "inside/deeper": {"state": "done", "point": {}},
    "a\0b": {"state": "done", "point": {}},
    "entry_text": "done",
    "entry_null": None,
    "point_list": {"state": "done", "point": [1]},
    "point_missing": {},
    "state_list": {"state": ["done"], "point": {"learning_rate": "fast"}},
    "rate_text": {"state": "done", "point": {"learning_rate": "fast"}},
    "rate_huge": {"state": "done", "point": {"learning_rate": 10**400}},
    "rate_null": {"state": "diverged", "point": {"learning_rate": None}},
    "rate_zero": {"state": "done", "point": {"learning_rate": 0.0}},
    "rate_negative": {"state": "done", "point": {"learning_rate": -1.0}},
    "arm_dollar": {"state": "done", "point": {"arm": "a$\\frac$b", "learning_rate": 0.1}},
    "arm_list": {"state": "done", "point": {"arm": ["_x"], "learning_rate": 1e-30}},
    "failed": {"state": "failed", "point": {"learning_rate": 0.1}},
}


def test_a_strangers_sweep_leads_nowhere_else(tmp_path):
    write(tmp_path / "outside", metrics())
    for name in ("inside", "unrecorded", *(name for name in RECORD if name.isidentifier() and name != "inside")):
        write(tmp_path / "sweep" / name, metrics())
    (tmp_path / "sweep/sweep.json").write_text(json.dumps(RECORD))
    (tmp_path / "sweep/failed/log.txt").write_bytes(b"first\n" + b"\xff" * 10_000 + b"\x1b[31m last")
    found = runs.find([str(tmp_path / "sweep")])
    assert {os.path.dirname(place.folder) for place in found.places} == {str(tmp_path / "sweep")}
    assert found.notes == [
        f"{tmp_path / 'sweep'}: 9 entries of sweep.json are no runs in that folder, and are left out."
    ]
    written, *_ = report.write([str(tmp_path / "sweep")], str(tmp_path / "page.html"), most=3)
    page = Path(written).read_text()
    for name in ("inside", "unrecorded", "point_list", "state_list", "rate_huge", "entry_text"):
        assert table_row(page, name)[:2] == ["done", "3/3"]
    assert table_row(page, "failed")[0] == "failed"
    assert "outside" not in page.replace(str(tmp_path), "")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", DEEP, b'{"a": 1' + b"0" * 5000 + b"}"])
def test_a_broken_record_of_a_sweep_costs_no_run(content, tmp_path):
    write(tmp_path / "sweep/a", metrics())
    (tmp_path / "sweep/sweep.json").write_bytes(content)
    found = runs.find([str(tmp_path / "sweep")])
    assert [place.name for place in found.places] == ["a"]
    assert len(found.notes) == 1


def test_numbers_are_the_same_with_and_without_the_faster_reader(place, monkeypatch):

    def read(path):
        file = files.MetricsFile(path)
        assert file.update()
        return list(file.rows), file.damage

    paths = [str(place / "runs" / name / "metrics.jsonl") for name in ("good", "sharpness_half", "loss_beyond", "crlf")]
    faster = [read(path) for path in paths]
    assert metrics_files._loads is orjson.loads
    monkeypatch.setattr(metrics_files, "_loads", functools.partial(json.loads, parse_int=metrics_files.integer))
    slower = [read(path) for path in paths]
    assert faster[0] == slower[0] == (ROWS, None)
    assert faster[1] == slower[1]
    assert faster[3] == slower[3] == (ROWS, None)


def test_what_no_reader_foresaw_costs_its_own_row_or_picture():
    judged = report._judge(runs.Place("a\0b", "a name that no system call takes", None, {}))
    assert judged.run.state == "unreadable"
    told = [sentence.text for sentence in findings.sentences(judged.run, judged.facts)]
    # In words of Python's own, which are not those of every version.
    assert len(told) == 1
    assert re.fullmatch(r"Cannot be read: ValueError: .*embedded null .*\.", told[0])
    picture, failure = report._picture("a", lambda: 1 / 0, "png")
    assert picture is None
    assert failure == "The picture a could not be drawn (ZeroDivisionError: division by zero)."
