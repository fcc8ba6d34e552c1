"""Runs the one step again at which a fit failed, under anomaly detection, and says where.

What `failure` left is read. A step that raised is taken again with its own batch and the weights
before it. For a loss that was not finite the run goes on from the newest checkpoint before it, bit for
bit, to the step; all values that are made there are looked at. Nothing of the run is changed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightkit import checkpoint, rng, trials
from lightkit.announce import short
from lightkit.callbacks import ModelCheckpoint, ProgressBar
from lightkit.checkpoint.files import peek
from lightkit.data import move_to_device
from lightkit.errors import ConfigError, LightkitError, NonFiniteError, UsageError, some
from lightkit.explaining import DOORS, of_user, passes
from lightkit.export import tensors_of
from lightkit.failure import FILE, FOLDER, of_no_step
from lightkit.hooks import Callback
from lightkit.task import overrides
from lightkit.trainer import Trainer
from lightkit.watching import Values, unusual

if TYPE_CHECKING:
    from lightkit.task import TaskModule

_log = logging.getLogger("lightkit")
#: Of the frames between an operation and what looks at it, which only hide the user's.
_OF_MODE = ("lightkit.watching", "torch._compile", "torch._dynamo.eval_frame", "torch._ops")


def replay(
    run: str | Path,
    *,
    task: TaskModule | None = None,
    data: Any = None,
    changed: Mapping[str, Any] | None = None,
    debug: bool = False,
) -> bool:
    """Runs the step again at which a fit failed, and logs what was found.

    Args:
        run: The run folder, or the ``failure`` folder in it.
        task: The task; by default that of the run's ``config.yaml``. Its weights are replaced.
        data: The training loader or data module, likewise; needed where the batch is not there.
        changed: Dotted keys and values that win over ``config.yaml``, as in `load_config`.
        debug: Whether to stop in the debugger of Python where it fails.

    Returns:
        Whether the step failed again.

    Raises:
        UsageError: There is no failure, or not what is needed to run it again.
    """
    folder, known = _found(Path(run))
    with tempfile.TemporaryDirectory() as scratch, rng.preserved():
        trainer, task, data = _built(folder, known, task, data, changed or {})
        state = folder / "state.ckpt"
        own = known.get("batch_as_it_was") and state.exists()
        watch = _Watch(known["step"] - (not own), known["step"], debug)
        twin = _twin(trainer, watch, Path(scratch), known, own=bool(own))
        trials.reduce_callbacks(task)
        _say_start(known, state, own=bool(own))
        error: Exception | None = None
        with trials.silent(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                if own:
                    _with_batch(twin, watch, task, folder, known)
                else:
                    _with_data(twin, task, data, folder, known)
            except Exception as found:  # noqa: BLE001  what is looked for
                error = found
            finally:
                watch.close()
                vars(task).pop("configure_callbacks", None)
        if error is None:
            _log.info("replay:   the step went through; in the run: %s", known["exception"])
            return False
        _tell(error, watch, known, [str(warning.message) for warning in said])
        if debug:
            import pdb  # noqa: T100  what was asked for

            pdb.post_mortem(error.__traceback__)
        return True


def from_words(words: list[str], values: Mapping[str, str], *, debug: bool) -> int:
    """Runs ``lightkit replay``; returns 0 where the step failed again, else 1."""
    from lightkit.config import read_sources

    if len(words) != 1 or {key.partition(".")[0] for key in values} - {"task", "data"}:
        given = " ".join(["lightkit replay", *words])
        allowed = "lightkit replay RUN [--task module.Class] [--data module.Class] [--debug]"
        raise ConfigError(f"command line: wrong use\n  given:   {given}\n  allowed: {allowed}")
    folder, known = _found(Path(words[0]))
    if (folder.parent / "config.yaml").exists():
        return 0 if replay(folder, changed=values, debug=debug) else 1
    sources, made = read_sources([], values, "command line"), {}
    own = folder / "state.ckpt"
    start = own if own.exists() else known["checkpoint"]
    for name in ("task", "data"):
        with _no_training():
            kind = sources.find_class(name)
        if kind is None:
            continue
        arguments = sources.arguments(name, kind)
        if name == "task" and start:
            made[name] = kind.load_from_checkpoint(start, **arguments)
        else:
            made[name] = kind(**arguments)
    return 0 if replay(folder, debug=debug, **made) else 1


@contextlib.contextmanager
def _no_training() -> Iterator[None]:
    """Refuses fits, as a script that is imported for its class would begin its training anew."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise UsageError(
            "The module of the class trains when it is imported. Let its training stand below "
            "if __name__ == '__main__': and give the command again."
        )

    fit, Trainer.fit = Trainer.fit, refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.fit = fit  # type: ignore[method-assign]


# --- what is needed ------------------------------------------------------------------------------


def _found(run: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the folder of a failure, and what is known of it."""
    for folder in (run, run / FOLDER, *sorted(run.glob(f"{FOLDER}_rank_*"))):
        with contextlib.suppress(OSError, ValueError):
            return folder, json.loads((folder / FILE).read_text(encoding="utf-8"))
    raise UsageError(
        f"{run} holds no {FOLDER}/{FILE}. Give the folder of a run that failed; Ctrl-C and signals "
        f"leave none, nor do errors before the first step."
    )


def _built(
    folder: Path,
    known: Mapping[str, Any],
    task: TaskModule | None,
    data: Any,
    changed: Mapping[str, Any],
) -> tuple[Trainer, TaskModule, Any]:
    """Returns trainer, task and data: those given, else those of the run's configuration."""
    file, trainer = folder.parent / "config.yaml", None
    if file.exists():
        from lightkit.config import build, load_config

        built = build(load_config(file, overrides=changed))
        trainer, task = built.trainer, built.task if task is None else task
        data = built.data if data is None else data
    if task is None:
        raise UsageError(
            f"The run has no config.yaml, as it was started from Python. Name the class of its task: "
            f"lightkit replay {folder.parent} --task {known['task']}; or in Python: "
            f"lightkit.replay.replay({str(folder.parent)!r}, task=...)."
        )
    return trainer or Trainer(**known["trainer"]), task, data


def _twin(
    trainer: Trainer, watch: _Watch, scratch: Path, known: Mapping[str, Any], *, own: bool
) -> Trainer:
    """Returns a trainer like that of the run, which leaves nothing behind and stops at the step."""
    savers = (ModelCheckpoint, ProgressBar)
    others = [one for one in trainer._callbacks if not isinstance(one, savers)]
    kept = [one for one in others if not getattr(one, "needs_folder", False)]
    changed: dict[str, Any] = {"logger": False, "compile": False, "terminate_on_nan": True}
    changed |= {"min_steps": None, "min_epochs": None, "max_time": None, "detect_anomaly": False}
    changed |= {"devices": 1, "num_nodes": None, "strategy": "auto", "default_root_dir": scratch}
    if own:  # one batch, in the place of all up to it
        changed |= dict.fromkeys(("limit_train_batches", "limit_val_batches", "val_check_interval"))
        changed |= {"accumulate_grad_batches": 1, "overfit_batches": 0.0, "prefetch": False}
        changed |= {"max_epochs": known["epoch"] + 1, "max_steps": None}
    twin: Trainer = trials.like(Trainer, trainer, [*kept, watch], **changed)
    return twin


def _say_start(known: Mapping[str, Any], state: Path, *, own: bool) -> None:
    start = f"{known['stage']} batch {known['batch_idx']}, with the state {known.get('state')}"
    if not own:
        begin = state if state.exists() else known["checkpoint"]
        start = f"the run goes on from {short(Path(begin)) if begin else 'its beginning'}"
    place = "after step" if of_no_step(known) else "step"
    number = known["step"] + (place == "step")
    _log.info("replay:   %s %d (epoch %d): %s", place, number, known["epoch"] + 1, start)


class _Again:
    """A loader that gives one batch, in the place of all up to its own."""

    def __init__(self, batch: Any, number: int) -> None:
        self._batch, self._number = batch, number

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self._batch, self._number)


def _with_batch(
    twin: Trainer, watch: _Watch, task: TaskModule, folder: Path, known: Mapping[str, Any]
) -> None:
    """Takes the step again with the batch that is there."""
    batch = checkpoint.read_any(folder / "batch.pt")["batch"]
    saved = checkpoint.read_checkpoint(folder / "state.ckpt")
    index = known["batch_idx"]
    path = twin.default_root_dir / "state.ckpt"
    watch.placed = True  # the batch went through all transfers
    if known["stage"] != "training":
        watch.random = checkpoint.random_states(saved, 0)
        checkpoint.write_checkpoint(saved, path)
        loaders = [_Again(batch, 1) for _ in range(known["dataloader_idx"] + 1)]
        counted = twin.session.state  # which an evaluation does not take from a checkpoint
        counted.global_step, counted.epoch = known["step"], known["epoch"]
        twin.validate(task, loaders, ckpt_path=path, verbose=False)
        return
    saved["loop"] |= {"batch_idx": index, "pending_validation": ""}
    saved["data"] = {}
    saved["flow"] |= {"accumulate": 1, "stop_reason": None}
    saved.pop("datamodule", None)
    checkpoint.write_checkpoint(saved, path)
    twin.fit(task, _Again(batch, index + 1), [], ckpt_path=path)


def _with_data(
    twin: Trainer, task: TaskModule, data: Any, folder: Path, known: Mapping[str, Any]
) -> None:
    """Goes on from the newest checkpoint before the step, or from the start, up to the step."""
    own = folder / "state.ckpt"
    start = own if own.exists() else known["checkpoint"] and Path(known["checkpoint"])
    if known["processes"] > 1:
        raise UsageError(
            f"The run had {known['processes']} processes, which only all of them can repeat, and its "
            f"batch is not there: {known['left_out'].get('batch.pt')}."
        )
    if start and not (start.exists() and peek(start)["lightkit"]["global_step"] <= known["step"]):
        raise UsageError(f"{start} is no longer the checkpoint from which the step was reached.")
    if not start and not (folder.parent / "config.yaml").exists():
        raise UsageError(
            f"The run failed before its first checkpoint, and it has no config.yaml with which it "
            f"could begin anew. Train once more with seed={known['seed']} and detect_anomaly=True."
        )
    if data is None and not overrides(task, "train_dataloader"):
        raise UsageError(
            f"The batch is not there ({known['left_out'].get('batch.pt')}), so the run goes on up to "
            f"the step and needs its data: lightkit replay {folder.parent} --task {known['task']} "
            f"--data module.Class; or in Python lightkit.replay.replay(..., data=loader)."
        )
    path = None
    if start:  # a copy: a fit that goes on from the file itself would go on in its folder
        path = twin.default_root_dir / start.name
        (shutil.copytree if start.is_dir() else shutil.copy)(start, path)
    twin.fit(task, data, ckpt_path=path)


# --- what is found -------------------------------------------------------------------------------


class _Watch(Callback):
    """Looks at the values of the step, and ends it where its loss or its weights are not finite."""

    def __init__(self, first: int, last: int, debug: bool) -> None:
        self._first, self._last, self._debug = first, last, debug
        self._stack = contextlib.ExitStack()
        self._values: Values | None = None
        self.found: list[str] = []
        self.placed = False
        self.random: dict[str, Any] | None = None

    def close(self) -> None:
        """Ends the looking."""
        self._stack.close()
        if self._values is not None:
            self.found, self._values = list(self._values.found.values()), None

    def on_train_start(self, trainer: Any, task: TaskModule) -> None:
        """Leaves a batch of the capsule as it is, but for its device."""
        if self.placed:
            trainer._run.transfer = lambda batch, _: move_to_device(batch, task.device)

    def on_validation_start(self, trainer: Any, task: TaskModule) -> None:
        """Likewise, and puts back random states, which an evaluation does not."""
        if self.random is not None:
            self.on_train_start(trainer, task)
            rng.set_rng_state(self.random)

    def on_train_batch_start(
        self, trainer: Any, task: TaskModule, batch: Any, batch_idx: int
    ) -> None:
        """Begins to look."""
        if trainer.global_step < self._first:
            return
        named = [(name, p.detach()) for name, p in task.named_parameters()]
        bad = [name for name, p in named if unusual(p)]
        if bad:
            raise NonFiniteError(f"the parameters were not finite before the step: {some(bad)}")
        self._values = Values(task, raising=self._debug)
        if any(unusual(t) for t in tensors_of(batch)):
            self._values.found["batch"] = f"the batch itself holds {unusual(*tensors_of(batch))}"
        self._stack.enter_context(torch.autograd.set_detect_anomaly(True))
        self._stack.enter_context(self._values)

    def on_before_backward(self, trainer: Any, task: TaskModule, loss: Tensor) -> None:
        """Ends a step whose loss is not finite."""
        if self._values is not None and (what := unusual(loss.detach())):
            found = "\n".join(["", *self._values.found.values()])
            raise NonFiniteError(f"the loss is {what}{found}")

    def on_train_batch_end(
        self, trainer: Any, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at what the step made of the weights."""
        if self._values is None:
            return
        self.close()
        named = [(name, p) for name, p in task.named_parameters()]
        bad = [name for name, p in named if unusual(p.detach())]
        if bad:
            wrong = [name for name, p in named if p.grad is not None and unusual(p.grad)]
            why = f"the gradients of {some(wrong)}" if wrong else "finite gradients"
            step = f"the update of step {trainer.global_step}"
            raise NonFiniteError(f"{step} made {some(bad)} nan or inf, from {why}")
        if trainer.global_step > self._last:
            trainer.stop("the step is over")


def _tell(error: Exception, watch: _Watch, known: Mapping[str, Any], said: list[str]) -> None:
    """Says how the step failed; raises the error itself where the step was not reached."""
    trace = error.__traceback__
    while trace is not None and not passes(trace.tb_frame, DOORS):
        trace = trace.tb_next
    if trace is None:
        if (type(error).__name__, str(error)) != (known["exception"], known["message"]):
            raise error
        _log.info("found:    the same error again, out of no step")  # but of a hook, a loader
        trace = error.__traceback__
        while trace is not None and trace.tb_next and not of_user(trace.tb_next.tb_frame):
            trace = trace.tb_next
        assert trace is not None
    last = inner = trace
    while inner.tb_next is not None:
        inner = inner.tb_next
        last = last if inner.tb_frame.f_globals.get("__name__") in _OF_MODE else inner
    last.tb_next = None  # the place that is shown, and where the debugger stops
    for text in said:  # of anomaly mode: where the forward was whose gradient is nan
        head, found, lines = text.partition(" Traceback of forward call that caused the error:\n")
        if found:
            lines = lines.rpartition("in train_step\n")[2].partition("\n")[2].partition(" (Trig")[0]
            _log.info("found:    %s The forward of it:\n%s", head, lines.rstrip())
    if isinstance(error, LightkitError):
        _log.info("found:    %s", error)
        return
    if any(map(of_user, (frame for frame, _ in walk_tb(trace.tb_next)))):
        lines = "".join(traceback.format_tb(trace.tb_next))
        _log.info("Traceback from your code on:\n%s", lines.rstrip())
    _log.info("%s", "".join(traceback.format_exception_only(error)).rstrip())
    for sentence in watch.found:
        _log.info("found:    %s", sentence)
