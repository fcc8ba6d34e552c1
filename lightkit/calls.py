"""One call of an entry point, from its opening to its closing, whatever happens in between."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.nn.parameter import is_lazy

from lightkit import (
    announce,
    console,
    explaining,
    failure,
    opening,
    places,
    resuming,
    rng,
    saving,
    signals,
)
from lightkit.data import DataModule
from lightkit.distributed import launched
from lightkit.errors import UsageError
from lightkit.flow import Flow
from lightkit.hooks import Callback, listens
from lightkit.limits import make_limits
from lightkit.options import listed
from lightkit.session import Session
from lightkit.state import Stage
from lightkit.task import TaskModule

if TYPE_CHECKING:
    from lightkit.resuming import Start
    from lightkit.run import EvalRun, FitRun
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")

#: A fit of no more optimizer steps and numbers in parameters than these needs no collection of
#: garbage before it; a search over hyperparameters makes hundreds of such fits.
SMALL_STEPS, SMALL_SIZE = 1000, 1_000_000


@contextlib.contextmanager
def prepare_fit(
    trainer: Trainer, task: TaskModule, data: tuple[Any, ...], ckpt_path: Any, **own: int | None
) -> Iterator[tuple[FitRun, Start, contextlib.ExitStack]]:
    """Builds a fit, of which nothing is written and nothing restored yet.

    Yields the run, where it begins, and what is closed after everything else.
    """
    console.install(launched().rank)
    train, val, datamodule = data
    train, datamodule = opening.as_datamodule(train, datamodule)
    adopt(trainer)
    opening.check_task(task, _needs_of_fit(trainer, task))
    session = Session(task=task, datamodule=datamodule, stage=Stage.FIT, given_train=train)
    session.limits = make_limits(trainer.options, **own)
    session.bare = own["max_steps"] is not None
    session.flow.accumulate = trainer.options.accumulate_grad_batches
    session.loggers = [] if trainer.options.fast_dev_run else [*trainer._loggers]
    opening.meet(trainer, session)
    start = resuming.find(trainer, session, ckpt_path)
    with (
        contextlib.closing(start),
        announce.the_end(trainer, session),
        contextlib.ExitStack() as last,
        _opened(trainer, session),
    ):
        trainer._run = run = opening.build_fit(trainer, session, train, val)
        yield run, start, last


@contextlib.contextmanager
def open_fit(
    trainer: Trainer, task: TaskModule, data: tuple[Any, ...], ckpt_path: Any, **own: int | None
) -> Iterator[FitRun]:
    """Opens a fit; see `Trainer.fit`. ``own`` has the limits of this call, or None for each."""
    with prepare_fit(trainer, task, data, ckpt_path, **own) as (run, start, last):
        session = trainer.session
        resumed = resuming.restore(trainer, run, start)
        planned = announce.planned(trainer)
        run.plan.check_horizon(*planned)
        if resumed is None and trainer.options.rehearse is not False:
            from lightkit import rehearsal

            rehearsal.before(trainer, run, own, planned[0])
        if not trainer.options.fast_dev_run:
            places.open_run(trainer, run, start)
        if resumed is None:
            session.loaded_at = run.state.epoch
            rng.for_rank(session.strategy.data_ranks[0])  # dropout differs over ranks
        elif run.reload is not None and run.state.batch_idx:
            run.reload(run)  # those that were made before know nothing of the epoch
        announce.say_start(trainer, run, resumed)
        try:
            _collect_garbage(run, 0 if trainer.rehearsing else planned[0])
            if run.agree is not None:
                run.agree.reach("the time at which the fit begins")  # a collective
            run.flow.validated_at = run.flow.clock()
            if trainer.limits.seconds is not None:
                run.flow.deadline = run.flow.clock() + trainer.limits.seconds - run.state.seconds
            # Until all is closed: an impatient second signal must not break that off.
            last.enter_context(signals.watching(run.flow))
            yield run
        except BaseException:
            run.writer.close(failed=True)
            raise
        else:
            saving.finish(run)
            session.ended = run
        finally:
            gc.unfreeze()


def _collect_garbage(run: FitRun, steps: int | None) -> None:
    """Collects what earlier calls left behind, unless the fit is small.

    A full collection costs a tenth of a second with all that is imported; what is there after it
    stays for the whole fit, so later ones need not look at it.
    """
    if steps is None or steps > SMALL_STEPS or not is_small(run.task):
        gc.collect()
        gc.freeze()


def is_small(task: TaskModule) -> bool:
    """Tells whether a task is on the CPU and has few parameters."""
    own = [p for p in task.parameters() if not is_lazy(p)]
    return sum(p.numel() for p in own) <= SMALL_SIZE and all(p.device.type == "cpu" for p in own)


def adopt(trainer: Trainer) -> None:
    """Takes over how the user changed ``trainer.callbacks`` since the last call began."""
    session = trainer.session
    now, before = session.callbacks, session.assembled
    kept = [c for c in trainer._callbacks if c in now or c not in before]
    added = [c for c in now if c not in before and c not in kept]
    trainer._callbacks = listed([*kept, *added], Callback, "callbacks")
    session.assembled = tuple(now)


def _needs_of_fit(trainer: Trainer, task: Any) -> dict[str, str]:
    """Returns the methods that a fit needs, and why; all of a loss may be what is added to it."""
    needs = {"configure_optimizers": "returns the optimizer"}
    if any(listens(one, "on_loss") for one in (task, *trainer._callbacks, *trainer._handlers)):
        return needs
    return {"training_step": "returns the loss of a batch", **needs}


@contextlib.contextmanager
def open_evaluation(
    trainer: Trainer,
    stage: str,
    task: TaskModule | None,
    given: Any,
    datamodule: Any,
    ckpt_path: Any,
    keep: bool = False,
) -> Iterator[EvalRun]:
    """Opens an evaluation; ``keep`` collects the outputs of its steps."""
    adopt(trainer)
    given, datamodule = opening.as_datamodule(given, datamodule)
    old = trainer.session
    task, ckpt_path = opening.task_of(trainer, stage, task, ckpt_path)
    needs = {"validation": "validation_step", "test": "validation_step"}.get(stage)
    own_test = stage == "test" and type(task).test_step is not TaskModule.test_step
    opening.check_task(task, {needs: f"{stage} runs"} if needs and not own_test else {})
    if datamodule is None and given is None:
        datamodule = old.datamodule
    entry = Stage("validate" if stage == "validation" else stage)
    # What the last fit left to be read stays: its counters, history, optimizers, folder.
    session = replace(
        old,
        task=task,
        datamodule=datamodule,
        stage=entry,
        flow=Flow(signal=old.flow.signal),
        loggers=[],
        hooks=None,
    )
    opening.meet(trainer, session)
    path = places.find_weights(trainer, session, ckpt_path)
    with _opened(trainer, session):
        trainer._run = run = opening.build_eval(trainer, session, stage, given, keep=keep)
        if path is not None:
            places.load_weights(session, path)
        session.strategy.before_evaluation(task)
        yield run


@contextlib.contextmanager
def _opened(trainer: Trainer, session: Session) -> Iterator[None]:
    """Sets up what every entry point needs, and closes it whatever happens."""
    if trainer.session.stage is not None:
        raise UsageError(
            f"This trainer is in the middle of {trainer.session.stage.value}, so it cannot begin "
            f"{session.stage.value}. Use another Trainer there, or begin it afterwards."  # type: ignore[union-attr]
        )
    console.install(launched().rank)
    link, failed = session.task._link, True
    held = link.held()  # another trainer may be in the middle of a call with this task
    try:
        link.trainer = trainer
        opening.equip(trainer, session)
        trainer.session = session
        if isinstance(session.datamodule, DataModule):
            session.datamodule.trainer = trainer
        opening.set_up(session, trainer.options.memory_format)
        with opening.numerics(trainer.options):
            yield
        failed = False
    except BaseException as exception:
        ranks = session.strategy.ranks
        error = ranks.explain(exception)  # torch cannot say which process is missing
        if session.compilation is not None:
            error = session.compilation.explained(error)
        explaining.explain(error, session.task)
        failure.leave(trainer, session, error)
        for hook in () if session.hooks is None else session.hooks.on_exception:
            _shielded(hook, error)
        ranks.failed(error)
        if error is not exception:
            raise error from exception
        raise
    finally:
        link.hold(trainer)  # the trainer stays known after its call
        session.strategy.end()
        if session.compilation is not None:
            session.compilation.end()
            session.compilation = None
        with contextlib.ExitStack() as stack:
            if session.hooks is None or held[1] is not None:
                stack.callback(link.hold, *held)
            _close(trainer, session, failed)


def _close(trainer: Trainer, session: Session, failed: bool) -> None:
    """Closes everything, and lets nothing of it hide the exception that may be under way."""
    assert session.stage is not None
    stage, datamodule = str(session.stage.value), session.datamodule
    closers: list[tuple[Callable[..., Any], Any]] = []
    if session.hooks is not None:  # else nothing was set up
        if hasattr(datamodule, "teardown"):
            closers.append((datamodule.teardown, stage))
        closers += [(hook, stage) for hook in session.hooks.teardown]
    if trainer._run is not None:
        closers.insert(0, (lambda run: run.close_feeds(), trainer._run))
    trainer._run, session.stage = None, None
    with contextlib.ExitStack() as stack:
        for logger in reversed(trainer._loggers):
            # In an evaluation it may be open for the fit of another trainer that shares it.
            end = logger.close if stage == Stage.FIT.value else logger.flush
            stack.callback(_shielded, end) if failed else stack.callback(end)
        for close, argument in reversed(closers):
            if failed:
                stack.callback(_shielded, close, argument)
            else:
                stack.callback(close, argument)


def _shielded(call: Callable[..., Any], *arguments: Any) -> None:
    """Calls while an exception is under way, which must stay the one that is seen."""
    try:
        call(*arguments)
    except Exception as error:  # noqa: BLE001
        _log.error("and in closing after the error: %s: %s", type(error).__name__, error)
