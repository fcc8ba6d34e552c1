from pathlib import Path

from PIL import Image


class ImageFolder:
    """Images in a folder for each class, the classes in the order of the alphabet."""

    def __init__(self, root, transform):
        self.transform = transform
        self.classes = sorted(path.name for path in Path(root).iterdir() if path.is_dir())
        self.samples = [
            (file, label)
            for label, name in enumerate(self.classes)
            for file in sorted(Path(root, name).iterdir())
        ]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        file, label = self.samples[index]
        return self.transform(Image.open(file).convert("RGB")), label
