"""The data: Python's own standard library, as text of ASCII characters with codes below 128."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import lightkit as lk


class Windows(Dataset):
    """A text cut into windows of ``context + 1`` characters; neighbours share one character.

    A window holds the input and what is to be predicted: all but its last character, and all but
    its first one.
    """

    def __init__(self, text: Tensor, context: int) -> None:
        self.text, self.context = text, context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.context
        return self.text[start : start + self.context + 1]


def read(folder: Path, pattern: str) -> list[str]:
    """Returns the text of each file in a folder; a file that is alone comes in a hundred pieces."""
    # Letters that cannot be read would become question marks later anyway.
    texts = [f.read_text("utf-8", errors="replace") for f in sorted(folder.glob(pattern))]
    if len(texts) != 1:
        return texts
    step = len(texts[0]) // 100 + 1
    return [texts[0][start : start + step] for start in range(0, len(texts[0]), step)]


class SourceCode(lk.DataModule):
    """Whole files: four fifths of the characters for training, the rest to validate and to test.

    Args:
        folder: Where the files are; None for Python's standard library.
        pattern: Which files of the folder.
        characters: How much text at most; the files are taken in an order of chance.
        context: How many characters the network sees at once.
        batch_size: Windows per batch.
        split_seed: Decides which files are taken and where each goes. It is apart from the seed
            of the run, so that runs with other seeds are judged on the same text.
    """

    def __init__(
        self,
        folder: str | None = None,
        pattern: str = "*.py",
        characters: int = 800_000,
        context: int = 64,
        batch_size: int = 16,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        self.folder = Path(folder or sysconfig.get_path("stdlib"))
        self.pattern, self.characters = pattern, characters
        self.context, self.batch_size, self.split_seed = context, batch_size, split_seed

    def setup(self, stage: str) -> None:
        texts = read(self.folder, self.pattern)
        characters = min(self.characters, sum(map(len, texts)))
        generator = torch.Generator().manual_seed(self.split_seed)
        shuffled = [texts[i] for i in torch.randperm(len(texts), generator=generator)]
        # No file is in two parts: code repeats itself, and a score must not come from memory.
        parts = {"val": 0.1, "test": 0.1, "train": 0.8}
        for name, share in parts.items():
            text = ""
            while shuffled and len(text) < share * characters:
                text += shuffled.pop()
            if len(text) <= self.context:
                raise ValueError(f"too little text in {self.pattern} of {self.folder} for {name}")
            codes = text[: int(share * characters)].encode("ascii", errors="replace")
            setattr(self, name, Windows(torch.tensor(list(codes)), self.context))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=8 * self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=8 * self.batch_size)
