"""``transfer-surgery finetune``: train a model while its gates are transferred."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import nn

from transfer_surgery.cli.conversion import (
    Conversion,
    Granularity,
    Pretrained,
    Target,
    Weights,
    keep,
)
from transfer_surgery.cli.finetuning.checkpoint import STATE, Checkpoint
from transfer_surgery.cli.finetuning.images import ImageData, count_classes, load_images
from transfer_surgery.cli.finetuning.training import Machine, fit, some_images
from transfer_surgery.cli.options import InputSize, Set, expected, model_spec, tell
from transfer_surgery.files import SPEC, ModelSpec, load_gates, load_model, read_spec, save_model
from transfer_surgery.matching import match_targets
from transfer_surgery.reports import History, report
from transfer_surgery.transfer import TransferSchedule, wrap_optimizer

_NEW = ("output", "target", "granularity", "weights", "pretrained", "assignments", "input_size")


def finetune(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|DIR",
            help="A model as for [b]convert[/b], with -o; or a folder of [b]convert[/b].",
            show_default=False,
        ),
    ],
    data: Annotated[
        str, typer.Option(help="digits, cifar10, or a folder with train/CLASS and val/CLASS.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to make, for a MODEL."),
    ] = None,
    target: Target = "sin",
    granularity: Granularity = "channel",
    weights: Weights = None,
    pretrained: Pretrained = False,
    assignments: Set = None,
    input_size: InputSize = None,
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
        bool,
        typer.Option("--match", help="First fit the targets of trained weights to 512 images."),
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
    """Train a model while its gates are transferred, and keep it in a folder.

    A MODEL is converted first, which takes the options from -o to --input-size. A zoo's model gets
    as many outputs as the data has classes, unless --set num_classes says otherwise. To choose
    sites, gates or their noise, make a DIR with [b]convert[/b].

    One cycle of the learning rate; the bar shows the time left and the share of the gates that is
    transferred. After each epoch the folder holds the model, for [b]report[/b], [b]bake[/b] and
    [b]export[/b], and the state of the training: the same command with --resume goes on with it.

    The labels teach here. To let the original network do so, use transfer_surgery.distill in
    Python.

    [bold]Examples[/bold]

    transfer-surgery finetune resnet18 --pretrained --data imagenette --match --amp -o run

    transfer-surgery finetune resnet18 --weights best.pth --set in_chans=1 --input-size 1x32x32
    --data digits --epochs 30 --lr 0.05 -o run

    transfer-surgery finetune run --data imagenette --match --amp --resume
    """
    settings = {
        **{"data": data, "epochs": epochs, "schedule": schedule, "fraction": fraction},
        **{"start": start, "end": end, "gamma": gamma, "opt": opt, "lr": lr},
        **{"weight_decay": weight_decay, "batch_size": batch_size, "seed": seed},
    }
    given = Path(model)
    conversion = None
    if output is None or ((given / SPEC).is_file() and given != output):
        _refuse_all_but_a_folder(context, given)
        folder = given
    else:
        folder = output
        spec = _fitting(model_spec(model, assignments, input_size), data)
        conversion = Conversion(spec, weights, pretrained, target, granularity, seed)
        if match and weights is None and not pretrained:
            raise typer.BadParameter(
                "--match fits targets to what a trained network computes: give --weights or "
                "--pretrained, too."
            )
    state = folder / STATE
    if state.exists() and not resume:
        raise typer.BadParameter(f"{folder} was trained: --resume, or convert into another folder.")
    if conversion is not None and (folder / SPEC).exists():
        if not resume:
            raise typer.BadParameter(f"{folder} holds a model: --resume, or another folder.")
        with expected():
            conversion.refuse_other(folder)
        conversion = None
    with expected():
        machine = Machine.choose(device, amp, compile)
        spec, network = _load(folder) if conversion is None else (conversion.spec, conversion.run())
        loaders = _load_images(spec, network, data, batch_size, machine)
        torch.manual_seed(seed)  # here, so that it does not matter how the model was made
        matched = match and not state.exists()
        if matched:
            tell(str(match_targets(network, some_images(loaders, machine))))
        total = epochs * len(loaders.train)
        transfer = TransferSchedule(total, fraction=fraction, start=start, end=end, order=schedule)
        optimizer = _timm().optim.create_optimizer_v2(
            network, opt=opt, lr=lr, weight_decay=weight_decay
        )
        wrap_optimizer(
            optimizer, network, transfer=transfer if gamma is None else None, gamma=gamma
        )
        if conversion is not None:  # not before: what does not go leaves no folder behind
            keep(network, folder, spec)
        elif matched:
            save_model(network, folder)
    with expected((ValueError, FloatingPointError)):  # a state that does not fit; divergence
        last = fit(
            *(network, loaders, optimizer, machine),
            epochs=epochs,
            title="finetune",
            history=History(network),
            checkpoint=Checkpoint(state, network, settings, lambda: save_model(network, folder)),
        )
    transferred = report(network).total.transferred
    typer.echo(f"{folder}: test accuracy {last.accuracy:.2%}, {transferred:.1%} transferred")


def _refuse_all_but_a_folder(context: typer.Context, folder: Path) -> None:
    """Look whether there is this folder, and no option of a conversion beside it."""
    if not folder.is_dir():
        raise typer.BadParameter(
            f"there is no folder {folder}. If it is a model, say with -o DIR where it goes."
        )
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in _NEW
        and (where := context.get_parameter_source(parameter.name)) is not None
        and where.name != "DEFAULT"
    ]
    if given:
        raise typer.BadParameter(
            f"{folder} is a folder, whose model is trained there as it was converted: leave out "
            f"{', '.join(given)}. If a model of timm's is meant: timm:{folder}."
        )


def _fitting(spec: ModelSpec, data: str) -> ModelSpec:
    """With an output per class, if not told; the function of a file may not take the number."""
    if "num_classes" in spec.arguments or spec.name.rpartition(":")[0].endswith(".py"):
        return spec
    with expected():
        return replace(spec, arguments={**spec.arguments, "num_classes": count_classes(data)})


def _load(folder: Path) -> tuple[ModelSpec, nn.Module]:
    """The model; without its weights, which a kill may have left older than its gates, to go on."""
    spec = read_spec(folder)
    if not (folder / STATE).exists():
        return spec, load_model(folder)
    model = spec.build()
    return spec, load_gates(model, folder, spec.example_input(model))


def _load_images(
    spec: ModelSpec, model: nn.Module, data: str, batch_size: int, machine: Machine
) -> ImageData:
    """The images as the model takes them, and the model where they are.

    Raises:
        ValueError: they have another number of channels or classes.
    """
    size = tuple(spec.example_input(model).shape[1:])
    config = _timm().data.resolve_data_config({"input_size": size}, model=model)
    loaders = load_images(
        data, batch_size=batch_size, device=machine.device, size=size[-1], config=config
    )
    x = machine.place(next(iter(loaders.test))[0][:2])
    if x.shape[1] != size[0]:
        raise ValueError(
            f"the model takes {size[0]} channels, the data has {x.shape[1]}: convert it with "
            f"--set in_chans={x.shape[1]}, and --input-size {x.shape[1]}xHxW where that was given."
        )
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
