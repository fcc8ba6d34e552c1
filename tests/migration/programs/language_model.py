"""A transformer that learns to continue a text: accumulation, clipping, warm-up by steps."""

import math

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Dataset

TEXT = "the cat sat on the mat and the dog sat on the log while the frog sat in the bog " * 8
LETTERS = sorted(set(TEXT))


class Windows(Dataset):
    def __init__(self, text, length=16):
        self.codes = torch.tensor([LETTERS.index(letter) for letter in text])
        self.length = length

    def __len__(self):
        return (len(self.codes) - 1) // self.length

    def __getitem__(self, index):
        begin = index * self.length
        window = self.codes[begin : begin + self.length + 1]
        return window[:-1], window[1:]


class LanguageModel(L.LightningModule):
    def __init__(self, width=16, heads=2, layers=2, lr=3e-3, decay=0.1, warmup=0.2):
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(len(LETTERS), width)
        self.position = nn.Embedding(16, width)
        layer = nn.TransformerEncoderLayer(width, heads, 32, dropout=0.1, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(LETTERS))
        self.losses, self.norms, self.rates = [], [], []

    def forward(self, codes):
        steps = codes.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(steps, device=self.device)
        x = self.embedding(codes) + self.position(torch.arange(steps, device=self.device))
        return self.head(self.blocks(x, mask=mask, is_causal=True))

    def loss(self, batch):
        codes, following = batch
        return nn.functional.cross_entropy(self(codes).flatten(0, 1), following.flatten())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = self.loss(batch)
        self.log("val/loss", loss, on_step=False, on_epoch=True, add_dataloader_idx=False)
        self.log("val/perplexity", loss.exp(), on_epoch=True)

    def on_after_backward(self):
        assert self.head.weight.grad is not None

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(self.head.weight.grad.norm())

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ):
        self.clip_gradients(
            optimizer,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
        )

    def configure_optimizers(self):
        plain = [p for p in self.parameters() if p.ndim < 2]
        decayed = [p for p in self.parameters() if p.ndim >= 2]
        groups = [
            {"params": decayed, "weight_decay": self.hparams.decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["lr"])
        total = self.planned = self.trainer.estimated_stepping_batches
        warm = max(1, int(total * self.hparams.warmup))

        def rate(step):
            if step < warm:
                return (step + 1) / warm
            return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "name": "rate"}]

    def lr_scheduler_step(self, scheduler, metric):
        self.rates.append(scheduler.get_last_lr()[0])
        scheduler.step()


class Validations(Callback):
    def __init__(self):
        self.found = []

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        names = ("val/loss", "val/perplexity")
        self.found += [trainer.callback_metrics[name].clone() for name in names]


def main(folder, **options):
    L.seed_everything(2)
    train, val = Windows(TEXT[: 16 * 32 + 1]), Windows(TEXT[16 * 32 :])
    task, watch = LanguageModel(), Validations()
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="auto",
        devices="auto",
        precision="32-true",
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        val_check_interval=0.5,
        callbacks=[watch],
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(task, train_dataloaders=DataLoader(train, 4, shuffle=True),
                val_dataloaders=DataLoader(val, 4))  # fmt: skip
    validated = trainer.validate(task, dataloaders=DataLoader(val, 4), verbose=False)
    return {
        "losses": task.losses,
        "norms": task.norms,
        "rates": task.rates,
        "val": [*watch.found, validated[0]["val/loss"]],
        "steps": trainer.global_step,
        "planned": task.planned,
    }
