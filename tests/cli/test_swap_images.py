"""The images of the swap command: which are found, and what becomes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor

from tests.helpers.photos import draw_photos
from transfer_surgery.cli.swapping.folders import find_images, split
from transfer_surgery.cli.swapping.images import Images, Preprocessing


@pytest.fixture(autouse=True)
def _photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    draw_photos(tmp_path / "train", 32)
    draw_photos(tmp_path / "val", 30)
    monkeypatch.chdir(tmp_path)


def test_images_to_learn_from_come_shuffled_shifted_and_mirrored_and_others_as_they_are() -> None:
    paths = find_images(Path("val"))[:6]
    size, settings = (3, 16, 16), {"mean": (0.5,), "std": (0.25,)}
    preprocessing = Preprocessing.choose(nn.Identity(), size, settings, paths)
    plain = torch.cat([*Images(paths, preprocessing, batch_size=4)])
    pixels = torch.stack([to_tensor(Image.open(path)) for path in paths])
    torch.testing.assert_close(plain, (pixels - 0.5) / 0.25)
    torch.manual_seed(0)
    learned = Images(paths, preprocessing, batch_size=3, training=True)
    for batch in (torch.cat([*learned]) for _ in range(3)):
        assert batch.shape == plain.shape
        assert not torch.equal(batch, plain)
        # The middle of each image is somewhere in one of the originals, maybe mirrored.
        windows = plain.unfold(2, 8, 1).unfold(3, 8, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        windows = torch.cat([windows, windows.flip(-1)])
        for image in batch:
            assert (windows == image[:, 4:12, 4:12]).flatten(1).all(1).any()


def test_in_teaching_no_batch_is_smaller_and_a_broken_image_is_left_out() -> None:
    paths = find_images(Path("val"))[:7]
    settings = {"mean": (0.5,), "std": (0.25,)}
    preprocessing = Preprocessing.choose(nn.Identity(), (3, 16, 16), settings, paths)
    learned = Images(paths, preprocessing, batch_size=3, training=True)
    assert [len(batch) for batch in learned] == [3, 3]
    Path("broken.png").write_bytes(paths[0].read_bytes()[:200])
    learned = Images([*paths[:2], Path("broken.png")], preprocessing, batch_size=3, training=True)
    with pytest.warns(UserWarning, match=r"broken\.png cannot be read .* goes on without it"):
        assert [len(batch) for batch in learned] == [2]


def test_links_to_a_folder_that_is_there_and_hidden_folders_add_no_images() -> None:
    Path("photos").mkdir()
    Path("photos/plain").symlink_to(Path("train/dark").resolve())
    Path("photos/again").symlink_to(Path("photos").resolve())
    Path("photos/.thumbnails").mkdir()
    Path("photos/.thumbnails/0.png").write_bytes(Path("val/dark/0.png").read_bytes())
    names = sorted(path.name for path in Path("train/dark").iterdir())
    assert find_images(Path("photos")) == [Path("photos/plain", name) for name in names]


def test_what_is_compared_on_is_never_learned_from() -> None:
    images = find_images(Path("train"))
    same = [Path.cwd() / path for path in images]  # by another name
    fitted, compared, learned = split(images, same, 10, 1000, seed=0)
    assert (len(fitted), len(compared), len(learned)) == (10, 16, 48)
    assert not {path.resolve() for path in compared} & {path.resolve() for path in learned}
    assert set(fitted) < set(learned)
    others = find_images(Path("val"))
    fitted, compared, learned = split(images, others, 1000, 1000, seed=0)
    assert (len(fitted), sorted(compared), learned) == (64, others, images)
