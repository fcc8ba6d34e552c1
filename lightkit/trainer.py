"""`Trainer`: decisions and entry points. It contains no loop; ``calls.py`` opens and closes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import Never

from lightkit import rng
from lightkit.distributed import Ranks, Strategy, launched
from lightkit.errors import NotRunningError, UsageError
from lightkit.history import History
from lightkit.hooks import Callback
from lightkit.limits import make_limits
from lightkit.loggers.base import Logger
from lightkit.options import Options, chosen_loggers, known_names, listed, refuse_unknown
from lightkit.precision import resolve_precision
from lightkit.session import Session
from lightkit.task import TaskModule
from lightkit.view import TrainerView

if TYPE_CHECKING:
    from lightkit.planned import Plan

_log = logging.getLogger("lightkit")


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
            states; -1 for all, 0 for none. Default: 2, or none where the fit was rehearsed.
        rehearse: Whether a fresh fit is tried before, in about two seconds on a copy of everything:
            two batches, a validation, a checkpoint. None leaves it out where the fit has no more than
            100 steps of a small model on the CPU, and with ``overfit_batches``.
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
        fused: None runs Adam, AdamW and SGD fused where that was measured to be never slower (on
            the CPU by threads and sizes); False never (the bits of a plain loop); True always.
        compile: True compiles ``training_step`` with ``torch.compile``, "regional" the repeated
            blocks of the model, a dict gives torch.compile's arguments (mode, backend, dynamic,
            fullgraph, options) and perhaps ``"regional": True``. Evaluations are not compiled.
        memory_format: "channels_last" keeps the 4-D weights of the task and the 4-D tensors of
            batches so; None leaves them as they are.
        prefetch: None brings the next batch to a GPU while a step runs, where that changes no number;
            False never; True also where reading a batch draws; "epoch" lets the workers of the next
            epoch begin before the validation.
        terminate_on_nan: Whether a loss that is not finite ends the run.
        hints: Whether it is told what is slow and what does not learn; a list names what is not told.
        seed: Seeds everything when the trainer is made.
        profiler: "simple" shows where the time went, in a table at the end; "trace" records a few
            steps with ``torch.profiler``; or ``lk.callbacks.SimpleProfiler()``,
            ``lk.callbacks.TraceProfiler(steps=(10, 15))``.

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
        rehearse: bool | None = None,
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
        compile: bool | str | dict[str, Any] = False,  # noqa: A002
        memory_format: str | None = None,
        prefetch: bool | Literal["epoch"] | None = None,
        terminate_on_nan: bool = True,
        hints: bool | list[str] = True,
        seed: int | None = None,
        profiler: str | Callback | None = None,
    ) -> None:
        self.options = Options(**{k: v for k, v in locals().items() if k != "self"})
        limits = make_limits(self.options)
        self._callbacks = listed(callbacks, Callback, "callbacks")
        self._handlers = []
        self._loggers = chosen_loggers(logger)
        self.session = Session(precision=resolve_precision(precision, "cpu"), limits=limits)
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
        *,
        max_epochs: int | None = None,
        max_steps: int | None = None,
        **unknown: Never,
    ) -> History:
        """Trains a task.

        Args:
            model: The task.
            train_dataloaders: A DataLoader or any iterable of batches; or a data module. Nothing
                trains without data, where the step takes no batch or ``max_steps`` is given here:
                a step that takes a batch gets None. An epoch has ``limit_train_batches`` steps
                then, or ``max_steps``.
            val_dataloaders: One loader, a list or a dict of loaders.
            datamodule: An object with ``train_dataloader`` and the like, instead of loaders.
            ckpt_path: Continue from a checkpoint: a path, "last", "best", or "auto" for the newest
                run of this task (anew if there is none; a finished run is left alone).
            max_epochs: Epochs to train, for this call instead of the Trainer's.
            max_steps: Optimizer steps to train, likewise.
            unknown: There are no others; the error says which one is meant.

        Returns:
            The history: one dict per epoch.

        Raises:
            KeyboardInterrupt: After Ctrl-C, once the state is saved; in a notebook fit returns.
            SystemExit: Likewise after another signal, with the exit code 128 + its number.
        """
        from lightkit import calls, loops

        if unknown:
            refuse_unknown(self.fit, unknown)
        data = (train_dataloaders, val_dataloaders, datamodule)
        own = {"max_epochs": max_epochs, "max_steps": max_steps}
        with calls.open_fit(self, model, data, ckpt_path, **own) as run:
            loops.fit(run)
        return self.session.history

    def check(
        self,
        model: TaskModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
    ) -> Plan:
        """Rehearses a fit with a few batches of a copy, and returns its plan; nothing else happens.

        Takes what `fit` takes. Afterwards random states, loaders and the trainer are as they were,
        and the task is on its device.

        Raises:
            Exception: What would have ended the fit, with a note that says when.
            UsageError: The task cannot be copied, or the loader gives its batches only once.
        """
        from lightkit.planned import check

        return check(self, model, train_dataloaders, val_dataloaders, datamodule)

    def validate(
        self,
        model: TaskModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        **unknown: Never,
    ) -> list[dict[str, float]]:
        """Runs ``validation_step`` over each loader.

        Args:
            model: The task; default: that of the last call, with the best weights that its fit saved.
            dataloaders: One loader, a list or a dict of loaders; or a data module.
            ckpt_path: Load the weights of this checkpoint before: a path, "last" or "best".
            verbose: Whether the results are shown.
            datamodule: An object with ``val_dataloader``, instead of loaders.
            unknown: There are no others.

        Returns:
            One dict of means for each loader.
        """
        if unknown:
            refuse_unknown(self.validate, unknown)
        return self._evaluate("validation", model, dataloaders, datamodule, ckpt_path, verbose)

    def test(
        self,
        model: TaskModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        **unknown: Never,
    ) -> list[dict[str, float]]:
        """Runs ``test_step`` (by default ``validation_step``) over each loader; see `validate`."""
        if unknown:
            refuse_unknown(self.test, unknown)
        return self._evaluate("test", model, dataloaders, datamodule, ckpt_path, verbose)

    def predict(
        self,
        model: TaskModule | None = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        return_predictions: bool = True,
        ckpt_path: str | Path | None = None,
        **unknown: Never,
    ) -> list[Any]:
        """Runs ``predict_step`` (by default ``forward``) over each loader.

        Args:
            model: The task; default: that of the last call.
            dataloaders: One loader, a list or a dict of loaders; or a data module.
            datamodule: An object with ``predict_dataloader``, instead of loaders.
            return_predictions: Whether the outputs are kept and returned. With several ranks all of
                them get all outputs, on the CPU; `callbacks.PredictionWriter` writes files instead.
            ckpt_path: Load the weights of this checkpoint before.
            unknown: There are no others.

        Returns:
            The outputs of all batches in order; for several loaders a list of such lists.
        """
        from lightkit.calls import open_evaluation
        from lightkit.evaluation import evaluate
        from lightkit.predictions import outputs_of_all

        if unknown:
            refuse_unknown(self.predict, unknown)
        given = (model, dataloaders, datamodule, ckpt_path)
        with open_evaluation(self, "predict", *given, keep=return_predictions) as run:
            evaluate(run)
            outputs = outputs_of_all(run)
        return outputs[0] if len(outputs) == 1 else outputs

    def on(
        self,
        event: str,
        function: Callable[..., Any] | None = None,
        *,
        every: int | None = None,
        once: int | None = None,
        before: int | None = None,
        after: int | None = None,
        filter: Callable[..., Any] | None = None,  # noqa: A002
        rank_zero: bool = False,
    ) -> Any:
        """Registers a function for a hook, after the callbacks and in the order of registration.

        As ``trainer.on("fit_end", function)``, or as a decorator: ``@trainer.on("fit_end")``. The
        function gets what a callback's hook gets, trainer and task first, or fewer of it; arguments
        with a default of their own keep it. Events are counted from 1 and go on so when a run is
        continued: training batches over all epochs, optimizer steps, epochs, validations, batches of
        an evaluation loader.

        Args:
            event: The name of a hook, with or without its "on_": "train_batch_end", "exception".
            function: The function; None returns a decorator.
            every: Call it at each so many-th event.
            once: Call it at this event alone; True for the first.
            before: Call it before this event.
            after: Call it after this event.
            filter: Called with the trainer and the number of the event; says whether to call it.
            rank_zero: Call it on the first process alone.

        Returns:
            The function as it was, or the decorator.

        Raises:
            ConfigError: For a number that no event can have.
            HookNameError: For an event that does not exist; it names the nearest.
            UsageError: While a call of this trainer runs, and for a function that needs more
                arguments than there are.
        """
        from lightkit.events import Handler, When, hook_of

        when = When(every, 1 if once is True else once, before, after, filter, rank_zero)
        if self.session.stage is not None:
            raise UsageError(
                f"trainer.on({event!r}) was called while {self.session.stage.value} runs, whose "
                f"listeners are settled. Call it before."
            )
        hook_of(event)  # at the decorator's own line

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self._handlers.append(Handler(event, function, when))
            return function

        return register if function is None else register(function)

    def add_to_loss(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Adds what a function returns to the loss of each training batch; also as a decorator.

        The same as ``trainer.on("loss", function)``, where nothing may be returned, too.

        Args:
            function: Gets trainer, task and loss, or fewer; returns a tensor with one element.

        Returns:
            The function as it was.
        """
        from lightkit.events import returning

        self.on("loss", returning(function) if callable(function) else function)
        return function

    def explain(
        self,
        model: TaskModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        *,
        stage: str = "fit",
    ) -> str:
        """Returns the loop as pseudocode with your hooks and callbacks, in the order of their calls.

        Nothing is run, loaded or written; only ``configure_callbacks`` is called.

        Args:
            model: The task.
            train_dataloaders: As for `fit`. None of the data need be given.
            val_dataloaders: Likewise.
            datamodule: Likewise.
            stage: The entry point: "fit", "validate", "test" or "predict".
        """
        from lightkit.pseudocode import explain

        return explain(self, model, (train_dataloaders, val_dataloaders, datamodule), stage)

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
        background: bool | Literal["disk"] = False,
        then: Callable[[], None] | None = None,
        failed: Callable[[Exception], None] | None = None,
        exact: bool = True,
    ) -> Path:
        """Writes a checkpoint now: at the end of a step while fit runs, or when it has ended.

        With several processes all of them must call it; rank zero writes the file.

        Args:
            filepath: The file; an existing one is replaced as a whole.
            weights_only: Leave out what is only needed to go on with the run.
            background: True to copy the state and return, while a thread writes the file; "disk" to
                write it and return, while a thread waits until it is on the disk.
            then: Called when the file is complete, on rank zero; in the background by that thread.
            failed: Gets the error of a background save. Without it the next such call or the end
                of the fit raises it.
            exact: False saves the last completed step, also in the middle of the next one.

        Raises:
            CheckpointError: The file cannot be written, also not after a second.
            NonFiniteError: A loss or a parameter is nan or inf.
            UsageError: Between the batches of one optimizer step.
            NotRunningError: Before a fit, after one that failed, and in an evaluation.
        """
        from lightkit import saving
        from lightkit.run import FitRun

        run = self._run or self.session.ended
        if not isinstance(run, FitRun):
            raise NotRunningError(
                "trainer.save_checkpoint works while fit runs and when it has ended. Without one, "
                "torch.save(task.state_dict(), path) saves weights alone."
            )
        if run is self.session.ended:
            return saving.save(self, run, filepath, weights_only=weights_only)
        if run.flow.group_open and exact:
            raise UsageError(
                "trainer.save_checkpoint was called between the batches of one optimizer step, "
                "where a run cannot be continued. Call it in on_save_point."
            )
        how: dict[str, Any] = {"background": background, "then": then, "failed": failed}
        with run.flow.times.checkpoint:
            return saving.save(self, run, filepath, weights_only=weights_only, exact=exact, **how)

    def set_accumulation(self, batches: int) -> None:
        """Sets the batches per optimizer step from the next epoch on."""
        if self.session.plan is not None:
            from lightkit import opening

            opening.require_automatic(self.session.plan, batches)
        self.session.flow.accumulate = batches

    def _evaluate(
        self, stage: str, task: Any, given: Any, datamodule: Any, ckpt_path: Any, verbose: bool
    ) -> list[dict[str, float]]:
        from lightkit.calls import open_evaluation
        from lightkit.evaluation import evaluate

        with open_evaluation(self, stage, task, given, datamodule, ckpt_path) as run:
            evaluate(run)
        results = run.metrics.eval_results(len(run.loaders))
        for row in results if verbose else ():
            text = "  ".join(f"{name} {value:.5g}" for name, value in row.items())
            _log.info("%s: %s", stage, text or "nothing was logged")
        return results
