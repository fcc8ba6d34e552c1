"""The task: a transformer that predicts the next character, and writes text with it."""

import math
import textwrap

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightkit as lk

CHARACTERS = 128  # ASCII


class LanguageModel(lk.TaskModule):
    """Predicts each next character of texts, which have the shape (batch, length).

    Args:
        context: How many characters it sees at most.
        width: Numbers that stand for one character.
        layers: How many blocks of attention and a small network.
        heads: How many attentions side by side in a block.
        lr: Highest learning rate of AdamW, after the warm-up.
        weight_decay: Weight decay of the matrices.
    """

    def __init__(
        self,
        context: int = 64,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        lr: float = 5e-3,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__()
        self.context, self.lr, self.weight_decay = context, lr, weight_decay
        self.character = nn.Embedding(CHARACTERS, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CHARACTERS, bias=False)
        for embedding in (self.character, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Returns scores of every next character, of shape (batch, length, 128)."""
        if text.shape[1] > self.context:
            raise ValueError(f"{text.shape[1]} characters are too many: context={self.context}")
        places = torch.arange(text.shape[1], device=text.device)
        x = self.character(text) + self.position(places)
        return self.head(self.norm(self.blocks(x)))

    def training_step(self, text: Tensor, batch_idx: int) -> Tensor:
        return self.loss(text)  # logged as train_loss

    def validation_step(self, text: Tensor, batch_idx: int) -> None:
        self.evaluate(text, "val")

    def test_step(self, text: Tensor, batch_idx: int) -> None:
        self.evaluate(text, "test")

    def loss(self, text: Tensor) -> Tensor:
        logits = self(text[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())

    def evaluate(self, text: Tensor, split: str) -> None:
        loss = self.loss(text)
        self.log(f"{split}_loss", loss)
        # In bits the loss is what a character would cost in a file compressed with this network.
        self.log(f"{split}_bits", loss / math.log(2), prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        if isinstance(self.logger, lk.loggers.TensorBoardLogger):  # its tab TEXT shows code as code
            sample = textwrap.indent(self.generate("def "), "    ")
            self.logger.experiment.add_text("sample", sample, self.global_step)

    @torch.no_grad()
    def generate(
        self, start: str, length: int = 300, temperature: float = 0.7, seed: int = 0
    ) -> str:
        """Returns a text with so many more characters; a low temperature takes fewer risks."""
        # A generator of its own: writing samples does not change what training draws.
        chance = torch.Generator(self.device).manual_seed(seed)
        codes = list((start or "\n").encode("ascii", errors="replace"))
        for _ in range(length):
            seen = torch.tensor([codes[-self.context :]], device=self.device)
            odds = (self(seen)[0, -1] / temperature).softmax(dim=0)
            codes.append(int(odds.multinomial(1, generator=chance)))
        return bytes(codes).decode("ascii")

    def configure_optimizers(self) -> dict:
        # Weight decay is for matrices; biases and norms are few and have to be free.
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        vectors = [p for p in self.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95))
        schedule = lk.warmup_cosine(optimizer, self.trainer, warmup=0.1, final=0.05)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Block(nn.Module):
    """Attention, then a small network for each character; each adds to what comes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attention(self, x: Tensor) -> Tensor:
        # From (batch, length, 3 * width) to three of (batch, heads, length, width of a head).
        parts = self.queries_keys_values(x).unflatten(2, (3, self.heads, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        # Causal: a character looks at itself and what is before it, never at what is to come.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))
