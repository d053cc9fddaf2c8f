"""Progress of a run on a terminal, and a clock that separates training, evaluation and compilation."""

import collections
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import rich.console
import rich.live
import rich.text

from sigmarep import terminal
from sigmarep.training.callbacks import Callback, Run

MODES = ("auto", "plain", "off")
SECONDS_BETWEEN_PLAIN_LINES = 5.0
# Where nothing else is shown: below five seconds even on a machine whose cores are all busy.
SECONDS_BETWEEN_SIGNS = 4.0
# Steps over which the speed is averaged.
WINDOW = 50


class _Shown:
    """The time of the last line that this process has shown."""

    def __init__(self):
        self.time = time.perf_counter()

    def line(self, text: str) -> None:
        print(text, flush=True)
        self.note()

    def note(self) -> None:
        self.time = time.perf_counter()


_SHOWN = _Shown()


class Clock:
    """Seconds by what they were spent on, over all starts of a run, and the speed of the last steps.

    Time spent compiling, evaluating and saving does not count in the speed.
    """

    def __init__(self):
        self._seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        self._window: collections.deque[tuple[float, float]] = collections.deque(maxlen=WINDOW)

    @contextlib.contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Adds the seconds of its block to `activity`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._seconds[activity] += elapsed

    def step(self, units: float) -> None:
        """Notes a finished step of so many examples, tokens or seconds."""
        self._window.append((units, self._seconds["training"] + self._seconds["data"]))

    @property
    def units_per_second(self) -> float:
        """Speed over the last steps; 0 until there are two."""
        if len(self._window) < 2:
            return 0.0
        seconds = self._window[-1][1] - self._window[0][1]
        return sum(units for units, _ in list(self._window)[1:]) / seconds if seconds > 0 else 0.0

    def state_dict(self) -> dict[str, float]:
        """Seconds by activity."""
        return dict(self._seconds)

    def load_state_dict(self, seconds: dict[str, float]) -> None:
        """Goes on from an earlier start's seconds."""
        self._seconds = collections.defaultdict(float, seconds)


class Progress(Callback):
    """One live line on a terminal; elsewhere a plain line every few seconds; or nothing.

    Args:
      total_steps: of the run.
      mode: one of `MODES`.
      unit: what the speed is a number of.
    """

    def __init__(self, total_steps: int, *, mode: str = "auto", unit: str = "examples"):
        terminal.escape_unencodable()
        self._total = total_steps
        self._mode, self._unit = mode, unit
        self._last_line = -SECONDS_BETWEEN_PLAIN_LINES
        self._first: tuple[int, float] | None = None
        self._live: rich.live.Live | None = None
        if mode == "auto" and sys.stdout.isatty():
            self._live = rich.live.Live(console=rich.console.Console(), refresh_per_second=4)
            self._live.start()

    def on_log(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        self.update(
            step,
            loss=metrics["train/loss"],
            entropy_min=metrics.get("attention/entropy_min"),
            units_per_second=metrics[f"train/{self._unit}_per_second"],
        )

    def on_evaluation(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        words = ", ".join(f"{name.removeprefix('eval/')} {value:.4g}" for name, value in metrics.items())
        self.message(f"step {step}: {words}")

    def on_end(self, run: Run) -> None:
        self.close()

    def update(
        self,
        step: int,
        *,
        loss: float,
        entropy_min: float | None = None,
        units_per_second: float | None = None,
    ) -> None:
        """Shows the state after `step`; `entropy_min` in nats."""
        now = time.perf_counter()
        self._first = self._first or (step, now)
        # Eighty columns have to hold it.
        parts = [f"step {step}/{self._total}", f"loss {loss:.4g}"]
        if entropy_min is not None:
            parts.append(f"lowest entropy {entropy_min:.3g} nats")
        if units_per_second:
            parts.append(f"{units_per_second:,.0f} {self._unit}/s")
        done = step - self._first[0]
        if done:
            parts.append(f"{_duration((now - self._first[1]) / done * (self._total - step))} left")
        line = "  ".join(parts)
        if self._live is not None:
            self._live.update(rich.text.Text(line, no_wrap=True, overflow="ellipsis"))
        elif self._mode != "off" and (now - self._last_line >= SECONDS_BETWEEN_PLAIN_LINES or step == self._total):
            self._last_line = now
            _SHOWN.line(line)

    def waiting(self, text: str) -> contextlib.AbstractContextManager[None]:
        """Says `text`, and for how long by now, while its block takes longer than a few seconds."""
        if self._live is not None:
            live = self._live
            return _repeated(text, lambda line: live.update(rich.text.Text(line, no_wrap=True)), seconds=1.0)
        return waiting(text, mode=self._mode)

    def message(self, text: str) -> None:
        """Shows a line that stays."""
        if self._live is not None:
            self._live.console.print(rich.text.Text(text))
        elif self._mode != "off":
            _SHOWN.line(text)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def announce(text: str, *, mode: str) -> None:
    """Shows a line before there is a run, in the first process alone; see `Progress` for `mode`."""
    if mode != "off" and jax.process_index() == 0:
        terminal.escape_unencodable()
        _SHOWN.line(text)


def waiting(text: str, *, mode: str) -> contextlib.AbstractContextManager[None]:
    """Says `text`, and for how long by now, after every few seconds without a line, in the first process alone."""
    if mode == "off" or jax.process_index() > 0:
        return contextlib.nullcontext()
    return _repeated(text, lambda line: print(line, flush=True), seconds=SECONDS_BETWEEN_SIGNS)


@contextlib.contextmanager
def _repeated(text: str, say: Callable[[str], None], *, seconds: float) -> Iterator[None]:
    start, ended = time.perf_counter(), threading.Event()

    def remaining() -> float:
        # Counted from the last line, whoever showed it: blocks that follow each other are not silent for twice the time.
        # The first second of a block may be all of it.
        return max(_SHOWN.time + seconds, start + 1.0) - time.perf_counter()

    def repeat():
        while not ended.wait(max(remaining(), 0.0)):
            if remaining() <= 0:
                say(f"{text}, {_duration(time.perf_counter() - start)}")
                _SHOWN.note()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds % 60:02d} s" if minutes else f"{seconds} s"
