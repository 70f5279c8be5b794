"""``transfer-surgery swap``: other activations in a trained network, from images alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from transfer_surgery.activations import get_target
from transfer_surgery.cli.finetuning.training import Machine
from transfer_surgery.cli.options import (
    BatchSize,
    Device,
    Exclude,
    GranularityName,
    Include,
    InputSize,
    Json,
    Model,
    Output,
    Pretrained,
    Role,
    Set,
    Source,
    Weights,
    choose,
    model_spec,
    option_errors,
    run_errors,
)
from transfer_surgery.cli.printing import say, show
from transfer_surgery.cli.swapping.checks import (
    answers_to,
    budget_of,
    check_classes,
    check_folder,
    left_out,
    preprocessing_settings,
    ready_to_swap,
    size_of,
    tell_without_effect,
)
from transfer_surgery.cli.swapping.folders import find_images, read_labels, split
from transfer_surgery.cli.swapping.images import Images, Preprocessing
from transfer_surgery.cli.swapping.options import CropPct, Interpolation, Mean, Std
from transfer_surgery.cli.weights import build, check_weights
from transfer_surgery.files import check_not_lost, save_baked
from transfer_surgery.matching import swap_activations
from transfer_surgery.sites import find_activations


def swap(
    context: typer.Context,
    model: Model,
    images: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="Fit to images of this folder and those below it. They need no labels.",
            exists=True,
            file_okay=False,
            show_default=False,
        ),
    ],
    output: Output,
    target: Annotated[
        str, typer.Option(help="Swap to this activation, such as hardswish or relu6.")
    ] = "relu",
    weights: Weights = None,
    pretrained: Pretrained = False,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER|CSV",
            help="Tell the accuracy: a folder CLASS/IMAGE, or a CSV file with lines IMAGE,NUMBER "
            "of images in --images. Nothing is trained with it. Default: no accuracy.",
            exists=True,
        ),
    ] = None,
    logits: Annotated[
        bool,
        typer.Option(
            "--logits",
            help="The model returns logits of classes, as with --labels: count answers that "
            "change. Default: outputs of any kind.",
        ),
    ] = False,
    calibration: Annotated[int, typer.Option(min=1, help="Fit to this number of images.")] = 1024,
    held_out: Annotated[
        int,
        typer.Option(min=1, help="Compare on this number of other images, at most a quarter."),
    ] = 1000,
    refit: Annotated[
        bool, typer.Option("--refit/--no-refit", help="Refit the layers behind the sites.")
    ] = True,
    offset: Annotated[
        bool | None,
        typer.Option(
            "--offset/--no-offset",
            help="Fit an offset of each target. Default: not where torch has a module of the "
            "target, so that nothing else remains.",
        ),
    ] = None,
    distill_steps: Annotated[
        int,
        typer.Option(min=0, help="Let the original network teach for this number of steps."),
    ] = 0,
    loss: Annotated[
        Literal["relative", "mse", "kl", "bce"] | None,
        typer.Option(help="What is taught. Default: kl for logits, else relative."),
    ] = None,
    lr: Annotated[float, typer.Option(help="Set the highest learning rate of teaching.")] = 3e-3,
    variation: Annotated[
        float,
        typer.Option(
            help="Mix and stretch the images of teaching, from 0 to 1, as helps with few images."
        ),
    ] = 0.0,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|SHARE",
            help="Keep the source of this number of neurons, or share such as 0.1: those whose "
            "swap costs most. Default: none.",
        ),
    ] = None,
    keep_sites: Annotated[
        int, typer.Option(min=0, help="Keep the sites, whole, whose swap costs most.")
    ] = 0,
    keep_points: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Keep as many of these sites as are needed to lose at most so many points of "
            "accuracy, such as 0.5, before teaching. Needs --labels.",
        ),
    ] = None,
    granularity: GranularityName = "channel",
    source: Source = None,
    include: Include = None,
    exclude: Exclude = None,
    role: Role = None,
    assignments: Set = None,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    crop_pct: CropPct = None,
    interpolation: Interpolation = None,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed the choice of images, and the teaching.")] = 0,
    as_json: Json = False,
) -> None:
    """Swap the activations of a trained network, fitted to images without labels, and save it.

    The new activations are fitted to what the network computes, and the layers behind them, too.
    With --distill-steps the original network teaches the new one, on shifted and mirrored images,
    of which none is among those that are compared. What is fitted is then folded
    into the layers. A row for each stage says how much the outputs changed on images that nothing
    was fitted to.

    The output is a file as [b]bake[/b] writes it: see there how to load it, and [b]export[/b].
    Images are resized, cropped and normalised as in timm's validation.

    [bold]Examples[/bold]

    transfer-surgery swap efficientnet_b0 --pretrained --images photos -o model.safetensors

    transfer-surgery swap efficientnet_b0 --set num_classes=10 --weights model_best.pth.tar
    --images data/train --labels data/val --distill-steps 1000 -o model.safetensors

    transfer-surgery swap nets.py:make_yolo --input-size 3x640x640 --mean 0 --std 1
    --images frames --target relu6 -o model.safetensors
    """
    # What can be refused at once is refused before the model is made.
    spec = model_spec(model, assignments, input_size)
    check_weights(weights, pretrained)
    with option_errors():
        wanted = get_target(target)
        budget = budget_of(keep)
        settings = preprocessing_settings(mean, std, crop_pct, interpolation)
        check_folder(output)
    if not distill_steps:
        tell_without_effect(context, ["loss", "lr", "variation"])
    with run_errors():
        check_not_lost(output, "baked")
        found = find_images(images)
        classes = {} if labels is None else read_labels(labels, images)
        fitted, compared, learned = split(found, [*classes] or found, calibration, held_out, seed)

        # Make the model, and look what it has to swap.
        machine = Machine.choose(device)
        torch.manual_seed(seed)
        network = ready_to_swap(build(spec, weights, pretrained))
        example = spec.example_input(network)
        size = size_of(example)
        check_classes(answers_to(network, example), classes.values(), labels)
        whole = find_activations(network, example)
    plan = choose(whole, source, include, exclude, role)
    plan = plan.filter(lambda site: site.source != wanted)
    with run_errors():
        if not plan.rows:
            raise ValueError(f"every activation selected is {wanted} already: there is no swap.")
    say(f"{len(plan)} sites to swap to {target}{left_out(whole, plan)}")
    with run_errors():
        # Read the images.
        preprocessing = Preprocessing.choose(network, size, settings, [*fitted, *compared])
        batches = [x.to(machine.device) for x in Images(fitted, preprocessing, batch_size)]
        network.to(machine.device)
        numbers = None
        if classes:
            numbers = torch.split(torch.tensor([classes[path] for path in compared]), batch_size)
        say(f"{len(fitted):,} images to fit to, {len(compared):,} to compare on: {preprocessing}")

        report = swap_activations(
            network,
            target,
            batches,
            held_out=Images(compared, preprocessing, batch_size),
            labels=numbers,
            logits=logits,
            plan=plan,
            granularity=granularity,
            refit=refit,
            offset=offset,
            keep=budget,
            keep_sites=keep_sites,
            keep_points=keep_points,
            distill_steps=distill_steps,
            distill_on=Images(learned, preprocessing, batch_size, training=True),
            loss=loss,
            lr=lr,
            variation=variation,
            keep_gates=True,
        )
        save_baked(network, output, spec, fold=batches[0])
    show(report.to_json() if as_json else str(report))
    say(f"wrote {output}")
