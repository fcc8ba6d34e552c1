"""`DataModule`: the data of a project in one class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightkit.data.move import move_to_device
from lightkit.hook_names import check_hook_names
from lightkit.hparams import HParams, capture, save_hyperparameters

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from lightkit.trainer import Trainer

#: The hooks that a data module may define.
DATA_NAMES: frozenset[str] = frozenset(
    (
        "prepare_data",
        "setup",
        "teardown",
        "train_dataloader",
        "val_dataloader",
        "test_dataloader",
        "predict_dataloader",
        "on_before_batch_transfer",
        "transfer_batch_to_device",
        "on_after_batch_transfer",
        "state_dict",
        "load_state_dict",
    )
)


@capture
class DataModule:
    """The data of a project: download, split, loaders. Override what you need.

    The constructor's arguments are kept in ``self.hparams`` without further ado. A method whose
    name is close to a hook's but is none raises `HookNameError` when the class is made.

    Attributes:
        hparams: The constructor's arguments; a dict that can also be read by attribute.
        trainer: The trainer, while one of its entry points uses this object.
    """

    hparams: HParams
    trainer: Trainer | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_hook_names(cls, DATA_NAMES)

    def prepare_data(self) -> None:
        """Called once, on the first process of each machine, before `setup`: download, unpack.

        Do not assign attributes here: other processes would not see them.
        """

    def setup(self, stage: str) -> None:
        """Called on every rank when an entry point begins: read, split, make datasets.

        Args:
            stage: "fit", "validate", "test" or "predict". "fit" needs the validation data too.
        """

    def teardown(self, stage: str) -> None:
        """Called on every rank when an entry point ends, also after an exception."""

    def train_dataloader(self) -> Any:
        """Returns the loader of batches to train on; None where there is none."""
        return None

    def val_dataloader(self) -> Any:
        """Returns one loader, a list or a dict of loaders to validate on; None for none."""
        return None

    def test_dataloader(self) -> Any:
        """Returns one loader, a list or a dict of loaders to test on; None for none."""
        return None

    def predict_dataloader(self) -> Any:
        """Returns one loader, a list or a dict of loaders to predict on; None for none."""
        return None

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Returns the batch as it is to be moved; called where the loader gave it."""
        return batch

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Returns the batch on ``device``. By default `lightkit.data.move_to_device`."""
        return move_to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Returns the batch as the step gets it; called on the device: augment here."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint should keep of this object: plain types and tensors."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""

    def save_hyperparameters(
        self, *names: Any, ignore: str | Iterable[str] = (), logger: bool = True
    ) -> None:
        """Chooses which constructor arguments stay in ``self.hparams``.

        They are captured anyway; call this to leave some out.

        Args:
            names: Names to keep (default: all), or one mapping or Namespace to take instead.
            ignore: Names to drop, one or several.
            logger: Whether loggers shall get them.

        Raises:
            ConfigError: A name that is no argument of the constructor.
        """
        save_hyperparameters(self, *names, ignore=ignore, logger=logger)
