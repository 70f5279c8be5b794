"""CIFAR-10 is found or its lack explained; crops of training images are fair."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from transfer_surgery.cli.finetuning.images import crop_and_flip, read_cifar10


def test_all_shifts_are_as_frequent_and_every_second_image_is_mirrored() -> None:
    # Every pixel has a number of its own, above all that of the middle, 13 of 25, tells the shift.
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5).expand(9_000, 2, 5, 5)
    crops = crop_and_flip(image, padding=1)
    assert torch.equal(crops[:, 0], crops[:, 1])  # all channels are shifted alike
    counts = Counter(
        (crop[2, 2].item(), (crop[2, 3] > crop[2, 2]).item()) for crop in crops[:, 0].int()
    )
    assert len(counts) == 18  # nine shifts, mirrored or not
    statistic = sum((count - 500) ** 2 / 500 for count in counts.values())
    assert statistic < 60  # chi-square with 17 degrees of freedom: beyond it 1 in a million


def test_without_data_and_torchvision_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRANSFER_SURGERY_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImportError, match=r"pip install 'transfer-surgery\[timm\]'"):
        read_cifar10()
    assert not list(tmp_path.iterdir())
