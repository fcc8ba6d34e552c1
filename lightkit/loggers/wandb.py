"""Weights & Biases: the only door to wandb."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightkit.errors import ConfigError
from lightkit.loggers.base import Logger, NullExperiment

if TYPE_CHECKING:
    from torch import Tensor, nn

_log = logging.getLogger("lightkit")

_STEP = "trainer/global_step"
_ROW = "trainer/row"


class WandbLogger(Logger):
    """Rows, hyperparameters and histograms for Weights & Biases (``pip install lightkit[wandb]``).

    A thin layer: it begins a run with ``wandb.init`` when a fit begins and finishes it at the end.
    What rows cannot say goes through ``logger.experiment``, the run of wandb. Where a run is active
    already (a sweep, an ``init`` of your own), that one is used and left open.

    The x axis of every curve is ``trainer/global_step``. A fit that is resumed in its folder goes
    on with the same run of wandb, by its id. The rows that came after the checkpoint come again,
    exactly, so those that the service has already are not sent twice. A run that is offline cannot
    know what it has sent: there they are in both of its parts.

    The files of wandb go to ``save_dir``; the run folder stays the trainer's.

    Args:
        name: What the run is called in the browser; None: wandb finds a name.
        save_dir: Where wandb keeps its files; None: in the run folder.
        version: The id of the run, to go on with one; None: a new one.
        offline: Only write files, for ``wandb sync``.
        id: Another name of ``version``.
        project: The project; None: wandb's own choice.
        log_model: True or "all" uploads the run's folder of checkpoints when the fit ends.
        experiment: A run of wandb to write to, which is left open.
        prefix: Put before every name, with a "-" between.
        options: Everything else that ``wandb.init`` takes: entity, group, job_type, tags, notes,
            settings and so on.

    Raises:
        ConfigError: For another ``log_model``.
        ImportError: When a fit begins and wandb is not installed.
    """

    _target = "wandb"

    def __init__(
        self,
        name: str | None = None,
        save_dir: str | Path | None = None,
        version: str | None = None,
        offline: bool = False,
        *,
        id: str | None = None,  # noqa: A002  # the name that wandb has for it
        project: str | None = None,
        log_model: Literal["all"] | bool = False,
        experiment: Any = None,
        prefix: str = "",
        **options: Any,
    ) -> None:
        super().__init__()
        if log_model not in (True, False, "all"):
            raise ConfigError(f"WandbLogger(log_model={log_model!r}): it is True, 'all' or False.")
        self._dir, self._display, self._project = save_dir, name, project
        self._id = self._given_id = version or id
        self._given, self._options, self.log_model = experiment, options, bool(log_model)
        if offline:
            options.setdefault("mode", "offline")
        self._prefix = f"{prefix}-" if prefix else ""
        self._run: Any = None
        self._own = False  # whether the run was begun here
        self._rows = self._there = 0  # rows that came; those that the service has
        self._marked: str | None = None  # the run whose rows come again
        self._watched: list[tuple[nn.Module, dict[str, Any]]] = []

    @property
    def name(self) -> str | None:
        """The project."""
        return self._project

    @property
    def version(self) -> int | str | None:
        """The id of the run; None before there is one."""
        return self._id

    @property
    def experiment(self) -> Any:
        """The run of wandb; it begins at the first use in a fit."""
        if self._run is None:
            if self._run_dir is None:
                return super().experiment
            self._begin()
        return self._run

    def watch(self, model: nn.Module, **options: Any) -> None:
        """Lets wandb watch gradients, from the start of the fit on: ``wandb.watch``.

        It reads from the device in the middle of steps; `Statistics` of the callbacks does not.
        """
        self._watched.append((model, options))
        if self._run is not None:
            self._run.watch(model, **options)

    def open(self, run_dir: str | Path, purge_step: int | None = None) -> None:
        """See `Logger.open`."""
        self.close()
        super().open(run_dir, purge_step)
        self._id, self._rows, self._marked = self._given_id, 0, None
        _import_wandb()  # a missing package is said before the run, not in the middle of it

    def _begin(self) -> None:
        wandb = _import_wandb()
        run = self._given if self._given is not None else wandb.run
        self._own = run is None
        if run is None:
            folder = Path(self._dir or self._run_dir or ".")
            folder.mkdir(parents=True, exist_ok=True)
            more = {} if self._id is None else {"id": self._id, "resume": "allow"}
            how = {"project": self._project, "name": self._display, "dir": str(folder)}
            run = wandb.init(**how, **more, **self._options)
        self._run, self._id = run, run.id
        run.define_metric(_STEP)
        run.define_metric("*", step_metric=_STEP, step_sync=True)
        self._there = int(run.summary.get(_ROW) or 0)
        if run.id != self._marked:  # what is there is of other fits, and this one comes behind it
            self._rows = max(self._rows, self._there)
        for model, options in self._watched:
            run.watch(model, **options)

    def _send(self, values: Mapping[str, Any], step: int) -> None:
        if self._run_dir is None:
            return
        run, self._rows = self.experiment, self._rows + 1
        if self._rows > self._there:
            named = {self._prefix + name: value for name, value in values.items()}
            run.log({**named, _STEP: step, _ROW: self._rows})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Sends one row."""
        self._send(metrics, step)

    def log_histogram(self, name: str, values: Tensor, step: int) -> None:
        """See `Logger.log_histogram`."""
        finite = values[values.isfinite()]
        if finite.numel():
            self._send({name: _import_wandb().Histogram(finite.numpy())}, step)

    def log_hyperparams(
        self, params: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Puts the hyperparameters into the configuration of the run."""
        if self._run_dir is not None:
            self.experiment.config.update(dict(params), allow_val_change=True)

    def mark(self) -> dict[str, Any]:
        """See `Logger.mark`: the id of the run and the number of rows."""
        return {"id": self.experiment.id, "rows": self._rows} if self._run_dir is not None else {}

    def rewind(self, mark: dict[str, Any]) -> None:
        """See `Logger.rewind`: goes on with the run of the mark, from its row on."""
        if "id" not in mark:
            _log.warning("The checkpoint names no run of wandb, so a new one begins.")
            return
        self._id, self._rows, self._marked = mark["id"], mark["rows"], mark["id"]

    def close(self) -> None:
        """Finishes the run, where it was begun here; a further use goes on with it."""
        run, self._run = self._run, None
        if run is None or isinstance(run, NullExperiment) or not self._own:
            return
        folder = Path(self._run_dir or ".") / "checkpoints"
        if self.log_model and folder.is_dir():
            artifact = _import_wandb().Artifact(f"model-{run.id}", type="model")
            artifact.add_dir(str(folder))
            run.log_artifact(artifact)
        run.finish()


def _import_wandb() -> Any:
    """Returns the module, or says how to install it."""
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            f"WandbLogger needs the package wandb: pip install wandb, or lightkit[wandb] ({error})"
        ) from error
    return wandb
