"""Inputs between and around the given ones."""

import torch
from torch import nn

from transfer_surgery.matching.distilling.held_out import Asked, hold_out, teach
from transfer_surgery.matching.distilling.variation import bearable_variation, varied


def test_what_is_the_same_in_all_examples_and_masks_and_integers_stay():
    x = torch.randn(50, 6)
    x[:, 2] = 3.5
    mask, tokens, number = torch.randint(0, 2, (50, 4)).float(), torch.arange(50), torch.tensor(2.0)
    batch = {"x": x, "more": [mask, tokens, number, torch.randn(1, 6)]}
    before = x.clone()
    found = varied(batch, 1.0)
    assert torch.equal(x, before)
    assert torch.allclose(found["x"][:, 2], x[:, 2])
    assert not torch.isclose(found["x"][:, :2], x[:, :2]).any(1).all()
    assert all(a is b for a, b in zip(found["more"], batch["more"], strict=True))
    padded = torch.randn(50, 2, 4, 4)
    padded[:, :, 0] = 3.5
    torch.testing.assert_close(varied(padded, 1.0)[:, :, 0], padded[:, :, 0])


def test_no_strength_changes_nothing_and_a_share_of_the_examples_is_left_alone():
    x = torch.randn(400, 3, dtype=torch.float64)
    torch.testing.assert_close(varied(x, 0.0), x)
    same = torch.isclose(varied(x, 1.0, share=0.5), x).all(1)
    assert 0.4 < same.double().mean() < 0.6


def test_each_channel_of_images_gets_a_light_of_its_own():
    torch.manual_seed(0)
    x = torch.randn(300, 2, 8, 8)
    x[:, 1] = 3.5  # the same in all examples
    found = varied(x, 1.0)
    torch.testing.assert_close(found[:, 1], x[:, 1])
    shifts = found[:, 0].mean((1, 2)).std() / x[:, 0].mean((1, 2)).std()
    assert shifts > 1.3  # mixtures and noise of single pixels bring means together
    rows = varied(x.flatten(1), 1.0).view_as(x)
    assert rows[:, 0].mean((1, 2)).std() < x[:, 0].mean((1, 2)).std()


def test_tensors_of_as_many_examples_get_the_same_partners():
    """Without noise a pair stays a pair: the second is twice the first."""
    torch.manual_seed(0)
    x = torch.randn(2000, 1)
    a, b = varied((x, 2 * x), 1.0)
    together = torch.corrcoef(torch.stack([(a - x)[:, 0], (b - 2 * x)[:, 0]]))[0, 1]
    assert together > 0.5


class Explodes(nn.Module):
    """An energy of pairs, which grows without bounds where two atoms meet."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x[:, 1] - x[:, 0]).pow(-12)


def test_inputs_are_varied_as_much_as_the_teacher_bears():
    torch.manual_seed(0)
    atoms = torch.stack([torch.zeros(64), 1 + 0.05 * torch.randn(64)], 1) + torch.randn(64, 1)
    images = torch.randn(64, 4)
    for teacher, x, low, high in (
        (Explodes(), atoms, 0.0, 0.1),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), images, 0.5, 1.0),
    ):
        strength, further = bearable_variation(
            teacher, [Asked(x, teach(teacher, x, "a batch"))], 1.0
        )
        assert low <= strength <= high
        assert len(further) == (strength > 0)
    assert bearable_variation(teacher, [Asked(x, teach(teacher, x, "a batch"))], 0.0) == (0.0, [])


def test_an_eighth_of_a_list_is_held_out_and_of_a_loader_none():
    batches = [torch.full((1,), float(i)) for i in range(17)]
    train, held = hold_out(batches)
    assert [*train] == batches[:15]
    assert held == batches[15:]
    train, held = hold_out(batches[:3])
    assert [*train] == held == batches[:3]
    train, held = hold_out(iter(batches))
    assert held == batches[:8]
    assert [*train] == batches
