"""Pictures of a folder, in a folder for each class, as a TFDS data set.

Two layouts are supported:

- `train/<class>/…`, and `test/<class>/…` or `validation/<class>/…` (or valid, val, dev), or both;
- `<class>/…`, the class folders alone.

Without a folder for testing or validation, a share of the pictures is held out as the split `test`. A picture's contents
decide on which side it is: the same for copies of one picture, and for good when others are added. Pictures below a
class folder belong to that class; names that begin with a dot are passed over.

Every picture is decoded once, when the data set is prepared; files that are no whole picture are left out, and `left_out`
lists them. Pictures are stored as their files are, with the size and format that they have (`sigmarep.data.images.files`
decodes them), under a hash of their contents, so that a changed file gives a new data set.
"""

import concurrent.futures
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from sigmarep.data.digests import content_digests
from sigmarep.data.images import files
from sigmarep.data.splitting import HELD_OUT, fraction
from sigmarep.errors import BadInput

SPLITS = {
    **{"train": "train", "test": "test"},
    **{name: "validation" for name in ("validation", "valid", "val", "dev")},
}
REPORT = "left_out.json"
# Pictures in memory while a data set is prepared.
AT_A_TIME = 64
# Files named for each reason.
NAMED = 3
REASONS = {
    "unreadable": "unreadable",
    "too_large": "too large",
    "unknown_suffix": "of an unknown suffix",
    "outside": "in no class folder",
    "empty_class": "class folders without a picture",
}


class Picture(NamedTuple):
    """A file: its `path` relative to the folder, its `label`, the name of its class, and the `digest` of its contents."""

    path: str
    label: str
    digest: str = ""


class Listing(NamedTuple):
    """The files of a folder.

    Attributes:
      splits: pictures by split; by "" if the folder has class folders alone.
      classes: names of the classes in order.
      left_out: lists of files by reason, a key of `REASONS`.
    """

    splits: dict[str, list[Picture]]
    classes: list[str]
    left_out: dict[str, list[str]]


class ImageFolder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the pictures of a folder; see the module docstring."""

    name = "image_folder"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First."}  # noqa: RUF012
    SKIP_REGISTERING = True

    def __init__(self, *, folder: str, held_out: float = HELD_OUT, data_dir: str, **options: Any):
        """Finds and hashes the pictures.

        Args:
          folder: see the module docstring.
          held_out: share of the pictures that becomes the split `test`, if the folder has neither that nor `validation`.
          data_dir: folder of prepared data sets.
          **options: of TFDS's builders.

        Raises:
          BadInput: see `find`; or a file cannot be read.
        """
        self._folder = os.path.abspath(os.path.expanduser(folder)) if folder else ""
        self._listing = find(self._folder, folder)
        self._splits, self._held_out = self._split(data_dir, held_out)
        digest = hashlib.sha256(json.dumps(self._listing.classes).encode())
        for split, pictures in sorted(self._splits.items()):
            for picture in pictures:
                digest.update(json.dumps([split, picture]).encode())
        super().__init__(config=tfds.core.BuilderConfig(name=digest.hexdigest()[:20]), data_dir=data_dir, **options)

    def _split(self, data_dir: str, held_out: float) -> tuple[dict[str, list[Picture]], bool]:
        """Pictures with their digests by split, in the order of the digests; True if some are held out."""
        folders = self._listing.splits
        pictures = [picture for split in folders.values() for picture in split]
        name = hashlib.sha256(os.fsencode(self._folder)).hexdigest()[:20]
        memory = os.path.join(data_dir, self.name, f"contents-{name}.json")
        paths = [os.path.join(self._folder, picture.path) for picture in pictures]
        digests = content_digests(paths, memory)
        for path in paths:
            if path not in digests:
                raise BadInput(f"{path}: cannot be read")
        splits: dict[str, list[Picture]] = {}
        holding_out = bool(held_out) and set(folders) <= {"", "train"}
        for split, listed in folders.items():
            for picture in listed:
                digest = digests[os.path.join(self._folder, picture.path)]
                aside = holding_out and fraction(digest) < held_out
                splits.setdefault("test" if aside else split or "train", []).append(picture._replace(digest=digest))
        # Not by class, so that a slice such as train[:10%] has pictures of all.
        return {split: sorted(each, key=lambda x: (x.digest, x.path)) for split, each in splits.items()}, holding_out

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=self._listing.classes),
                    "file": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        self._failed: dict[str, list[str]] = {}
        return {split: self._generate_examples(split, pictures) for split, pictures in sorted(self._splits.items())}

    def _generate_examples(self, split, pictures):
        number = 0
        for picture, stored in self._whole(pictures):
            yield number, {"image": io.BytesIO(stored), "label": picture.label, "file": printable(picture.path)}
            number += 1
        if not number:
            reasons = "; ".join(itertools.islice(itertools.chain(*self._failed.values()), NAMED))
            raise BadInput(f"config.data.folder = {self._folder!r}: has no picture for the split {split!r}: {reasons}")
        # While TFDS prepares, data_dir is a temporary folder that is renamed when the data set is complete.
        with open(os.path.join(str(self.data_dir), REPORT), "w", encoding="utf-8") as file:
            json.dump(self._failed, file, indent=1, ensure_ascii=False)

    def _whole(self, pictures: list[Picture]) -> Iterator[tuple[Picture, bytes]]:
        """Yields the pictures that can be decoded, with the bytes of their files."""
        waiting = iter(pictures)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            while part := list(itertools.islice(waiting, AT_A_TIME)):
                for picture, (stored, kind, reason) in zip(part, pool.map(self._checked, part), strict=True):
                    if kind:
                        self._failed.setdefault(kind, []).append(f"{printable(picture.path)}: {reason}")
                    else:
                        yield picture, stored

    def _checked(self, picture: Picture) -> tuple[bytes, str, str]:
        """The bytes of a file; the reason for which it cannot be used, a key of `REASONS`, and in words; "" if it can."""
        path = os.path.join(self._folder, picture.path)
        try:
            stored = files.contents(path)
        except files.TooLarge as error:
            return b"", "too_large", str(error)
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
        if hashlib.sha256(stored).hexdigest() != picture.digest:
            raise BadInput(f"{path}: has changed since the start of this command; start it again")
        try:
            files.decode(stored)
        except files.TooLarge as error:
            return stored, "too_large", str(error)
        except files.PictureError as error:
            return stored, "unreadable", str(error)
        return stored, "", ""

    def left_out(self) -> dict[str, list[str]]:
        """Files of the folder that are not part of the prepared data set, by reason, a key of `REASONS`."""
        with open(os.path.join(str(self.data_dir), REPORT), encoding="utf-8") as file:
            reasons = json.load(file)
        return {
            kind: [*self._listing.left_out.get(kind, ()), *reasons.get(kind, ())]
            for kind in REASONS
            if kind in self._listing.left_out or kind in reasons
        }

    def summary(self) -> str:
        """One line: pictures of each split, and what was left out and why."""
        counts = ", ".join(f"{split} {details.num_examples}" for split, details in self.info.splits.items())
        line = f"{printable(self._folder)}: {len(self._listing.classes)} classes; pictures: {counts}"
        if self._held_out:
            line += " (held out by their contents)"
        reasons = []
        for kind, names in self.left_out().items():
            more = ", …" if len(names) > NAMED else ""
            reasons.append(f"{len(names)} {REASONS[kind]} ({', '.join(names[:NAMED])}{more})")
        return f"{line}; left out: {'; '.join(reasons) or 'nothing'}"


def find(folder: str, given: str) -> Listing:
    """Finds the pictures of a folder.

    Args:
      folder: absolute path.
      given: as the user wrote it, for messages.

    Raises:
      BadInput: there is no such folder, it has neither layout or a mixture of both, a split has two folders, or a class of
        another split is none of train.
    """
    if not folder or not os.path.isdir(folder):
        raise BadInput(f"config.data.folder = {given!r}: there is no such folder")
    names, loose = _entries(folder)
    roots = {name: SPLITS[name.lower()] for name in names if name.lower() in SPLITS and _entries(_in(folder, name))[0]}
    if roots:
        _check_roots(given, names, roots)
    left_out: dict[str, list[str]] = {}
    splits: dict[str, list[Picture]] = {}
    classes: dict[str, set[str]] = {}
    for name, split in (roots or {"": ""}).items():
        splits[split] = list(_pictures(folder, name, left_out))
        classes[split] = {picture.label for picture in splits[split]}
    for name in loose if roots else ():
        _sort_out(name, left_out)
    _check_classes(given, classes)
    return Listing(splits, sorted(set().union(*classes.values())), left_out)


def _check_roots(given: str, names: list[str], roots: dict[str, str]) -> None:
    """Checks the folders `names`, of which `roots` are those of splits."""
    for name in names:
        if name not in roots:
            problem = "which has no class folders" if name.lower() in SPLITS else "which is no split"
            raise BadInput(
                f"config.data.folder = {given!r}: has {next(iter(roots))}/ and {name}/, {problem}; expected folders of "
                "splits, such as train/ and test/, or folders of classes alone"
            )
    for split in roots.values():
        several = [name for name in roots if roots[name] == split]
        if len(several) > 1:
            raise BadInput(
                f"config.data.folder = {given!r}: has several folders of the split {split}: {', '.join(several)}; keep one"
            )


def _check_classes(given: str, classes: dict[str, set[str]]) -> None:
    every = set().union(*classes.values())
    if not every or {label.lower() for label in every} <= set(SPLITS):
        problem = (
            f"has {'/, '.join(sorted(every))}/ without class folders" if every else "has no picture in a class folder"
        )
        raise BadInput(
            f"config.data.folder = {given!r}: {problem}; expected train/CLASS/PICTURE and test/CLASS/PICTURE, or "
            f"CLASS/PICTURE ({', '.join(files.EXTENSIONS)})"
        )
    for split, own in classes.items():
        if unknown := sorted(own - classes.get("train", own)):
            raise BadInput(f"config.data.folder = {given!r}: {unknown[0]!r} in {split} is no class of train")
    for label in every:
        if label != label.strip() or not label.isprintable():
            raise BadInput(
                f"config.data.folder = {given!r}: {printable(label)!r} cannot name a class; expected printable characters "
                "without white space at the ends"
            )


def _pictures(folder: str, root: str, left_out: dict[str, list[str]]) -> Iterator[Picture]:
    """Yields the pictures in the class folders of `root`, a folder in `folder`; adds to `left_out` what is none."""
    labels, loose = _entries(_in(folder, root))
    for name in loose:
        _sort_out(_in(root, name), left_out)
    for label in labels:
        pictures = []
        for path in _below(folder, _in(root, label)):
            if not _is_picture(path):
                _sort_out(path, left_out)
            elif not os.path.isfile(_in(folder, path)):
                left_out.setdefault("unreadable", []).append(f"{printable(path)}: leads to no file")
            else:
                pictures.append(path)
        if not pictures:
            left_out.setdefault("empty_class", []).append(printable(_in(root, label)))
        for path in pictures:
            yield Picture(path, label)


def _below(folder: str, top: str) -> Iterator[str]:
    """Yields the files in and below a folder `top` of `folder`, in order, relative to `folder`."""
    names, loose = _entries(_in(folder, top))
    yield from (_in(top, name) for name in loose)
    for name in names:
        inside, here = os.path.realpath(_in(folder, top, name)), os.path.realpath(_in(folder, top))
        # A link to a folder above would be followed without end.
        if not f"{here}{os.sep}".startswith(f"{inside}{os.sep}"):
            yield from _below(folder, _in(top, name))


def _entries(folder: str) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder, each in order, without those that begin with a dot."""
    try:
        with os.scandir(folder) as entries:
            listed = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise BadInput(f"{folder}: cannot be read ({error.strerror})") from error
    return sorted(name for name, is_dir in listed if is_dir), sorted(name for name, is_dir in listed if not is_dir)


def _is_picture(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in files.EXTENSIONS


def _sort_out(path: str, left_out: dict[str, list[str]]) -> None:
    kind = "outside" if _is_picture(path) else "unknown_suffix"
    left_out.setdefault(kind, []).append(printable(path))


def _in(*parts: str) -> str:
    return os.path.join(*(part for part in parts if part))


def printable(path: str) -> str:
    """A path in which bytes that are no UTF-8, and characters that do not print, are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
