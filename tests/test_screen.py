"""The progress display of a real fit, in a real pseudo-terminal and in a real pipe."""

from __future__ import annotations

import io
import re

import pytest

from lightkit import screen
from tests.pseudo_terminal import render, run, run_in_pipe

#: A fit of two epochs, 30 batches of 10 ms each; ``in_step`` is put into the training step.
FIT = """
import os, sys, time
import torch
import lightkit as lk
from torch.utils.data import DataLoader, TensorDataset

class Net(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        time.sleep(0.01)
        epoch = self.trainer.current_epoch
        {in_step}
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        time.sleep(0.01)
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

data = TensorDataset(torch.randn(240, 4), torch.randint(0, 2, (240,)))
held = TensorDataset(torch.randn(80, 4), torch.randint(0, 2, (80,)))
trainer = lk.Trainer(
    max_epochs=2, logger=False, enable_checkpointing=False, enable_model_summary=False,
    accelerator="cpu", log_every_n_steps=5, callbacks=[{callbacks}],
    default_root_dir={folder!r},
)
trainer.fit(Net(), DataLoader(data, 8), DataLoader(held, 8))
print("the end")
"""


def program(tmp_path, in_step="pass", callbacks=""):
    indented = in_step.replace("\n", "\n        ")
    return FIT.format(in_step=indented, callbacks=callbacks, folder=str(tmp_path))


def lines(raw, columns=80):
    return [line for line in render(raw, columns) if line]


def table(shown):
    return [line.split() for line in shown if re.match(r" *(epoch|\d/2) ", line)]


@pytest.mark.parametrize("columns", [40, 100])
def test_what_is_seen_of_a_fit_and_what_is_left(tmp_path, columns):
    status, raw = run(
        program(
            tmp_path,
            "if batch_idx == 10:\n"
            "    print('a print', epoch)\n"
            "    os.system('echo a subprocess')\n"
            "    print('to', 'stderr', file=sys.stderr)",
        ),
        columns=columns,
    )
    assert status == 0, raw
    shown = lines(raw, columns)
    rows = table(shown)
    assert [row[0] for row in rows] == ["epoch", "1/2", "2/2"]
    assert rows[0][1:3] == ["train_loss", "val_loss"]
    assert all(re.fullmatch(r"\d\.\d{4}", cell) for row in rows[1:] for cell in row[1:3])
    for text in ("a print 0", "a print 1", "the end"):
        assert shown.count(text) == 1
    assert shown.count("a subprocess") == shown.count("to stderr") == 2
    assert not any("━" in line for line in shown)
    # 80 batches of 10 ms, ten drawings a second; each goes up again once, and a print repeats it.
    assert "validating" in raw
    assert 3 < len(re.findall(r"\x1b\[[12]A\r", raw)) < 40


def test_breakpoint_and_input_can_be_used(tmp_path):
    status, raw = run(
        program(
            tmp_path,
            "if epoch == 0 and batch_idx == 20:\n"
            "    answer = 41\n"
            "    breakpoint()\n"
            "if epoch == 1 and batch_idx == 20:\n"
            "    print('got', input('name? '))",
        ),
        keys=[("(Pdb) ", b"p answer + 1\n"), ("(Pdb) ", b"c\n"), ("name? ", b"anne\n")],
    )
    assert status == 0, raw
    shown = lines(raw)
    at = shown.index("(Pdb) p answer + 1")
    assert "training_step" in shown[at - 1]  # pdb stops in the code of the user
    assert shown[at + 1 : at + 3] == ["42", "(Pdb) c"]
    assert shown[shown.index("name? anne") + 1] == "got anne"
    assert [row[0] for row in table(shown)] == ["epoch", "1/2", "2/2"]


def test_ctrl_c_leaves_the_terminal_clean(tmp_path):
    # It waits for the key, however late that comes on a busy machine.
    step = (
        "if epoch == 1 and batch_idx == 10:\n"
        "    print('now', flush=True)\n"
        "    end = time.monotonic() + 30\n"
        "    while self.trainer.session.flow.signal is None and time.monotonic() < end:\n"
        "        time.sleep(0.05)"
    )
    status, raw = run(program(tmp_path, step), keys=[("now", b"\x03")])
    assert status != 0
    shown = lines(raw)
    told = [line for line in shown if "stopped" in line]
    assert [re.sub(r"\d+", "N", line) for line in told] == [
        "SIGINT: stopped after step N (epoch N, batch N)"
    ]
    assert "stopping after this step; ^C again: now" in shown
    assert not any("━" in line for line in shown)
    assert "the end" not in shown
    assert "\x1b[?25l" not in raw  # the cursor was never hidden, so it need not come back


def test_a_pipe_gets_plain_lines(tmp_path):
    status, text = run_in_pipe(
        program(tmp_path, callbacks="lk.callbacks.ProgressBar(interval=0.1)"),
        env={"FORCE_COLOR": "1"},
    )
    assert status == 0, text
    assert "\x1b" not in text
    assert "\r" not in text
    shown = text.splitlines()
    assert [row[0] for row in table(shown)] == ["epoch", "1/2", "2/2"]
    between = [line for line in shown if line.startswith("Epoch 1/2  ")]
    assert 1 <= len(between) <= 5
    assert re.search(r"  \d+/30  \d+\.\d it/s  0:0\d left", between[-1])


def test_columns_without_room_are_counted_where_their_names_have_none_either():
    names = ["train/metric_one", "train/metric_two", "val/accuracy_top1"]
    assert screen._left_out(names, 80) == f"(too narrow for {', '.join(names)})"
    assert screen._left_out(names, 60) == "(too narrow for train/metric_one and 2 more)"
    assert screen._left_out(names, 30) == "(too narrow for 3 columns)"


def test_speed_and_memory_stand_behind_the_time_and_go_first_where_it_is_narrow():
    row = {"train_loss": 0.5, "val_loss": 12.5}

    def shown(width, **more):
        return screen.Table().lines("1/3", row, 1.25, 0.1, width, **more)

    both = {"speed": 12345.6, "memory": 3_250_000_000}
    assert shown(80, **both) == [
        "epoch  train_loss  val_loss   time  data wait  samples/s  memory",
        "  1/3      0.5000   12.5000   1.2s        10%      12.3k  3.2 GB",
    ]
    assert shown(63, **both)[0] == "epoch  train_loss  val_loss   time  data wait  samples/s"
    assert shown(54, **both)[0] == "epoch  train_loss  val_loss   time  data wait"
    assert shown(43, **both)[0] == "epoch  train_loss  val_loss   time"
    assert shown(31, **both)[:2] == ["(too narrow for val_loss)", "epoch  train_loss   time"]
    assert shown(80, memory=850_400_000)[0].endswith("  data wait  memory")
    assert shown(80)[0].endswith("  data wait")


def test_columns_take_the_room_that_their_values_need_and_the_losses_come_first():
    table = screen.Table()
    lines = table.lines("0.50/12", {"val_acc": 0.5, "val_loss": 1.0}, 3700.0, 0.0, 80)
    lines += table.lines("1/12", {"train_loss": 2.0, "val_loss": 1.0, "val_acc": 0.5}, 9.0, 0.0, 80)
    assert lines == [
        "  epoch  val_loss   val_acc     time  data wait",
        "0.50/12    1.0000    0.5000  1:01:40         0%",
        "  epoch  train_loss  val_loss   val_acc     time  data wait",
        "   1/12      2.0000    1.0000    0.5000     9.0s         0%",
    ]


class Tty(io.StringIO):
    def isatty(self):
        return True


def test_long_lines_go_on_between_words_below_what_follows_their_label(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    text = "error: a word-with-hyphens and\n  one line more: with two points\nshort"
    assert screen.fold(text, Tty()).splitlines() == [
        "error: a",
        "       word-with-hyphens",  # no room, but a name is never broken
        "       and",
        "  one line more:",
        "  with two points",
        "short",
    ]
    assert screen.fold(text, io.StringIO()) == text
    command = "curves:   tensorboard --logdir runs/a"
    assert screen.fold(command, Tty(), " \\").splitlines() == [
        "curves: \\",
        "          tensorboard \\",
        "          --logdir \\",
        "          runs/a",
    ]


def test_numbers_have_the_units_that_fit_them():
    assert [screen.large(x) for x in (7.24, 99.6, 950, 999.6, 12345, 1.25e6)] == [
        *("7.2", "100", "950", "1.0k", "12.3k", "1.2M"),
    ]
    assert [screen.size_of(x) for x in (0, 850_400_000, 999_600_000, 12.34e9)] == [
        *("0 MB", "850 MB", "1.0 GB", "12.3 GB"),
    ]
    assert [screen.brief(x) for x in (0.00035, 0.00996, 0.0123, 0.9996, 1.25, 99.96, 3700)] == [
        *("350 us", "10 ms", "12 ms", "1.0 s", "1.2 s", "1:40", "1:01:40"),
    ]
