"""``Trainer(compile=)``: the numbers of the same fit uncompiled, and no more graphs than needed."""

from __future__ import annotations

import copy
import functools
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit.compiling import Compilation, Notes, settings
from lightkit.config import load_config
from lightkit.errors import CompileError, ConfigError
from lightkit.flow import Flow
from lightkit.loggers.base import Logger

EAGER = {"backend": "eager"}
#: Dropout draws as it does uncompiled.
INDUCTOR = {"options": {"fallback_random": True}}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class Net(lk.TaskModule):
    """Logs in every way, with metrics that count in the step."""

    def __init__(self, optimizer: str = "SGD"):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(4, 1)
        self.error = torchmetrics.MeanAbsoluteError()
        self.several = torchmetrics.MetricCollection({"mse": torchmetrics.MeanSquaredError()})
        self.optimizer = optimizer

    def net(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        found = self.net(x)
        loss = nn.functional.mse_loss(found, y)
        self.log("first", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.error(found.detach(), y)
        self.several.update(found.detach(), y)
        self.log("error", self.error)
        self.log_dict(self.several)
        self.log_dict({"mean": found.mean(), "most": found.max()}, reduce_fx="max")
        self.log("three", 3.0, on_step=False)
        self.log("bias", self.head.bias)
        self.log("alone", loss * 2, rank_zero_only=True)
        return {"loss": loss, "weight": len(x), "spread": found.std()}

    def validation_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        if self.optimizer == "LBFGS":
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Plain(Net):
    """Nothing but a loss, and what is asked for."""

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])


class Logging(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("a", loss)
        self.log_dict({"b": loss * 2, "c": 1.0})
        return loss


class Rows(Logger):
    """Keeps the rows."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step):
        self.rows.append((step, dict(metrics)))


class Graphs:
    """A backend that runs graphs as they are, and counts them and their calls."""

    def __init__(self):
        self.made = self.called = 0

    def __call__(self, graph, inputs):
        self.made += 1

        def call(*arguments):
            self.called += 1
            return graph.forward(*arguments)

        return call


def data(samples: int = 42, seed: int = 1) -> TensorDataset:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.sum(1, keepdim=True))


def loaders(**options):
    return DataLoader(data(), 4, shuffle=True, **options), DataLoader(data(10, seed=2), 4)


def fitted(quiet, kind=Net, task=None, drop_last=False, **options):
    torch.manual_seed(3)
    task = kind() if task is None else task
    rows = Rows()
    trainer = quiet(**{"max_epochs": 2, "log_every_n_steps": 3, "logger": rows} | options)
    history = trainer.fit(task, *loaders(drop_last=drop_last))
    entries = [{k: v for k, v in entry.items() if k != "time"} for entry in history]
    return task, entries, rows.rows


def same(one, other):
    assert one[1] == other[1]
    assert one[2] == other[2]
    first, second = one[0].state_dict(), other[0].state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def lines(caplog, *beginnings):
    texts = [record.getMessage() for record in caplog.records if record.name == "lightkit"]
    return [text for text in texts if text.startswith(beginnings)]


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, None),
        (False, None),
        (True, {}),
        ("regional", {"regional": True}),
        ({"mode": "max-autotune", "regional": True}, {"mode": "max-autotune", "regional": True}),
        ({"dynamic": None, "options": {"fallback_random": True}}, ...),
    ],
)
def test_what_may_be_given(given, found):
    assert settings(given) == (given if found is ... else found)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("regionl", "allowed are True, False, 'regional', or a dict.*Did you mean 'regional'"),
        ("reduce-overhead", r"Write \{'mode': 'reduce-overhead'\}"),
        ({"fulgraph": True}, "unknown key 'fulgraph'.*Did you mean 'fullgraph'"),
        ({"dynamic": "yes"}, "'dynamic': 'yes'.*allowed is bool or none"),
        ({"regional": 1}, "allowed is bool"),
        (1, "compile=1: allowed are"),
    ],
)
def test_what_may_not_be_given(given, words):
    with pytest.raises(ConfigError, match=words):
        lk.Trainer(compile=given)


def test_a_backend_that_does_not_exist(quiet):
    with pytest.raises(ConfigError, match="torch.compile refuses it"):
        fitted(quiet, compile={"backend": "nonesuch"})


@pytest.mark.parametrize(
    ("text", "flags", "found"),
    [
        ("compile: true", {}, True),
        ("compile: regional", {}, "regional"),
        (
            "compile: {backend: eager}",
            {"trainer.compile.regional": "true"},
            {**EAGER, "regional": True},
        ),
        ("", {"trainer.compile.mode": "reduce-overhead"}, {"mode": "reduce-overhead"}),
        ("", {"trainer.compile": "false", "trainer.memory_format": "channels_last"}, False),
    ],
)
def test_from_files_and_flags(tmp_path, text, flags, found):
    path = tmp_path / "config.yaml"
    path.write_text(f"task: tests.small.Net\ntrainer: {{max_epochs: 1, {text}}}\n")
    config = load_config(path, overrides=flags)
    assert config.trainer.arguments.get("compile") == found
    lk.Trainer(**config.trainer.arguments)


# --- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_everything_is_bit_for_bit_that_of_an_eager_fit(quiet, backend):
    same(fitted(quiet), fitted(quiet, compile={"backend": backend}))


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"kind": "LBFGS"},
        {"val_check_interval": 4},
        {"detect_anomaly": True},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("how", [EAGER, {**EAGER, "regional": True}], ids=["step", "regional"])
def test_it_goes_with_the_rest(quiet, options, how):
    if "kind" in options:
        options = {"kind": functools.partial(Logging, "LBFGS")}
    same(fitted(quiet, **options), fitted(quiet, compile=how, **options))


def test_gradient_hooks_are_called_as_ever(quiet):
    seen = {}
    for how in (False, EAGER):
        torch.manual_seed(3)
        task, found = Plain(), []
        task.head.weight.register_hook(found.append)
        fitted(quiet, task=task, compile=how)
        seen[bool(how)] = torch.stack(found)
    assert torch.equal(seen[True], seen[False])


def test_numbers_of_numpy_are_logged(quiet):
    class Numbers(Plain):
        def training_step(self, batch, batch_idx):
            self.log("half", np.float32(0.5))
            self.log_dict({"mean": np.mean([1.0, 2.0])})
            return super().training_step(batch, batch_idx)

    found = [fitted(quiet, Numbers, compile=how)[1] for how in (False, EAGER)]
    for entries in found:
        assert [(entry["half"], entry["mean"]) for entry in entries] == [(0.5, 1.5)] * len(entries)


def test_what_changes_in_place_after_it_was_logged_is_logged_as_it_was(quiet):
    class Changing(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("before", loss)
            loss += 1
            return loss

    _, entries, _ = fitted(quiet, Changing, compile=EAGER)
    for entry in entries:
        assert entry["train_loss"] == pytest.approx(entry["before"] + 1)


def test_a_run_goes_on_compiled_or_not(quiet):
    whole = fitted(quiet, max_epochs=4)
    for first, second in ((EAGER, False), (False, EAGER)):
        path = lk.callbacks.ModelCheckpoint()
        how = {"enable_checkpointing": True, "callbacks": path}
        fitted(quiet, compile=first, **how)
        task, rows = Net(), Rows()
        trainer = quiet(max_epochs=4, compile=second, logger=rows, log_every_n_steps=3)
        history = trainer.fit(task, *loaders(), ckpt_path=path.last_model_path)
        entries = [{k: v for k, v in entry.items() if k != "time"} for entry in history]
        assert entries == whole[1]
        for name, value in whole[0].state_dict().items():
            assert torch.equal(task.state_dict()[name], value)


# --- the number of graphs -------------------------------------------------------------------------


def test_one_graph_for_many_steps_epochs_and_validations(quiet):
    graphs = Graphs()
    _, entries, _ = fitted(
        quiet,
        Plain,
        drop_last=True,
        max_epochs=3,
        val_check_interval=4,
        compile={"backend": graphs},
    )
    assert graphs.made == 1
    assert graphs.called == entries[-1]["step"] == 30


class Index(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + batch_idx * 0.001)


class Step(Plain):
    def training_step(self, batch, batch_idx):
        self.log("steps", self.global_step)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("kind", "drop_last", "most"),
    [
        (Logging, True, 1),
        (Logging, False, 2),  # a shorter last batch
        (Index, True, 2),  # the first index is a constant, then it is none
        (Step, True, 2),
    ],
)
def test_no_graph_is_made_anew_per_step(quiet, kind, drop_last, most):
    graphs = Graphs()
    fitted(quiet, kind, drop_last=drop_last, max_epochs=3, compile={"backend": graphs})
    assert graphs.made == most


def test_metrics_break_the_graph_and_nothing_more(quiet, caplog):
    caplog.set_level(logging.INFO, logger="lightkit")
    graphs = Graphs()
    fitted(quiet, drop_last=True, compile={"backend": graphs})
    assert graphs.made <= 4  # before, between and behind the two metrics
    assert lines(caplog, "graph break") == []


def test_fits_do_not_share_the_limit_of_graphs(quiet):
    """Torch keeps eight for a function; those of a fit go with it."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list as kept

    for width in range(10):
        graphs = Graphs()
        task = Plain()
        task.head = nn.Sequential(nn.Linear(4, 2 + width), nn.Linear(2 + width, 1))
        fitted(quiet, task=task, max_epochs=1, drop_last=True, compile={"backend": graphs})
        assert graphs.made == 1
        assert graphs.called == 10
    assert kept(Plain.training_step.__code__) == []


def test_a_step_with_defaults_and_super(quiet):
    class Scaled(Plain):
        def training_step(self, batch, batch_idx, *, scale=2.0):
            return super().training_step(batch, batch_idx) * scale

    class Wrapped(Plain):
        training_step = functools.partialmethod(Plain.training_step)

    for kind in (Scaled, Wrapped):
        same(fitted(quiet, kind), fitted(quiet, kind, compile=EAGER))


# --- blocks ---------------------------------------------------------------------------------------


def test_blocks_are_compiled_once_and_evaluated_as_they_are(quiet):
    graphs = Graphs()
    how = {"backend": graphs, "regional": True}
    _, entries, _ = fitted(quiet, Plain, drop_last=True, max_epochs=2, compile=how)
    # The first block gets a batch, which needs no gradient; the others what it makes of it.
    assert graphs.made == 2
    assert graphs.called == 3 * entries[-1]["step"]


def test_blocks_are_those_that_the_task_names(quiet):
    class Named(Plain):
        def configure_sharding(self):
            return [self.head]

    graphs = Graphs()
    _, entries, _ = fitted(quiet, Named, compile={"backend": graphs, "regional": True})
    assert graphs.called == entries[-1]["step"]


def test_blocks_of_torch_are_compiled_too(quiet):
    class Encoder(Plain):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            self.blocks = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).layers

    graphs = Graphs()
    how = {"backend": graphs, "regional": True}
    _, entries, _ = fitted(quiet, Encoder, drop_last=True, compile=how)
    assert graphs.made == 2
    assert graphs.called == 3 * entries[-1]["step"]


def test_a_block_that_the_user_compiled_stays_his(quiet):
    task = Plain()
    own = Graphs()
    task.blocks[0].compile(backend=own)
    call = task.blocks[0]._compiled_call_impl
    fitted(quiet, task=task, compile={"backend": Graphs(), "regional": True})
    assert task.blocks[0]._compiled_call_impl is call
    assert own.called > 22  # in evaluations too


def test_no_blocks(quiet):
    class Bare(Plain):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*self.blocks)

    with pytest.raises(ConfigError, match="Bare has no ModuleList with two of one type"):
        fitted(quiet, Bare, compile="regional")


def test_manual_optimization(quiet):
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)["loss"]
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return loss

    with pytest.raises(ConfigError, match="differentiates and steps by itself.*compile='regional'"):
        fitted(quiet, Manual, compile=True)
    same(fitted(quiet, Manual), fitted(quiet, Manual, compile={**EAGER, "regional": True}))


def test_a_sharded_model_is_compiled_by_blocks():
    how = Compilation({}, Plain(), Flow(), torch.device("cpu"))
    with pytest.raises(ConfigError, match="block by block.*compile='regional'"):
        how.check(automatic=True, sharded=True)
    how = Compilation({"regional": True}, Plain(), Flow(), torch.device("cpu"))
    how.check(automatic=True, sharded=True)


# --- nothing is left ------------------------------------------------------------------------------


def attributes(task):
    return [(name, sorted(vars(module))) for name, module in task.named_modules()]


@pytest.mark.parametrize("how", [EAGER, {**EAGER, "regional": True}], ids=["step", "regional"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_task_is_as_it_was(quiet, how, fails):
    class Copying(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            if batch_idx == 2:
                self.copied = copy.deepcopy(task)
                if fails:
                    raise RuntimeError("enough")

    import torch._dynamo.config as config

    task, copying = Net(), Copying()
    before = attributes(task)
    updates = [vars(task.error)["update"], vars(task.error)["compute"]]
    classes = {kind: dict(vars(kind)) for kind in (type(task.error), type(task.several))}
    option = config.allow_unspec_int_on_nn_module
    if fails:
        with pytest.raises(RuntimeError, match="enough"):
            fitted(quiet, task=task, compile=how, callbacks=copying)
    else:
        fitted(quiet, task=task, compile=how, callbacks=copying)
    assert attributes(task) == attributes(copying.copied)
    assert [(n, [a for a in names if a != "_computed"]) for n, names in before] == [
        (n, [a for a in names if a != "_computed"]) for n, names in attributes(task)
    ]
    assert [vars(task.error)["update"], vars(task.error)["compute"]] == updates
    assert all(dict(vars(kind)) == found for kind, found in classes.items())
    assert config.allow_unspec_int_on_nn_module is option
    assert list(task.state_dict()) == list(Net().state_dict())


# --- what is told ---------------------------------------------------------------------------------


class Printing(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        print(end="")
        return loss * 2


class Branching(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if loss > 0:
            loss = loss * 2
        return loss


class Growing(Plain):
    seen: list[int] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(1)
        return super().training_step(batch, batch_idx) * len(self.seen)


class Looping(Plain):
    def training_step(self, batch, batch_idx):
        for _ in range(2):
            print(end="")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (Printing, 'print(end="")', "`print`"),
        (Branching, "if loss > 0", "depends on the value of a tensor"),
    ],
)
def test_a_graph_break_is_told_once(quiet, caplog, kind, text, reason):
    caplog.set_level(logging.INFO, logger="lightkit")
    fitted(quiet, kind, compile=EAGER, drop_last=True)
    (told,) = lines(caplog, "graph break")
    assert "\n" not in told
    assert reason in told
    source = Path(__file__).read_text().splitlines()
    number = 1 + next(i for i, line in enumerate(source) if line.strip().startswith(text))
    assert f"test_compiling.py:{number}: " in told
    assert len(lines(caplog, "compiled training_step")) == 1


def test_a_shorter_last_batch_is_told_once(quiet, caplog):
    caplog.set_level(logging.INFO, logger="lightkit")
    fitted(quiet, Logging, compile=EAGER, max_epochs=3)
    first, again = lines(caplog, "compiled")
    assert first.startswith("compiled training_step")
    assert again.startswith("compiled training_step again in ")
    assert "expected 4, actual 2. A shorter last batch does that once; drop_last=True" in again


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_made_anew_in_every_step_is_told_a_few_times(quiet, caplog):
    caplog.set_level(logging.INFO, logger="lightkit")
    Growing.seen = []
    fitted(quiet, Growing, compile=EAGER, drop_last=True)
    assert len(lines(caplog, "compiled")) == 4
    (limit,) = lines(caplog, "training_step was compiled as often as torch allows")
    assert "The last: len(" in limit


def test_a_step_that_is_not_compiled_is_told(quiet, caplog):
    caplog.set_level(logging.INFO, logger="lightkit")
    same(fitted(quiet, Looping), fitted(quiet, Looping, compile=EAGER))
    (told,) = lines(caplog, "training_step is not compiled, because of")
    assert "test_compiling.py:" in told
    assert "\n" not in told


def test_the_start_says_what_is_compiled(quiet, caplog):
    caplog.set_level(logging.INFO, logger="lightkit")
    fitted(quiet, Plain, compile={**EAGER, "regional": True}, max_epochs=1)
    fitted(quiet, Plain, compile=EAGER, max_epochs=1)
    assert lines(caplog, "compile:") == [
        "compile:  3 blocks (Block) with backend='eager'; the first step takes longer",
        "compile:  training_step with backend='eager'; the first step takes longer",
    ]


def test_a_backend_that_fails(quiet):
    def backend(graph, inputs):
        raise RuntimeError("no kernel for this")

    with pytest.raises(CompileError) as caught:
        fitted(quiet, Plain, compile={"backend": backend})
    text = str(caught.value)
    assert "training_step of Plain could not be compiled" in text
    assert "no kernel for this" in text
    assert "Trainer(compile=False)" in text
    assert "\n" not in text


def test_one_whole_graph_that_cannot_be(quiet):
    with pytest.raises(CompileError, match=r"test_compiling.py:\d+.*print.*compile=False"):
        fitted(quiet, Printing, compile={**EAGER, "fullgraph": True})


def test_an_error_of_the_user_is_his_own(quiet):
    class Wrong(Plain):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise ValueError("of my own")
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="of my own") as caught:
        fitted(quiet, Wrong, compile=EAGER)
    assert type(caught.value) is ValueError


# --- memory that the next step overwrites ---------------------------------------------------------


class Overwriting:
    """Stands for a step in a CUDA graph: its results lie where its next call writes."""

    def __init__(self, task):
        self.task, self.memory, self.count = task, torch.zeros(()), 0
        self.weight = torch.ones((), requires_grad=True)

    def __call__(self, batch):
        self.count += 1
        with torch.no_grad():
            self.memory.fill_(self.count)
        self.task._link.metrics.calls.append((False, "kept", self.memory, ()))
        return {"loss": self.memory * self.weight, "parts": [self.memory], "name": "x"}


class Kept:
    def __init__(self):
        self.values = []

    def log(self, name, value):
        self.values.append(value)


def test_what_is_kept_is_copied_out_of_the_memory_of_cuda_graphs(monkeypatch):
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    task, flow = Plain(), Flow()
    how = Compilation({"mode": "reduce-overhead"}, task, flow, torch.device("cuda"))
    task._link.metrics = log = Kept()
    step = how.around(Overwriting(task))
    found = []
    for count in range(6):
        flow.group_open = bool(count % 3)  # groups of three batches
        found.append(step(None))
    assert len(marks) == 2
    assert [value.item() for value in log.values] == [1, 2, 3, 4, 5, 6]
    assert [outputs["parts"][0].item() for outputs in found] == [1, 2, 3, 4, 5, 6]
    assert all(outputs["loss"].requires_grad for outputs in found)
    assert task._link.metrics is log


@pytest.mark.parametrize(
    ("how", "device", "copies"),
    [
        ({"mode": "reduce-overhead"}, "cuda", True),
        ({"mode": "max-autotune"}, "cuda", True),
        ({"options": {"triton.cudagraphs": True}}, "cuda", True),
        ({"backend": "cudagraphs"}, "cuda", True),
        ({"mode": "max-autotune-no-cudagraphs"}, "cuda", False),
        ({}, "cuda", False),
        ({"mode": "reduce-overhead"}, "cpu", False),
    ],
)
def test_where_there_are_cuda_graphs(how, device, copies):
    assert Compilation(how, Plain(), Flow(), torch.device(device))._overwrites is copies


def test_notes_are_dropped_with_a_step_that_failed(quiet):
    task = Plain()
    how = Compilation({}, task, Flow(), torch.device("cpu"))
    task._link.metrics = log = Kept()
    fail = [True]

    def step(batch):
        task._link.metrics.log("a", 1.0)
        if fail.pop():
            raise RuntimeError("once")

    noting = how.around(step)
    with pytest.raises(RuntimeError, match="once"):
        noting(None)
    assert task._link.metrics is log
    fail.append(False)
    noting(None)
    assert log.values == [1.0]


def test_notes_copy_tensors_and_nothing_else():
    notes, value = Notes(), torch.ones((), requires_grad=True)
    notes.log("a", value)
    notes.log("b", 2.0)
    (_, _, first, _), (_, _, second, _) = notes.calls
    assert first is not value
    assert not first.requires_grad
    assert second == 2.0


# --- the compiler stays out -----------------------------------------------------------------------


def test_nothing_is_imported_where_nothing_is_compiled():
    code = """
import sys, torch
torch.compile = torch.compiler.disable = None
import lightkit as lk
from tests.small import Net, loader
class Own(Net):
    def configure_optimizers(self):
        assert "torch._dynamo" not in sys.modules  # an optimizer imports it by itself
        return super().configure_optimizers()
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
lk.Trainer(**quiet).validate(Own(), loader())
lk.Trainer(max_epochs=1, **quiet).fit(Own(), loader(), loader(seed=2))
print("lightkit.compile_report" in sys.modules)
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "False"


# --- the real compiler ----------------------------------------------------------------------------


@pytest.fixture
def inductor():
    """The default backend in this process alone; else it starts processes that stay."""
    import torch._inductor.config as config

    with config.patch(compile_threads=1):
        yield


def test_inductor_gives_the_same_within_rounding(quiet, inductor):
    """The default backend, which compiles C++ in the first step."""
    options = {"drop_last": True, "max_epochs": 1}
    one = fitted(quiet, Logging, **options)
    other = fitted(quiet, Logging, compile=INDUCTOR, **options)
    for entry, wanted in zip(other[1], one[1], strict=True):
        assert entry == pytest.approx(wanted, rel=1e-4)
    for name, value in one[0].state_dict().items():
        torch.testing.assert_close(other[0].state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_inductor_goes_on_bit_for_bit(quiet, inductor):
    """The random numbers that its dropout draws in its own way are those of the checkpoint too."""
    options = {"drop_last": True, "compile": True}
    whole = fitted(quiet, Plain, max_epochs=2, **options)
    saver = lk.callbacks.ModelCheckpoint()
    how = {"enable_checkpointing": True, "callbacks": saver}
    fitted(quiet, Plain, max_epochs=1, **how, **options)
    task, own = Plain(), quiet(max_epochs=2, compile=True)
    history = own.fit(task, *loaders(drop_last=True), ckpt_path=saver.last_model_path)
    assert [entry["train_loss"] for entry in history] == [e["train_loss"] for e in whole[1]]
    for name, value in whole[0].state_dict().items():
        assert torch.equal(task.state_dict()[name], value)
