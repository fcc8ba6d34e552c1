"""What the processes of test_fsdp.py do; one process does the same for comparison."""

from __future__ import annotations

import inspect
import os
import signal
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit.callbacks import EarlyStopping, ModelCheckpoint
from lightkit.distributed import Ranks
from lightkit.distributed.meta import materialise
from lightkit.errors import LightkitError

QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "logger": False,
}
WORLD = int(os.environ.get("WORLD_SIZE", 1))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.b(torch.tanh(self.a(x)))


class Net(lk.TaskModule):
    """A step that calls layers and never itself."""

    def __init__(self, width=6):
        super().__init__()
        self.inp, self.out = nn.Linear(5, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList([Block(width) for _ in range(3)])
        self.seen, self.types = [], set()

    def forward(self, x):
        x = self.inp(x)
        self.types.add((x.dtype, self.inp.weight.dtype))
        for block in self.blocks:
            x = block(x)
        return self.out(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(Net.forward(self, x).float(), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(len(x))
        return {"loss": nn.functional.cross_entropy(Net.forward(self, x), y), "weight": len(x)}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Weighted(Net):
    """Batches count by their tokens, which the ranks have different numbers of."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        counts = x[:, 0] > 0
        losses = nn.functional.cross_entropy(Net.forward(self, x), y, reduction="none")
        weight = counts.sum()
        return {"loss": (losses * counts).sum() / weight.clamp(min=1), "weight": weight}


class Moved(Net):
    """Groups with rates of their own, momentum, a schedule, and a block that learns later."""

    def configure_optimizers(self):
        rest = [*self.blocks.parameters(), *self.out.parameters()]
        groups = [{"params": self.inp.parameters()}, {"params": rest, "lr": 0.02}]
        optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def on_train_epoch_start(self):
        self.blocks[0].requires_grad_(self.current_epoch == 1)


class Newton(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class Recomputed(Net):
    """Its blocks are computed again in backward instead of kept."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = self.inp(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        loss = nn.functional.cross_entropy(self.out(x), y)
        self.log("loss", loss)
        return loss


class Parallel(Net):
    """Its blocks are split over the ranks of one group."""

    def configure_parallelism(self, mesh):
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        for block in self.blocks:
            parallelize_module(block, mesh["tp"], {"a": ColwiseParallel(), "b": RowwiseParallel()})


class Initialised(Net):
    """Says its first values, embeddings and buffers too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(3))
        self.table = nn.Embedding(5, 6, padding_idx=2)

    def init_weights(self):
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.1)
            else:
                nn.init.zeros_(parameter)
        nn.init.constant_(self.scale, 2.0)


class Embedded(Net):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 6, padding_idx=2)
        self.attention = nn.MultiheadAttention(6, 2)


def data(count=120, size=12, seed=0):
    """Returns a loader whose batches over all ranks together are those of one process."""
    drawn = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, 5, generator=drawn), torch.randint(0, 3, (count,), generator=drawn)
    return DataLoader(TensorDataset(x, y), size)


def whole(task):
    """Returns the whole weights of a task; a collective."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in task.state_dict().items()
    }


def trained(strategy, task=None, *, ranks=WORLD, epochs=2, **options):
    """Trains for ten steps an epoch, and returns weights and metrics."""
    lk.seed_everything(1, verbose=False)
    task = Net() if task is None else task()
    trainer = lk.Trainer(
        max_epochs=epochs, strategy=strategy, enable_checkpointing=False, **QUIET, **options
    )
    trainer.fit(task, data(120, 12 // ranks), data(21, 3, 1))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"weights": whole(task), "metrics": metrics, "name": type(task).__name__, "task": task}


def plain(result):
    return {name: value for name, value in result.items() if name != "task"}


#: Options of runs that must give the numbers of one process.
RUNS = {
    "clipped": (Net, {"gradient_clip_val": 0.3}),
    "by value": (Net, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "accumulated": (Net, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}),
    "moved": (Moved, {}),
    "recomputed": (Recomputed, {"gradient_clip_val": 0.3}),
    "weighted": (Weighted, {"accumulate_grad_batches": 2}),
}


def refused(call):
    try:
        call()
    except LightkitError as error:
        return str(error)
    return None


def training():
    """On two ranks: the numbers, precision, what is refused."""
    found = {name: plain(trained("fsdp", task, **more)) for name, (task, more) in RUNS.items()}
    mixed = trained("fsdp", precision="bf16-mixed", epochs=1)
    task = mixed["task"]
    found["mixed"] = (task.types, {p.dtype for p in task.parameters()}, mixed["metrics"])
    true = trained("fsdp", precision="bf16-true", epochs=1)["task"]
    found["true"] = {p.dtype for p in true.parameters()}
    found["local"] = [p.to_local().numel() for p in task.parameters()]
    found["signature"] = list(inspect.signature(task.training_step).parameters)
    found["shards"] = [n for n, m in task.named_modules() if hasattr(m, "unshard")]
    found["16-mixed"] = refused(lambda: trained("fsdp", precision="16-mixed"))
    found["other"] = refused(
        lambda: lk.Trainer(strategy="fsdp", precision="bf16-true", **QUIET).validate(task, data())
    )
    found["single"] = refused(lambda: lk.Trainer(strategy="ddp", **QUIET).validate(task, data()))
    found["class"] = f"{type(task).__module__}.{type(task).__qualname__}"
    found["hsdp"] = refused(lambda: trained("hsdp"))
    found["three"] = refused(lambda: trained(lk.FSDPStrategy(replicate=3)))
    found["no parallelism"] = refused(lambda: trained(lk.FSDPStrategy(tensor_parallel=2)))

    class Manual(Net):
        automatic_optimization = False

    class Wrong(Net):
        def configure_sharding(self):
            return [nn.Linear(1, 1)]

    class Listed(Net):
        def configure_sharding(self):
            return [self.inp, self.blocks]

    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.blocks[2].a.weight = self.blocks[0].a.weight

    class Scalar(Net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

    class Own(Net):
        def configure_sharding(self):
            return self.blocks[:2]

    found["manual"] = refused(lambda: trained("fsdp", Manual))
    found["newton"] = refused(lambda: trained("fsdp", Newton))
    found["wrong"] = refused(lambda: trained("fsdp", Wrong))
    found["listed"] = refused(lambda: trained("fsdp", Listed))
    found["scalar"] = refused(lambda: trained("fsdp", Scalar))
    found["tied"] = refused(lambda: trained("fsdp", Tied))
    own = trained("fsdp", Own, epochs=1)["task"]
    found["own"] = [n for n, m in own.named_modules() if hasattr(m, "unshard")]
    return found


def evaluation():
    """On two ranks: loaders that give them unequal numbers of batches, and first values."""
    lk.seed_everything(1, verbose=False)
    task, found = Net(), {}
    trainer = lk.Trainer(strategy="fsdp", max_epochs=1, enable_checkpointing=False, **QUIET)
    for count in (3, 9, 12):  # the first time before any forward: one rank has no batch
        task.seen.clear()
        found[count] = (trainer.validate(task, data(count, 3, 1), verbose=False), list(task.seen))
    # Whether blocks stay whole after forward is another order of what the ranks do together.
    for keeps in (True, False):
        other, strategy = Net(), lk.FSDPStrategy(reshard_after_forward=keeps)
        alone = lk.Trainer(strategy=strategy, max_epochs=1, enable_checkpointing=False, **QUIET)
        alone.fit(other, data(24, 6), data(9, 3, 1))
        found[keeps] = type(next(other.parameters())).__name__
    found["forms"] = {type(p).__name__ for p in task.parameters()}
    trainer.fit(task, data(24, 6), data(9, 3, 1))
    found["trained"] = whole(task)
    found["predicted"] = len(trainer.predict(task, data(9, 3, 1)))
    for kind in (Embedded, Initialised):
        torch.manual_seed(5)
        with torch.device("meta"):
            task = kind()
        trainer.validate(task, data(9, 3, 1), verbose=False)
        torch.manual_seed(5)
        with torch.device("meta"):
            one = kind()
        materialise(one, torch.device("cpu"), Ranks())
        found[kind.__name__] = (whole(task), one.state_dict())

    class Forgetful(Net):
        def init_weights(self):
            nn.init.zeros_(self.inp.weight)

    with torch.device("meta"):
        task = Forgetful()
    found["forgotten"] = refused(lambda: trainer.validate(task, data(9, 3, 1)))
    return found


def many(folder):
    """On four ranks: copies of the model, split layers, a checkpoint of two ranks."""
    found = {"hsdp": plain(trained(lk.FSDPStrategy(replicate=2), gradient_clip_val=0.3))}
    options = {"gradient_clip_val": 0.3, "ranks": 2}
    split = trained(lk.FSDPStrategy(tensor_parallel=2), lambda: Parallel(8), **options)
    found["parallel"] = plain(split)
    found["placements"] = {str(p.placements) for p in split["task"].parameters()}
    found["loaded"] = []
    for path in ("two.ckpt", "joined.ckpt"):
        task = Net()
        trainer = saver(Path(folder) / f"from_{path}", epochs=3, strategy="fsdp")
        trainer.fit(task, data(48, 3), ckpt_path=str(Path(folder) / path))
        found["loaded"].append(whole(task))
    task = Parallel(8)
    trainer = saver(Path(folder) / "split", strategy=lk.FSDPStrategy(tensor_parallel=2))
    trainer.fit(task, data(48, 6))
    found["split"] = whole(task)
    other = Parallel(8)
    trainer.validate(other, data(12, 3), ckpt_path=trainer.checkpoint_callback.last_model_path)
    found["split again"] = whole(other)
    return found


def saver(root, epochs=2, strategy="fsdp", **options):
    """Returns a trainer that saves every file."""
    how = {"save_top_k": -1, "every_n_train_steps": 2, **options}
    return lk.Trainer(
        max_epochs=epochs,
        strategy=strategy,
        default_root_dir=root,
        callbacks=[ModelCheckpoint(dirpath=Path(root) / "files", **how)],
        **QUIET,
    )


def fitted(root, task=None, path=None, seed=1, epochs=2, size=6, **options):
    """Trains four steps an epoch, with files every second one."""
    lk.seed_everything(seed, verbose=False)
    task = Net() if task is None else task
    trainer = saver(root, epochs, **options)
    trainer.fit(task, data(48, size), data(9, 3, 1), ckpt_path=path)
    return task, trainer


def checkpoints(folder):
    """On two ranks: written, resumed bit for bit, in the background, and what fails."""
    root, found = Path(folder), {}
    first, _ = fitted(root / "first")
    found["weights"] = whole(first)
    files = root / "first" / "files"
    found["files"] = {p.name: sorted(f.name for f in p.iterdir()) for p in files.iterdir()}
    found["same"] = (files / "last.ckpt" / "__0_0.distcp").samefile(
        files / "step_000008.ckpt" / "__0_0.distcp"
    )
    again, trainer = fitted(root / "again", path=files / "step_000002.ckpt", seed=2)
    found["resumed"], found["at"] = whole(again), trainer.global_step
    behind, trainer = fitted(
        root / "behind", every_n_train_steps=1, save_top_k=2, monitor="loss", async_save=True
    )
    found["behind"] = whole(behind)
    found["kept"] = sorted(p.name for p in (root / "behind" / "files").iterdir())
    found["best"] = trainer.checkpoint_callback.best_model_path
    # What one rank cannot write is an error of all, and what was there stays.
    own, broken = os.environ["RANK"], [1000]
    if own == "1":
        from torch.distributed.checkpoint.filesystem import FileSystemWriter

        write = FileSystemWriter.write_data

        def fail(*args):
            broken[0] -= 1
            if broken[0] >= 0:
                raise OSError(28, "No space left on device")
            return write(*args)

        FileSystemWriter.write_data = fail
    found["full"] = refused(lambda: fitted(root / "full"))
    found["left"] = sorted(p.name for p in (root / "full" / "files").iterdir())
    found["full behind"] = refused(lambda: fitted(root / "full behind", async_save=True))
    broken[0] = 2  # the first file and its second try
    fitted(root / "warned", on_error="warn")
    found["warned"] = sorted(p.name for p in (root / "warned" / "files").iterdir())
    if own == "1":
        FileSystemWriter.write_data = write

    class Unstorable(Net):
        def on_save_checkpoint(self, contents):
            contents["thing"] = object()

    found["unstorable"] = refused(lambda: fitted(root / "unstorable", Unstorable()))
    # The best weights are those of the first epoch, also where the run goes on from its second.
    found["best weights"] = [restored(root, epochs, path) for epochs, path in RESTORED]
    return found


RESTORED = ((3, None), (2, None), (3, "last"))


def restored(root, epochs, path):
    """Returns the weights that EarlyStopping puts back."""
    lk.seed_everything(1, verbose=False)
    task, keep = Net(), EarlyStopping("val_loss", min_delta=1e9, restore_best=True)
    where = {"default_root_dir": root / "restored", "callbacks": [keep], **QUIET}
    trainer = lk.Trainer(max_epochs=epochs, strategy="fsdp", **where)
    trainer.fit(task, data(48, 6), data(9, 3, 1), ckpt_path=path)
    assert keep.best_epoch == 0
    return whole(task)


def killed(folder):
    """On two ranks: rank zero dies when all parts of the second checkpoint are written."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    finish, calls = FileSystemWriter.finish, []

    def die(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(*arguments)

    FileSystemWriter.finish = die
    fitted(Path(folder) / "killed")
