"""What the template `transfer` takes from torchvision, where that is not installed."""
