"""Fabric: a loop by hand over its wrappers."""

from __future__ import annotations

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger

from tests.benchmarks.contenders.hand import evaluate
from tests.benchmarks.works import CLASSES, EVERY, Job, loss_of


def train(job: Job) -> None:
    full = job.level == "full"
    loggers = [TensorBoardLogger(root_dir=job.folder)] if full else []
    fabric = Fabric(accelerator="cpu", devices=1, loggers=loggers)
    net, optimizer = fabric.setup(job.net, job.optimizer(job.net.parameters()))
    (full_epochs if full else plain_epochs)(job, fabric, net, optimizer)


def plain_epochs(job: Job, fabric: Fabric, net, optimizer) -> None:
    from tqdm import tqdm

    train, schedule, losses = job.train, job.schedule(optimizer), []
    if isinstance(train, torch.utils.data.DataLoader):
        train = fabric.setup_dataloaders(train)
    newcomer, logs = job.level == "newcomer", job.level == "log"
    for epoch in range(job.epochs):
        net.train()
        total = 0.0
        for x, y in tqdm(train) if newcomer else train:
            optimizer.zero_grad()
            loss = loss_of(net(x), y)
            fabric.backward(loss)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            if newcomer:
                total += loss.item()
            elif logs:
                losses.append(loss.detach())
                if len(losses) == EVERY:
                    torch.stack(losses).mean().item()
                    losses.clear()
        if newcomer:
            fabric.print(f"epoch {epoch}: train_loss {total / len(job.train):.4f}")
        if job.val is not None:
            val_loss = evaluate(job, net=net)
            if newcomer:
                fabric.print(f"epoch {epoch}: val_loss {val_loss:.4f}")


def full_epochs(job: Job, fabric: Fabric, net, optimizer) -> None:
    from torchmetrics.classification import MulticlassAccuracy
    from tqdm import tqdm

    train, schedule, step, losses = job.train, job.schedule(optimizer), 0, []
    if isinstance(train, torch.utils.data.DataLoader):
        train = fabric.setup_dataloaders(train)
    accuracy = MulticlassAccuracy(CLASSES, average="micro")
    val_accuracy = MulticlassAccuracy(CLASSES, average="micro")
    for epoch in range(job.epochs):
        net.train()
        bar = tqdm(train, desc=f"epoch {epoch}")
        for x, y in bar:
            optimizer.zero_grad()
            scores = net(x)
            loss = loss_of(scores, y)
            fabric.backward(loss)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            accuracy.update(scores, y)
            losses.append(loss.detach())
            step += 1
            if step % EVERY == 0:
                mean = torch.stack(losses).mean().item()
                losses.clear()
                fabric.log("train_loss", mean, step=step)
                bar.set_postfix(train_loss=mean)
        fabric.log("train_accuracy", accuracy.compute().item(), step=step)
        accuracy.reset()
        fabric.log("val_loss", evaluate(job, val_accuracy, net), step=step)
        fabric.log("val_accuracy", val_accuracy.compute().item(), step=step)
        val_accuracy.reset()
        fabric.save(job.folder / "last.pt", {"model": net, "optimizer": optimizer, "epoch": epoch})
    for logger in fabric.loggers:
        logger.finalize("success")
