"""``transfer-surgery finetune``: train a converted model while its gates are transferred."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import nn

from transfer_surgery.checkpoint import load_gates
from transfer_surgery.commands.common import Folder, expected, tell
from transfer_surgery.finetune.checkpoint import STATE, Checkpoint
from transfer_surgery.finetune.images import ImageData, load_images
from transfer_surgery.finetune.training import Machine, fit, some_images
from transfer_surgery.history import History
from transfer_surgery.match import match_targets
from transfer_surgery.model_folder import load_model, read_spec, save_model
from transfer_surgery.optimizer import wrap_optimizer
from transfer_surgery.report import report
from transfer_surgery.schedule import TransferSchedule

__all__ = ["finetune"]


def finetune(
    folder: Folder,
    data: Annotated[
        str, typer.Option(help="digits, cifar10, or a folder with train/CLASS and val/CLASS.")
    ],
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    schedule: Annotated[
        Literal["joint", "front_to_back", "back_to_front"], typer.Option(help="Who goes first.")
    ] = "joint",
    fraction: Annotated[float, typer.Option(help="Share of the gates to transfer.")] = 1.0,
    start: Annotated[float, typer.Option(help="When, as a share of the training.")] = 0.1,
    end: Annotated[float, typer.Option(help="Until when.")] = 0.7,
    gamma: Annotated[
        float | None, typer.Option(help="The paper's constant instead of a schedule.")
    ] = None,
    match: Annotated[
        bool, typer.Option("--match", help="First fit the targets to 512 of the images.")
    ] = False,
    opt: Annotated[str, typer.Option(help="Any timm optimizer.")] = "sgd",
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 0.01,
    weight_decay: float = 5e-4,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = (
        "auto"
    ),
    amp: Annotated[bool, typer.Option("--amp", help="Autocast to bfloat16.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the steps.")] = False,
    seed: int = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a training that was killed.")
    ] = False,
) -> None:
    """Train a converted model while its gates are transferred, and keep it in its folder.

    One cycle of the learning rate; the bar shows the time left and the share of the gates that is
    transferred. After each epoch the folder holds the model, for [b]report[/b], [b]bake[/b] and
    [b]export[/b], and the state of the training: the same command with --resume goes on with it.

    [bold]Examples[/bold]

    transfer-surgery convert resnet18 --set num_classes=10 --set in_chans=1 --input-size 1x32x32 -o
    run

    transfer-surgery finetune run --data digits --epochs 30 --lr 0.05

    transfer-surgery finetune run --data imagenette --match --opt adamw --lr 1e-4 --amp --resume
    """
    settings = {
        **{"data": data, "epochs": epochs, "schedule": schedule, "fraction": fraction},
        **{"start": start, "end": end, "gamma": gamma, "opt": opt, "lr": lr},
        **{"weight_decay": weight_decay, "batch_size": batch_size, "seed": seed},
    }
    state = folder / STATE
    if state.exists() and not resume:
        raise typer.BadParameter(f"{folder} was trained: --resume, or convert into another folder.")
    with expected():
        machine = Machine.choose(device, amp, compile)
        torch.manual_seed(seed)
        model = _load(folder)
        loaders = _load_images(folder, model, data, batch_size, machine)
        if match and not state.exists():
            tell(str(match_targets(model, some_images(loaders, machine))))
            save_model(model, folder)
        total = epochs * len(loaders.train)
        transfer = TransferSchedule(total, fraction=fraction, start=start, end=end, order=schedule)
        optimizer = _timm().optim.create_optimizer_v2(
            model, opt=opt, lr=lr, weight_decay=weight_decay
        )
        wrap_optimizer(optimizer, model, transfer=transfer if gamma is None else None, gamma=gamma)
    with expected((ValueError,)):  # of a state that does not fit
        last = fit(
            *(model, loaders, optimizer, machine),
            epochs=epochs,
            title="finetune",
            history=History(model),
            checkpoint=Checkpoint(state, model, settings, lambda: save_model(model, folder)),
        )
    transferred = report(model).total.transferred
    typer.echo(f"{folder}: test accuracy {last.accuracy:.2%}, {transferred:.1%} transferred")


def _load(folder: Path) -> nn.Module:
    """The model; without its weights, which a kill may have left older than its gates, to go on."""
    if not (folder / STATE).exists():
        return load_model(folder)
    spec = read_spec(folder)
    model = spec.build()
    return load_gates(model, folder, spec.example_input(model))


def _load_images(
    folder: Path, model: nn.Module, data: str, batch_size: int, machine: Machine
) -> ImageData:
    """The images as the model takes them, and the model where they are.

    Raises:
        ValueError: they have another number of classes.
    """
    size = tuple(read_spec(folder).example_input(model).shape[1:])
    config = _timm().data.resolve_data_config({"input_size": size}, model=model)
    loaders = load_images(
        data, batch_size=batch_size, device=machine.device, size=size[-1], config=config
    )
    x = machine.place(next(iter(loaders.test))[0][:2])
    with torch.no_grad():
        outputs = machine.place(model).eval()(x).shape[-1]
    if outputs != loaders.classes:
        raise ValueError(
            f"the model has {outputs} outputs, the data {loaders.classes} classes: convert it with "
            f"--set num_classes={loaders.classes}."
        )
    return loaders


def _timm() -> Any:
    try:
        import timm.data
        import timm.optim
    except ImportError as error:
        raise ImportError(
            "finetune needs timm: pip install 'transfer-surgery[examples]'"
        ) from error
    return timm
