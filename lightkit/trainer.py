"""`Trainer`: decisions, entry points, opening and closing a run. It contains no loop."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightkit import console, rng
from lightkit.data import DataModule
from lightkit.distributed import Ranks, Strategy, launched
from lightkit.errors import NotRunningError, UsageError
from lightkit.flow import Flow
from lightkit.history import History
from lightkit.hooks import Callback
from lightkit.limits import make_limits
from lightkit.loggers.base import Logger
from lightkit.options import Options, known_names, listed
from lightkit.precision import resolve_precision
from lightkit.session import Session
from lightkit.state import Stage
from lightkit.task import TaskModule
from lightkit.view import TrainerView

if TYPE_CHECKING:
    from lightkit.run import EvalRun, FitRun

_log = logging.getLogger("lightkit")
_FIT_NEEDS = {
    "training_step": "returns the loss of a batch",
    "configure_optimizers": "returns the optimizer",
}


class Trainer(TrainerView):
    """Trains, validates, tests and predicts. It holds decisions; nothing is opened before a call.

    All arguments are keywords, and an unknown one is an error that names the nearest valid one.

    Args:
        max_epochs: Epochs to train; -1 for no limit. Without it, ``max_steps`` and ``max_time``: 10.
        min_epochs: Requests to stop wait for so many epochs.
        max_steps: Optimizer steps to train; None or -1 for no limit.
        min_steps: Requests to stop wait for so many steps.
        max_time: Time to train: "DD:HH:MM:SS", "90 min", a timedelta, or a dict of its arguments.
        accelerator: "auto" (CUDA, else the CPU), "cpu", "gpu", "cuda" or "mps".
        devices: 1, "auto", or a list with the index of one device. Under torchrun 1 means one for
            each process, and another number must be that of the processes on this machine.
        gpus: 0 for the CPU, 1 for one GPU (for each process), or a list with the index of one.
        num_nodes: Machines, where torchrun shall be checked to have started on so many.
        strategy: "auto" (one device, or "ddp" under torchrun), "ddp", "fsdp", "hsdp",
            "ddp_find_unused_parameters_true", or an object such as ``DDPStrategy(...)``.
        sync_batchnorm: Whether batch norms compute their means over all ranks; GPUs only.
        use_distributed_sampler: False where the loaders give each rank its own share by themselves.
        precision: 32, "bf16-mixed", "16-mixed", "bf16-true" or 64.
        accumulate_grad_batches: Batches per optimizer step; the last group of an epoch may be
            shorter and is weighted right.
        gradient_clip_val: Clip gradients to this; the norm before is logged as ``grad_norm``.
        gradient_clip_algorithm: "norm" (of all gradients together) or "value" (of each element).
        limit_train_batches: Training batches per epoch: a number, or a fraction as a float.
        limit_val_batches: The same for each validation loader; 0 for no validation.
        limit_test_batches: The same for each test loader.
        limit_predict_batches: The same for each loader to predict.
        val_check_interval: When to validate within an epoch: a number of batches, a fraction of
            the epoch, "500 steps" or "10 min". Default: at its end.
        check_val_every_n_epoch: Validate in every so many epochs; None counts the interval over
            epochs.
        num_sanity_val_steps: Validation batches tried before a fresh fit, on a copy of the random
            states; default 2, -1 for all, 0 for none.
        log_every_n_steps: Steps per row of the loggers; a row holds means over them.
        callbacks: A callback or a list of them.
        logger: True for TensorBoard and metrics.jsonl, False for none, a logger, or a list.
        enable_progress_bar: Whether progress is shown.
        enable_checkpointing: Whether checkpoints are written by default.
        enable_model_summary: Whether a table of the model is shown.
        default_root_dir: Where run folders go; default "runs".
        fast_dev_run: True or a number of batches: one epoch of so many, nothing is written.
        overfit_batches: Train on the same few batches: a number, or a fraction as a float.
        reload_dataloaders_every_n_epochs: Make the loaders anew every so many epochs.
        deterministic: True for deterministic algorithms only, "warn" to be told where there are
            none.
        benchmark: Whether cuDNN tries algorithms for the fastest.
        detect_anomaly: Whether autograd looks for the origin of nan; slow.
        fused: None runs Adam, AdamW and SGD fused where that was measured faster; False never (the
            bits of a plain loop); True always.
        terminate_on_nan: Whether a loss that is not finite ends the run.
        seed: Seeds everything when the trainer is made.

    Raises:
        ConfigError: For arguments that cannot work.
    """

    #: The resolved configuration, where a command line made this trainer; fit saves it.
    config_text: str | None = None
    #: Whether the seed was drawn there, so that a run may go on with another one.
    seed_drawn: bool = False

    @known_names
    def __init__(
        self,
        *,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int | None = None,
        min_steps: int | None = None,
        max_time: str | timedelta | dict[str, int] | None = None,
        accelerator: str = "auto",
        devices: int | str | list[int] = "auto",
        gpus: int | list[int] | None = None,
        num_nodes: int | None = None,
        strategy: str | Strategy = "auto",
        sync_batchnorm: bool = False,
        use_distributed_sampler: bool = True,
        precision: str | int = "32",
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        val_check_interval: int | float | str | None = None,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = None,
        log_every_n_steps: int = 50,
        callbacks: list[Callback] | Callback | None = None,
        logger: bool | Logger | list[Logger] | None = True,
        enable_progress_bar: bool = True,
        enable_checkpointing: bool = True,
        enable_model_summary: bool = True,
        default_root_dir: str | Path | None = None,
        fast_dev_run: bool | int = False,
        overfit_batches: int | float = 0.0,
        reload_dataloaders_every_n_epochs: int = 0,
        deterministic: bool | Literal["warn"] | None = None,
        benchmark: bool | None = None,
        detect_anomaly: bool = False,
        fused: bool | None = None,
        terminate_on_nan: bool = True,
        seed: int | None = None,
    ) -> None:
        self.options = Options(**{k: v for k, v in locals().items() if k != "self"})
        self.limits, self.default_epochs = make_limits(self.options)
        self._callbacks = listed(callbacks, Callback, "callbacks")
        self._loggers: list[Logger]
        if logger is True:
            from lightkit.loggers import JSONLLogger, TensorBoardLogger

            self._loggers = [TensorBoardLogger(), JSONLLogger()]
        else:
            self._loggers = [] if logger is False else listed(logger, Logger, "logger")
        self.session = Session(precision=resolve_precision(precision, "cpu"))
        # Until a call meets the others: what is_global_zero and the like say before it.
        self.session.strategy.ranks = Ranks(launched())
        if seed is not None:
            rng.seed_everything(seed, verbose=False)

    # --- entry points ----------------------------------------------------------------------------

    def fit(
        self,
        model: TaskModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: str | Path | None = None,
    ) -> History:
        """Trains a task.

        Args:
            model: The task.
            train_dataloaders: A DataLoader or any iterable of batches; or a data module.
            val_dataloaders: One loader, a list or a dict of loaders.
            datamodule: An object with ``train_dataloader`` and the like, instead of loaders.
            ckpt_path: Continue from a checkpoint: a path, "last", "best", or "auto" for the newest
                run of this task (anew if there is none; a finished run is left alone).

        Returns:
            The history: one dict per epoch.

        Raises:
            KeyboardInterrupt: After Ctrl-C, once the state is saved; in a notebook fit returns.
            SystemExit: Likewise after another signal, with the exit code 128 + its number.
        """
        from lightkit import loops

        with self._open_fit(
            model, train_dataloaders, val_dataloaders, datamodule, ckpt_path
        ) as run:
            loops.fit(run)
        return self.session.history

    def validate(
        self,
        model: TaskModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: Any = None,
    ) -> list[dict[str, float]]:
        """Runs ``validation_step`` over each loader.

        Args:
            model: The task; default: that of the last call, with the best weights that its fit saved.
            dataloaders: One loader, a list or a dict of loaders; or a data module.
            ckpt_path: Load the weights of this checkpoint before: a path, "last" or "best".
            verbose: Whether the results are shown.
            datamodule: An object with ``val_dataloader``, instead of loaders.

        Returns:
            One dict of means for each loader.
        """
        return self._evaluate("validation", model, dataloaders, datamodule, ckpt_path, verbose)

    def test(
        self,
        model: TaskModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: Any = None,
    ) -> list[dict[str, float]]:
        """Runs ``test_step`` (by default ``validation_step``) over each loader; see `validate`."""
        return self._evaluate("test", model, dataloaders, datamodule, ckpt_path, verbose)

    def predict(
        self,
        model: TaskModule | None = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        return_predictions: bool = True,
        ckpt_path: str | Path | None = None,
    ) -> list[Any]:
        """Runs ``predict_step`` (by default ``forward``) over each loader.

        Args:
            model: The task; default: that of the last call.
            dataloaders: One loader, a list or a dict of loaders; or a data module.
            datamodule: An object with ``predict_dataloader``, instead of loaders.
            return_predictions: Whether the outputs are kept and returned. With several ranks all of
                them get all outputs, on the CPU; `callbacks.PredictionWriter` writes files instead.
            ckpt_path: Load the weights of this checkpoint before.

        Returns:
            The outputs of all batches in order; for several loaders a list of such lists.
        """
        from lightkit.evaluation import evaluate
        from lightkit.predictions import outputs_of_all

        given = (model, dataloaders, datamodule, ckpt_path)
        with self._open_eval("predict", *given, keep=return_predictions) as run:
            evaluate(run)
            outputs = outputs_of_all(run)
        return outputs[0] if len(outputs) == 1 else outputs

    def stop(self, reason: str) -> None:
        """Asks the fit to end at the next step, once the minimum of epochs and steps is done.

        Args:
            reason: What the last lines say.
        """
        self.session.flow.ask(reason)

    def save_checkpoint(
        self,
        filepath: str | Path,
        weights_only: bool = False,
        *,
        background: bool = False,
        then: Callable[[], None] | None = None,
        failed: Callable[[Exception], None] | None = None,
        exact: bool = True,
    ) -> Path:
        """Writes a checkpoint now; only at the end of a step, while fit runs.

        With several processes all of them must call it; rank zero writes the file.

        Args:
            filepath: The file; an existing one is replaced as a whole.
            weights_only: Leave out what is only needed to go on with the run.
            background: Copy the state and return, while a thread writes the file.
            then: Called when the file is complete, on rank zero; in the background by that thread.
            failed: Gets the error of a background save. Without it the next such call or the end
                of the fit raises it.
            exact: False saves the last completed step, also in the middle of the next one.

        Raises:
            CheckpointError: The file cannot be written, also not after a second.
            NonFiniteError: A loss or a parameter is nan or inf.
            UsageError: Between the batches of one optimizer step.
            NotRunningError: Outside fit.
        """
        from lightkit import saving
        from lightkit.run import FitRun

        run = self._run
        if not isinstance(run, FitRun):
            raise NotRunningError(
                "trainer.save_checkpoint works while fit runs. Afterwards the files of the run "
                "are in its folder; torch.save(task.state_dict(), path) saves weights alone, and "
                "of a sharded model `lightkit export` makes one file."
            )
        if run.flow.group_open and exact:
            raise UsageError(
                "trainer.save_checkpoint was called between the batches of one optimizer step, "
                "where a run cannot be continued. Call it in on_save_point."
            )
        how: dict[str, Any] = {"background": background, "then": then, "failed": failed}
        return saving.save(self, run, filepath, weights_only=weights_only, exact=exact, **how)

    def set_accumulation(self, batches: int) -> None:
        """Sets the batches per optimizer step from the next epoch on."""
        if self.session.plan is not None:
            from lightkit import opening

            opening.require_automatic(self.session.plan, batches)
        self.session.flow.accumulate = batches

    # --- opening and closing a run ---------------------------------------------------------------

    @contextlib.contextmanager
    def _open_fit(
        self, task: TaskModule, train: Any, val: Any, datamodule: Any, ckpt_path: Any
    ) -> Iterator[FitRun]:
        from lightkit import announce, opening, places, resuming, saving, signals

        console.install(launched().rank)
        train, datamodule = opening.as_datamodule(train, datamodule)
        opening.check_task(task, _FIT_NEEDS)
        session = Session(task=task, datamodule=datamodule, stage=Stage.FIT, given_train=train)
        session.flow.accumulate = self.options.accumulate_grad_batches
        session.loggers = [] if self.options.fast_dev_run else [*self._loggers]
        opening.meet(self, session)
        start = resuming.find(self, session, ckpt_path)
        # Signals are watched until all is closed: an impatient second one must not break that off.
        with (
            contextlib.closing(start),
            announce.the_end(self, session),
            contextlib.ExitStack() as watch,
            self._opened(session),
        ):
            self._run = run = opening.build_fit(self, session, train, val)
            resumed = resuming.restore(self, run, start)
            if not self.options.fast_dev_run:
                places.open_run(self, run, start)
            if resumed is None:
                session.loaded_at = run.state.epoch
                rng.for_rank(session.strategy.data_ranks[0])  # dropout differs over ranks
            elif run.reload is not None and run.state.batch_idx:
                run.reload(run)  # those that were made before know nothing of the epoch
            run.plan.check_horizon(*announce.planned(self))
            announce.say_start(self, run, resumed)
            # A full collection costs a tenth of a second with all that is imported; what is there
            # now stays for the whole fit, so later ones need not look at it.
            gc.collect()
            gc.freeze()
            if run.agree is not None:
                run.agree.reach("the time at which the fit begins")  # a collective
            run.flow.validated_at = run.flow.clock()
            if self.limits.seconds is not None:
                run.flow.deadline = run.flow.clock() + self.limits.seconds - run.state.seconds
            try:
                watch.enter_context(signals.watching(run.flow))
                yield run
            except BaseException:
                run.writer.close(failed=True)
                raise
            else:
                saving.finish(run)
            finally:
                gc.unfreeze()

    @contextlib.contextmanager
    def _open_eval(
        self,
        stage: str,
        task: TaskModule | None,
        given: Any,
        datamodule: Any,
        ckpt_path: Any,
        keep: bool = False,
    ) -> Iterator[EvalRun]:
        from lightkit import opening, places

        given, datamodule = opening.as_datamodule(given, datamodule)
        old = self.session
        task, ckpt_path = opening.task_of(self, stage, task, ckpt_path)
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
        opening.meet(self, session)
        path = places.find_weights(self, session, ckpt_path)
        with self._opened(session):
            self._run = run = opening.build_eval(self, session, stage, given, keep=keep)
            if path is not None:
                places.load_weights(session, path)
            session.strategy.before_evaluation(task)
            yield run

    @contextlib.contextmanager
    def _opened(self, session: Session) -> Iterator[None]:
        """Sets up what every entry point needs, and closes it whatever happens."""
        from lightkit import opening

        if self.session.stage is not None:
            raise UsageError(
                f"This trainer is in the middle of {self.session.stage.value}, so it cannot begin "
                f"{session.stage.value}. Use another Trainer there, or begin it afterwards."  # type: ignore[union-attr]
            )
        console.install(launched().rank)
        link, failed = session.task._link, True
        held = link.held()  # another trainer may be in the middle of a call with this task
        try:
            link.trainer = self
            opening.equip(self, session)
            self.session = session
            if isinstance(session.datamodule, DataModule):
                session.datamodule.trainer = self
            opening.set_up(session)
            with opening.numerics(self.options):
                yield
            failed = False
        except BaseException as exception:
            ranks = session.strategy.ranks
            error = ranks.explain(exception)  # torch cannot say which process is missing
            for hook in () if session.hooks is None else session.hooks.on_exception:
                _shielded(hook, error)
            ranks.failed(error)
            if error is not exception:
                raise error from exception
            raise
        finally:
            link.hold(self)  # the trainer stays known after its call
            session.strategy.end()
            with contextlib.ExitStack() as stack:
                if session.hooks is None or held[1] is not None:
                    stack.callback(link.hold, *held)
                self._close(session, failed)

    def _close(self, session: Session, failed: bool) -> None:
        """Closes everything, and lets nothing of it hide the exception that may be under way."""
        assert session.stage is not None
        stage, datamodule = str(session.stage.value), session.datamodule
        closers: list[tuple[Callable[..., Any], Any]] = []
        if session.hooks is not None:  # else nothing was set up
            if hasattr(datamodule, "teardown"):
                closers.append((datamodule.teardown, stage))
            closers += [(hook, stage) for hook in session.hooks.teardown]
        if self._run is not None:
            closers.insert(0, (lambda run: run.close_feeds(), self._run))
        self._run, session.stage = None, None
        with contextlib.ExitStack() as stack:
            for logger in reversed(self._loggers):
                # In an evaluation it may be open for the fit of another trainer that shares it.
                end = logger.close if stage == Stage.FIT.value else logger.flush
                stack.callback(_shielded, end) if failed else stack.callback(end)
            for close, argument in reversed(closers):
                if failed:
                    stack.callback(_shielded, close, argument)
                else:
                    stack.callback(close, argument)

    def _evaluate(
        self, stage: str, task: Any, given: Any, datamodule: Any, ckpt_path: Any, verbose: bool
    ) -> list[dict[str, float]]:
        from lightkit.evaluation import evaluate

        with self._open_eval(stage, task, given, datamodule, ckpt_path) as run:
            evaluate(run)
        results = run.metrics.eval_results(len(run.loaders))
        for row in results if verbose else ():
            text = "  ".join(f"{name} {value:.5g}" for name, value in row.items())
            _log.info("%s: %s", stage, text or "nothing was logged")
        return results


def _shielded(call: Callable[..., Any], *arguments: Any) -> None:
    """Calls while an exception is under way, which must stay the one that is seen."""
    try:
        call(*arguments)
    except Exception as error:  # noqa: BLE001
        _log.error("and in closing after the error: %s: %s", type(error).__name__, error)
