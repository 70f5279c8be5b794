"""Runs the code blocks of a Markdown page, in their order and in one namespace, without a network.

`python` blocks are run, with `>>>` as doctests; of `bash` blocks the `transfer-surgery` lines, in
this process. Comments of Sybil's in the page prepare what it leaves out
(``<!--- invisible-code-block: python``) or say why a block is not run
(``<!--- skip: next "reason" -->``).
"""

from __future__ import annotations

import functools
import re
import shlex
import warnings
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
import sklearn.datasets
import timm
import torch
import torch.nn.functional as F
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import transfer_surgery
from transfer_surgery.cli.app import app

RUN = ("python", "bash")
SHOWN = ("text", "bibtex", "toml")
# What the pages call by the names that users know is run as something small of the same kind.
STAND_INS = {
    "efficientnet_b0": "test_efficientnet",
    "resnet18": "test_resnet",
    "resnet50": "test_resnet",
}
FENCE = re.compile(r"^```(?P<language>[^\n]*)\n(?P<source>.*?)^```$", re.MULTILINE | re.DOTALL)


def run_page(path: Path, patch: pytest.MonkeyPatch) -> None:
    """Run a page, but for the blocks that say that they are not to be run."""
    _use_stand_ins(patch)
    parsers = (PythonCodeBlockParser(), CodeBlockParser("bash", run_commands), SkipParser())
    document = Document.parse(str(path), *parsers)
    document.namespace.update(taken_for_granted())
    for example in document.examples():
        with suppress(SkipTest):
            example.evaluate()


def taken_for_granted() -> dict[str, Any]:
    """The names that pages use without defining them: a user's data and training loop."""
    inputs, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=4)
    images = [x for x, _ in loader]
    return {
        "F": F,
        "batches": images[:1],
        "calibration": loader,
        "epochs": 2,
        "images": images,
        "loader": loader,
        "nn": nn,
        "torch": torch,
        "train": functools.partial(train, epochs=2),
    }


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], epochs: int
) -> None:
    """A training loop as any other."""
    model.train()
    for _ in range(epochs):
        for inputs, labels in loader:
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def run_commands(example: Example) -> None:
    """Each ``transfer-surgery`` command of a block, as a user would type it."""
    for line in str(example.parsed).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "transfer-surgery", f"{line}: say why it is not run, or change the tests"
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, words[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"


def _use_stand_ins(patch: pytest.MonkeyPatch) -> None:
    """Small models with random weights, 300 of the digits, and a few steps of distilling."""
    create = timm.create_model
    distil = transfer_surgery.distill
    digits = sklearn.datasets.load_digits()
    few = Namespace(images=digits.images[:300], target=digits.target[:300])

    def create_model(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        return create(STAND_INS.get(name, name), **arguments)

    def distill(*args: Any, steps: int, **arguments: Any) -> list[float]:
        with warnings.catch_warnings():  # three steps do no good
            warnings.simplefilter("ignore", transfer_surgery.DistillWarning)
            return distil(*args, steps=min(steps, 3), **arguments)

    patch.setattr(timm, "create_model", create_model)
    patch.setattr(transfer_surgery, "distill", distill)
    patch.setattr(sklearn.datasets, "load_digits", lambda: few)


def blocks_of_no_known_language(text: str) -> list[str]:
    """First lines of blocks that are neither run nor known to be no code; skips without why."""
    found = re.findall(r'<!--- *skip:(?! next "\w).*', text)
    found += [
        match["source"].split("\n")[0]
        for match in FENCE.finditer(text)
        if match["language"] not in (*RUN, *SHOWN)
    ]
    rest = FENCE.sub("", text)
    assert "```" not in rest, "a fence is not closed, or is indented"
    return found + [match[1] for match in re.finditer(r"\n\n {4,}(\S.*)", rest)]
