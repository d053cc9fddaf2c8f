"""The report, on runs whose story is written here by hand."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sigmarep.diagnostics import findings, plots, report, runs, sensitivity
from sigmarep.errors import BadInput
from tests.diagnostics.written import collapsing, page_of, read, read_all, row, run_folder, sweep, told

SCRIPT = Path(__file__).parents[2] / "scripts" / "report.py"


def test_the_layer_that_fell_first_and_how_long_before_the_loss(tmp_path):
    run, found = read(run_folder(tmp_path / "a", collapsing(), total=500))
    assert found.fell == [("encoder/block_1", 340), ("encoder/block_0", 360)]
    assert found.rose == 400
    assert found.lowest == (0.05, "encoder/block_0", 360)
    said = told(run, found)
    assert said[0] == "Done after 500 steps. The loss rose at step 400."
    assert said[1] == (
        "encoder/block_1 fell below 0.1 nats at step 340 (still above it at step 335), 60 steps before the loss rose. "
        "1 more of 2 layers followed. The "
        "lowest was 0.05 nats in encoder/block_0 at step 360."
    )


@pytest.mark.parametrize(
    ("rise", "words"),
    [
        (200, "at step 340 (still above it at step 335), 140 steps after the loss rose."),
        (340, "at step 340 (still above it at step 335), the step at which the loss rose."),
        (9999, "at step 340 (still above it at step 335); the loss had no lasting rise."),
    ],
)
def test_collapse_before_with_after_and_without_a_rise(tmp_path, rise, words):
    run, found = read(run_folder(tmp_path / "a", collapsing(rise), total=500))
    assert words in told(run, found)[1]


def test_a_run_that_kept_its_entropy(tmp_path):
    rows = [row(step, 2.0 - step / 100, 2.5, 1.5 - step / 100) for step in range(1, 51)]
    rows.append({"step": 50, "eval/test/loss": 0.7, "eval/test/accuracy": 0.9125})
    run, found = read(run_folder(tmp_path / "a", rows, total=50))
    assert found.final == ("test/accuracy", 0.9125)
    assert told(run, found)[:2] == [
        "Done after 50 steps with test/accuracy 0.9125. No lasting rise of the loss.",
        "No layer's attention entropy fell below 0.1 nats: the lowest was 1 in encoder/block_1 at step 50.",
    ]


def test_sharpness_interventions_and_negative_gammas_are_spoken_of(tmp_path):
    rows = [row(step, 1.0, 2.0) for step in range(1, 11)]
    for each in rows:
        each |= {"sharpness/hessian": each["step"] * 10.0, "sharpness/threshold": 75.0}
        each["spectral/gamma/head"] = 1.0 - each["step"] / 5
    config = {"intervention": {"at_steps": 4.0, "attention_temperature": 0.1, "learning_rate_factor": 1.0}}
    said = " ".join(told(*read(run_folder(tmp_path / "a", rows, config=config, total=10))))
    assert "Sharpness was above its threshold at 3 of 10 measurements, earliest at step 8." in said
    assert (
        "After step 4 the run was changed on purpose: attention temperature times 0.1, which makes attention "
        "sharper. Its loss was 1 just before, at most 1 after it (at step 5) and 1 at the end: the run was not set "
        "back, no "
        "loss after it was higher. The lowest entropy of any layer was 2 nats just before, at least 2 after it (at "
        "step 5) and "
        "2 at the end." in said
    )
    assert "γ became negative in 1 layers, head among them." in said


def test_a_run_still_going_has_half_a_line_at_its_end(tmp_path):
    folder = run_folder(tmp_path / "a", [row(step, 1.0, 2.0) for step in (1, 50)], total=100, end='\n{"step": 75, "tr')
    run, found = read(folder)
    assert (run.state, run.last_step) == ("unfinished", 50)
    said = told(run, found)[0]
    assert re.fullmatch(r"Unfinished, at step 50 of 100; the last line was written on [\d-]+ at [\d:]+\.", said)
    page, pictures = page_of(tmp_path, folder, static="png")
    assert "Unfinished, at step 50 of 100" in page
    assert "If it is not running any more: it goes on from its last checkpoint" in page
    assert pictures == ["a-entropy.png"]
    for content, age, words in (("", 0, "it was stopped"), ("{}", 0, "still going on"), ("{}", 99, "without a word")):
        (folder / ".lock").write_text(content)
        os.utime(folder / ".lock", (time.time() - age,) * 2)
        page, _ = page_of(tmp_path, folder)
        assert words in page
        assert ("or by this one" in page) == (words != "still going on")
        assert "So far 2 losses are logged, too few to tell." in page


@pytest.mark.parametrize("rows", [[{"step": 0, "train/loss": "nan"}], [row(1, "inf", 2.0)], [row(1, "nan", "nan")]])
def test_a_run_that_diverged_at_once(tmp_path, rows):
    folder = run_folder(tmp_path / "a", rows, total=100, diagnosis={"step": rows[0]["step"], "reason": "it broke"})
    run, found = read(folder)
    assert found.diverged == found.rose == rows[0]["step"]
    assert told(run, found)[0] == f"Diverged at step {rows[0]['step']} of 100: it broke."
    page, _ = page_of(tmp_path, folder)
    assert f"Diverged at step {rows[0]['step']} of 100" in page


def test_without_a_diagnosis_a_broken_loss_says_it(tmp_path):
    run, found = read(run_folder(tmp_path / "a", [row(1, 2.0), row(2, "nan"), row(3, "nan")]))
    assert findings.outcome(run, found) == "Diverged at step 2: the loss became nan."


def test_a_run_that_has_just_started(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.json").write_text("{}")
    page, pictures = page_of(tmp_path, tmp_path / "a", static="png")
    assert "Nothing is logged yet." in page
    assert pictures == []


def test_folders_without_a_run_are_refused_alone_and_named_among_others(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BadInput, match=r"no run found; a run's folder has a config\.json or a metrics\.jsonl"):
        runs.find([str(empty)])
    with pytest.raises(BadInput, match="there is no such folder"):
        runs.find([str(tmp_path / "missing")])
    page, _ = page_of(tmp_path, empty, run_folder(tmp_path / "a", [row(1, 1.0)]))
    assert f"{empty} holds no run." in page


def test_a_damaged_file_is_said_and_costs_no_other_run(tmp_path):
    broken = run_folder(tmp_path / "runs/broken", [row(1, 1.0)])
    (broken / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    run_folder(tmp_path / "runs/good", collapsing())
    page, _ = page_of(tmp_path, tmp_path / "runs")
    assert "2 unfinished" in page
    assert "broken: metrics.jsonl: 1 of 3 lines are damaged, line 2 first." in page
    assert list(read(broken)[0].rows) == [{"step": 1}, {"step": 2}]


def test_a_sweeps_ranges_and_sensitivities(tmp_path):
    page, pictures = page_of(tmp_path, sweep(tmp_path), most=3, static="png")
    assert "12 runs: 10 done, 2 diverged." in page
    assert "sigma: no layer collapsed, lowest entropy 2 nats." in page
    assert (
        "pre_ln: 4 of 6 runs collapsed (at learning rates 0.01 and 0.1); earliest to fall: encoder/block_0, by "
        "step 1; lowest entropy 0.01 to 2 nats; 2 of 6 runs diverged (at learning rate 0.1) at step 21." in page
    )
    # The median of two seeds is 1.005. At 0.01 pre_ln's loss is still 3, at 0.1 it is cut to that of the start: 3.
    assert (
        "sweep: pre_ln trains at learning rate 0.001 alone. Its lowest loss at the end is 1.005, at 0.001. (An arm "
        "trains at a "
        "rate whose loss at the end, the median of its seeds, is within 10% of the lowest of all, 1.005.)" in page
    )
    assert (
        "sweep: sigma trains at learning rates 0.001 to 0.1 (a factor of 100; 0.001 is "
        "the lowest tried; 0.1 is the highest tried)" in page
    )
    # The last two: its lowest entropy at 0.001, and at any rate.
    numbers = "".join(f'<td class="number">{number}</td>' for number in ("1.33", "2", "0.01"))
    assert f"<td>0.001 alone</td><td>–</td><td>0.001 alone</td>{numbers}" in page
    assert pictures[:2] == ["all.png", "sweep-rates.png"]
    assert len({name.rsplit("-", 1)[0] for name in pictures[2:]}) == 3
    assert "3 of 12 runs are drawn" in page


def test_runs_are_judged_by_one_loss_which_the_tables_name(tmp_path):
    # Of 20 losses the last two are the last tenth; the last one alone would be 3, and would not train.
    for arm, last in (("a", (1.0, 3.0)), ("b", (2.5, 2.5))):
        for rate in (0.1, 1.0):
            rows = [row(step, 5.0 if step < 19 else last[step - 19], 2.0) for step in range(1, 21)]
            run_folder(tmp_path / f"sweep/{arm}{rate}", rows, total=20)
    record = {
        f"{arm}{rate}": {"point": {"arm": arm, "learning_rate": rate}, "state": "done", "status": 0}
        for arm in "ab"
        for rate in (0.1, 1.0)
    }
    (tmp_path / "sweep/sweep.json").write_text(json.dumps(record))
    page, _ = page_of(tmp_path, tmp_path / "sweep", most=0)
    assert '<th scope="col">loss at the end (mean of the last tenth)</th>' in page
    assert "last loss" not in page
    rows = re.findall(
        r'<tr><th scope="row">(\w[\d.]+)</th>.*?<td class="number">([\d.]+)</td>', page.split("<h2>Runs")[1]
    )
    assert dict(rows) == {"a0.1": "2", "a1.0": "2", "b0.1": "2.5", "b1.0": "2.5"}
    assert "a trains at learning rates 0.1 to 1 (a factor of 10" in page
    assert "b trains at no learning rate. Its lowest loss at the end is 2.5" in page


def test_a_sweep_that_is_going_on_shows_what_it_has(tmp_path):
    folder = sweep(tmp_path)
    record = json.loads((folder / "sweep.json").read_text())
    del record["arm=sigma,learning_rate=0.1,seed=1"]
    record["arm=sigma,learning_rate=0.01,seed=1"]["state"] = "failed"
    (folder / "sweep.json").write_text(json.dumps(record))
    (folder / "arm=sigma,learning_rate=0.01,seed=1/log.txt").write_text("first\nout of memory\n")
    states = {run.name: run.state for run in read_all(folder)}
    assert len(states) == 12
    assert states["arm=sigma,learning_rate=0.01,seed=1"] == "failed"
    assert states["arm=sigma,learning_rate=0.1,seed=1"] == "done"
    page, _ = page_of(tmp_path, folder)
    # A run that is not in the record has its place in the sweep from its name, and its state from its files.
    assert "1 of its runs have not ended, or failed, and are left out." in page
    (new,) = (run for run in read_all(folder) if run.name == "arm=sigma,learning_rate=0.1,seed=1")
    assert new.point == {"arm": "sigma", "learning_rate": 0.1, "config.seed": 1}


def test_only_fields_that_differ_are_shown(tmp_path):
    run_folder(tmp_path / "runs/a", [row(1, 1.0)], config={"model": {"norm": "pre", "depth": 2}})
    run_folder(tmp_path / "runs/b", [row(1, 1.0)], config={"model": {"norm": "post", "depth": 2}, "new": 0.5})
    found = read_all(tmp_path / "runs")
    assert findings.differences(found) == {"model.norm": ["pre", "post"], "new": [None, 0.5]}


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_static_pictures_are_written_on_request(tmp_path, kind, start):
    folder = run_folder(tmp_path / "a<b>&", collapsing(), total=500)
    _, pictures = page_of(tmp_path, folder, run_folder(tmp_path / "c", collapsing(9999)), static=kind)
    assert pictures == [f"all.{kind}", f"a_b_-entropy.{kind}", f"c-entropy.{kind}"]
    for name in pictures:
        assert (tmp_path / "out/page_plots" / name).read_bytes().startswith(start)


def test_names_tell_runs_of_one_name_apart(tmp_path):
    for folder in ("x/run", "y/run"):
        run_folder(tmp_path / folder, [row(1, 1.0)])
    found = read_all(tmp_path / "x", tmp_path / "y")
    assert [run.name for run in found] == ["x/run", "y/run"]


def test_two_hundred_runs_are_all_in_the_table_and_a_few_are_drawn(tmp_path):
    folder = sweep(tmp_path, arms=[f"arm_{i}" for i in range(10)], rates=(1e-4, 1e-3, 1e-2, 0.1), seeds=5)
    page, pictures = page_of(tmp_path, folder, most=2)
    assert page.count('<th scope="row">arm=arm_') == 200
    assert page.count("<h3>arm=arm_") == 2
    assert pictures == []
    assert os.listdir(tmp_path / "out") == ["page.html"]


def test_processes_of_their_own_write_the_same_report(tmp_path, monkeypatch):
    folder = sweep(tmp_path)

    def written(jobs):
        files = report.write([str(folder)], str(tmp_path / str(jobs) / "page.html"), most=3, jobs=jobs, static="png")
        page, *pictures = [Path(each).read_bytes() for each in files]
        return re.sub(rb"Made on .{19}", b"", page), [Path(each).name for each in files], pictures

    alone = written(1)
    with report._processes(runs.find([str(folder)]).places, 2) as each:
        assert each is map, "so little to read is read here"
    monkeypatch.setattr(report, "WORTH_A_PROCESS", 1)
    with report._processes(runs.find([str(folder)]).places, 2) as each:
        assert each is not map
    assert written(2) == alone


def test_the_page_needs_no_matplotlib_and_static_pictures_say_that_they_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = run_folder(tmp_path / "a", collapsing())
    assert "<figure" in page_of(tmp_path, folder)[0]
    with pytest.raises(BadInput, match="static pictures need matplotlib"):
        page_of(tmp_path, folder, static="pdf")


def test_a_gradient_norm_of_zero_leaves_the_axis_logarithmic(tmp_path):
    rows = [row(step, 1.0, **{"gradient/norm/head": 10.0**-step if step < 5 else 0.0}) for step in range(6)]
    (axes,) = plots.updates(*read(run_folder(tmp_path / "a", rows))).axes
    assert axes.get_yscale() == "log"
    # Zero is far below what is seen, the least value above it is not.
    assert 0 < axes.get_ylim()[0] < 1e-4


def test_pictures_of_a_single_step_without_numbers_say_so(tmp_path):
    found = read(run_folder(tmp_path / "a", [row(1, "nan", 0.0)]))
    loss, *_, below = plots.entropy(*found).axes
    assert [text.get_text() for text in loss.texts] == ["no finite value"]
    assert not below.texts
    left, right = below.get_xlim()
    assert [tick for tick in below.get_xticks() if left <= tick <= right] == [1]


@pytest.mark.parametrize(("primary", "final"), [("beauty", 0.5), ("accuracy", 0.9), (None, 0.9), ("lost", 0.9)])
def test_the_result_of_a_run_is_the_metric_that_its_task_calls_primary(tmp_path, primary, final):
    rows = [row(5, 1.0), {"step": 5, "eval/test/accuracy": 0.9, "eval/test/beauty": 0.5}]
    folder = run_folder(tmp_path / "a", rows, total=5)
    environment = {"total_steps": 5} | ({"primary_metric": primary} if primary else {})
    (folder / "environment.json").write_text(json.dumps(environment))
    assert read(folder)[1].final[1] == final


def test_the_command_starts_no_jax_and_refuses_in_one_line(tmp_path):
    folder = run_folder(tmp_path / "a", collapsing(), total=500)
    code = "import sys; sys.argv = sys.argv[1:]; import runpy\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: print('jax' in sys.modules)"
    command = [sys.executable, "-c", code, str(SCRIPT)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}

    def call(*arguments):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=120)
        return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()

    output = str(tmp_path / "page.html")
    status, out, _ = call(str(folder), "--output", output)
    assert (status, out) == (0, [f"report: {output}", "False"])
    status, _, err = call("--output", output)
    assert status == 2
    assert len(err) == 1
    assert err[0].startswith("report.py: no folder was given: no run found")
    status, _, err = call(str(folder), "--output", str(folder / "metrics.jsonl" / "page.html"))
    assert status == 2
    assert len(err) == 1
    assert "cannot be written" in err[0]


def test_infinities_do_not_reach_the_pictures(tmp_path):
    rows = [row(step, 1.0, 2.0, **{"sharpness/hessian": 1.0, "sharpness/threshold": "inf"}) for step in (1, 2)]
    _, pictures = page_of(tmp_path, run_folder(tmp_path / "a", rows), static="png")
    assert "a-sharpness.png" in pictures
    assert math.isinf(read(tmp_path / "a")[0].rows[0]["sharpness/threshold"])


def test_a_nan_is_no_entropy_and_the_cause_of_a_divergence_is_told(tmp_path):
    rows = [row(step, 2.0, 2.5, 1.5) for step in (1, 2)] + [row(3, "nan", "nan", 1.5)]
    folder = run_folder(tmp_path / "runs/broken", rows, total=100)
    run_folder(tmp_path / "runs/collapsed", [row(1, 2.0, 2.5, 0.01), row(2, "nan", "nan", "nan")], total=100)
    run_folder(
        tmp_path / "runs/rising",
        [row(1, 2.0, 2.5), row(2, 9.0, 2.4)],
        config={"divergence_factor": 3.0},
        diagnosis={"step": 2},
    )
    run, facts = read(folder)
    assert (facts.cause, facts.diverged, facts.fell) == ("logits", 3, [])
    assert facts.lowest == (1.5, "encoder/block_1", 1)
    assert told(run, facts)[1:4] == [
        "Cause: logits; the attention logits of encoder/block_0 were out of range at step 3; step 2, the last one recorded "
        "before, was healthy (loss 2, lowest entropy 1.5 nats in encoder/block_1).",
        "No layer's attention entropy fell below 0.1 nats: the lowest was 1.5 in encoder/block_1 at step 1.",
        "The earliest attention statistics that were not finite are those of encoder/block_0 at step 3.",
    ]
    page, _ = page_of(tmp_path, tmp_path / "runs")
    assert (
        "3 runs diverged, collapsed earliest, at step 2. Causes: 1 logits, 1 entropy collapse, 1 learning rate." in page
    )
    assert page.count("<td>diverged</td>") == 3
    assert "3, logits" in page


def test_a_sharpness_and_a_gamma_that_are_nan_are_neither_below_nor_hidden(tmp_path):
    rows = [row(step, 1.0, 2.0) for step in (1, 2, 3)]
    for each, sharpness, gamma in zip(rows, (10.0, "nan", 20.0), ("nan", -1.0, "nan"), strict=True):
        each |= {"sharpness/hessian": sharpness, "sharpness/threshold": 75.0, "spectral/gamma/head": gamma}
    sentences = " ".join(told(*read(run_folder(tmp_path / "a", rows, total=3))))
    assert "Sharpness stayed below its threshold at 2 measurements. It was NaN at 1, earliest at step 2." in sentences
    assert "γ became negative in 1 layers, head among them." in sentences


@pytest.mark.parametrize(("column", "inches"), [("single", 3.3), ("double", 6.9)])
def test_static_pictures_are_as_wide_as_a_column(tmp_path, column, inches):
    output = str(tmp_path / "page.html")
    _, *pictures = report.write([str(sweep(tmp_path))], output, most=1, static="svg", column=column)
    assert len(pictures) >= 3
    for picture in pictures:
        # SVG counts in points.
        assert float(re.search(r'width="([\d.]+)pt"', Path(picture).read_text())[1]) == pytest.approx(72 * inches)


def test_every_seed_of_a_sweep_is_a_dot_in_the_static_picture(tmp_path):
    table = sensitivity.tabulate(
        [
            ({"arm": arm, "learning_rate": rate, "seed": seed}, sensitivity.RunOutcome(loss + seed, 1.0 + seed, 9.0))
            for arm, loss in (("a", 1.0), ("b", 2.0))
            for rate in (0.1, 1.0)
            for seed in range(3)
        ]
    )
    loss, lowest = plots.rates(table).axes
    for axes, values in ((loss, [1, 2, 2, 3, 3, 4]), (lowest, [1, 1, 2, 2, 3, 3])):
        dots = [y for line in axes.get_lines() if line.get_marker() == "o" for y in line.get_ydata()]
        assert sorted(dots) == sorted(values * 2)
        assert len(axes.collections) == 2, "a band for each arm"
