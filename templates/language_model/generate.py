"""Writes text: python3 generate.py CHECKPOINT [START] [TEMPERATURE]."""

import sys

from model import LanguageModel


def main(checkpoint: str, start: str = "class ", temperature: str = "0.7") -> None:
    task = LanguageModel.load_from_checkpoint(checkpoint)
    sys.stdout.write(task.generate(start, length=500, temperature=float(temperature)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
