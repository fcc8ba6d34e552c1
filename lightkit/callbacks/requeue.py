"""Puts the job back into SLURM's queue when its time is nearly over."""

from __future__ import annotations

import logging
import subprocess
from typing import TYPE_CHECKING

from lightkit import signals
from lightkit.distributed import slurm_job
from lightkit.errors import one_of
from lightkit.hooks import Callback
from lightkit.state import Stage

if TYPE_CHECKING:
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")


class RequeueJob(Callback):
    """Runs ``scontrol requeue`` for the own SLURM job when a signal ended the fit.

    SLURM sends the signal some time before the limit, with ``#SBATCH --signal=USR1@120`` two
    minutes before; ``#SBATCH --requeue`` allows the job to come back. The state is saved by then,
    so that a script with ``ckpt_path="auto"`` goes on from there. Outside SLURM nothing happens but
    a warning.

    Args:
        signal: The signal that means "come back": SIGUSR1, or another one that a fit listens to.
            With SIGTERM a job that was cancelled would come back too.

    Raises:
        ConfigError: For another signal.
    """

    def __init__(self, signal: str = "SIGUSR1") -> None:
        one_of("RequeueJob: signal", signal, signals.WATCHED)
        self.signal = signal

    def on_exception(self, trainer: Trainer, task: TaskModule, exception: BaseException) -> None:
        """Requeues the job if it was the signal that ended the fit."""
        if trainer.stage is not Stage.FIT:
            return  # the signal ended an earlier fit
        if trainer.interrupted != self.signal or not trainer.is_global_zero:
            return
        if not isinstance(exception, (KeyboardInterrupt, SystemExit)):
            return  # an error that came first would come again
        job = slurm_job()
        if not job:
            _log.warning("%s ended the fit, but this is no SLURM job to requeue.", self.signal)
            return
        command = ["scontrol", "requeue", job]
        try:
            done = subprocess.run(  # noqa: S603  nothing of it is given from outside but the number
                command, capture_output=True, text=True, timeout=60, check=False
            )
            problem = done.stderr.strip() or done.stdout.strip() if done.returncode else ""
            if done.returncode and not problem:
                problem = f"exit code {done.returncode}"
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        if problem:
            _log.warning("%s failed: %s. Submit the job again.", " ".join(command), problem)
        else:
            _log.info("job %s is in the queue again", job)
