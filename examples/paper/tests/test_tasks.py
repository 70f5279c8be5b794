"""Samples of the Bessel function; images, loaded, shuffled with their labels, normalised."""

import math

import numpy as np
import pytest
import torch
from scipy.special import j0
from tasks import Bessel, Images, load_cifar10, load_mnist, make_task

from transfer_surgery.cli.finetuning.images import crop_and_flip

CPU = torch.device("cpu")


def test_bessel_samples_are_400_evenly_spaced_points_halved_at_random():
    data = Bessel(CPU)
    both = torch.cat([data.x_train, data.x_test]).flatten().sort().values
    torch.testing.assert_close(both, torch.linspace(-80, 80, 400))
    assert len(data.x_train) == len(data.x_test) == 200
    # A sample's neighbour is as likely as not in the same half: runs of 1, 2, 3... not of 1 alone.
    inside = torch.isin(both, data.x_train.flatten())
    assert 160 < (inside[1:] != inside[:-1]).sum().item() < 240


def test_test_labels_are_clean_and_training_labels_have_white_noise_of_standard_deviation_008():
    clean = torch.from_numpy(j0(Bessel(CPU).x_test.double().numpy())).float()
    torch.testing.assert_close(Bessel(CPU).y_test, clean, rtol=0, atol=1e-5)
    noises = []
    for seed in range(20):
        data = Bessel(CPU, seed=seed)
        exact = torch.from_numpy(j0(data.x_train.double().numpy()))
        noises.append((data.y_train.double() - exact).flatten())
    noise = torch.stack(noises)
    number = noise.numel()
    assert noise.std().item() == pytest.approx(0.08, abs=4 * 0.08 / math.sqrt(2 * number))
    assert noise.mean().item() == pytest.approx(0, abs=4 * 0.08 / math.sqrt(number))


def test_all_networks_learn_the_same_samples_and_the_global_random_state_stays():
    before = torch.get_rng_state()
    first = make_task("bessel", CPU)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = make_task("bessel", CPU)
    assert torch.equal(first.x_train, again.x_train)
    assert torch.equal(first.y_train, again.y_train)
    with pytest.raises(ValueError, match="unknown task 'imagenet'"):
        make_task("imagenet", CPU)


def test_an_epoch_shows_each_sample_once_with_its_label():
    data = Bessel(CPU)
    batches = list(data.batches(128))
    assert [len(x) for x, _ in batches] == [128, 72]
    assert len(batches) == data.steps(128)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    order = x.flatten().argsort()
    assert torch.equal(x[order], data.x_train)
    assert torch.equal(y[order], data.y_train)


def test_score_is_the_mean_squared_error_without_noise():
    def mean(x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, 0.25)

    data = Bessel(CPU)
    expected = (j0(data.x_test.double().numpy()) - 0.25) ** 2
    assert data.score(mean) == pytest.approx(expected.mean(), rel=1e-4)
    assert data.drawn(mean)["fit"] == [0.25] * 401


# ---- images


def test_an_epoch_shows_every_image_once_with_its_label_augmented_in_a_new_order():
    labels = torch.arange(100)
    x = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    look = torch.zeros(3, 1, 1)
    images = Images((x, labels), (x, labels), look, look, augment=lambda x: x + 100)
    (first, y), (_, again) = images.shuffled(), images.shuffled()
    assert torch.equal(first[:, 2, 3, 3].long(), y + 100)
    assert torch.equal(y.sort().values, labels)
    assert not torch.equal(y, labels)
    assert not torch.equal(y, again)


def test_mnist_has_values_from_0_to_1(data_folder):
    images = load_mnist(CPU, limit=500)
    x, y = images.test
    assert (x.shape, x.dtype, y.shape) == ((500, 1, 28, 28), torch.uint8, (500,))
    assert (len(images.train[0]), images.augment) == (500, None)
    assert torch.equal(images.seen(x), x.float() / 255)
    assert images.seen(x).max() == 1


def test_cifar10_is_channels_first_and_normalised_as_the_trained_weights_expect(data_folder):
    images = load_cifar10(CPU, limit=4)
    with np.load(data_folder / "cifar10.npz") as file:
        assert np.array_equal(images.train[0], file["x_train"][:4].transpose(0, 3, 1, 2))
        assert np.array_equal(images.test[1], file["y_test"][:4])
    assert images.augment is crop_and_flip
    seen = images.seen(torch.full((2, 3, 2, 2), 255, dtype=torch.uint8))
    assert seen.is_contiguous(memory_format=torch.channels_last)
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert seen[0, :, 0, 0].tolist() == pytest.approx(expected)


def test_a_folder_without_the_images_is_an_error_and_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSFER_SURGERY_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"cifar10\.npz"):
        load_cifar10(CPU)
    with pytest.raises(RuntimeError, match="Dataset not found"):
        load_mnist(CPU)
