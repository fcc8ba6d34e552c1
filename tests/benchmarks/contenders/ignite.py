"""ignite: engines with handlers."""

from __future__ import annotations

from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.metrics import Accuracy, Loss

from tests.benchmarks.works import EVERY, Job, loss_of


def train(job: Job) -> None:
    optimizer = job.optimizer(job.net.parameters())
    full = job.level == "full"
    trainer = create_supervised_trainer(
        job.net,
        optimizer,
        loss_of,
        # Its default reads the loss in each step; here only where somebody wants it.
        output_transform=(lambda x, y, scores, loss: (loss.detach(), scores, y))
        if full or job.level == "log"
        else (lambda x, y, scores, loss: loss.item())
        if job.level == "newcomer"
        else (lambda x, y, scores, loss: None),
    )
    schedule = job.schedule(optimizer)
    if schedule is not None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: schedule.step())
    evaluator = None
    if job.val is not None:
        metrics = {"val_loss": Loss(loss_of)}
        if full:
            metrics["val_accuracy"] = Accuracy()
        evaluator = create_supervised_evaluator(job.net, metrics=metrics)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(job.val))
    closing = []
    if job.level == "log":
        attach_means(trainer)
    elif job.level == "newcomer":
        attach_bar(trainer, evaluator)
    elif full:
        closing.append(attach_all(job, trainer, evaluator, optimizer))
    trainer.run(job.train, max_epochs=job.epochs)
    for close in closing:
        close()


def attach_means(trainer) -> None:
    from ignite.metrics import RunningAverage

    RunningAverage(output_transform=lambda output: output[0]).attach(trainer, "train_loss")


def attach_bar(trainer, evaluator) -> None:
    from ignite.handlers import ProgressBar
    from ignite.metrics import RunningAverage

    RunningAverage(output_transform=lambda output: output).attach(trainer, "train_loss")
    bar = ProgressBar()
    bar.attach(trainer, ["train_loss"])

    @trainer.on(Events.EPOCH_COMPLETED)
    def say():
        bar.log_message(f"epoch {trainer.state.epoch}: {trainer.state.metrics}")
        if evaluator is not None:
            bar.log_message(f"{evaluator.state.metrics}")


def attach_all(job: Job, trainer, evaluator, optimizer):
    """Attaches the full set; returns what closes it."""
    from ignite.handlers import (
        Checkpoint,
        DiskSaver,
        ProgressBar,
        TensorboardLogger,
        global_step_from_engine,
    )

    Accuracy(output_transform=lambda output: output[1:]).attach(trainer, "train_accuracy")
    every = Events.ITERATION_COMPLETED(every=EVERY)
    ProgressBar().attach(
        trainer, event_name=every, output_transform=lambda output: {"train_loss": output[0].item()}
    )
    logger = TensorboardLogger(log_dir=str(job.folder))
    logger.attach_output_handler(
        trainer, every, tag="train", output_transform=lambda output: {"loss": output[0].item()}
    )
    logger.attach_output_handler(
        trainer, Events.EPOCH_COMPLETED, tag="train", metric_names=["train_accuracy"]
    )
    logger.attach_output_handler(
        evaluator,
        Events.COMPLETED,
        tag="val",
        metric_names=["val_loss", "val_accuracy"],
        global_step_transform=global_step_from_engine(trainer),
    )
    state = {"model": job.net, "optimizer": optimizer}
    saver = DiskSaver(str(job.folder / "checkpoints"), create_dir=True, require_empty=False)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(state, saver, n_saved=1))
    return logger.close
