"""What the terminal shows: stages with progress bars, notes, tables, paths.

A terminal gets live bars (rich, imported only when a `Display` is built, so that `opsd --help`
stays fast). Anything else, such as a pipe, a log file or CI, gets plain lines: one when a stage
starts, one when it ends, and in between at most one every ten seconds and at least one every
thirty, even if the work reports nothing.
"""

# ruff: noqa: RUF001 - the dashes and minus signs are intended: people read them

import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from opsd.common.format import duration, labelled, number, shown, size

PLAIN_INTERVAL = 10.0  # seconds between two progress lines of a stage on a pipe
LONGEST_SILENCE = 22.0  # seconds without a line on a pipe, checked every BEAT seconds
BEAT = 5.0
MAX_WIDTH = 100  # columns of a progress row; a longer bar is no easier to read


class Stage:
    """A piece of work whose progress is shown; a context manager, made by `Display.stage`."""

    def __init__(self, display: "Display", title: str, total: int | None, unit: str):
        self.title, self.total, self.unit = shown(title), total, shown(unit)
        self.completed = 0
        self.fields: dict[str, object] = {}
        self.most_tokens = 0  # upper bound on tokens: allows an ETA before the first unit is done
        self._phase: tuple[str, float, int] | None = None  # name, start time, tokens so far
        self._display = display
        self._begun = self._reported = self._spoken = time.monotonic()
        self._eta_from = self._begun, 0  # the speed counts from here: (time, units done by then)
        self._counting = False

    def advance(self, n: int = 1, **fields: Any) -> None:
        """Count `n` more units as done; show `fields` (such as `divergence=0.2`) beside the bar."""
        self._counting = True
        self.update(completed=self.completed + n, **fields)

    def update(
        self, completed: int | None = None, total: int | None = None, **fields: object
    ) -> None:
        """Set the number of units done, the total, or fields.

        The first `update(completed=…)` may set where a resumed run starts: the ETA counts from it.
        """
        if total is not None:
            self.total = total
        if completed is not None:
            self._reported = time.monotonic()
            self.completed = completed
            if not self._counting:
                self._eta_from = self._reported, completed
                self._counting = True
        self.fields.update(fields)
        self._display._report(self)

    def phase(self, name: str) -> None:
        """Start a phase, such as "sampling": its time and tokens are shown."""
        self._phase = name, time.monotonic(), 0
        self._display._report(self)

    def tokens(self, count: int) -> None:
        """Add `count` tokens to the current phase."""
        name, begun, before = self._phase or ("tokens", time.monotonic(), 0)
        self._phase = name, begun, before + count
        self._display._report(self)

    def count(self, units: int, tokens: int) -> None:
        """Add a sampler's progress: units done, and tokens."""
        self.tokens(tokens)
        if units:
            self.advance(units)

    @property
    def elapsed(self) -> float:
        """Seconds since the stage was entered."""
        return time.monotonic() - self._begun

    @property
    def remaining(self) -> float | None:
        """Seconds left at the mean speed (at first: at most, by the token rate); None: unknown."""
        since, before = self._eta_from
        done = self.completed - before
        if done <= 0 and self._phase and self._phase[2] and self.most_tokens:
            _, begun, tokens = self._phase
            seconds = time.monotonic() - begun
            return max(self.most_tokens / tokens - 1, 0.0) * seconds
        if not self.total or done <= 0:
            return None
        per_unit = (self._reported - since) / done
        left = (self.total - self.completed) * per_unit - (time.monotonic() - self._reported)
        return max(left, 0.0) if left > 0 or self.completed >= self.total else None

    def progress(self) -> str:
        """Units done and the total: "12/24", "41 MB of 93 MB"; empty when nothing is counted."""
        if self.unit == "bytes":
            done = size(self.completed)
            return f"{done} of {size(self.total)}" if self.total else done
        unit = f" {self.unit}" if self.unit else ""
        if self.total:
            return f"{number(self.completed)}/{number(self.total)}{unit}"
        return f"{number(self.completed)}{unit}" if self.completed else ""

    def measured(self) -> list[str]:
        """Each field as text with its unit."""
        return [shown(labelled(name, value)) for name, value in self.fields.items()]

    def busy(self) -> list[str]:
        """The phase and its time; its tokens and their rate."""
        if self._phase is None:
            return []
        name, begun, tokens = self._phase
        seconds = time.monotonic() - begun
        rate = [labelled("tokens_per_second", tokens / seconds)] if tokens and seconds > 0 else []
        counted = [f"{number(tokens)} tokens", *rate] if tokens else []
        return [name if name == "tokens" else f"{name} {duration(seconds)}", *counted]

    def __enter__(self) -> "Stage":
        self._begun = self._reported = self._spoken = time.monotonic()
        self._eta_from = self._begun, 0
        self._display._enter(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._display._leave(self, kind)


class Display:
    """Shows progress. quiet: show nothing. file: where to write (default: standard output)."""

    def __init__(self, *, quiet: bool = False, file: IO[str] | None = None):
        self.quiet = quiet
        self._file = file or sys.stdout
        self._stages: list[Stage] = []
        self._spoken = time.monotonic()  # time of the last line on a pipe
        self._beats: threading.Thread | None = None
        self._lock = threading.RLock()
        self._live: Any = None
        self._console: Any = None  # rich's, for a terminal; None for a pipe
        if not quiet:
            from rich.console import Console
            from rich.spinner import Spinner

            console = Console(file=file, highlight=False, markup=False, emoji=False)
            if console.is_terminal and not console.is_dumb_terminal:
                self._console = console
                self._spinner = Spinner("dots", style="cyan")

    def stage(self, title: str, total: int | None = None, unit: str = "") -> Stage:
        """Make a stage, to be entered by `with`; stages may be nested.

        total: the number of units, if known: then there is a bar and an ETA. unit: the name of
        what is counted ("problems"); "bytes" are shown as MB.
        """
        return Stage(self, title, total, unit)

    def note(self, text: str) -> None:
        """Print one or several lines that stay."""
        for line in (self._indent() + text).split("\n"):
            self._line(line)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table that stays; columns of numbers are aligned to the right."""
        columns, *rows = ([shown(cell) for cell in row] for row in (columns, *rows))
        columns_of = [*zip(columns, *rows, strict=True)]
        least = sum(3 + max(map(len, " ".join(column).split()), default=0) for column in columns_of)
        if self._console and least > self._console.width and len(rows) < len(columns):
            columns, *rows = map(list, columns_of)  # too wide: on its side
        right = [bool(rows) and all(_numeric(row[i]) for row in rows) for i in range(len(columns))]
        if self._console:
            self._console.print()
        self._line((title, "bold"))
        if self._console:
            from rich import box
            from rich.table import Table
            from rich.text import Text

            table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
            for column, is_right in zip(columns, right, strict=True):
                table.add_column(
                    Text(column), justify="right" if is_right else "left", overflow="fold"
                )
            for row in rows:
                table.add_row(*(Text(cell) for cell in row))
            self._console.print(table)
            return
        cells = [list(columns), *map(list, rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        for row in cells:
            aligned = (
                cell.rjust(width) if is_right else cell.ljust(width)
                for cell, width, is_right in zip(row, widths, right, strict=True)
            )
            self._line("  " + "  ".join(aligned).rstrip())

    def paths(self, title: str, paths: Mapping[str, Path]) -> None:
        """Show where files were written, as links if the terminal can open links."""
        width = max(map(len, paths), default=0)
        self._line((title, "bold"))
        for name, path in paths.items():
            link: Any = ""
            path, here = Path(path).resolve(), Path.cwd()
            if self._console:
                from rich.style import Style

                link = Style(color="cyan", link=path.as_uri())
            shown = str(path.relative_to(here) if path.is_relative_to(here) else path)
            self._line(f"  {name.ljust(width)}  ", (shown, link))

    # Called by stages

    def _enter(self, stage: Stage) -> None:
        self._stages.append(stage)
        if self._console and self._live is None:
            from rich.live import Live

            # transient: the bar disappears when its stage ends, and one line with the result stays
            self._live = Live(
                console=self._console,
                get_renderable=self._bars,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()
        elif not self._console:
            self._line(f"{self._indent(1)}{stage.title} …")
            if not self.quiet and (self._beats is None or not self._beats.is_alive()):
                self._beats = threading.Thread(target=_beat, args=(weakref.ref(self),), daemon=True)
                self._beats.start()

    def _report(self, stage: Stage) -> None:
        if self.quiet or self._console or time.monotonic() - stage._spoken < PLAIN_INTERVAL:
            return
        self._say(stage)

    def _say(self, stage: Stage) -> None:
        stage._spoken = time.monotonic()
        left = stage.remaining
        most = "at most " if stage.most_tokens and not stage.completed else ""
        time_text = f"{most}{duration(left or 0)} left"
        time_text = time_text if left is not None else f"{duration(stage.elapsed)} so far"
        said = [*filter(None, [stage.progress(), time_text]), *stage.busy(), *stage.measured()]
        self._line(f"{self._indent(1)}{stage.title}: {', '.join(said)}")

    def _break_silence(self) -> bool:
        """Report the innermost stage if a pipe has been silent for long; False: no stage runs."""
        with self._lock:
            if self._stages and time.monotonic() - self._spoken >= LONGEST_SILENCE:
                self._say(self._stages[-1])
            return bool(self._stages)

    def _leave(self, stage: Stage, kind: type[BaseException] | None) -> None:
        indent = self._indent(1)
        with self._lock:
            self._stages.remove(stage)
        took = duration(stage.elapsed)
        if self._live and not self._stages:
            self._live.stop()  # before the line below, so that nothing is drawn over it
            self._live = None
        if kind is None:
            mark, style, end = "✓", "green", took
        elif issubclass(kind, KeyboardInterrupt):
            mark, style, end = "■", "yellow", f"interrupted after {took}"
        else:
            mark, style, end = "✗", "red", f"failed after {took}"
        result = [end, *stage.measured()]
        if self._console:
            bold = stage.title, "bold"
            self._line(indent, (mark, style), " ", bold, "  ", " · ".join(result))
        else:
            done = "done in " if kind is None else ""
            self._line(f"{indent}{stage.title}: {done}{', '.join(result)}")

    # Drawing

    def _indent(self, inside: int = 0) -> str:
        return "  " * max(len(self._stages) - inside, 0)

    def _bars(self):
        """The live region: a row for each open stage, and the fields of the innermost one."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        assert self._console is not None
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.width = min(self._console.width, MAX_WIDTH)
        grid.add_column(no_wrap=True, overflow="ellipsis", width=1)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        grid.add_column(ratio=1, min_width=4)
        grid.add_column(no_wrap=True, justify="right")
        grid.add_column(no_wrap=True, justify="right")
        stages = list(self._stages)
        for stage in stages:
            left = stage.remaining
            bar = ProgressBar(stage.total, min(stage.completed, stage.total)) if stage.total else ""
            time_text = f"{duration(stage.elapsed)}" if left is None else f"{duration(left)} left"
            spinner = self._spinner if stage is stages[-1] else ""
            grid.add_row(spinner, Text(stage.title), bar, stage.progress(), Text(time_text, "dim"))
        lines = [grid]
        if stages and (said := stages[-1].busy() + stages[-1].measured()):
            measured = "  " + " · ".join(said)
            lines.append(Text(measured, "dim", no_wrap=True, overflow="ellipsis"))
        return Group(*lines)

    def _line(self, *parts: str | tuple[str, Any]) -> None:
        """Print a line of parts: text, or (text, style). Control characters are escaped; a pipe
        gets the line at once, with `?` for characters that its encoding lacks."""
        styled = [(part, "") if isinstance(part, str) else part for part in parts]
        styled = [(shown(text), style) for text, style in styled]
        if self._console:
            from rich.padding import Padding
            from rich.text import Text

            line = Text.assemble(*styled)
            inside, words = len(line.plain) - len(line.plain.lstrip(" ")), line.plain.split()
            # Lines end between words; but not in overrides to paste, nor in a path.
            whole = all("=" in word for word in words) or max(map(len, words)) >= MAX_WIDTH // 2
            row = line if whole else Padding.indent(line[inside:], inside)
            self._console.print(row, soft_wrap=whole)
        elif not self.quiet:
            text = "".join(text for text, _ in styled)
            self._spoken = time.monotonic()
            encoding = getattr(self._file, "encoding", None) or "utf-8"
            with self._lock:
                self._file.write(text.encode(encoding, "replace").decode(encoding) + "\n")
                self._file.flush()


def _beat(display: weakref.ref[Display]) -> None:
    """Call a display's `_break_silence` every BEAT seconds until no stage is open."""
    while True:
        time.sleep(BEAT)
        alive = display()
        if alive is None or not alive._break_silence():
            return
        del alive


def _numeric(cell: str) -> bool:
    """Whether a cell holds a number, or a dash for a missing one."""
    text = cell.strip()
    return text in {"", "-", "–", "—"} or text.lstrip("+-−±~≈.<> ")[:1].isdigit()
