"""The story that a report tells: what happened before a layer fell, which run did otherwise, and what to try next."""

import html
import json
import os
import re
import shlex
import shutil

from sigmarep.diagnostics import composition, runs
from tests.diagnostics.written import collapsing, page_of, read, read_all, row, run_folder, told


def plain_run(folder, rows, *, arm="pre_ln", seed=0, total=500, **optimizer):
    model = {"pre_ln": {"norm": "pre", "reparam": "none"}, "sigma": {"norm": "post", "reparam": "sigma"}}[arm]
    config = {"model": model, "optimizer": {"learning_rate": 0.02, **optimizer}, "seed": seed, "total_steps": total}
    return run_folder(folder, rows, config=config, total=total)


def story_of(*folders):
    """The sentences of the first run on the page of all, with their commands."""
    judged = [composition.judge(run) for run in read_all(*folders)]
    drawn = {0: composition.draw(read_all(*folders)[0], judged[0].facts, most=1)}
    return composition.compose(judged, drawn, []).details[0].sentences


def test_what_grew_before_the_first_layer_fell(tmp_path):
    rows = collapsing()
    for each in rows:
        step = each["step"]
        each["attention/max_logit/encoder/block_1"] = 4.0 if step < 335 else 200.0
        each["spectral/sigma/encoder/block_1/attention/query"] = 2.0 if step < 340 else 7.0
        each["spectral/sigma/encoder/block_1/attention/value"] = 1.0 if step < 340 else 99.0
        each["spectral/sigma/encoder/block_0/attention/query"] = 1.0 if step < 340 else 99.0
        each["train/learning_rate"] = min(step / 100, 1.0) * 0.02
    sentences = story_of(plain_run(tmp_path / "a", rows))
    before = next(each for each in sentences if each.text.startswith("Before that"))
    # The values of the others are of no account for block 1's attention; those at step 335 are the last before its fall.
    assert before.text == (
        "Before that, between steps 335 and 340, σ of encoder/block_1/attention/query grew from 2 to 7."
    )
    assert before.topic == "spectral/sigma/"
    assert "The learning rate was then 0.02, its highest." in [each.text for each in sentences]


def test_the_advice_is_a_command_for_a_new_folder(tmp_path):
    folder = plain_run(tmp_path / "it's a run", collapsing())
    told = story_of(folder)[-1]
    assert told.text == (
        "To try next: σReparam, which bounds the logits, with the norm after each branch, at the same learning rate."
    )
    words = shlex.split(told.command)
    assert words == [
        *("python", "scripts/train.py", "--config", f"{folder}/config.json", "--config.model.norm=post"),
        *("--config.model.reparam=sigma", "--workdir", f"{folder}-sigma"),
    ]
    os.makedirs(f"{folder}-sigma")
    assert shlex.split(story_of(folder)[-1].command)[-1] == f"{folder}-sigma-2"
    # σReparam that falls all the same learns more slowly; a short run goes on for longer; a steady one may learn faster.
    slow = story_of(plain_run(tmp_path / "b", collapsing(), arm="sigma"))[-1]
    assert "--config.optimizer.learning_rate=0.0067" in slow.command
    short = story_of(plain_run(tmp_path / "c", [row(1, 1.0, 2.0)], total=1))[-1]
    assert short.text == "To try next: a longer run; 1 steps tell little."
    steady = story_of(plain_run(tmp_path / "d", [row(step, 5.0 / step, 2.0) for step in range(1, 51)], total=50))[-1]
    assert "--config.optimizer.learning_rate=0.06" in steady.command


def test_the_run_that_kept_its_attention_is_named_with_its_differences(tmp_path):
    fallen = plain_run(tmp_path / "runs/a", [*collapsing(), {"step": 500, "eval/test/accuracy": 0.5}])
    kept = [row(step, 5.0 / step, 2.0) for step in range(5, 505, 5)]
    plain_run(tmp_path / "runs/b", [*kept, {"step": 500, "eval/test/accuracy": 0.9}], arm="sigma", seed=1)
    plain_run(tmp_path / "runs/c", [*kept, {"step": 500, "eval/test/accuracy": 0.9}], arm="sigma", seed=0)
    sentences = story_of(tmp_path / "runs")
    assert sentences[-2].text == (
        "Compare c (nearest of the runs that trained, 2 settings away): it has model.norm post instead of pre and "
        "model.reparam sigma instead of none. It had no collapse and no lasting rise of its loss. These settings changed "
        "together: which of them did it, the two runs do not tell. Its lowest entropy is 2 nats, its test/accuracy is 0.9 "
        "(here 0.5)."
    )
    assert sentences[-2].topic == "all entropies"
    # What would be tried has been: where only one seed has, what is left is another.
    assert sentences[-1] == (
        "What would be tried next, the arm sigma (σReparam and post-LN), has been, and trained in 2 of 2 runs: b and c.",
        None,
        "",
        (),
    )
    shutil.rmtree(tmp_path / "runs/c")
    once = story_of(tmp_path / "runs")[-1]
    assert once.text == "To try next: b with another seed; one seed that trains may be luck."
    assert shlex.split(once.command)[-3:] == ["--config.seed=2", "--workdir", f"{fallen.parent / 'b'}-seed_2"]


def test_a_remedy_that_failed_is_not_recommended_again(tmp_path):
    for name, arm in (("a", "pre_ln"), ("b", "sigma")):
        plain_run(tmp_path / "runs" / name, collapsing(), arm=arm)
    assert story_of(tmp_path / "runs")[-1].text == (
        "What would be tried next, the arm sigma (σReparam and post-LN), has been, and its attention collapsed: b."
    )


def commands(page):
    """The words of every command on a page."""
    texts = re.findall(r"<code>(.*?)</code>", page, re.DOTALL)
    return [shlex.split(html.unescape(re.sub("<.*?>", "", text)).replace("\\\n", " ")) for text in texts]


def changed_run(folder, losses, entropies, arm, factor=0.1):
    """A run that was changed on purpose after step 60, in a folder as a sweep names it."""
    rows = [row(step, losses[step > 60], entropies[step > 60]) for step in range(5, 125, 5)]
    plain_run(folder, rows, arm=arm, total=120)
    config = json.loads((folder / "config.json").read_text())
    config["intervention"] = {"at_steps": 60, "attention_temperature": factor, "learning_rate_factor": 1.0}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_change_on_purpose_is_told_of_first(tmp_path):
    for arm, losses, entropies in (("pre_ln", (1.0, 2.0), (2.0, 0.3)), ("sigma", (1.5, 1.2), (2.5, 0.8))):
        changed_run(tmp_path / f"runs/at=60,arm={arm},seed=0", losses, entropies, arm)
    folders, _ = runs.find([str(tmp_path / "runs")])
    # Arguments that all runs share tell none from another.
    assert [place.name for place in folders] == ["arm=pre_ln", "arm=sigma"]
    page, _ = page_of(tmp_path, tmp_path / "runs")
    assert (
        "All runs were changed on purpose after step 60: attention temperature times 0.1, which makes attention sharper. "
        "Before it the loss was lowest in arm=pre_ln, 1, and highest in arm=sigma, 1.5." in page
    )
    assert (
        "After it, up to the last step, arm=sigma was not set back and arm=pre_ln did not recover. Recovered: the "
        "loss at the "
        "end is not above the last one logged before the change." in page
    )
    assert "model.norm pre (LayerNorm before each branch) and model.reparam none (plain kernels)" in page
    assert (
        "after the change on purpose it did not recover (loss 1 just before, at most 2 after it, 2 at the end; lowest "
        "entropy "
        "2 just before, at least 0.3 after it, 0.3 at the end)" in page
    )
    assert "at most 2 after it (at step 65) and 2 at the end: the run did not recover by step 120, the last." in page
    assert "It had no lasting rise of its loss after the same change on purpose." in page
    control = next(each for each in commands(page) if "intervention" in " ".join(each[4:5]))
    assert control == [
        *("python", "scripts/train.py", "--config", f"{tmp_path}/runs/at=60,arm=pre_ln,seed=0/config.json"),
        *("--config.intervention.attention_temperature=1.0", "--workdir"),
        f"{tmp_path}/runs/at=60,arm=pre_ln,seed=0-control",
    ]
    # The control itself is no run that was changed.
    changed_run(tmp_path / "control", (1.0, 0.9), (2.0, 2.0), "pre_ln", factor=1.0)
    assert "changed on purpose" not in " ".join(told(*read(tmp_path / "control")))


def test_layers_that_fell_first_are_told_of_with_their_rates(tmp_path):
    record = {}
    for rate, layer, step in ((0.1, 1, 20), (1.0, 0, 10)):
        name = f"steps=40,arm=pre_ln,learning_rate={rate},seed=0"
        rows = [row(at, 1.0, 0.05 if layer == 0 and at >= step else 2.0) for at in range(5, 45, 5)]
        for each in rows:
            each["attention/entropy/encoder/block_1"] = 0.05 if layer == 1 and each["step"] >= step else 2.0
        run_folder(tmp_path / "sweep" / name, rows, total=40)
        point = {"steps": 40, "arm": "pre_ln", "learning_rate": rate, "seed": 0}
        record[name] = {"point": point, "state": "done", "status": 0}
    (tmp_path / "sweep/sweep.json").write_text(json.dumps(record))
    page, _ = page_of(tmp_path, tmp_path / "sweep")
    assert (
        "pre_ln: 2 of 2 runs collapsed (at learning rates 0.1 and 1); earliest to fall: encoder/block_1, by step "
        "20 (at learning rate 0.1) and encoder/block_0, by step 10 (at learning rate 1); lowest entropy 0.05 nats"
        in page
    )


def test_a_name_that_cannot_be_shown_is_in_no_command(tmp_path):
    told = story_of(plain_run(tmp_path / "a\nb", collapsing()))[-1]
    assert told.text.startswith("To try next")
    assert told.command == ""
    page, _ = page_of(tmp_path, plain_run(tmp_path / "$(touch x) <b>", collapsing()))
    assert "&#x27;" in page.split("<code>")[1].split("</code>")[0]
    assert "<b>/config.json" not in page


def test_a_run_that_recovers_says_when_and_to_which_loss(tmp_path):
    losses = {65: 3.0, 70: 2.0, 75: 0.9}
    rows = [
        row(step, losses.get(step, 1.0 if step <= 60 else 0.8), 2.0 if step <= 60 else 1.0) for step in range(5, 125, 5)
    ]
    run_folder(tmp_path / "a", rows, total=120, config={"intervention": {"at_steps": 60, "learning_rate_factor": 5.0}})
    sentence = next(each for each in told(*read(tmp_path / "a")) if "on purpose" in each)
    assert sentence == (
        "After step 60 the run was changed on purpose: learning rate times 5. Its loss was 1 just before, at most 3 "
        "after it "
        "(at step 65) and 0.8 at the end: the run recovered, for good from step 75 on. "
        "The lowest entropy of any layer was 2 nats just "
        "before, at least 1 after it (at step 65) and 1 at the end: it stayed lower."
    )


def test_the_nearest_run_that_trained_is_compared(tmp_path):
    steady = [row(step, 5.0 / step, 2.0) for step in range(5, 505, 5)]
    plain_run(tmp_path / "runs/a", collapsing(), learning_rate=1.0)
    plain_run(tmp_path / "runs/b", steady, learning_rate=0.01)
    plain_run(tmp_path / "runs/c", steady, learning_rate=0.1)
    plain_run(tmp_path / "runs/d", steady, learning_rate=1.0, arm="sigma")
    nearest, same_rate = [each.text for each in story_of(tmp_path / "runs") if each.text.startswith("Compare")]
    assert nearest.startswith(
        "Compare c (nearest of the runs that trained, 1 setting away): it has optimizer.learning_rate 0.1 instead of "
        "1. It had"
    )
    assert same_rate.startswith(
        "Compare d (nearest at the same learning rate): it has model.norm post instead of pre and"
    )


def test_arms_that_differ_in_norm_and_reparam_are_separated_by_runs(tmp_path):
    steady = [row(step, 5.0 / step, 2.0) for step in range(5, 505, 5)]
    fallen = plain_run(tmp_path / "runs/a", collapsing())
    kept = plain_run(tmp_path / "runs/b", steady, arm="sigma")
    page, _ = page_of(tmp_path, tmp_path / "runs", most=0)
    assert "a and b differ in model.norm and model.reparam at once: which of the two did it, they do not tell." in page
    begin = ["python", "scripts/train.py", "--config", f"{fallen}/config.json"]
    again = ["python", "scripts/train.py", "--config", f"{kept}/config.json", "--config.seed=1"]
    again += ["--workdir", f"{kept}-seed_1"]
    # What tells the two apart comes before what repeats one of them, and a higher rate is left out.
    assert commands(page) == [
        [*begin, "--config.model.norm=post", "--workdir", f"{fallen}-post_ln"],
        [*begin, "--config.model.reparam=sigma", "--workdir", f"{fallen}-sigma_pre_ln"],
        again,
    ]
    assert '<h2>To try next</h2>\n<div data-key="told"><ol>' in page
    assert "<li>For a: b with another seed; one seed that trains may be luck.<" in page
    # One of them made, the other is left; and where both runs trained, or differ in one field, there is nothing to
    # separate.
    shutil.copytree(fallen, tmp_path / "runs/c")
    config = json.loads((tmp_path / "runs/c/config.json").read_text())
    config["model"]["norm"] = "post"
    (tmp_path / "runs/c/config.json").write_text(json.dumps(config))
    left = commands(page_of(tmp_path, tmp_path / "runs", most=0)[0])
    assert [each[-1] for each in left[:2]] == [f"{fallen}-sigma_pre_ln", again[-1]]
    others = commands(page_of(tmp_path, tmp_path / "runs/c", kept, most=0)[0])
    assert others[0] == again
    assert not any(each[-1].endswith(("-post_ln", "-sigma_pre_ln")) for each in others)


def test_layers_that_fell_at_one_step_are_named_together(tmp_path):
    rows = collapsing()
    for each in rows:
        each["attention/entropy/encoder/block_1"] = each["attention/entropy/encoder/block_0"]
    for name in ("a", "b"):
        plain_run(tmp_path / "runs" / name, rows)
    step = next(each["step"] for each in rows if each["attention/entropy/encoder/block_0"] < 0.1)
    words = told(*read(tmp_path / "runs/a"))
    assert any(
        each.startswith(f"encoder/block_0, encoder/block_1 fell below 0.1 nats at step {step}")
        and "Which of these was earlier, the logged steps do not tell." in each
        for each in words
    )
    page, _ = page_of(tmp_path, tmp_path / "runs")
    assert f"earliest to fall: encoder/block_0, encoder/block_1, by step {step}" in page
    assert f"<td>encoder/block_0, encoder/block_1 at step {step}</td>" in page


def test_revisions_of_the_code_are_told_of_at_the_top(tmp_path):
    for name, revision in (("a", "1" * 40), ("b", "2" * 40), ("c", "2" * 40)):
        folder = plain_run(tmp_path / "runs" / name, [row(1, 1.0)], total=1)
        (folder / "environment.json").write_text(json.dumps({"git_revision": revision, "total_steps": 1}))
    page, _ = page_of(tmp_path, tmp_path / "runs")
    assert f"<li>They were made by 2 revisions of the code: {'2' * 12} (2), {'1' * 12} (1).</li>" in page


def test_a_layer_near_to_a_collapse_is_named(tmp_path):
    for name, lowest in (("a", 0.104), ("b", 2.0)):
        plain_run(
            tmp_path / "runs" / name, [row(step, 1.0, lowest if step > 40 else 2.0) for step in range(1, 51)], total=50
        )
    assert "No layer collapsed, but encoder/block_0 came near: 0.104 nats at step 41, against 0.1." in told(
        *read(tmp_path / "runs/a")
    )
    page, _ = page_of(tmp_path, tmp_path / "runs")
    assert "a: no layer collapsed, but encoder/block_0 came near: 0.104 nats at step 41, against 0.1" in page
    assert "b: no layer collapsed, lowest entropy 2 nats" in page
