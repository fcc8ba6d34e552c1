"""accelerate: a loop by hand over what ``prepare`` returned."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from tests.benchmarks.contenders.hand import evaluate
from tests.benchmarks.works import CLASSES, EVERY, Job, loss_of


def train(job: Job) -> None:
    full = job.level == "full"
    tracking = {"log_with": "tensorboard", "project_dir": str(job.folder)} if full else {}
    accelerator = Accelerator(cpu=True, **tracking)
    optimizer = job.optimizer(job.net.parameters())
    schedule = job.schedule(optimizer)
    net, optimizer, train = accelerator.prepare(job.net, optimizer, job.train)
    if schedule is not None:
        schedule = accelerator.prepare(schedule)
    (full_epochs if full else plain_epochs)(job, accelerator, net, optimizer, schedule, train)
    # What it knows is shared by all of the process; the next one shall begin anew.
    accelerator.free_memory()


def plain_epochs(job: Job, accelerator: Accelerator, net, optimizer, schedule, train) -> None:
    from tqdm import tqdm

    newcomer, logs, losses = job.level == "newcomer", job.level == "log", []
    for epoch in range(job.epochs):
        net.train()
        total = 0.0
        for x, y in tqdm(train) if newcomer else train:
            optimizer.zero_grad()
            loss = loss_of(net(x), y)
            accelerator.backward(loss)
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
            accelerator.print(f"epoch {epoch}: train_loss {total / len(job.train):.4f}")
        if job.val is not None:
            val_loss = evaluate(job, net=net)
            if newcomer:
                accelerator.print(f"epoch {epoch}: val_loss {val_loss:.4f}")


def full_epochs(job: Job, accelerator: Accelerator, net, optimizer, schedule, train) -> None:
    from torchmetrics.classification import MulticlassAccuracy
    from tqdm import tqdm

    accelerator.init_trackers("benchmark")
    step, losses = 0, []
    accuracy = MulticlassAccuracy(CLASSES, average="micro")
    val_accuracy = MulticlassAccuracy(CLASSES, average="micro")
    for epoch in range(job.epochs):
        net.train()
        bar = tqdm(train, desc=f"epoch {epoch}")
        for x, y in bar:
            optimizer.zero_grad()
            scores = net(x)
            loss = loss_of(scores, y)
            accelerator.backward(loss)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            accuracy.update(scores, y)
            losses.append(loss.detach())
            step += 1
            if step % EVERY == 0:
                mean = torch.stack(losses).mean().item()
                losses.clear()
                accelerator.log({"train_loss": mean}, step=step)
                bar.set_postfix(train_loss=mean)
        row = {"train_accuracy": accuracy.compute().item()}
        row["val_loss"] = evaluate(job, val_accuracy, net)
        row["val_accuracy"] = val_accuracy.compute().item()
        accuracy.reset()
        val_accuracy.reset()
        accelerator.log(row, step=step)
        accelerator.save_state(str(job.folder / "last"))
    accelerator.end_training()
