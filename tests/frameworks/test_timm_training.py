"""wrap_timm_optimizer in a loop written like timm's train.py, with timm's own parts."""

from argparse import Namespace

import pytest
import timm
import torch
from timm.models import model_parameters, resume_checkpoint
from timm.optim import Lookahead, create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler, dispatch_clip_grad
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.same_bits import assert_same_bits
from tests.helpers.schedules import half
from transfer_surgery import (
    GatedActivation,
    TransferSchedule,
    bake,
    convert,
    match_targets,
    report,
    wrap_optimizer,
)
from transfer_surgery.frameworks.timm import total_updates, wrap_timm_optimizer

BATCHES = 5
TINY = {
    "test_resnet": {"num_classes": 3},
    "test_vit": {"num_classes": 3, "img_size": 32},
}


def arguments(**settings):
    """The arguments of train.py that the loop below reads."""
    defaults = {
        "clip_grad": None,
        "clip_mode": "norm",
        "cooldown_epochs": 0,
        "epochs": 4,
        "grad_accum_steps": 1,
        "lr": 0.01,
        "model": "test_resnet",
        "momentum": 0.9,
        "opt": "sgd",
        "resume": "",
        "sched": "cosine",
        "sched_on_updates": True,
        "stop_after": None,
        "warmup_epochs": 1,
        "weight_decay": 1e-4,
    }
    return Namespace(**defaults | settings)


def early(steps):
    return TransferSchedule(steps, end=0.5)


def loader():
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(BATCHES * 4, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(images, images.mean(dim=(2, 3)).argmax(dim=1)), batch_size=4)


def train(
    args,
    *,
    wrap="before scheduler",
    matched=False,
    ema=False,
    amp=False,
    saver=None,
    schedule=TransferSchedule,
):
    """train.py in short. The two lines of the recipe are marked."""
    torch.manual_seed(1)
    model = timm.create_model(args.model, **TINY[args.model])
    convert(model, "sin")  # the first line
    if matched:
        match_targets(model, [torch.randn(64, 3, 32, 32)])
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    loss_scaler = NativeScaler(device="cpu") if amp else None
    start_epoch = 0
    if args.resume:
        start_epoch = resume_checkpoint(model, args.resume, optimizer, loss_scaler, log_info=False)
    model_ema = ModelEmaV3(model, decay=0.5) if ema else None
    loader_train = loader()
    if wrap == "before scheduler":
        wrap_timm_optimizer(optimizer, model, args, loader_train, schedule)  # the second line
    updates_per_epoch = -(-len(loader_train) // args.grad_accum_steps)
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch
    )
    if wrap == "after scheduler":
        wrap_timm_optimizer(optimizer, model, args, loader_train, schedule)
    if wrap == "by hand":
        steps = num_epochs * updates_per_epoch
        wrap_optimizer(optimizer, model, transfer=schedule(steps))
    if start_epoch > 0:
        lr_scheduler.step_update(start_epoch * updates_per_epoch)
    if saver is not None:
        saver = CheckpointSaver(
            model, optimizer, args, model_ema, amp_scaler=loss_scaler, checkpoint_dir=str(saver)
        )
    for epoch in range(start_epoch, num_epochs):
        if epoch == args.stop_after:
            break
        train_one_epoch(epoch, model, loader_train, optimizer, args, lr_scheduler, loss_scaler)
        if model_ema is not None:
            model_ema.update(model)
        if saver is not None:
            saver.save_checkpoint(epoch, metric=epoch)
    return model, optimizer, model_ema


def train_one_epoch(epoch, model, loader, optimizer, args, lr_scheduler, loss_scaler):
    model.train()
    updates_per_epoch = -(-len(loader) // args.grad_accum_steps)
    num_updates = epoch * updates_per_epoch
    for i, (images, labels) in enumerate(loader):
        torch.manual_seed(epoch * BATCHES + i)  # train.py does not save the generator's state
        need_update = (i + 1) % args.grad_accum_steps == 0 or i + 1 == len(loader)
        loss = torch.nn.functional.cross_entropy(model(images), labels) / args.grad_accum_steps
        clip = {"clip_grad": args.clip_grad, "clip_mode": args.clip_mode}
        if loss_scaler is not None:
            parameters = model_parameters(model)
            loss_scaler(loss, optimizer, **clip, parameters=parameters, need_update=need_update)
        else:
            loss.backward()
            if need_update:
                if args.clip_grad is not None:
                    dispatch_clip_grad(model_parameters(model), args.clip_grad, args.clip_mode)
                optimizer.step()
        if not need_update:
            continue
        num_updates += 1
        optimizer.zero_grad()
        lr_scheduler.step_update(num_updates=num_updates)
    if hasattr(optimizer, "sync_lookahead"):
        optimizer.sync_lookahead()


@pytest.mark.parametrize("wrap", ["before scheduler", "after scheduler"])
def test_two_lines_do_what_wrap_optimizer_does_by_hand_bit_for_bit(wrap):
    args = arguments(grad_accum_steps=2, clip_grad=1.0, cooldown_epochs=1)
    model, optimizer, _ = train(args, wrap=wrap, schedule=half)
    expected, *_ = train(args, wrap="by hand", schedule=half)
    assert_same_bits(model, expected)
    assert report(model).total.transferred == 0.5
    assert [g["transfer_step"] for g in optimizer.param_groups if "transfer_step" in g] == [15]


# How each family of optimizers steps is tested by tests/transfer/test_timm_optimizers.py.
@pytest.mark.parametrize(
    ("opt", "settings"),
    [
        ("adamw", {"layer_decay": 0.7, "model": "test_vit"}),
        ("lion", {"lr": 1e-3}),
        ("lookahead_sgd", {"layer_decay": 0.7, "epochs": 6}),
        ("muon", {"model": "test_vit"}),
    ],
)
def test_timms_optimizers_transfer_all_gates_and_the_network_bakes(opt, settings):
    model, optimizer, _ = train(arguments(opt=opt, **settings))
    assert report(model).total.transferred == 1
    groups = [group for group in optimizer.param_groups if "transfer_step" in group]
    assert [group["transfer_step"] for group in groups] == [BATCHES * settings.get("epochs", 4)]
    size = TINY[settings.get("model", "test_resnet")].get("img_size", 64)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model.eval()(images)
        assert torch.equal(bake(model)(images), expected)


def test_lookahead_leaves_the_gates_where_the_schedule_put_them():
    model, optimizer, _ = train(arguments(opt="lookahead_sgd", epochs=12, stop_after=6))
    # Of the 60 steps 30 were taken, and every sixth is one after which Lookahead averages.
    gates = [unit.gate for unit in model.modules() if isinstance(unit, GatedActivation)]
    share = torch.cat([gate.probability().flatten() for gate in gates]).mean().item()
    assert share == pytest.approx(TransferSchedule(60).budget(30), abs=1e-3)
    assert isinstance(optimizer, Lookahead)
    averaged = [p for p, s in optimizer._base_optimizer.state.items() if "lookahead_slow_buff" in s]
    assert len(averaged) == len(list(model.parameters())) - len(gates)


@pytest.mark.parametrize(
    ("opt", "wrap", "matched"),
    [("adamw", "before scheduler", True), ("lookahead_adamw", "after scheduler", False)],
)
def test_a_resumed_training_ends_like_an_uninterrupted_one_bit_for_bit(
    tmp_path, opt, wrap, matched
):
    settings, how = {"opt": opt, "lr": 1e-3}, {"wrap": wrap, "matched": matched}
    whole, *_ = train(arguments(**settings), **how)
    half, *_ = train(arguments(**settings, stop_after=2), **how, saver=tmp_path)
    assert 0 < report(half).total.transferred < 1
    resumed, *_ = train(arguments(**settings, resume=str(tmp_path / "last.pth.tar")), **how)
    assert_same_bits(resumed, whole)
    assert report(resumed).total.transferred == 1


def test_native_scaler_ema_and_saver_work_as_before(tmp_path):
    args = arguments(clip_grad=0.5, epochs=12)
    model, _, ema = train(args, ema=True, amp=True, saver=tmp_path, schedule=early)
    assert report(model).total.transferred == 1
    assert report(ema.module).total.transferred == 1  # it had 6 epochs to follow
    assert (tmp_path / "model_best.pth.tar").exists()
    fresh = convert(timm.create_model(args.model, **TINY[args.model]), "sin")
    resume_checkpoint(fresh, str(tmp_path / "model_best.pth.tar"), log_info=False)
    assert_same_bits(fresh, model)


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [
        ({"sched": "none"}, 4),
        ({"sched": "step", "sched_on_updates": False, "decay_epochs": 2}, 4),
        ({"sched": "cosine", "cooldown_epochs": 3}, 7),
        ({"sched": "cosine", "warmup_prefix": True}, 5),
        ({"sched": "cosine", "sched_on_updates": False, "lr_cycle_limit": 2}, 8),
        ({"sched": "step", "warmup_prefix": True}, 5),
    ],
)
def test_total_updates_counts_the_epochs_that_timm_trains(settings, epochs):
    assert total_updates(arguments(**settings), range(BATCHES)) == epochs * BATCHES
    settings["grad_accum_steps"] = 2
    assert total_updates(arguments(**settings), range(BATCHES)) == epochs * 3


def test_frozen_gates_are_left_out():
    """layer_decay_no_opt_scale takes the lowest layers out of the optimizer."""
    args = arguments(opt="adamw", layer_decay=0.5, layer_decay_no_opt_scale=0.3)
    model, *_ = train(args)
    kept = {row.path for row in report(model) if row.transferred == 0}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert kept
    assert {f"{path}.gate.log_alpha" for path in kept} <= frozen
    assert all(row.transferred in (0, 1) for row in report(model))


def test_schedules_and_orders_that_cannot_work_are_errors_and_change_nothing():
    args = arguments()
    model = timm.create_model(args.model)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    with pytest.raises(ValueError, match=r"call convert\(model, \.\.\.\) first"):
        wrap_timm_optimizer(optimizer, model, args, range(5))
    convert(model)
    with pytest.raises(ValueError, match=r"holds 0 of .* convert\(model\) before create_optimizer"):
        wrap_timm_optimizer(optimizer, model, args, range(5))
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    with pytest.raises(ValueError, match="fraction=2"):
        wrap_timm_optimizer(
            optimizer, model, args, range(5), lambda steps: TransferSchedule(steps, fraction=2)
        )
    assert not any("transfer_step" in group for group in optimizer.param_groups)
    wrap_timm_optimizer(optimizer, model, args, range(5))
    with pytest.raises(ValueError, match="wrapped already"):
        wrap_timm_optimizer(optimizer, model, args, range(5))
    assert any("transfer_step" in group for group in optimizer.param_groups)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    match_targets(model, [torch.randn(64, 3, 32, 32)])
    with pytest.raises(ValueError, match=r"holds 12 of the 60 .* and fitted targets"):
        wrap_timm_optimizer(optimizer, model, args, range(5))
