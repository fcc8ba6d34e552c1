"""The progress display: in a fake terminal here, in a real one in tests/test_screen.py."""

from __future__ import annotations

import builtins
import contextlib
import io
import logging
import os
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from lightkit import screen
from lightkit.callbacks.progress import ProgressBar
from lightkit.history import History
from lightkit.state import Stage, TrainState
from tests.pseudo_terminal import render


class FakeTerminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class FakeTrainer(SimpleNamespace):
    """What a Trainer shows to the progress display."""

    def __init__(self, **kwargs):
        defaults = {
            "state": TrainState(),
            "stage": Stage.FIT,
            "sanity_checking": False,
            "run_ending": False,
            "progress_bar_metrics": {},
            "history": History(),
            "is_global_zero": True,
            "world_size": 1,
            "max_epochs": 3,
            "max_steps": -1,
            "num_training_batches": 6,
            "num_val_batches": [4],
            "num_test_batches": [4],
            "num_predict_batches": [4],
            "accumulate_grad_batches": 1,
            "epoch_times": {"data": 0.0},
            "samples_per_second": None,
            "memory": None,
            "epoch_started": time.perf_counter(),
        }
        super().__init__(**{**defaults, **kwargs})
        self.validated = {}  # what the last validation logged
        results = SimpleNamespace(eval_results=lambda loaders: [self.validated] * loaders)
        self.session = SimpleNamespace(metrics=results)

    @property
    def global_step(self):
        return self.state.global_step

    @property
    def current_epoch(self):
        return self.state.epoch


class Fit:
    """Calls the hooks as the loop does, one piece at a time."""

    def __init__(self, bar, **kwargs):
        self.bar, self.trainer = bar, FakeTrainer(**kwargs)
        bar.on_fit_start(self.trainer, None)
        bar.on_train_start(self.trainer, None)

    def start_epoch(self):
        self.trainer.state.batch_idx = 0
        self.trainer.epoch_started = time.perf_counter()
        self.bar.on_train_epoch_start(self.trainer, None)

    def batches(self, number, **metrics):
        for _ in range(number):
            batch_idx = self.trainer.state.batch_idx
            self.trainer.state.batch_idx += 1
            self.trainer.state.global_step += 1
            self.trainer.progress_bar_metrics.update(metrics)
            self.bar.on_train_batch_end(self.trainer, None, None, None, batch_idx)

    def validate(self, number=4, **metrics):
        self.bar.on_validation_start(self.trainer, None)
        for i in range(number):
            self.bar.on_validation_batch_end(self.trainer, None, None, None, i)
        self.trainer.validated = metrics
        self.bar.on_validation_end(self.trainer, None)

    def end_epoch(self, took=1.25, **row):
        number = self.trainer.state.epoch + 1
        self.trainer.history.append(
            {"epoch": number, "step": self.trainer.global_step, **row, "time": took}
        )
        self.bar.on_train_epoch_end(self.trainer, None)
        self.trainer.state.epoch += 1

    def end(self):
        self.bar.on_train_end(self.trainer, None)
        self.bar.teardown(self.trainer, None, "fit")


def put_in_place(request, out):
    """Makes ``out`` the standard streams while the test's body runs.

    A fixture alone cannot: pytest sets the streams anew between a fixture and the body.
    """
    body = request.node.obj

    def wrapped(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", out)
            body(*args, **kwargs)
            assert sys.stdout is out  # what was taken has been given back
            assert sys.stderr is out

    request.node.obj = wrapped


@pytest.fixture
def terminal(request, monkeypatch):
    """A terminal of 80 columns as standard streams."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    out = FakeTerminal()
    put_in_place(request, out)
    return out


@pytest.fixture
def pipe(request):
    """A file as standard streams."""
    out = io.StringIO()
    put_in_place(request, out)
    return out


def shown(out, columns=80):
    return [line for line in render(out.getvalue(), columns) if line]


EVERY_BATCH = 1e9  # drawings per second


def test_the_bar_shows_epoch_count_and_metrics(terminal):
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH))
    fit.start_epoch()
    assert shown(terminal) == ["Epoch 1/3  " + "━" * 30 + "  0/6"]
    fit.batches(3, train_loss=0.5, val_acc=0.25)
    (line,) = shown(terminal)
    assert line.startswith("Epoch 1/3  ━")
    assert "  3/6  " in line
    assert "it/s" in line
    assert " left  train_loss 0.5000" in line
    fit.end()
    assert shown(terminal) == []


def test_an_epoch_leaves_a_row_and_the_header_comes_once(terminal):
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH))
    for loss in (0.5, 0.25):
        fit.start_epoch()
        fit.batches(6, train_loss=loss)
        fit.trainer.epoch_times = {"data": 0.125}
        fit.end_epoch(train_loss=loss, val_acc=0.75, val_loss=12.5)
    fit.end()
    assert shown(terminal) == [
        "epoch  train_loss  val_loss   val_acc   time  data wait",
        "  1/3      0.5000   12.5000    0.7500   1.2s        10%",
        "  2/3      0.2500   12.5000    0.7500   1.2s        10%",
    ]


def test_a_new_column_brings_the_header_again_and_gaps_are_dashes(terminal):
    fit = Fit(ProgressBar())
    for row in ({"train_loss": 1.0}, {"train_loss": 0.5, "val_loss": 2.0}, {"train_loss": 0.25}):
        fit.start_epoch()
        fit.end_epoch(**row)
    fit.end()
    assert shown(terminal) == [
        "epoch  train_loss   time  data wait",
        "  1/3      1.0000   1.2s         0%",
        "epoch  train_loss  val_loss   time  data wait",
        "  2/3      0.5000    2.0000   1.2s         0%",
        "  3/3      0.2500         -   1.2s         0%",
    ]


def test_a_validation_in_an_epoch_has_its_own_bar_below(terminal):
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH), num_val_batches=[4, 6])
    fit.start_epoch()
    fit.batches(6)
    fit.bar.on_validation_start(fit.trainer, None)
    fit.bar.on_validation_batch_end(fit.trainer, None, None, None, 0)
    above, below = shown(terminal)
    assert above.startswith("Epoch 1/3  ━")
    assert below.startswith("validating ━")
    assert " 1/10 " in below
    assert above.rindex("━") == below.rindex("━")
    fit.end()


def test_a_validation_at_the_end_of_an_epoch_leaves_no_row_of_its_own(terminal):
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH))
    fit.start_epoch()
    fit.batches(6)
    fit.validate()
    fit.end_epoch(train_loss=0.5)
    fit.end()
    assert [line.split()[0] for line in shown(terminal)] == ["epoch", "1/3"]


def test_a_validation_in_the_middle_leaves_a_row_with_the_fraction(terminal):
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH))
    fit.start_epoch()
    fit.batches(3, train_loss=0.5)
    fit.validate(val_loss=0.75)
    fit.batches(3, train_loss=0.25)
    fit.validate(val_loss=0.5)
    fit.end_epoch(train_loss=0.375, val_loss=0.5)
    fit.end()
    rows = [line.split()[:3] for line in shown(terminal)]
    assert rows == [  # what it logged; the mean of training is not known before the epoch's end
        ["epoch", "val_loss", "time"],
        ["0.50/3", "0.7500", "0.0s"],
        ["epoch", "train_loss", "val_loss"],
        ["1/3", "0.3750", "0.5000"],
    ]


def test_unknown_length_is_a_bar_without_end_and_rows_say_the_step(terminal):
    fit = Fit(
        ProgressBar(refresh_hz=EVERY_BATCH),
        num_training_batches=None,
        num_val_batches=[None],
        max_epochs=-1,
    )
    fit.start_epoch()
    fit.batches(5)
    (line,) = shown(terminal)
    assert line.startswith("Epoch 1    ━")
    assert "  5  " in line
    assert "left" not in line
    fit.validate(val_loss=0.5)
    fit.batches(1)
    fit.end()
    assert shown(terminal)[1].split()[:3] == ["step", "5", "0.5000"]


def test_max_steps_ends_the_bar_early(terminal):
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH), max_steps=4)
    fit.start_epoch()
    fit.batches(1)
    assert "  1/4  " in shown(terminal)[0]
    fit.end()


def test_a_continued_epoch_counts_from_where_it_goes_on(terminal):
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH), state=TrainState(epoch=1, batch_idx=4))
    fit.batches(1)
    (line,) = shown(terminal)
    assert line.startswith("Epoch 2/3")
    assert "  5/6  " in line
    fit.end()


def test_the_sanity_check_shows_nothing(terminal):
    bar = ProgressBar(refresh_hz=EVERY_BATCH)
    trainer = FakeTrainer(sanity_checking=True)
    bar.on_fit_start(trainer, None)
    bar.on_validation_start(trainer, None)
    bar.on_validation_batch_end(trainer, None, None, None, 0)
    bar.on_validation_end(trainer, None)
    assert terminal.getvalue() == ""
    bar.teardown(trainer, None, "fit")


@pytest.mark.parametrize("stage", ["validation", "test", "predict"])
def test_evaluation_alone_has_a_bar(terminal, stage):
    bar = ProgressBar(refresh_hz=EVERY_BATCH)
    stages = {"validation": Stage.VALIDATE, "test": Stage.TEST, "predict": Stage.PREDICT}
    trainer = FakeTrainer(stage=stages[stage])
    getattr(bar, f"on_{stage}_start")(trainer, None)
    time.sleep(0.001)
    getattr(bar, f"on_{stage}_batch_end")(trainer, None, None, None, 0)
    (line,) = shown(terminal)
    assert "━" in line
    assert " 1/4 " in line
    getattr(bar, f"on_{stage}_end")(trainer, None)
    left = shown(terminal)
    assert left == ([f"predicted 1 batches in {left[0].split()[-1]}"] if stage == "predict" else [])


@pytest.mark.parametrize("columns", [20, 40, 80, 120])
def test_no_line_is_wider_than_the_terminal(terminal, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH))
    row = {"train_loss": 0.5, "val_loss": 0.5, "val_acc": 0.5, "val_f1_macro": 0.5}
    fit.start_epoch()
    fit.batches(3, **row)
    (bar,) = shown(terminal, columns)
    assert len(bar) < columns
    fit.end_epoch(**row)
    fit.end()
    lines = shown(terminal, columns)
    header, values = lines[-2:]
    assert len(header) == len(values) <= columns
    assert header.split()[0] == "epoch"
    if columns == 40:
        assert lines[0] == "(too narrow for val_acc, val_f1_macro)"
        assert header.split() == ["epoch", "train_loss", "val_loss", "time"]
    if columns >= 80:
        assert header.split()[-3:] == ["time", "data", "wait"]
        assert len(lines) == 2


def test_prints_stand_whole_above_the_bar(terminal):
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH))
    fit.start_epoch()
    fit.batches(1)
    print("hello", "world")
    print("to stderr", file=sys.stderr)
    print("a" * 200)
    sys.stdout.writelines(["one\n", "two\n"])
    lines = shown(terminal)
    assert lines[:2] == ["hello world", "to stderr"]
    assert "".join(lines[2:5]) == "a" * 200
    assert lines[5:7] == ["one", "two"]
    assert lines[7].startswith("Epoch 1/3  ━")
    fit.end()
    assert len(shown(terminal)) == 7


def test_an_unfinished_line_keeps_the_bar_away_until_it_ends(terminal):
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH))
    fit.start_epoch()
    print("loading ", end="")
    fit.batches(1)
    assert shown(terminal) == ["loading"]
    print("done")
    lines = shown(terminal)
    assert lines[0] == "loading done"
    assert lines[1].startswith("Epoch 1/3")
    print("dots..", end="")
    fit.end_epoch(train_loss=0.5)
    fit.end()
    lines = shown(terminal)
    assert lines[:2] == ["loading done", "dots.."]
    assert lines[2].split()[0] == "epoch"


def test_text_that_goes_around_stdout_falls_on_the_line_above_the_bar(terminal):
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH))
    fit.start_epoch()
    terminal.write("from a subprocess\n")
    fit.batches(1)
    lines = shown(terminal)
    assert lines[0] == "from a subprocess"
    assert lines[1].startswith("Epoch 1/3")
    assert len(lines) == 2
    fit.end()


def test_log_handlers_that_were_made_before_go_above_the_bar(terminal, monkeypatch):
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(logging.root, "handlers", [handler])
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH))
    fit.start_epoch()
    for word in ("one", "two", "three"):
        logging.getLogger("user").warning(word)
    lines = shown(terminal)
    assert lines[:3] == ["one", "two", "three"]
    assert lines[3].startswith("Epoch 1/3")
    assert handler.stream is not terminal
    fit.end()
    assert handler.stream is terminal


def test_a_thread_may_print(terminal):
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH), num_training_batches=300)
    fit.start_epoch()
    thread = threading.Thread(target=lambda: [print(f"line {i}") for i in range(100)])
    thread.start()
    fit.batches(300)
    thread.join()
    fit.end()
    assert shown(terminal) == [f"line {i}" for i in range(100)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_writes_straight_through(terminal):
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH))
    fit.start_epoch()
    before = terminal.getvalue()
    fit.bar._display._pid = -1  # as a child sees it
    print("from a worker")
    assert terminal.getvalue() == before + "from a worker\n"
    fit.bar._display._pid = os.getpid()
    fit.end()


def test_a_prompt_has_the_screen_for_itself(terminal, monkeypatch):
    asked = []

    def question(prompt=""):
        asked.append((prompt, shown(terminal), sys.stdout is terminal))
        return "yes"

    monkeypatch.setattr(builtins, "input", question)
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH))
    fit.start_epoch()
    assert builtins.input is not question
    assert input("go on? ") == "yes"
    assert asked == [("go on? ", [], True)]
    fit.batches(1)
    assert shown(terminal)[0].startswith("Epoch 1/3")
    fit.end()
    assert builtins.input is question


def test_an_exception_takes_the_bar_away_and_says_where_it_stood(terminal):
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH))
    fit.start_epoch()
    fit.batches(4)
    fit.bar.on_exception(fit.trainer, None, KeyboardInterrupt())
    fit.bar.teardown(fit.trainer, None, "fit")
    assert shown(terminal) == ["Epoch 1/3 stopped at batch 4/6"]


def test_a_ctrl_c_within_a_drawing_leaves_nothing_of_the_bar(terminal, monkeypatch):
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH))
    fit.start_epoch()
    put = fit.bar._display._put
    fit.bar._display._hide()

    def interrupted(text):
        put(text)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit.bar._display, "_put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit.batches(1)
    terminal.write("^C")  # of the terminal
    fit.bar.on_exception(fit.trainer, None, KeyboardInterrupt())
    assert shown(terminal) == ["Epoch 1/3 stopped at batch 1/6"]


def test_where_a_signal_ended_the_run_the_loop_says_where_alone(terminal):
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH), run_ending=True)
    fit.start_epoch()
    fit.batches(4)
    fit.bar.on_exception(fit.trainer, None, SystemExit(143))
    assert shown(terminal) == []


def test_a_second_bar_takes_over_and_the_first_comes_back(terminal):
    outer = Fit(ProgressBar(refresh_hz=EVERY_BATCH), max_epochs=9)
    outer.start_epoch()
    inner = Fit(ProgressBar(refresh_hz=EVERY_BATCH), max_epochs=2)
    inner.start_epoch()
    assert [line[:9] for line in shown(terminal)] == ["Epoch 1/2"]
    inner.end()
    outer.batches(1)
    assert [line[:9] for line in shown(terminal)] == ["Epoch 1/9"]
    outer.end()


def test_one_bar_serves_fit_after_fit(terminal):
    bar = ProgressBar(refresh_hz=EVERY_BATCH)
    for _ in range(2):
        fit = Fit(bar)
        fit.start_epoch()
        fit.batches(6)
        fit.end_epoch(train_loss=0.5)
        fit.end()
    assert [line.split()[0] for line in shown(terminal)] == ["epoch", "1/3"] * 2


def test_a_stream_replaced_by_the_user_is_left_alone(terminal):
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH))
    fit.start_epoch()
    mine = io.StringIO()
    with contextlib.redirect_stdout(mine):
        print("kept")
        fit.batches(1)
        fit.end()
        assert sys.stdout is mine
    assert mine.getvalue() == "kept\n"
    sys.stdout = terminal


def test_plain_lines_where_there_is_no_terminal(pipe):
    fit = Fit(ProgressBar())
    for _ in range(2):
        fit.start_epoch()
        fit.batches(6)
        fit.validate()
        fit.end_epoch(train_loss=0.5)
    fit.end()
    assert pipe.getvalue().splitlines() == [
        "epoch  train_loss   time  data wait",
        "  1/3      0.5000   1.2s         0%",
        "  2/3      0.5000   1.2s         0%",
    ]


def test_long_epochs_leave_a_plain_line_per_interval(pipe):
    fit = Fit(ProgressBar(interval=0.02))
    fit.start_epoch()
    fit.batches(1)
    assert pipe.getvalue() == ""
    time.sleep(0.03)
    fit.batches(1, train_loss=0.5)
    fit.batches(1)
    (line,) = pipe.getvalue().splitlines()
    assert line.startswith("Epoch 1/3  2/6  ")
    assert line.endswith("  train_loss 0.5000")
    time.sleep(0.03)
    fit.validate()
    assert pipe.getvalue().splitlines()[1].startswith("validating  1/4")
    fit.end()


@pytest.mark.parametrize(
    ("name", "value"), [("TERM", "dumb"), ("TERM", "unknown"), ("TTY_COMPATIBLE", "0")]
)
def test_a_terminal_that_cannot_move_the_cursor_gets_plain_lines(
    terminal, monkeypatch, name, value
):
    monkeypatch.setenv(name, value)
    assert type(screen.find_display()) is screen.Plain


def test_forced_colors_do_not_make_a_pipe_a_terminal(pipe, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert type(screen.find_display()) is screen.Plain


def test_no_color_and_no_unicode(terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(FakeTerminal, "encoding", "ascii")
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH))
    fit.start_epoch()
    fit.batches(3)
    assert "m" not in terminal.getvalue().replace("Epoch", "").replace("it/s", "")
    terminal.getvalue().encode("ascii")
    assert "####" in shown(terminal)[0]
    assert "...." in shown(terminal)[0]
    fit.end()


def test_a_closed_pipe_does_not_end_the_training(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())  # in the body, so it holds
    fit = Fit(ProgressBar(interval=0.0))
    fit.start_epoch()
    fit.batches(6)
    fit.end_epoch(train_loss=0.5)
    fit.end()


def test_other_ranks_show_nothing(terminal):
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH), is_global_zero=False)
    fit.start_epoch()
    fit.batches(6)
    fit.validate()
    fit.end_epoch(train_loss=0.5)
    fit.bar.on_exception(fit.trainer, None, ValueError())
    fit.end()
    assert terminal.getvalue() == ""


def test_a_notebook_has_one_area_that_is_replaced(monkeypatch, pipe):
    areas = []

    class Area:
        def __init__(self, content):
            self.contents = [content["text/plain"]]
            areas.append(self)

        def update(self, content, raw):
            self.contents.append(content["text/plain"])

    display = SimpleNamespace(display=lambda content, raw, display_id: Area(content))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(screen, "find_display", screen.Notebook)
    fit = Fit(ProgressBar(refresh_hz=EVERY_BATCH))
    fit.start_epoch()
    fit.bar._period = 0.0
    fit.batches(3, train_loss=0.5)
    fit.end_epoch(train_loss=0.5)
    fit.end()
    (area,) = areas
    assert all(text.startswith("Epoch 1/3") for text in area.contents[:-1])
    assert area.contents[-1] == ""
    assert "\x1b" not in "".join(area.contents)
    assert len(pipe.getvalue().splitlines()) == 2


def test_nothing_is_drawn_before_it_is_due(terminal):
    fit = Fit(ProgressBar(refresh_hz=1.0))
    fit.start_epoch()
    before = terminal.getvalue()
    fit.batches(6)
    assert terminal.getvalue() == before
    fit.end()


def test_short_epochs_do_not_draw_more_often(terminal):
    fit = Fit(ProgressBar(refresh_hz=1.0), max_epochs=50)
    for _ in range(50):
        fit.start_epoch()
        fit.batches(2)
        fit.end_epoch(train_loss=0.5)
    fit.end()
    assert terminal.getvalue().count("━━") == 15  # one bar of 30 signs
    assert len(shown(terminal)) == 51


def test_looking_at_the_clock_costs_next_to_nothing():
    fit = Fit(ProgressBar())
    fit.start_epoch()
    hook, trainer = fit.bar.on_train_batch_end, fit.trainer
    best = 1.0
    for _ in range(5):
        began = time.thread_time()
        for i in range(20_000):
            hook(trainer, None, None, None, i)
        best = min(best, (time.thread_time() - began) / 20_000)
    fit.end()
    print(f"progress display, nothing due: {best * 1e6:.2f} us per batch")
    assert best < 1e-6


def test_numbers_and_times():
    numbers = (0.0, 1.0, -0.5, 12.34567, 1234.56, 1e-4, 2e7, float("nan"), float("inf"))
    assert [screen.number(n) for n in numbers] == [
        "0.0000",
        "1.0000",
        "-0.5000",
        "12.3457",
        "1234.6",
        "1.00e-04",
        "2.00e+07",
        "nan",
        "inf",
    ]
    assert [screen.duration(s) for s in (0.04, 1.94, 59.97, 61, 3723)] == [
        "0.0s",
        "1.9s",
        "1:00",
        "1:01",
        "1:02:03",
    ]
