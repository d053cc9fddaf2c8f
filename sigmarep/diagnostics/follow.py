"""Runs that are followed while they go on: what is new is read, and what has changed is judged, drawn and told anew."""

import os
from collections.abc import Sequence

from sigmarep.diagnostics import page, runs
from sigmarep.diagnostics.composition import Drawn, Judged, compose, draw, is_judged, judge, select
from sigmarep.diagnostics.figures import Figure
from sigmarep.diagnostics.page import Body, Content
from sigmarep.diagnostics.runs import Place, Run
from sigmarep.errors import BadInput
from sigmarep.sweep_execution import RECORD
from sigmarep.training.metrics import FILE

# All files of a run that are read, and that tell whether it has changed.
FILES = (FILE, runs.CONFIG, "environment.json", "diagnosis.json", "stopped.json", "log.txt")

# Of the files of a run: changes when one of them does.
Signature = tuple[object, ...]


class _Followed:
    """A run that is followed. Of a run that is not drawn, only the metrics that judge it are held."""

    def __init__(self, place: Place):
        self.place = place
        self.paths = [os.path.join(place.folder, name) for name in FILES]
        self.signature: Signature | None = None
        self.metrics = runs.metrics_file(place, is_judged)
        self.whole = False
        self.judged: Judged
        self.drawn: Drawn | None = None
        # The number of runs that were drawn together when this one was, which share the page's size.
        self.among = 0

    def read(self) -> Run:
        try:
            return runs.read(self.place, self.metrics)
        except Exception as error:
            # Files may be anybody's: a run that breaks the page costs its own row alone.
            return runs.unreadable(self.place, error)

    def judge(self) -> None:
        self.judged, self.drawn = judge(self.read()), None

    def draw(self, most: int) -> Drawn:
        if not self.whole:
            # What was left out has to be read, once.
            self.metrics, self.whole = runs.metrics_file(self.place), True
            self.drawn = None
        if self.drawn is None or self.among != most:
            self.drawn, self.among = draw(self.read(), self.judged.facts, most=most), most
        return self.drawn

    def narrow(self) -> None:
        """Lets go of what only a drawn run needs."""
        if self.whole:
            self.metrics.narrow(is_judged)
            self.whole, self.drawn = False, None


class Follower:
    """The page of the runs in some folders, brought up to date by `update`. It only reads, and takes no lock.

    A run, or a file of one, that a symbolic link takes out of the folders is not read.

    Args:
      folders: runs, sweeps, or folders of runs; they may still be empty.
      most: largest number of runs that are drawn one by one.

    Attributes:
      version: number of the page's present state.
      body: its text and its plots.

    Raises:
      BadInput: a folder does not exist.
    """

    def __init__(self, folders: Sequence[str], *, most: int):
        if missing := [folder for folder in folders if not os.path.isdir(folder)]:
            raise BadInput(f"{missing[0]}: there is no such folder")
        if not folders:
            raise BadInput("no folder was given: name that of a run, a sweep or several runs")
        self._folders, self._most = folders, most
        self._roots = [os.path.realpath(folder) for folder in folders]
        self._runs: dict[str, _Followed] = {}
        self._state: object = None
        # Of each plot: the version at which it became what it is, and what that is.
        self._changed: dict[str, tuple[int, Figure]] = {}
        self.version = 0
        self.body: Body

    def update(self) -> bool:
        """Reads what is new; False if nothing is."""
        places, notes = self._places()
        followed: dict[str, _Followed] = {}
        changed = False
        for place in places:
            known = self._runs.get(place.folder)
            if known is None or known.place != place:
                known = _Followed(place)
            # A process that dies changes no file.
            signature = (*map(_status, known.paths), runs.process(place.folder))
            if signature != known.signature:
                if outside := [path for path in known.paths if not self._is_inside(path)]:
                    notes.append(
                        f"{place.folder}: {os.path.basename(outside[0])} leads out of the folder; this run is not read."
                    )
                    continue
                known.judge()
                known.signature, changed = signature, True
            followed[place.folder] = known
        state = (tuple(notes), tuple(followed))
        if not changed and state == self._state:
            return False
        self._runs, self._state = followed, state
        self.version += 1
        self._show(notes)
        return True

    def _places(self) -> tuple[list[Place], list[str]]:
        """Places of the runs inside the folders, and notes for the reader."""
        if outside := [folder for folder in self._folders if not self._is_inside(os.path.join(folder, RECORD))]:
            return [], [f"{outside[0]}: {RECORD} leads out of the folder, which is not read."]
        try:
            places, notes = runs.find(self._folders)
        except BadInput:
            return [], ["No run is here yet; the page shows it when it begins."]
        # A run is at most one step below a folder that was named: only a link leads elsewhere.
        inside = [each for each in places if not os.path.islink(each.folder) or self._is_inside(each.folder)]
        if left_out := len(places) - len(inside):
            notes.append(f"{left_out} runs are links out of the folder, and are not read.")
        return inside, notes

    def _is_inside(self, path: str) -> bool:
        real = os.path.realpath(path)
        return any(real == root or real.startswith(os.path.join(root, "")) for root in self._roots)

    def _show(self, notes: Sequence[str]) -> None:
        following = list(self._runs.values())
        judged = [each.judged for each in following]
        chosen = select(judged, self._most) or ([0] if len(judged) == 1 else [])
        for i, each in enumerate(following):
            if i not in chosen:
                each.narrow()
        drawn = {i: following[i].draw(len(chosen)) for i in chosen}
        content = compose(judged, drawn, notes) if judged else Content([], [], [], [], list(notes), [], [], [])
        self.body = page.body(content)
        before = self._changed
        self._changed = {}
        for figure in self.body.figures:
            version, known = before.get(figure.key, (0, None))
            self._changed[figure.key] = (version, figure) if figure == known else (self.version, figure)

    def data(self, since: int) -> str:
        """The page's plots as JSON; those that a browser with version `since` has are named only."""
        plots = []
        for figure in self.body.figures:
            version, _ = self._changed[figure.key]
            plots.append(f'{{"same":"{figure.key}"}}' if version <= since else figure.data)
        return f'{{"version":{self.version},"panels":[{",".join(plots)}]}}'


def _status(path: str) -> tuple[int, ...]:
    """Changes when the file does."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
