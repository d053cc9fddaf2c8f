"""Folders of recordings: their layouts, and what becomes of unusable files."""

import hashlib
import json
import os
import re
import shutil

import numpy as np
import pytest
import soundfile

from sigmarep.data import digests, sources
from sigmarep.data.datasets import speech_folder
from sigmarep.errors import BadInput
from tests.sounds import rows, sine


def opened(tmp_path, split="train"):
    return sources.open_source("speech_folder", split, data_dir=str(tmp_path / "data"), folder=str(tmp_path / "own"))


def problems(tmp_path):
    return speech_folder.problems(
        sources.builder("speech_folder", data_dir=str(tmp_path / "data"), folder=str(tmp_path / "own"))
    )


def test_a_folder_like_librispeech(tmp_path):
    for split in ("train-clean-100", "dev-clean"):
        for speaker, chapter in (("19", "198"), ("26", "495")):
            place = tmp_path / "own" / split / speaker / chapter
            place.mkdir(parents=True)
            names = [f"{speaker}-{chapter}-{i:04}" for i in range(3)]
            for i, name in enumerate(names):
                soundfile.write(place / f"{name}.flac", sine(0.5 + i / 10, 16000), 16000)
            lines = "".join(f"{name} WORDS OF {i}\n" for i, name in enumerate(names))
            (place / f"{speaker}-{chapter}.trans.txt").write_text(lines)
    assert len(opened(tmp_path, "dev_clean")) == 6
    assert problems(tmp_path) == {}
    found = rows(opened(tmp_path, "train_clean_100"))
    assert [(row["id"], row["text"], row["speaker"]) for row in found[2:4]] == [
        ("19-198-0002", "WORDS OF 2", "19"),
        ("26-495-0000", "WORDS OF 0", "26"),
    ]
    assert [len(row["audio"]) for row in found[:3]] == [8000, 9600, 11200]
    expected = sine(0.5, 16000)
    np.testing.assert_allclose(found[0]["audio"] / 32768, expected, atol=1e-4)
    with pytest.raises(BadInput, match="no split 'train'; expected one of dev_clean, train_clean_100"):
        opened(tmp_path)
    # A file without a line, a line without a file, two files of one line, and a chapter without a transcript.
    os.rename(place / f"{names[0]}.flac", place / "new.flac")
    shutil.copy(place / f"{names[1]}.flac", place / f"{names[1]}.wav")
    (place.parent / "496").mkdir()
    shutil.copy(place / "new.flac", place.parent / "496" / "26-496-0000.flac")
    assert len(opened(tmp_path, "dev_clean")) == 5
    assert problems(tmp_path) == {
        "missing": [f"dev-clean/26/495/{names[0]}.flac: there is no such file"],
        "no_text": [
            "dev-clean/26/495/new.flac: no line of the transcript names it",
            "dev-clean/26/496/26-496-0000.flac: has no transcript",
        ],
        "repeated": [f"dev-clean/26/495/{names[1]}.wav: {names[1]}.flac is taken"],
    }


def tables(tmp_path, train):
    own = tmp_path / "own"
    (own / "wav").mkdir(parents=True)
    for name, rate, channels in (("a.wav", 16000, 1), ("b.flac", 44100, 2), ("c.ogg", 8000, 1), ("d.wav", 44100, 1)):
        soundfile.write(own / "wav" / name, sine(0.5, rate, channels), rate)
    (own / "train.tsv").write_text(train)
    (own / "dev.tsv").write_text("wav/a.wav\tHeld out\n")
    return own


def test_tables_with_and_without_speakers_at_any_rate(tmp_path):
    train = "wav/a.wav\tOne\tann\nwav/b.flac\tTwo, both\tbob\nwav/c.ogg\tThree\nwav/d.wav\tÜbung\t\n"
    tables(tmp_path, train)
    found = rows(opened(tmp_path))
    assert [(row["id"], row["text"], row["speaker"]) for row in found] == [
        ("wav/a.wav", "One", "ann"),
        ("wav/b.flac", "Two, both", "bob"),
        ("wav/c.ogg", "Three", ""),
        ("wav/d.wav", "Übung", ""),
    ]
    for row in found:
        assert len(row["audio"]) == 8000
        np.testing.assert_allclose(row["audio"][500:-500] / 32768, sine(0.5, 16000)[500:-500], atol=0.02)
    assert len(opened(tmp_path, "validation")) == 1
    assert problems(tmp_path) == {
        "resampled": ["wav/b.flac: 44100 Hz", "wav/c.ogg: 8000 Hz", "wav/d.wav: 44100 Hz"],
        "averaged": ["wav/b.flac: 2 channels"],
    }


def test_every_unusable_file_is_left_out_and_named(tmp_path):
    names = ("a.wav\tOne", "gone.wav\tx", "text.wav\tx", "none.wav\tx", "nan.wav\tx", "cut.wav\tx", "b.flac\t ")
    own = tables(tmp_path, "".join(f"wav/{name}\n" for name in names) + "\nwav/c.ogg\nwav/a.wav\tx\ts\tmore\n\tx\n")
    (own / "wav/text.wav").write_text("text" * 100)
    soundfile.write(own / "wav/none.wav", np.zeros(0), 8000)
    soundfile.write(own / "wav/nan.wav", np.full(900, np.inf), 8000, subtype="FLOAT")
    soundfile.write(own / "wav/unnamed.wav", sine(0.5, 16000), 16000)
    whole = (own / "wav/a.wav").read_bytes()
    (own / "wav/cut.wav").write_bytes(whole[: len(whole) // 2])
    assert [row["text"] for row in rows(opened(tmp_path))] == ["One"]
    found = problems(tmp_path)
    unreadable = found.pop("unreadable")
    assert re.fullmatch(r"wav/text\.wav: cannot be decoded \(.+\)", unreadable[0])
    assert unreadable[1:] == [
        "wav/nan.wav: holds samples that are not finite",
        f"wav/cut.wav: cannot be decoded (truncated: {len(whole) // 2 - 8:,} of {len(whole) - 8:,} bytes are present)",
    ]
    assert found == {
        "missing": ["wav/gone.wav: there is no such file"],
        "empty_audio": ["wav/none.wav: holds no samples"],
        "empty_text": ["wav/b.flac: has no text"],
        "no_text": [f"wav/{name}: has no transcript" for name in ("c.ogg", "d.wav", "unnamed.wav")],
        "malformed": [
            "train.tsv: line 9 has 0 tabs; expected a file, a tab, its text",
            "train.tsv: line 10 has 3 tabs; expected a file, a tab, its text",
            "train.tsv: line 11 names no file",
        ],
    }


def test_a_split_of_which_nothing_is_left_says_why(tmp_path):
    tables(tmp_path, "wav/gone.wav\tx\nwav/a.wav\t\n")
    with pytest.raises(
        BadInput,
        match=r"nothing of the split 'train' can be used \(left out 2\): wav/gone.wav: there is no such file; wav/a.wav: ",
    ):
        opened(tmp_path)


def test_an_empty_table_is_refused(tmp_path):
    tables(tmp_path, "")
    with pytest.raises(BadInput, match=r"train\.tsv: is empty"):
        opened(tmp_path)


def test_changed_text_or_audio_is_another_set_and_a_touched_file_is_not(tmp_path):
    own = tables(tmp_path, "wav/a.wav\tOne\n")

    def fingerprint():
        return sources.fingerprint("speech_folder", "train", data_dir=str(tmp_path / "data"), folder=str(own))

    first = fingerprint()
    os.utime(own / "wav/a.wav", (0, 0))
    assert fingerprint() == first
    soundfile.write(own / "wav/a.wav", sine(0.6, 16000), 16000)
    second = fingerprint()
    (own / "train.tsv").write_text("wav/a.wav\tTwo\n")
    assert len({first, second, fingerprint()}) == 3


def test_folders_that_cannot_be_one_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"config\.data\.folder = '': there is no such folder"):
        sources.open_source("speech_folder", "train", data_dir=str(tmp_path), folder="")
    (tmp_path / "own").mkdir()
    with pytest.raises(BadInput, match=r"has no train\.tsv \(audio, tab, text on each line\), no metadata\.csv"):
        opened(tmp_path)
    for name in ("valid.tsv", "dev.tsv"):
        (tmp_path / "own" / name).write_text("a.wav\tx\n")
    with pytest.raises(BadInput, match=r"several files of the split validation: dev\.tsv, valid\.tsv; keep one"):
        opened(tmp_path)


def test_other_sets_have_no_problems(tmp_path):
    builder = sources.builder("digits", data_dir=str(tmp_path))
    assert speech_folder.problems(builder) == {}


def test_one_absurd_file_costs_only_itself(tmp_path):
    own = tables(tmp_path, "wav/a.wav\tOne\nwav/loud.wav\tLoud\nwav/huge.flac\tx\nwav/slow.wav\tx\n\n")
    wave = 20000 * sine(0.5, 16000)
    soundfile.write(own / "wav/loud.wav", wave, 16000, subtype="FLOAT")
    soundfile.write(own / "wav/huge.flac", sine(0.5, 16000), 16000)
    content = bytearray((own / "wav/huge.flac").read_bytes())
    content[21:26] = bytes([content[21] | 0x0F]) + b"\xff" * 4
    (own / "wav/huge.flac").write_bytes(content)
    content = bytearray((own / "wav/a.wav").read_bytes())
    content[24:28] = b"\1\0\0\0"
    (own / "wav/slow.wav").write_bytes(content)
    examples = rows(opened(tmp_path))
    assert [row["text"] for row in examples] == ["One", "Loud"]
    np.testing.assert_allclose(examples[1]["audio"], wave, atol=1)
    left_out = problems(tmp_path)
    assert left_out["scaled"] == ["wav/loud.wav: floats, divided by 32768"]
    assert [reason.split(",")[0] for reason in left_out["unreadable"]] == [
        "wav/huge.flac: claims 68",
        "wav/slow.wav: claims 1 Hz; expected 4",
    ]


def test_a_replaced_recording_of_equal_length_is_another_set(tmp_path):
    own = tables(tmp_path, "wav/a.wav\tOne\n")
    status = os.stat(own / "wav/a.wav")
    np.testing.assert_allclose(rows(opened(tmp_path))[0]["audio"] / 32768, sine(0.5, 16000), atol=1e-4)
    soundfile.write(own / "wav/a.wav", -sine(0.5, 16000), 16000)
    os.utime(own / "wav/a.wav", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.path.getsize(own / "wav/a.wav") == status.st_size
    np.testing.assert_allclose(rows(opened(tmp_path))[0]["audio"] / 32768, -sine(0.5, 16000), atol=1e-4)


def test_digests_are_remembered_until_a_file_changes(tmp_path, monkeypatch):
    paths = [str(tmp_path / name) for name in "abc"]
    for path in paths[:2]:
        with open(path, "w") as file:
            file.write(path)
    expected = {path: hashlib.sha256(path.encode()).hexdigest() for path in paths[:2]}
    memory = str(tmp_path / "made/memory.json")
    assert digests.content_digests(paths, memory) == expected
    # Files that were just written are not remembered, since they may change within a tick of the clock.
    assert not os.path.exists(memory)
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -60.0)
    digests.content_digests(paths, memory)
    monkeypatch.setattr(digests, "_digest", lambda path: "read again")
    assert digests.content_digests(paths, memory) == expected
    os.utime(paths[0], (0, 0))
    assert digests.content_digests(paths, memory) == {**expected, paths[0]: "read again"}
    for content in ("[]", "no JSON", json.dumps({paths[1]: 7})):
        (tmp_path / "made/memory.json").write_text(content)
        assert set(digests.content_digests(paths, memory).values()) == {"read again"}


def test_a_folder_like_common_voice(tmp_path):
    own = tmp_path / "own"
    (own / "clips").mkdir(parents=True)
    names = "client_id\tpath\tsentence_id\tsentence\tup_votes\n"
    for name in ("train", "test", "validated"):
        lines = "".join(f'ann\t{name}{i}.mp3\tx\tIt\u2019s "{name}" {i}.\t2\n' for i in range(2))
        (own / f"{name}.tsv").write_text(names + lines + "\n")
        for i in range(2):
            soundfile.write(own / f"clips/{name}{i}.mp3", sine(0.5 + i / 10, 48000), 48000)
    (own / "train.tsv").write_text(f"{(own / 'train.tsv').read_text()}ann\tgone.mp3\tx\ty\t0\nann\tshort.mp3\n")
    (own / "clip_durations.tsv").write_text("clip\tduration[ms]\ntrain0.mp3\t500\n")
    (own / "reported.tsv").write_text("sentence_id\tsentence\tlocale\treason\n")
    examples = rows(opened(tmp_path))
    assert [(row["id"], row["text"], row["speaker"]) for row in examples] == [
        ("train0.mp3", 'It\u2019s "train" 0.', "ann"),
        ("train1.mp3", 'It\u2019s "train" 1.', "ann"),
    ]
    assert [len(row["audio"]) for row in examples] == [8000, 9600]
    np.testing.assert_allclose(examples[0]["audio"][500:-500] / 32768, sine(0.5, 16000)[500:-500], atol=0.02)
    assert len(opened(tmp_path, "test")) == 2
    with pytest.raises(BadInput, match="no split 'validated'; expected one of test, train"):
        opened(tmp_path, "validated")
    left_out = problems(tmp_path)
    assert left_out["missing"] == ["clips/gone.mp3: there is no such file"]
    assert left_out["malformed"] == ["train.tsv: line 6 has 2 columns; expected 5, a path among them"]
    assert set(left_out) == {"missing", "malformed", "resampled"}


def test_a_folder_like_ljspeech(tmp_path):
    own = tmp_path / "own"
    (own / "wavs").mkdir(parents=True)
    texts = {f"LJ001-{i:04}": f"Sentence no {i}" for i in range(60)}
    for name in texts:
        soundfile.write(own / f"wavs/{name}.wav", sine(0.05, 22050), 22050)
    lines = [f"{name}|{text.replace('no', 'No.')}|{text}" for name, text in texts.items()]
    lines[1] = lines[1].rpartition("|")[0]
    lines[2] += "|more"
    (own / "metadata.csv").write_text("\n".join([*lines, "gone|Not there|Not there", "", ""]))
    texts["LJ001-0001"] = "Sentence No. 1"
    del texts["LJ001-0002"]
    held_out = {split: rows(opened(tmp_path, split)) for split in ("train", "validation", "test")}
    assert {row["id"]: row["text"] for members in held_out.values() for row in members} == texts
    for split, (low, high) in {"train": (0.1, 1), "validation": (0.05, 0.1), "test": (0, 0.05)}.items():
        assert [row["text"] for row in held_out[split]] == [
            text for text in texts.values() if low <= int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256 < high
        ]
    assert all(held_out.values())
    left_out = problems(tmp_path)
    assert left_out["missing"] == ["wavs/gone.wav: there is no such file"]
    assert left_out["malformed"] == [
        "metadata.csv: line 3 has 4 columns; expected an id, its text, its normalized text, by |"
    ]


def test_a_table_with_a_byte_order_mark_keeps_its_first_row(tmp_path):
    tables(tmp_path, "\ufeffwav/a.wav\tOne\nwav/b.flac\te\u0301te\u0301\n")
    assert [(row["id"], row["text"]) for row in rows(opened(tmp_path))] == [
        ("wav/a.wav", "One"),
        ("wav/b.flac", "\xe9t\xe9"),
    ]
