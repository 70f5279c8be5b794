"""Turn the activations of a trained timm model into sinusoids, then bake it.

Without arguments: a small ResNet and scikit-learn's digits, a minute or two on a CPU. `--no-match`
is the paper's method: plain sine, and gates that move while the model is fine-tuned. On a GPU:

    python examples/finetune_timm.py --model resnet50.a1_in1k --pretrained --data FOLDER \
        --opt adamw --lr 1e-4 --pretrain-epochs 3 --epochs 3 --distill-lr 1e-4 \
        --batch-size 256 --amp --compile
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from summary import Summary, console, describe_change
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer

from transfer_surgery import (
    History,
    TransferSchedule,
    bake,
    convert,
    distill,
    fold_targets,
    match_targets,
    report,
    swap_targets,
    wrap_optimizer,
)
from transfer_surgery.cli.finetuning.images import Unlabelled, load_images
from transfer_surgery.cli.finetuning.training import Machine, predict, some_images, train


def main(
    model_name: Annotated[str, typer.Option("--model", help="Any timm model.")] = "test_resnet",
    data_name: Annotated[
        str, typer.Option("--data", help="digits, cifar10, or a folder with train/ and val/.")
    ] = "digits",
    weights: Annotated[
        Path | None, typer.Option(help="Checkpoint of the model: .safetensors, .pth.")
    ] = None,
    pretrained: Annotated[bool, typer.Option(help="Download timm's weights.")] = False,
    target: Annotated[str, typer.Option(help="Activation to transfer to.")] = "sin",
    source: Annotated[
        str | None, typer.Option(help="Activation to replace; default: every hidden one.")
    ] = None,
    granularity: Annotated[
        str, typer.Option(help="Who shares a gate: layer, channel or neuron.")
    ] = "channel",
    match: Annotated[
        bool,
        typer.Option(help="Fit targets to the trained network; --no-match is the paper's way."),
    ] = True,
    gamma: Annotated[
        float | None, typer.Option(help="The paper's constant instead of a TransferSchedule.")
    ] = None,
    pretrain_epochs: Annotated[
        int | None,
        typer.Option(help="Epochs of ordinary training before; 15, or 0 where weights fit."),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Epochs: 3 of distillation, or 30 of transfer with --no-match."),
    ] = None,
    distill_lr: Annotated[
        float, typer.Option(help="Highest learning rate of distillation.")
    ] = 1e-4,
    opt: Annotated[str, typer.Option(help="Any timm optimizer.")] = "sgd",
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 0.05,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
    image_size: Annotated[int, typer.Option(help="Height and width of digits and cifar10.")] = 32,
    device: Annotated[
        str, typer.Option(help="Device; auto takes CUDA where there is a GPU.")
    ] = "auto",
    amp: Annotated[bool, typer.Option(help="Autocast to bfloat16.")] = False,
    compile: Annotated[bool, typer.Option(help="torch.compile the training steps.")] = False,
    seed: int = 0,
    output: Annotated[Path, typer.Option(help="Folder for the picture and the figures.")] = Path(
        "runs/finetune_timm"
    ),
) -> None:
    """Train or load a timm model, convert, transfer and bake it."""
    torch.manual_seed(seed)
    machine, summary = Machine.choose(device, amp, compile), Summary()
    in_chans = 1 if data_name == "digits" else 3
    model = timm.create_model(model_name, pretrained=pretrained, in_chans=in_chans)
    if weights:
        load_weights(model, weights)
    data = load_images(
        data_name,
        batch_size=batch_size,
        device=machine.device,
        size=image_size,
        config=resolve_data_config(model=model),
    )
    fits = model.num_classes == data.classes
    if not fits:
        model.reset_classifier(data.classes)
    machine.place(model)

    def optimizer() -> Optimizer:
        return create_optimizer_v2(model, opt=opt, lr=lr, weight_decay=weight_decay)

    # 1. A trained network.
    if pretrain_epochs is None:
        pretrain_epochs = 0 if fits and (weights or pretrained) else 15
    if pretrain_epochs:
        train(model, data, optimizer(), machine, epochs=pretrain_epochs, title="train")
    before = predict(model, data.test, machine)
    summary.add("trained", before.accuracy)

    # 2. Convert: nothing changes yet.
    teacher = copy.deepcopy(model)
    example_input = machine.place(next(iter(data.test))[0][:2])
    convert(model, target, source=source, granularity=granularity, example_input=example_input)
    converted = predict(model, data.test, machine)
    describe_change("convert", converted.change_from(before))
    summary.add("converted", converted.accuracy, change=converted.change_from(before))
    output.mkdir(parents=True, exist_ok=True)

    # 3. All gates to the target, at once or softly.
    if match:
        # Fit the targets and the layers behind them to what the network computes, without labels.
        found = match_targets(model, some_images(data, machine), refit=True)
        swap_targets(model)
        print(f"\n{found}\n")
        found.plot().figure.savefig(output / "match.png", dpi=100)
        matched = predict(model, data.test, machine)
        summary.add("matched", matched.accuracy, transferred=report(model).total.transferred)
        # The original network teaches the new one.
        steps = (epochs or 3) * len(data.train)
        with machine.autocast():
            images = Unlabelled(data.train)  # augmented
            distill(model, teacher, images, steps=steps, loss="kl", lr=distill_lr, variation=0)
        transferred = predict(model, data.test, machine)
    else:
        # The paper's way: plain targets; the wrapped optimizer moves the gates in training.
        epochs = epochs or 30
        schedule = TransferSchedule(epochs * len(data.train)) if gamma is None else None
        wrapped = wrap_optimizer(optimizer(), model, transfer=schedule, gamma=gamma)
        history = History(model)
        transferred = train(
            model, data, wrapped, machine, epochs=epochs, title="transfer", history=history
        )
        history.plot().figure.savefig(output / "transfer.png", dpi=100)
        (output / "history.json").write_text(history.to_json())
    table = report(model)
    name = "distilled" if match else "transferred"
    summary.add(name, transferred.accuracy, transferred=table.total.transferred)
    print(f"\n{table}\n")

    # 4. Bake: plain modules, the same outputs.
    bake(model)
    baked = predict(model, data.test, machine)
    describe_change("bake", baked.change_from(transferred))
    summary.add("baked", baked.accuracy, change=baked.change_from(transferred))

    # 5. Fold: what was fitted goes into the layers around, where that is exact.
    if match:
        print(f"\n{fold_targets(model, example_input)}\n")
        folded = predict(model, data.test, machine)
        describe_change("fold", folded.change_from(baked))
        summary.add("folded", folded.accuracy, change=folded.change_from(baked))
    console.print(summary.table())
    figures = summary.to_dict() | {"report": table.to_dict()}
    (output / "figures.json").write_text(json.dumps(figures, indent=2))
    torch.save(model, output / "baked.pt")
    console.print(f"{output}/: {', '.join(sorted(file.name for file in output.iterdir()))}")


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a checkpoint strictly, whatever its number of classes."""
    state = timm.models.load_state_dict(str(file))
    classifier = model.pretrained_cfg["classifier"]
    name = classifier if isinstance(classifier, str) else classifier[0]
    model.reset_classifier(len(state[f"{name}.weight"]))
    model.load_state_dict(state)


if __name__ == "__main__":
    typer.run(main)
