"""The screen: bars that are drawn again and again, lines that stay. The only door to rich.

On a terminal the bars stand below the text. The cursor rests on an empty line *above* them, so
text from anywhere (a library in C, a subprocess, a prompt) falls on that line and not into a bar,
a terminal that is resized is put right by the next drawing, and there is no state of the terminal
to restore. Nothing here runs on a thread of its own.
"""

from __future__ import annotations

import builtins
import contextlib
import logging
import os
import re
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Mapping
from typing import IO, TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_SHORTEST_BAR, _LONGEST_BAR = 8, 30


class Line:
    """One bar as words, the same for every kind of screen."""

    def __init__(
        self, label: str, done: int, total: int | None, rate: float, metrics: Iterable[str] = ()
    ) -> None:
        self.label = f"{label:<10}"
        self.share = min(done / total, 1.0) if total else None
        self.parts = [count(done, total)]
        if rate > 0:
            speed = f"{rate:.1f} it/s" if rate >= 1 else f"{1 / rate:.1f} s/it"
            self.parts.append(f"{speed:>10}")
        if rate > 0 and total:
            self.parts.append(f"{clock((total - done) / rate):>5} left")
        self.parts += metrics

    def plain(self) -> str:
        """The line without a bar."""
        return "  ".join(part.strip() for part in (self.label, *self.parts))

    def words(self, width: int) -> tuple[str, int]:
        """Returns the parts that fit into ``width`` columns beside a bar, and the bar's columns."""
        room = width - len(self.label) - 1 - _SHORTEST_BAR
        words = ""
        for part in self.parts:
            if len(part) + 2 > room:
                break
            room -= len(part) + 2
            words += f"  {part}"
        return words, min(_SHORTEST_BAR + max(room, 0), _LONGEST_BAR)


def with_bars(lines: list[Line], width: int, console: Console) -> list[Text]:
    """Returns the lines with bars of one length, at most ``width`` columns wide."""
    from rich.text import Text

    words = [line.words(width) for line in lines]
    columns = min(bar for _, bar in words)
    plain = console.options.ascii_only
    full = "#" if plain else "━"
    rest = full if console.color_system and not console.no_color and not plain else "."
    texts = []
    for line, (after, _) in zip(lines, words, strict=True):
        first, last = 0, round(columns * (line.share or 0))
        if line.share is None:  # of unknown length: a short piece that wanders
            first = int(time.perf_counter() * 8) % (columns - 3)
            last = first + 4
        text = Text(f"{line.label} ", no_wrap=True, overflow="crop")
        text.append(rest * first, "bar.back").append(full * (last - first), "bar.complete")
        texts.append(text.append(rest * (columns - last), "bar.back").append(after))
    return texts


class Table:
    """The lines left behind: a header, a row per epoch, and columns that keep their places."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._titles: list[str] = []  # of the last header
        self._widths: dict[str, int] = {}  # what the columns have needed so far

    def lines(
        self,
        position: str,
        row: Mapping[str, float],
        took: float,
        waited: float,
        width: int,
        *,
        speed: float | None = None,
        memory: int | None = None,
    ) -> list[str]:
        """Returns the row, after a header where there is none yet or the columns changed.

        Args:
            position: Which epoch it is.
            row: Its metrics.
            took: Its seconds.
            waited: The share of them that was spent waiting for data.
            width: Columns of the screen.
            speed: Samples per second; None where unknown.
            memory: Bytes in use; None where unknown.
        """
        known = dict.fromkeys([*self._names, *row])
        self._names = [name for name in known if name not in ("epoch", "step", "time")]
        self._names.sort(key=lambda name: ("train_loss", "val_loss", name).index(name))
        texts = {"epoch": position}
        texts |= {n: f"{number(row[n]) if n in row else '-':>8}" for n in self._names}
        texts |= {"time": f"{duration(took):>5}", "data wait": f"{waited:.0%}"}
        if speed is not None:
            texts["samples/s"] = large(speed)
        if memory is not None:
            texts["memory"] = size_of(memory)
        for title, text in texts.items():
            self._widths[title] = max(self._widths.get(title, len(title)), len(text))
        cells = [(title, text, self._widths[title]) for title, text in texts.items()]
        cut: list[str] = []
        while sum(size + 2 for _, _, size in cells) - 2 > width and len(cells) > 2:
            # On a narrow screen first what comes after the time goes, then the last metrics.
            if cells[-1][0] != "time":
                cells.pop()
            else:
                cut.insert(0, cells.pop(-2)[0])
        lines = ["  ".join(f"{value:>{size}}" for _, value, size in cells)]
        titles = [title for title, _, _ in cells]
        if titles != self._titles:
            self._titles = titles
            lines.insert(0, "  ".join(f"{title:>{size}}" for title, _, size in cells))
            if cut:
                lines.insert(0, _left_out(cut, width))
        return lines


def _left_out(names: list[str], width: int) -> str:
    """Returns a line that says which columns had no room, in at most ``width`` characters."""
    for shown in range(len(names), 0, -1):
        more = f" and {len(names) - shown} more" if shown < len(names) else ""
        text = f"(too narrow for {', '.join(names[:shown])}{more})"
        if len(text) <= width:
            return text
    return f"(too narrow for {len(names)} columns)"[:width]


class Plain:
    """A pipe, a file, a dumb terminal: whole lines and nothing else."""

    live = False
    fastest = 0.0  # seconds between drawings, at least

    @property
    def width(self) -> int:
        """Columns that a line may have."""
        return 10_000

    def draw(self, lines: list[Line]) -> None:
        """Shows the bars in place of those shown before."""

    def leave(self, line: str) -> None:
        """Writes a line that stays."""
        # A reader that has gone (a closed pipe, a lost terminal) must not end a training.
        with contextlib.suppress(OSError):
            if sys.stdout is not None:
                sys.stdout.write(line + "\n")
                sys.stdout.flush()

    def close(self) -> None:
        """Takes the bars away."""


class Notebook(Plain):
    """One output area that is replaced; lines go below it, into the output of the cell."""

    live = True
    fastest = 0.5
    _area: Any = None

    def draw(self, lines: list[Line]) -> None:
        """Replaces what the area shows."""
        texts = with_bars(lines, 100, _console())
        self._show({"text/plain": "\n".join(text.plain for text in texts)})

    def close(self) -> None:
        """Empties the area."""
        if self._area is not None:
            self._show({"text/plain": ""})

    def _show(self, content: dict[str, str]) -> None:
        from IPython.display import display

        if self._area is None:
            self._area = display(content, raw=True, display_id=True)
        else:
            self._area.update(content, raw=True)


class Terminal(Plain):
    """Bars below the cursor; everything written meanwhile goes above them."""

    live = True
    _active: ClassVar[Terminal | None] = None  # only one can own the screen

    def __init__(self, console: Console) -> None:
        self._console = console
        self._out: IO[str] = console.file
        self._bars = ""  # what draws them, from the cursor's line and back to it
        self._visible = False
        self._open_line = False  # text without a line break stands before the cursor
        self._lock = threading.RLock()  # any thread may print
        self._pid = os.getpid()
        self._restore = contextlib.ExitStack()

    @property
    def width(self) -> int:
        """Columns of the terminal now; it may be resized at any time."""
        return self._console.width

    def draw(self, lines: list[Line]) -> None:
        """Draws the bars over the old ones, in one write."""
        # A line as wide as the terminal would wrap.
        drawn = [self._paint(text) for text in with_bars(lines, self.width - 1, self._console)]
        with self._lock, contextlib.suppress(OSError):
            self._take_streams()
            self._bars = "\r\x1b[K\n" + "\x1b[K\n".join(drawn) + f"\x1b[J\x1b[{len(drawn)}A\r"
            if not self._open_line:
                self._visible = True  # before it is: a second Ctrl-C may come in between
                self._put(self._bars)

    def leave(self, line: str) -> None:
        """Writes a line in place of the bars; they come back with the next drawing."""
        with self._lock, contextlib.suppress(OSError):
            self._hide()
            self._bars = ""
            self._put(f"\n{line}\n" if self._open_line else f"{line}\n")
            self._open_line = False

    def close(self) -> None:
        """Takes the bars away and gives the streams back, until the next drawing."""
        with self._lock, contextlib.suppress(OSError):
            if Terminal._active is self:
                Terminal._active = None
            self._restore.close()
            self._bars, self._open_line = "", False
            self._hide()

    def pass_on(self, stream: IO[str], text: str) -> int:
        """Writes text of others above the bars. They are away while a line is unfinished."""
        # A forked worker knows nothing of the screen.
        if Terminal._active is not self or os.getpid() != self._pid or not text:
            return stream.write(text)
        with self._lock:
            self._hide()
            written = stream.write(text)
            self._open_line = text[-1] not in "\r\n"
            if self._bars and not self._open_line:
                stream.flush()
                self._visible = True
                self._put(self._bars)
        return written

    def _hide(self) -> None:
        if self._visible:
            self._visible = False
            self._put("\r\x1b[J")

    def _put(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    def _paint(self, text: Text) -> str:
        with self._console.capture() as captured:
            self._console.print(text, end="", crop=True)
        return captured.get()

    def _take_streams(self) -> None:
        if Terminal._active is self:
            return
        if Terminal._active is not None:
            Terminal._active.close()
        Terminal._active = self
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and stream.isatty():
                above = _Above(self, stream)
                self._replace(sys, name, above)
                for handler in logging.root.handlers:  # they keep the stream that they were given
                    if getattr(handler, "stream", None) is stream:
                        self._replace(handler, "stream", above)

        question = builtins.input

        def ask(*args: Any) -> str:  # input() and the prompt of pdb need the screen for themselves
            self.close()
            return question(*args)

        self._replace(builtins, "input", ask)

    def _replace(self, owner: Any, name: str, new: Any) -> None:
        old = getattr(owner, name)
        setattr(owner, name, new)

        def put_back() -> None:
            if getattr(owner, name) is new:  # else somebody replaced it after us
                setattr(owner, name, old)

        self._restore.callback(put_back)


class _Above:
    """Stands for ``sys.stdout`` or ``sys.stderr`` while bars are drawn."""

    def __init__(self, screen: Terminal, stream: IO[str]) -> None:
        self._screen, self._stream = screen, stream

    def write(self, text: str) -> int:
        return self._screen.pass_on(self._stream, text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def fold(text: str, stream: IO[str], joint: str = "") -> str:
    """Returns text whose long lines go on in the next one of a terminal, broken between words.

    They go on below what follows their label ("error: "). Elsewhere the text stays as it is.

    Args:
        text: One line or more.
        stream: Where it will be written.
        joint: What stands at the end of a line that goes on.
    """
    if not stream.isatty():
        return text
    from rich.console import Console

    width, lines = Console(file=stream).width, []
    for line in text.split("\n"):
        label = re.match(r" *(\w+: +)?", line)
        options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
        options["subsequent_indent"] = " " * (label.end() if label else 0)
        parts = textwrap.wrap(line, width - len(joint), **options) if len(line) > width else [line]
        lines.append(f"{joint}\n".join(parts))
    return "\n".join(lines)


def is_colored(stream: IO[str]) -> bool:
    """Tells whether ``stream`` is a terminal that shows colors and may (NO_COLOR, TERM=dumb)."""
    from rich.console import Console

    console = Console(file=stream)
    return console.is_terminal and bool(console.color_system) and not console.no_color


def _console() -> Console:
    from rich.console import Console

    stream: Any = sys.stdout
    while isinstance(stream, _Above):  # a fit within a fit
        stream = stream._stream
    return Console(file=stream, highlight=False, markup=False, emoji=False)


def find_display() -> Plain:
    """Returns what ``sys.stdout`` allows: a terminal, a notebook, or plain lines."""
    console = _console()
    if console.is_jupyter:
        return Notebook()
    # FORCE_COLOR makes rich see terminals everywhere: the stream itself must say so too.
    terminal = sys.stdout is not None and sys.stdout.isatty() and console.is_terminal
    if terminal and not console.is_dumb_terminal and not console.legacy_windows:
        return Terminal(console)
    return Plain()


def in_notebook() -> bool:
    """Tells whether the output goes to a notebook's cell."""
    return isinstance(find_display(), Notebook)


def count(done: int | str, total: int | None) -> str:
    """Returns "  7/120", as wide as it will ever be."""
    return f"{done:>{len(str(total))}}/{total}" if total else str(done)


def number(value: float) -> str:
    """Returns a metric in at most nine characters."""
    size = abs(value)
    if size >= 1e5 or 0 < size < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4f}" if size < 100 else f"{value:.1f}"


def large(value: float) -> str:
    """Returns "7.2", "950", "12.3k" or "1.2M"."""
    for unit, scale in (("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * scale:
            return f"{value / scale:.1f}{unit}"
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}"


def size_of(size: int) -> str:
    """Returns bytes as "850 MB" or "3.2 GB"."""
    return f"{size / 1e6:.0f} MB" if size < 999.5e6 else f"{size / 1e9:.1f} GB"


def duration(seconds: float) -> str:
    """Returns "1.9s", or "1:02" and "3:00:01" for what is longer than a minute."""
    return f"{seconds:.1f}s" if seconds < 59.95 else clock(seconds)


def brief(seconds: float) -> str:
    """Returns "350 us", "6 ms", "1.2 s" or what `clock` says: two or three figures."""
    for unit, scale in (("us", 1e-6), ("ms", 1e-3)):
        if seconds < 999.5 * scale:
            value = seconds / scale
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 99.95 else clock(seconds)


def clock(seconds: float) -> str:
    """Returns minutes and seconds, with hours where there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
