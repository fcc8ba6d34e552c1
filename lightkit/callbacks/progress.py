"""What a person sees while the trainer works: a bar, and a line left behind for every epoch."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lightkit import screen
from lightkit.errors import HookNameError
from lightkit.hooks import Callback
from lightkit.state import Stage

if TYPE_CHECKING:
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

_NEVER = math.inf


class ProgressBar(Callback):
    """A bar with rate, time left and metrics, and a line left behind for every epoch.

    On a terminal and in a notebook the bar is live. In a pipe, a file or a dumb terminal there is
    the same line per epoch, and inside long epochs one plain line per ``interval``. A validation
    in the middle of an epoch leaves a line of what it logged, with the epochs done as a fraction.
    The loop only compares a clock: between two drawings nothing is rendered, and no tensor is ever
    read. Shows something on rank zero only.

    Args:
        refresh_hz: Drawings per second at most on a terminal (in a notebook: 2).
        interval: Seconds between plain lines where no bar can be drawn.
        refresh_rate: Accepted for ported code: drawings go by the clock, not by batches.
        leave: Accepted for ported code: every epoch leaves its line.
        theme: Accepted for ported code.
    """

    order: ClassVar[int] = 50

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in vars(cls):
            if name == "get_metrics" or (name.startswith("init_") and name.endswith("_tqdm")):
                raise HookNameError(
                    f"{cls.__qualname__}.{name} would never be called: the bar shows what is "
                    f"logged with self.log(..., prog_bar=True). Leave it out."
                )

    def __init__(
        self,
        *,
        refresh_hz: float = 10.0,
        interval: float = 30.0,
        refresh_rate: int | None = None,
        leave: bool = True,
        theme: Any = None,
    ) -> None:
        self.refresh_hz = refresh_hz
        self.interval = interval
        self._display: screen.Plain | None = None  # None: nothing runs, or this is not rank zero
        self._period = 0.0  # seconds between drawings
        self._drawn = -_NEVER  # when the last one was
        self._due = _NEVER  # when the next one may come
        self._in_epoch = False
        self._table = screen.Table()
        self._rate = _Rate()
        self._round: _Round | None = None  # the evaluation that runs
        self._pending: tuple[str, dict[str, float]] | None = None  # row of the last validation

    def on_fit_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Finds out what kind of screen there is."""
        self._open(trainer)

    def on_train_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Shows the bar from the next batch on; a continued epoch has no epoch start."""
        self._begin_epoch(trainer)

    def on_train_epoch_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Shows the empty bar of the epoch."""
        self._begin_epoch(trainer)
        if (now := time.perf_counter()) >= self._due:
            self._draw(trainer, now)

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the clock."""
        now = time.perf_counter()
        if now >= self._due:
            self._leave_pending(trainer)
            self._rate.add(now, trainer.state.batch_idx)
            self._draw(trainer, now)

    def on_train_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Leaves the line of the epoch behind."""
        if self._display is None:
            return
        self._in_epoch, self._due, self._pending = False, _NEVER, None
        number = trainer.current_epoch + 1
        history = trainer.history
        row = history[-1] if history and history[-1].get("epoch") == number else None
        self._leave_row(trainer, str(number), row or trainer.progress_bar_metrics)

    def on_train_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Takes the bar away."""
        self._close()

    def on_exception(self, trainer: Trainer, task: TaskModule, exception: BaseException) -> None:
        """Takes the bar away and says where it stood; the loop does where a signal ended the run."""
        told = trainer.run_ending and isinstance(exception, (KeyboardInterrupt, SystemExit))
        if self._display is not None and self._in_epoch and not told:
            done = screen.count(trainer.state.batch_idx, trainer.num_training_batches).strip()
            self._display.leave(f"{_epoch_label(trainer)} stopped at batch {done}")
        self._close()

    def teardown(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """Takes the bar away, whatever happened."""
        self._close()

    def on_validation_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Begins a second bar, or the only one of ``validate``; the sanity check has none."""
        if not trainer.sanity_checking:
            self._begin_round(trainer, "validating", trainer.num_val_batches)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        task: TaskModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Looks at the clock."""
        self._tick_round(trainer)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Takes the second bar away, and keeps a row for the case that the epoch goes on."""
        if self._end_round(trainer) and self._in_epoch:
            done, total = trainer.state.batch_idx, trainer.num_training_batches
            fraction = f"{trainer.current_epoch + done / total:.2f}" if total else None
            position = fraction or f"step {trainer.global_step}"
            assert trainer.session.metrics is not None
            rows = trainer.session.metrics.eval_results(len(trainer.num_val_batches))
            self._pending = position, {name: row[name] for row in rows for name in row}

    def on_test_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Begins the bar of ``test``."""
        self._begin_round(trainer, "testing", trainer.num_test_batches)

    def on_test_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Takes the bar away; predictions leave a line behind, results are the trainer's to show."""
        self._end_round(trainer)

    on_predict_end = on_test_end

    def on_predict_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Begins the bar of ``predict``."""
        self._begin_round(trainer, "predicting", trainer.num_predict_batches)

    def _open(self, trainer: Trainer) -> None:
        self._close()
        if trainer.is_global_zero:
            self._display = screen.find_display()
            fastest = max(1.0 / self.refresh_hz, self._display.fastest)
            self._period = fastest if self._display.live else self.interval
            self._table, self._rate, self._drawn = screen.Table(), _Rate(), -_NEVER

    def _close(self) -> None:
        display, self._display = self._display, None
        self._due, self._in_epoch, self._round, self._pending = _NEVER, False, None, None
        if display is not None:
            display.close()

    def _begin_epoch(self, trainer: Trainer) -> None:
        if self._display is None:
            return
        now = time.perf_counter()
        self._in_epoch = True
        self._rate.restart(now, trainer.state.batch_idx)
        # Epochs may be shorter than a period: the bar does not come more often then.
        self._due = (self._drawn if self._display.live else now) + self._period

    def _begin_round(self, trainer: Trainer, verb: str, totals: Iterable[int | None]) -> None:
        alone = trainer.stage != Stage.FIT
        if alone:
            self._open(trainer)
        if self._display is None:
            return
        self._leave_pending(trainer)
        counts = [-1 if n is None else n for n in totals]
        self._round = _Round(verb, None if -1 in counts else sum(counts))
        if alone:
            self._due = self._round.began + self._period
            if self._display.live:
                self._draw(trainer, self._round.began)

    def _tick_round(self, trainer: Trainer) -> None:
        current = self._round
        if current is not None:
            current.done += 1
            now = time.perf_counter()
            if now >= self._due:
                current.rate.add(now, current.done)
                self._draw(trainer, now)

    def _end_round(self, trainer: Trainer) -> bool:
        """Returns whether there was a round; takes the display away if it was all that runs."""
        current, self._round = self._round, None
        if current is None or self._display is None:
            return False
        now = time.perf_counter()
        if trainer.stage == Stage.FIT:
            self._rate.restart(now, trainer.state.batch_idx)
            return True
        if trainer.stage == Stage.PREDICT:  # the others end with their results
            took = screen.duration(now - current.began)
            where = " on rank 0" if trainer.world_size > 1 else ""
            self._display.leave(f"predicted {current.done} batches{where} in {took}")
        self._close()
        return True

    def _draw(self, trainer: Trainer, now: float) -> None:
        """Draws the bars, or leaves a plain line where none can be drawn."""
        display = self._display
        if display is None:
            return
        self._drawn, self._due = now, now + self._period
        lines: list[screen.Line] = []
        if self._in_epoch:
            done = trainer.state.batch_idx
            metrics = [f"{k} {screen.number(v)}" for k, v in trainer.progress_bar_metrics.items()]
            total = _last_batch(trainer)
            lines.append(screen.Line(_epoch_label(trainer), done, total, self._rate.value, metrics))
        if (current := self._round) is not None:
            lines.append(screen.Line(current.verb, current.done, current.total, current.rate.value))
        if display.live:
            display.draw(lines)
        elif lines:
            display.leave(lines[-1].plain())

    def _leave_pending(self, trainer: Trainer) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._leave_row(trainer, *pending)

    def _leave_row(self, trainer: Trainer, position: str, row: Mapping[str, float]) -> None:
        display = self._display
        if display is None:
            return
        seconds = row.get("time", time.perf_counter() - trainer.epoch_started)
        waited = trainer.epoch_times["data"] / seconds if seconds > 0 else 0.0
        if trainer.max_epochs > 0 and not position.startswith("step"):
            position = screen.count(position, trainer.max_epochs)
        more: dict[str, Any] = {"speed": trainer.samples_per_second, "memory": trainer.memory}
        for line in self._table.lines(position, row, seconds, waited, display.width, **more):
            display.leave(line)


class _Rate:
    """Batches per second over the last drawings (half a minute of them at ten a second)."""

    def __init__(self) -> None:
        self.value = 0.0
        self._points: deque[tuple[float, int]] = deque(maxlen=300)

    def restart(self, now: float, done: int) -> None:
        """Leaves a pause out; the last value stands until there is a new one."""
        self._points.clear()
        self._points.append((now, done))

    def add(self, now: float, done: int) -> None:
        self._points.append((now, done))
        began, first = self._points[0]
        if now > began and done > first:
            self.value = (done - first) / (now - began)


class _Round:
    """One evaluation: what has been counted since it began."""

    def __init__(self, verb: str, total: int | None) -> None:
        self.verb, self.total, self.done = verb, total, 0
        self.began = time.perf_counter()
        self.rate = _Rate()
        self.rate.restart(self.began, 0)


def _last_batch(trainer: Trainer) -> int | None:
    """Batches that this epoch will have: ``max_steps`` may end it early."""
    total = trainer.num_training_batches
    if trainer.max_steps < 0:
        return total
    done, group = trainer.state.batch_idx, trainer.accumulate_grad_batches
    end = done - done % group + (trainer.max_steps - trainer.global_step) * group
    return end if total is None else min(total, end)


def _epoch_label(trainer: Trainer) -> str:
    number, most = trainer.current_epoch + 1, trainer.max_epochs
    return f"Epoch {screen.count(number, most)}" if most > 0 else f"Epoch {number}"
