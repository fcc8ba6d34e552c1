"""The loop that people write over torch alone, on each level what the others do by themselves.

Written with care where care is common knowledge: losses are kept as tensors and read every 50
steps. The variant "usual" reads each one, as most loops do: for the bar, for TensorBoard, for the
mean of the epoch. The variant "silent" trains, validates and updates the metric, and that is all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from tests.benchmarks.works import CLASSES, EVERY, Job, loss_of


def train(job: Job, variant: str = "") -> None:
    optimizer = job.optimizer(job.net.parameters())
    if variant == "silent":
        silent(job, optimizer)
    elif variant == "usual":
        {"full": usual_full, "newcomer": newcomer}.get(job.level, usual_bare)(job, optimizer)
    else:
        {"full": full, "log": log, "bare": bare, "newcomer": newcomer}[job.level](job, optimizer)


def tqdm(batches, **options):
    """The bar that people take; imported by those who show one."""
    from tqdm import tqdm as bar

    return bar(batches, **options)


def bare(job: Job, optimizer: Optimizer) -> None:
    net, schedule = job.net, job.schedule(optimizer)
    for _ in range(job.epochs):
        net.train()
        for x, y in job.train:
            optimizer.zero_grad()
            loss = loss_of(net(x), y)
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
        if job.val is not None:
            evaluate(job)


def log(job: Job, optimizer: Optimizer) -> None:
    net, schedule, losses, means = job.net, job.schedule(optimizer), [], []
    for _ in range(job.epochs):
        net.train()
        for x, y in job.train:
            optimizer.zero_grad()
            loss = loss_of(net(x), y)
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            losses.append(loss.detach())
            if len(losses) == EVERY:
                means.append(torch.stack(losses).mean().item())
                losses.clear()
        if job.val is not None:
            evaluate(job)


def newcomer(job: Job, optimizer: Optimizer) -> None:
    """The loop of tutorials: a bar, and the mean loss of each epoch printed."""
    net, schedule = job.net, job.schedule(optimizer)
    for epoch in range(job.epochs):
        net.train()
        total = 0.0
        for x, y in tqdm(job.train):
            optimizer.zero_grad()
            loss = loss_of(net(x), y)
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            total += loss.item()
        print(f"epoch {epoch}: train_loss {total / len(job.train):.4f}")
        if job.val is not None:
            print(f"epoch {epoch}: val_loss {evaluate(job):.4f}")


def full(job: Job, optimizer: Optimizer) -> None:
    from torch.utils.tensorboard import SummaryWriter
    from torchmetrics.classification import MulticlassAccuracy

    net, schedule, step, losses = job.net, job.schedule(optimizer), 0, []
    writer = SummaryWriter(str(job.folder))
    accuracy = MulticlassAccuracy(CLASSES, average="micro")
    val_accuracy = MulticlassAccuracy(CLASSES, average="micro")
    for epoch in range(job.epochs):
        net.train()
        bar = tqdm(job.train, desc=f"epoch {epoch}")
        for x, y in bar:
            optimizer.zero_grad()
            scores = net(x)
            loss = loss_of(scores, y)
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            accuracy.update(scores, y)
            losses.append(loss.detach())
            step += 1
            if step % EVERY == 0:
                mean = torch.stack(losses).mean().item()
                losses.clear()
                writer.add_scalar("train_loss", mean, step)
                bar.set_postfix(train_loss=mean)
        writer.add_scalar("train_accuracy", accuracy.compute().item(), step)
        accuracy.reset()
        writer.add_scalar("val_loss", evaluate(job, val_accuracy), step)
        writer.add_scalar("val_accuracy", val_accuracy.compute().item(), step)
        val_accuracy.reset()
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
        torch.save(state, job.folder / "last.pt")
    writer.close()


def usual_bare(job: Job, optimizer: Optimizer) -> None:
    net, schedule = job.net, job.schedule(optimizer)
    for _ in range(job.epochs):
        net.train()
        total = 0.0
        for x, y in job.train:
            optimizer.zero_grad()
            loss = loss_of(net(x), y)
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            total += loss.item()
        if job.val is not None:
            evaluate(job)


def usual_full(job: Job, optimizer: Optimizer) -> None:
    from torch.utils.tensorboard import SummaryWriter
    from torchmetrics.classification import MulticlassAccuracy

    net, schedule, step = job.net, job.schedule(optimizer), 0
    writer = SummaryWriter(str(job.folder))
    accuracy = MulticlassAccuracy(CLASSES, average="micro")
    val_accuracy = MulticlassAccuracy(CLASSES, average="micro")
    for epoch in range(job.epochs):
        net.train()
        bar = tqdm(job.train, desc=f"epoch {epoch}")
        for x, y in bar:
            optimizer.zero_grad()
            scores = net(x)
            loss = loss_of(scores, y)
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            accuracy.update(scores, y)
            writer.add_scalar("train_loss", loss.item(), step)
            bar.set_postfix(train_loss=loss.item())
            step += 1
        writer.add_scalar("train_accuracy", accuracy.compute().item(), step)
        accuracy.reset()
        writer.add_scalar("val_loss", evaluate(job, val_accuracy), step)
        writer.add_scalar("val_accuracy", val_accuracy.compute().item(), step)
        val_accuracy.reset()
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
        torch.save(state, job.folder / f"epoch_{epoch}.pt")
    writer.close()


def silent(job: Job, optimizer: Optimizer) -> None:
    accuracy = None
    if job.level == "full":
        from torchmetrics.classification import MulticlassAccuracy

        accuracy = MulticlassAccuracy(CLASSES, average="micro")
    net, schedule = job.net, job.schedule(optimizer)
    for _ in range(job.epochs):
        net.train()
        for x, y in job.train:
            optimizer.zero_grad()
            scores = net(x)
            loss = loss_of(scores, y)
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            if accuracy is not None:
                accuracy.update(scores, y)
        if accuracy is not None:
            accuracy.compute()
            accuracy.reset()
        if job.val is not None:
            evaluate(job, accuracy)


def evaluate(job: Job, accuracy=None, net=None) -> float:
    """Returns the mean loss over the validation; updates ``accuracy`` where there is one."""
    net = job.net if net is None else net
    net.eval()
    total, samples = torch.zeros(()), 0
    with torch.no_grad():
        for x, y in job.val:
            scores: Tensor = net(x)
            total += loss_of(scores, y) * len(y)
            samples += len(y)
            if accuracy is not None:
                accuracy.update(scores, y)
    return total.item() / samples
