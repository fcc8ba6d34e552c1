"""The data: names of written syllables, from the table of Unicode that is in every Python."""

import sys
from unicodedata import ucd_3_2_0 as unicode  # this version is the same in all Pythons

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, random_split

import lightkit as lk

#: How the names of the characters begin, and of how many of them one is taken: Hangul has 11,172.
#: The label of a syllable is its script's place here.
SCRIPTS = {
    "CANADIAN SYLLABICS ": 1,
    "ETHIOPIC SYLLABLE ": 1,
    "HANGUL SYLLABLE ": 10,
    "YI SYLLABLE ": 1,
}

#: A syllable as numbers (A is 1, Z is 26), and its label.
Sample = tuple[Tensor, int]


def encode(name: str) -> Tensor:
    """Returns a name of capital letters as numbers; 0 is left for the padding."""
    return torch.tensor([ord(letter) - ord("A") + 1 for letter in name])


def collate(samples: list[Sample]) -> tuple[Tensor, list[int], Tensor]:
    """Makes a batch of syllables of unequal lengths.

    Returns:
        The letters, of shape (batch, longest), padded with 0; the length of each syllable; the
        labels. Lengths stay a list because packing wants them on the CPU: a tensor would be moved
        to the GPU with the batch, and each step would wait for it to come back.
    """
    names = [name for name, _ in samples]
    labels = torch.tensor([label for _, label in samples])
    return pad_sequence(names, batch_first=True), [len(name) for name in names], labels


def read() -> list[Sample]:
    """Returns names such as GGWALB (Hangul) or NZUOP (Yi), and the script that each belongs to."""
    names = [unicode.name(chr(code), "") for code in range(sys.maxunicode)]
    labels: dict[str, list[int]] = {}
    for label, (script, step) in enumerate(SCRIPTS.items()):
        for name in [name for name in names if name.startswith(script)][::step]:
            labels.setdefault(name.removeprefix(script), []).append(label)
    # Names that two scripts share (RO is in all four) have no right answer.
    return [
        (encode(name), found[0])
        for name, found in labels.items()
        if name.isalpha() and len(found) == 1
    ]


class SyllableData(lk.DataModule):
    """What `read` returns: 60 % of the names for training, 20 % each for validation and testing.

    Args:
        batch_size: Names per batch.
        split_seed: Decides which name goes where. It is apart from the seed of the run, so that
            runs with other seeds are judged on the same names.
    """

    def __init__(self, batch_size: int = 32, split_seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.split_seed = split_seed

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(self.split_seed)
        self.train, self.val, self.test = random_split(read(), [0.6, 0.2, 0.2], generator=generator)

    def loader(self, samples: list[Sample], shuffle: bool = False) -> DataLoader:
        return DataLoader(samples, self.batch_size, shuffle=shuffle, collate_fn=collate)

    def train_dataloader(self) -> DataLoader:
        return self.loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self.loader(self.val)

    def test_dataloader(self) -> DataLoader:
        return self.loader(self.test)

    def predict_dataloader(self) -> DataLoader:
        return self.loader(self.test)
