"""CIFAR-10 is found or its lack explained; crops of training images are fair."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import resolve_data_config

from transfer_surgery.cli.finetuning.images import (
    Loader,
    crop_and_flip,
    load_folder,
    read_cifar10,
)


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


def test_an_epoch_of_a_folder_is_the_same_again_from_the_random_state_before_it(
    tmp_path: Path,
) -> None:
    for part in ("train", "val"):
        folder = tmp_path / part / "class"
        folder.mkdir(parents=True)
        for number in range(8):
            pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype="uint8")
            Image.fromarray(pixels).save(folder / f"{number}.png")
    config = resolve_data_config({"input_size": (3, 16, 16)})

    def loader() -> Loader:
        device = torch.device("cpu")
        return load_folder(tmp_path, batch_size=4, device=device, config=config).train

    images = loader()
    torch.cat([x for x, _ in images])
    before = torch.get_rng_state()
    expected = torch.cat([x for x, _ in images])
    torch.set_rng_state(before)
    assert torch.equal(torch.cat([x for x, _ in loader()]), expected)


def test_without_data_and_torchvision_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRANSFER_SURGERY_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImportError, match=r"pip install 'transfer-surgery\[timm\]'"):
        read_cifar10()
    assert not list(tmp_path.iterdir())
