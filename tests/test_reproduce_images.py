"""Images are loaded from local files, shuffled with their labels, shifted, mirrored, normalised."""

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from transfer_surgery.reproduce.images import Images, crop_and_flip, load_cifar10, load_mnist

CPU = torch.device("cpu")


def numbered(number: int, augment=None) -> Images:
    """Images that show their number, which is their label too."""
    labels = torch.arange(number)
    x = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    return Images(x, labels, x[:2], labels[:2], torch.zeros(3, 1, 1), torch.ones(3, 1, 1), augment)


# ---- augmentation


def window(image: np.ndarray, top: int, left: int, padding: int) -> np.ndarray:
    """The crop, pixel by pixel; what lies outside of the image is 0."""
    result = np.zeros_like(image)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            y, x = row + top - padding, column + left - padding
            if 0 <= y < height and 0 <= x < width:
                result[:, row, column] = image[:, y, x]
    return result


@given(
    st.integers(0, 3), st.sampled_from([(1, 4, 4), (3, 5, 7)]), st.sampled_from(["uint8", "float"])
)
def test_each_crop_is_a_window_of_the_padded_image_mirrored_or_not(padding, shape, kind):
    dtype = torch.uint8 if kind == "uint8" else torch.float32
    images = torch.randint(1, 256, (4, *shape)).to(dtype)  # random pixels: windows differ
    found = crop_and_flip(images, padding)
    assert (found.shape, found.dtype) == (images.shape, dtype)
    places = range(2 * padding + 1)
    for image, crop in zip(images.numpy(), found.numpy(), strict=True):
        windows = [window(image, top, left, padding) for top in places for left in places]
        assert any((crop == w).all() or (crop == w[:, :, ::-1]).all() for w in windows)


def test_all_shifts_are_as_frequent_and_every_second_image_is_mirrored():
    padding, number = 1, 9_000
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5)
    found = crop_and_flip(image.expand(number, 1, 5, 5), padding)[:, 0].numpy()
    counts = {}
    for top in range(3):
        for left in range(3):
            w = window(image[0].numpy(), top, left, padding)[0]
            for mirrored, crop in ((False, w), (True, w[:, ::-1])):
                counts[top, left, mirrored] = int((found == crop).all((1, 2)).sum())
    assert sum(counts.values()) == number
    expected = number / 18
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    assert statistic < 60  # chi-square with 17 degrees of freedom: beyond it 1 in a million


def test_cifar_images_are_shifted_by_four_pixels_at_most():
    image = torch.ones(1, 1, 32, 32, dtype=torch.uint8)
    kept = crop_and_flip(image.expand(2_000, 1, 32, 32)).sum((1, 2, 3))
    assert (kept.min(), kept.max()) == (28 * 28, 32 * 32)


# ---- an epoch


def test_an_epoch_shows_every_image_once_with_its_label_in_a_new_order():
    images = numbered(200)
    orders = []
    for _ in range(2):
        x, y = images.shuffled()
        assert torch.equal(x[:, 0, 0, 0].long(), y)
        assert torch.equal(y.sort().values, images.y_train)
        orders.append(y)
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], images.y_train)


def test_augmentation_sees_the_images_in_their_new_order_and_labels_stay_theirs():
    images = numbered(100, augment=lambda x: x + 100)
    x, y = images.shuffled()
    assert torch.equal(x[:, 2, 3, 3].long(), y + 100)


def test_the_network_sees_normalised_float32_channels_last():
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    images = Images(*[torch.zeros(0)] * 4, mean.view(3, 1, 1), std.view(3, 1, 1))
    x = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    seen = images.seen(x)
    assert seen.dtype == torch.float32
    assert seen.is_contiguous(memory_format=torch.channels_last)
    pixels = x.numpy() / 255
    expected = [(pixels[:, c] - mean[c].item()) / std[c].item() for c in range(3)]
    np.testing.assert_allclose(seen.numpy(), np.stack(expected, 1), rtol=1e-5, atol=1e-6)


# ---- files


def write_idx(file: Path, values: np.ndarray) -> None:
    """The format of http://yann.lecun.com/exdb/mnist, unsigned bytes."""
    head = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    file.write_bytes(head + values.astype(np.uint8).tobytes())


@pytest.fixture
def digits(tmp_path, monkeypatch) -> dict[str, np.ndarray]:
    pytest.importorskip("torchvision")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random, arrays = np.random.default_rng(0), {}
    for part, name, number in (("train", "train", 12), ("test", "t10k", 5)):
        arrays[f"x_{part}"] = random.integers(256, size=(number, 28, 28), dtype=np.uint8)
        arrays[f"y_{part}"] = random.integers(10, size=number, dtype=np.uint8)
        write_idx(raw / f"{name}-images-idx3-ubyte", arrays[f"x_{part}"])
        write_idx(raw / f"{name}-labels-idx1-ubyte", arrays[f"y_{part}"])
    monkeypatch.setenv("TRANSFER_SURGERY_DATA", str(tmp_path))
    return arrays


@pytest.fixture
def photos(tmp_path, monkeypatch) -> dict[str, np.ndarray]:
    random, arrays = np.random.default_rng(0), {}
    for part, number in (("train", 12), ("test", 5)):
        arrays[f"x_{part}"] = random.integers(256, size=(number, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = random.integers(10, size=number, dtype=np.uint8)
    np.savez(tmp_path / "cifar10.npz", **arrays)
    monkeypatch.setenv("TRANSFER_SURGERY_DATA", str(tmp_path))
    return arrays


def same(tensor: Tensor, array: np.ndarray) -> bool:
    return tensor.shape == array.shape and bool((tensor.numpy() == array).all())


@pytest.mark.parametrize("limit", [None, 7])
def test_mnist_is_read_from_the_folder_with_values_from_0_to_1(digits, limit):
    images = load_mnist(CPU, limit)
    assert same(images.x_train, digits["x_train"][:limit, None])
    assert same(images.y_train, digits["y_train"][:limit])
    assert same(images.x_test, digits["x_test"][:limit, None])
    assert same(images.y_test, digits["y_test"][:limit])
    assert (images.x_train.dtype, images.y_train.dtype) == (torch.uint8, torch.int64)
    assert images.augment is None
    assert torch.equal(images.seen(images.x_test), images.x_test.float() / 255)


@pytest.mark.parametrize("limit", [None, 7])
def test_cifar10_is_read_from_the_folder_with_channels_first(photos, limit):
    images = load_cifar10(CPU, limit)
    assert same(images.x_train, photos["x_train"][:limit].transpose(0, 3, 1, 2))
    assert same(images.y_train, photos["y_train"][:limit])
    assert same(images.x_test, photos["x_test"][:limit].transpose(0, 3, 1, 2))
    assert same(images.y_test, photos["y_test"][:limit])
    assert (images.x_train.dtype, images.y_train.dtype) == (torch.uint8, torch.int64)
    assert images.augment is crop_and_flip


def test_cifar10_is_normalised_as_the_trained_weights_expect(photos):
    seen = load_cifar10(CPU).seen(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert seen[0, :, 0, 0].tolist() == pytest.approx(expected)


def test_a_folder_without_the_images_is_an_error_and_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSFER_SURGERY_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"cifar10\.npz"):
        load_cifar10(CPU)
    pytest.importorskip("torchvision")
    with pytest.raises(RuntimeError, match="Dataset not found"):
        load_mnist(CPU)
    assert not list(tmp_path.glob("**/*ubyte*"))


WITHOUT_TORCHVISION = """
import os, sys
import torch
sys.modules["torchvision"] = sys.modules["torchvision.datasets"] = None
from transfer_surgery.reproduce.images import load_cifar10, load_mnist

def error(load):
    try:
        load(torch.device("cpu"))
    except ImportError as error:
        return str(error)

print(len(load_cifar10(torch.device("cpu")).x_train))
print(error(load_mnist))
del os.environ["TRANSFER_SURGERY_DATA"]
print(error(load_mnist))
print(error(load_cifar10))
"""


def test_without_torchvision_cifar10_is_read_and_errors_say_what_to_install(photos, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCHVISION], capture_output=True, text=True, cwd=tmp_path
    )
    install = "is read by torchvision: pip install 'transfer-surgery[timm]'"
    number, *errors = run.stdout.splitlines()
    assert int(number) == len(photos["x_train"]), run.stderr
    assert errors == [f"MNIST {install}", f"MNIST {install}", f"CIFAR-10 {install}"]
    assert [file.name for file in tmp_path.iterdir()] == ["cifar10.npz"]
