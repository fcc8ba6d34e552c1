from torch import nn


def resnet18(weights=None):
    """A network with the last layer of a ResNet-18, and batch norms before it."""
    net = nn.Sequential(
        nn.Conv2d(3, 512, 3, stride=4), nn.BatchNorm2d(512), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    net.fc = nn.Linear(512, 1000)
    return net
