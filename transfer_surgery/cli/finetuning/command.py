"""``transfer-surgery finetune``: train a model while its gates are transferred."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import typer
from torch import nn

from transfer_surgery.cli.finetuning.checkpoint import Checkpoint, state_of
from transfer_surgery.cli.finetuning.images import ImageData, load_images
from transfer_surgery.cli.finetuning.training import Machine, some_images, train
from transfer_surgery.cli.options import BatchSize, Converted, Device, run_errors
from transfer_surgery.cli.printing import say, show
from transfer_surgery.files import ModelSpec, load_network, save_model
from transfer_surgery.matching import match_targets
from transfer_surgery.reports import History, report
from transfer_surgery.transfer import TransferSchedule, wrap_optimizer


def finetune(
    file: Converted,
    data: Annotated[
        str,
        typer.Option(
            help="Train on digits, cifar10, or a folder with train/CLASS and val/CLASS.",
            show_default=False,
        ),
    ],
    epochs: Annotated[
        int, typer.Option(min=1, help="Number of passes over the training images.")
    ] = 10,
    order: Annotated[
        Literal["joint", "front_to_back", "back_to_front"],
        typer.Option(help="Transfer all sites together, the first ones first, or the last first."),
    ] = "joint",
    fraction: Annotated[
        float, typer.Option(help="Transfer this share of the gates, in (0, 1].")
    ] = 1.0,
    start: Annotated[
        float, typer.Option(help="Begin the transfer after this share of the training.")
    ] = 0.1,
    end: Annotated[
        float, typer.Option(help="End the transfer after this share of the training.")
    ] = 0.7,
    match: Annotated[
        bool,
        typer.Option(
            "--match",
            help="First fit the targets of a trained model to 512 images. Default: no fit.",
        ),
    ] = False,
    opt: Annotated[str, typer.Option(help="Name of a timm optimizer.")] = "sgd",
    lr: Annotated[float, typer.Option(help="Set the highest learning rate.")] = 0.01,
    weight_decay: Annotated[float, typer.Option(help="Set the weight decay.")] = 5e-4,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    amp: Annotated[
        bool, typer.Option("--amp", help="Autocast to bfloat16. Default: float32.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile. Default: eager steps.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed the order of the images and the noise.")] = 0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue a training that was stopped. Default: start a new one."
        ),
    ] = False,
) -> None:
    """Train a converted model while its gates are transferred; FILE is replaced by the result.

    The learning rate makes one cycle; the bar shows the time left and the share of the gates that
    is transferred. After each epoch FILE holds the model, for [b]report[/b], [b]bake[/b] and
    [b]export[/b], and a file beside it holds the state of the training: the same command with
    --resume continues it.

    The labels teach here. To let the original network do so, use transfer_surgery.distill in
    Python.

    [bold]Examples[/bold]

    transfer-surgery finetune run.safetensors --data imagenette --match --amp

    transfer-surgery finetune run.safetensors --data digits --epochs 30 --lr 0.05

    transfer-surgery finetune run.safetensors --data imagenette --match --amp --resume
    """
    settings = {
        "data": data,
        "epochs": epochs,
        "order": order,
        "fraction": fraction,
        "start": start,
        "end": end,
        "opt": opt,
        "lr": lr,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
        "seed": seed,
    }
    state = state_of(file)
    if state.exists() and not resume:
        raise typer.BadParameter(
            f"{file} was trained: continue with --resume, or convert into another file."
        )
    with run_errors():
        machine = Machine.choose(device, amp, compile)
        spec, network = load_network(file, "model")
        network.float()  # as the images
        loaders = _load_images(spec, network, data, batch_size, machine)
        torch.manual_seed(seed)  # here, so that it does not matter how the model was made
        total = epochs * len(loaders.train)
        transfer = TransferSchedule(total, fraction=fraction, start=start, end=end, order=order)
        if match and not state.exists():
            say(str(match_targets(network, some_images(loaders, machine))))
            save_model(network, file)
        optimizer = _timm().optim.create_optimizer_v2(
            network, opt=opt, lr=lr, weight_decay=weight_decay
        )
        wrap_optimizer(optimizer, network, transfer=transfer)
    # A state may not fit, an image be damaged, a disk be full, the loss diverge; all else is a bug.
    with run_errors((ValueError, OSError, FloatingPointError)):
        last = train(
            network,
            loaders,
            optimizer,
            machine,
            epochs=epochs,
            title="finetune",
            history=History(network),
            checkpoint=Checkpoint(state, network, settings, lambda: save_model(network, file)),
        )
    transferred = report(network).total.transferred
    show(f"{file}: test accuracy {last.accuracy:.2%}, {transferred:.1%} transferred")


def _load_images(
    spec: ModelSpec, model: nn.Module, data: str, batch_size: int, machine: Machine
) -> ImageData:
    """The images as the model takes them; the model goes where they are.

    Raises:
        ValueError: they have another number of channels or classes.
    """
    example = spec.example_input(model)
    if not isinstance(example, torch.Tensor) or example.dim() != 4:
        shape = (
            tuple(example.shape[1:]) if isinstance(example, torch.Tensor) else "no single tensor"
        )
        raise ValueError(f"the model takes {shape}, and this command trains on images: CxHxW.")
    size = tuple(example.shape[1:])
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
        found = machine.place(model).eval()(x)
    if not isinstance(found, torch.Tensor) or found.dim() != 2:
        raise ValueError(
            f"the model returns {getattr(found, 'shape', type(found).__name__)} for two images, "
            "and this command trains classifiers, which return (images, classes). Train others in "
            "Python, with wrap_optimizer."
        )
    outputs = found.shape[1]
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
