"""Accuracy of a model on a data set, and the two settings that it shares with training."""

from __future__ import annotations

import torch


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, data, batch_size: int = 512, *, autocast: str | None = None, channels_last: bool = False
) -> float:
    """The share of ``data``'s test images that ``model``, in evaluation mode, gets right, in [0, 1].

    Raises ValueError when there are none. The model's mode is restored.
    """
    count = len(data.test_labels)
    if count == 0:
        raise ValueError("the data has no test images to evaluate on")
    mode = model.training
    model.eval()
    try:
        correct = 0
        for first in range(0, count, batch_size):
            images = data.normalize(data.test_images[first : first + batch_size])
            images = laid_out(images, channels_last)
            with autocast_to(images.device, autocast):
                guess = model(images).argmax(1)
            correct += (guess == data.test_labels[first : first + batch_size]).sum()
    finally:
        model.train(mode)
    return int(correct) / count


def laid_out(images: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """``images`` [N, C, H, W] in the memory format that the model was given."""
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images


def autocast_to(device: torch.device, dtype: str | None) -> torch.autocast:
    """The context in which torch casts to ``dtype`` ("bfloat16", "float16"); with None it changes nothing."""
    return torch.autocast(device.type, getattr(torch, dtype or "bfloat16"), enabled=dtype is not None)
