"""Layouts of folders of recordings with transcripts, see `sigmarep.data.datasets.speech_folder`."""

import glob
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from sigmarep.data import splitting
from sigmarep.data.datasets import text_folder
from sigmarep.errors import BadInput

EXTENSIONS = (".flac", ".wav", ".ogg", ".mp3")
# Columns of Common Voice's tables, and its splits.
PATH, SENTENCE, CLIENT = "path", "sentence", "client_id"
COMMON_VOICE_SPLITS = ("train", "validation", "test")
# Splits of LJSpeech's layout, with the upper ends of `splitting.fraction` of their texts.
LJSPEECH_SPLITS = {"test": 0.05, "validation": 0.1, "train": 1.0}


class Entry(NamedTuple):
    """An utterance of a transcript or table.

    Attributes:
      path: the audio file.
      text: the transcript.
      speaker: "" if unknown.
      name: id of the utterance.
      problem: kind of the fault that makes it unusable, a key of `speech_folder.problems`; "" for none.
      reason: the fault in words.
    """

    path: str
    text: str
    speaker: str
    name: str
    problem: str = ""
    reason: str = ""


def entries_by_split(folder: str) -> dict[str, list[Entry]]:
    """The utterances of each split of a folder, in order; audio files without a transcript are unusable ones.

    Raises:
      BadInput: there is no such folder, it has none of the layouts, a split has two tables, or a table and transcripts, or
        a table cannot be read.
    """
    root = os.path.expanduser(folder)
    if not folder or not os.path.isdir(root):
        raise BadInput(f"config.data.folder = {folder!r}: there is no such folder")
    tables, chapters = _tables(folder, root), _chapters(root)
    if both := tables.keys() & chapters.keys():
        raise BadInput(f"config.data.folder = {folder!r}: has a table and a folder of the split {min(both)}; keep one")
    columns = {split: _columns(path) for split, path in tables.items()}
    if any(columns.values()):
        return _common_voice(root, tables, columns)
    entries = {split: list(_rows(root, path)) for split, path in tables.items()}
    if tables:
        entries[next(iter(tables))] += _unnamed_by_tables(root, entries)
    for split, paths in chapters.items():
        entries[split] = [entry for path in paths for entry in _chapter(path)]
        entries[split] += _unnamed_by_chapters(root, split, entries[split])
    if not entries:
        entries = _ljspeech(root)
    if not entries:
        raise BadInput(
            f"config.data.folder = {folder!r}: has no train.tsv (audio, tab, text on each line), no metadata.csv with a "
            "folder wavs, and no transcripts such as train-clean-100/103/1240/103-1240.trans.txt"
        )
    return entries


def _common_voice(root: str, tables: dict[str, str], columns: dict[str, dict[str, int]]) -> dict[str, list[Entry]]:
    splits = [split for split in tables if columns[split]]
    # The others name clips that are of no use or in several splits, and have columns of their own.
    chosen = [split for split in splits if split in COMMON_VOICE_SPLITS] or splits
    return {split: list(_clips(root, tables[split], columns[split])) for split in chosen}


def _tables(folder: str, root: str) -> dict[str, str]:
    """Paths of the tables by split."""
    paths: dict[str, list[str]] = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(root), "*.tsv"))):
        stem = re.sub(r"\W", "_", os.path.basename(path).removesuffix(".tsv"))
        paths.setdefault(text_folder.SPLITS.get(stem, stem), []).append(path)
    for split, several in paths.items():
        if len(several) > 1:
            names = ", ".join(os.path.basename(path) for path in several)
            raise BadInput(
                f"config.data.folder = {folder!r}: has several files of the split {split}: {names}; keep one"
            )
    return {split: path for split, (path,) in paths.items()}


def _chapters(root: str) -> dict[str, list[str]]:
    """Paths of LibriSpeech's transcripts by split."""
    paths: dict[str, list[str]] = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(root), "*", "*", "*", "*.trans.txt"))):
        paths.setdefault(re.sub(r"\W", "_", os.path.relpath(path, root).split(os.sep)[0]), []).append(path)
    return paths


def _columns(path: str) -> dict[str, int]:
    """Numbers of the columns by name, of a table of Common Voice; {} for another one."""
    names = next(text_folder.lines(path)).split("\t")
    columns = {name.strip(): number for number, name in enumerate(names)}
    return columns if {PATH, SENTENCE} <= columns.keys() else {}


def _clips(root: str, path: str, columns: dict[str, int]) -> Iterator[Entry]:
    """Yields the entries of a table of Common Voice."""
    for number, line in enumerate(text_folder.lines(path), 1):
        cells = [cell.strip() for cell in line.split("\t")]
        if number == 1 or not any(cells):
            continue
        if len(cells) != len(columns) or not cells[columns[PATH]]:
            reason = f"line {number} has {len(cells)} columns; expected {len(columns)}, a path among them"
            yield Entry(path, "", "", "", "malformed", reason)
            continue
        speaker = cells[columns[CLIENT]] if CLIENT in columns else ""
        clip = cells[columns[PATH]]
        yield _checked(Entry(os.path.join(root, "clips", clip), cells[columns[SENTENCE]], speaker, clip))


def _rows(root: str, path: str) -> Iterator[Entry]:
    """Yields the entries of a table without names of columns."""
    for number, line in enumerate(text_folder.lines(path), 1):
        columns = [column.strip() for column in line.split("\t")]
        if not any(columns):
            continue
        if len(columns) not in (2, 3) or not columns[0]:
            reason = (
                f"line {number} has {len(columns) - 1} tabs; expected a file, a tab, its text" if columns[0] else ""
            )
            yield Entry(path, "", "", "", "malformed", reason or f"line {number} names no file")
            continue
        speaker = columns[2] if len(columns) == 3 else ""
        yield _checked(Entry(os.path.join(root, columns[0]), columns[1], speaker, columns[0]))


def _chapter(path: str) -> Iterator[Entry]:
    """Yields the entries of a transcript of LibriSpeech, then audio files of its folder that it does not name."""
    here = os.path.dirname(path)
    speaker = os.path.basename(os.path.dirname(here))
    audio_files: dict[str, str] = {}
    for name in sorted(os.listdir(here)):
        stem, extension = os.path.splitext(name)
        if extension.lower() not in EXTENSIONS:
            continue
        if stem in audio_files:
            reason = f"{os.path.basename(audio_files[stem])} is taken"
            yield Entry(os.path.join(here, name), "", speaker, stem, "repeated", reason)
        else:
            audio_files[stem] = os.path.join(here, name)
    spoken = set()
    for line in text_folder.lines(path):
        name, _, text = line.strip().partition(" ")
        if name:
            spoken.add(name)
            yield _checked(
                Entry(audio_files.get(name, os.path.join(here, f"{name}.flac")), text.strip(), speaker, name)
            )
    for name in sorted(set(audio_files) - spoken):
        yield Entry(audio_files[name], "", speaker, name, "no_text", "no line of the transcript names it")


def _ljspeech(root: str) -> dict[str, list[Entry]]:
    """The entries of LJSpeech's layout by split; {} for another folder."""
    path, wavs = os.path.join(root, "metadata.csv"), os.path.join(root, "wavs")
    if not (os.path.isfile(path) and os.path.isdir(wavs)):
        return {}
    audio_files = {os.path.splitext(os.path.basename(each))[0]: each for each in _audio_below(root, ["wavs"])}
    entries: dict[str, list[Entry]] = {}
    for number, line in enumerate(text_folder.lines(path), 1):
        cells = [cell.strip() for cell in line.split("|")]
        if not any(cells):
            continue
        if len(cells) not in (2, 3) or not cells[0]:
            reason = f"line {number} has {len(cells)} columns; expected an id, its text, its normalized text, by |"
            entry = Entry(path, "", "", "", "malformed", reason)
        else:
            name = os.path.splitext(cells[0])[0] if cells[0].lower().endswith(EXTENSIONS) else cells[0]
            audio = audio_files.get(os.path.basename(name), os.path.join(wavs, f"{name}.wav"))
            entry = _checked(Entry(audio, cells[-1] or cells[1], "", name))
        hashed = splitting.fraction(entry.text)
        entries.setdefault(next(split for split, end in LJSPEECH_SPLITS.items() if hashed < end), []).append(entry)
    return entries


def _unnamed_by_chapters(root: str, split: str, entries: list[Entry]) -> list[Entry]:
    """Audio files of chapters of LibriSpeech that have no transcript."""
    folders = [name for name in os.listdir(root) if re.sub(r"\W", "_", name) == split]
    known = {os.path.dirname(entry.path) for entry in entries}
    return [_without_text(path) for path in _audio_below(root, folders) if os.path.dirname(path) not in known]


def _unnamed_by_tables(root: str, entries: dict[str, list[Entry]]) -> list[Entry]:
    """Audio files in folders that tables name, which no table names."""
    known = {os.path.normpath(entry.path) for members in entries.values() for entry in members}
    tops = {os.path.relpath(os.path.dirname(path), root).split(os.sep)[0] for path in known}
    # A table may name files outside the folder; other files there are none of this data set's business.
    return [_without_text(path) for path in _audio_below(root, sorted(tops - {".."})) if path not in known]


def _without_text(path: str) -> Entry:
    return Entry(path, "", "", "", "no_text", "has no transcript")


def _audio_below(folder: str, roots: list[str]) -> list[str]:
    """Audio files in subfolders `roots` of `folder` and below; the root "." is `folder` itself without subfolders."""
    paths = []
    for root in roots:
        for here, _, names in os.walk(os.path.normpath(os.path.join(folder, root))):
            paths += [os.path.join(here, name) for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS]
            if root == ".":
                break
    return sorted(set(paths))


def _checked(entry: Entry) -> Entry:
    if not os.path.isfile(entry.path):
        return entry._replace(problem="missing", reason="there is no such file")
    return entry if entry.text else entry._replace(problem="empty_text", reason="has no text")
