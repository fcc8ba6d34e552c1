"""The hooks of a task: those of a callback, without trainer and task; and those of sharding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer


class ShardingHooks:
    """What a task may say about how it is split over ranks; see docs/fsdp.md."""

    def configure_parallelism(self, mesh: DeviceMesh) -> None:
        """Called on all ranks before a task is sharded: split single layers over ``mesh["tp"]``.

        Only with ``FSDPStrategy``. The task is on the CPU, or on the meta device where it was built
        there.
        """

    def configure_sharding(self) -> Iterable[nn.Module]:
        """Returns the blocks that are put together one at a time; only with ``FSDPStrategy``.

        By default the children of every ``ModuleList`` with at least two of one type.
        """
        return ()

    def init_weights(self) -> None:
        """Sets all parameters and buffers, where the task was built on the meta device.

        By default ``reset_parameters`` of each module is called.
        """


class TaskHooks:
    """Every hook that a task may define, doing nothing; `lightkit.Callback` says when each is called.

    They exist so that an override may call ``super()``. One that is not overridden is never called.
    """

    def setup(self, stage: str) -> None:
        """Called when an entry point begins, before the model is on its device."""

    def teardown(self, stage: str) -> None:
        """Called when an entry point ends, also after an exception."""

    def on_fit_start(self) -> None:
        """Called once per fit, when everything is built and a checkpoint is loaded."""

    def on_fit_end(self) -> None:
        """Called once per fit, last, when no exception was raised."""

    def on_sanity_check_start(self) -> None:
        """Called before the validation batches that are tried before training."""

    def on_sanity_check_end(self) -> None:
        """Called after them; what they logged is discarded."""

    def on_train_start(self) -> None:
        """Called once per fit, after the sanity check."""

    def on_train_end(self) -> None:
        """Called once per fit, after the last epoch."""

    def on_train_epoch_start(self) -> None:
        """Called before the first batch of an epoch (not when an epoch is continued)."""

    def on_train_epoch_end(self) -> None:
        """Called when an epoch's batches and its validation are done; epoch means are known."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Called with the batch on its device, before ``training_step``."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Called after the step that the batch belongs to (if it is the last of its group)."""

    def on_save_point(self) -> None:
        """Called where everything about a step, or about an epoch, is known: save here."""

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """Called before the gradients of the last step are cleared, at the start of a step."""

    def on_loss(self, loss: Tensor) -> Tensor | None:
        """Called with the loss of a training batch; a tensor that is returned is added to it."""
        return None

    def on_before_backward(self, loss: Tensor) -> None:
        """Called with the loss as it is differentiated (divided by the group's length)."""

    def on_after_backward(self) -> None:
        """Called after backward; under fp16 the gradients are still scaled."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Called with the gradients of the whole group, unscaled, before they are clipped."""

    def on_validation_start(self) -> None:
        """Called when a validation begins; the model is in eval mode."""

    def on_validation_end(self) -> None:
        """Called when a validation is over; its means are known."""

    def on_validation_epoch_start(self) -> None:
        """Called after ``on_validation_start``."""

    def on_validation_epoch_end(self) -> None:
        """Called after the last validation batch; logging is still possible."""

    def on_validation_batch_start(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called with the batch on its device, before ``validation_step``."""

    def on_validation_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called with what ``validation_step`` returned."""

    def on_test_start(self) -> None:
        """Called when a test begins; the model is in eval mode."""

    def on_test_end(self) -> None:
        """Called when a test is over; its means are known."""

    def on_test_epoch_start(self) -> None:
        """Called after ``on_test_start``."""

    def on_test_epoch_end(self) -> None:
        """Called after the last test batch; logging is still possible."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called with the batch on its device, before ``test_step``."""

    def on_test_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called with what ``test_step`` returned."""

    def on_predict_start(self) -> None:
        """Called when a prediction begins; the model is in eval mode."""

    def on_predict_end(self) -> None:
        """Called when a prediction is over."""

    def on_predict_epoch_start(self) -> None:
        """Called after ``on_predict_start``."""

    def on_predict_epoch_end(self) -> None:
        """Called after the last batch to predict."""

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called with the batch on its device, before ``predict_step``."""

    def on_predict_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called with what ``predict_step`` returned."""

    def on_exception(self, exception: BaseException) -> None:
        """Called when an entry point ends by an exception, Ctrl-C included."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called with a checkpoint before it is written; plain types and tensors may be added."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called with a checkpoint before its parts are restored."""
