"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere; train.log keeps what was said."""

import datetime
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from flywheel_fast.errors import Failure


class Screen:
    """Without a log file it says nothing: one of several processes speaks for all."""

    def __init__(self, log_file: Path | None):
        self.console = Console(highlight=False, soft_wrap=True)
        self.log_file = log_file

    def say(self, text: str, style: str = "") -> None:
        """A line on the screen and, with the time, in train.log."""
        if self.log_file is None:
            return
        self.console.print(text, style=style, markup=False)
        self._log(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}", style="yellow")

    @contextmanager
    def progress(self, total_images: int, done_images: int):
        """Yields a function that takes a number of images; the bar shows on terminals only."""
        columns = [TextColumn("{task.description}"), BarColumn(), _Rate(), TimeElapsedColumn(), TimeRemainingColumn()]
        hidden = self.log_file is None or not self.console.is_terminal
        with Progress(*columns, console=self.console, disable=hidden, transient=True) as bar:
            task = bar.add_task("training", total=total_images, completed=done_images, start_at=done_images)
            yield lambda images: bar.advance(task, images)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold")
        table.add_column()
        for name, value in rows:
            table.add_row(Text(name), Text(value))
        self.console.print(table)
        self._log("".join(f"{name:<32} {value}\n" for name, value in rows))

    def _log(self, lines: str) -> None:
        try:
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise Failure(f"{self.log_file}: cannot be written ({error.strerror})") from error


class _Rate(ProgressColumn):
    def render(self, task) -> Text:
        done = task.completed - task.fields["start_at"]
        return Text(f"{done / task.elapsed:,.0f} images/s" if task.elapsed and done else "")
