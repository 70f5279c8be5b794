"""What is checked of one model; runs in a process of its own and reports as it goes.

Each stage adds its findings to the record of the model at once, so that a model that fails, takes
too long or too much memory leaves what was found until then.
"""

from __future__ import annotations

import contextlib
import resource
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transfer_surgery import bake, convert, find_activations
from transfer_surgery.sites import Plan
from transfer_surgery.units import gated_activations
from zoo.inputs import Setting, settings
from zoo.models import build, count_parameters
from zoo.outputs import depends_on_input, equal, finite_share, mean_square

PASSED = ("identical", "changes", "trained", "baked")
"""Fields of a record that are all true where nothing is wrong."""

_GIB = 2**30
_FROZEN = 1_000_000_000
"""From here on, weights get no gradients: they would take as much memory as the model again."""
_HALF = 3_000_000_000
"""From here on bfloat16: as float32, the weights alone would take 12 GiB and more."""
_NOT_LIVE = "it does not depend on the input"
_SHOWN = 20


@dataclass
class Reporter:
    """Sends findings to the parent; times the stages."""

    send: Callable[[dict[str, Any]], None]
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, **fields: Any) -> None:
        self.send(fields)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.add(stage=name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.add(seconds=dict(self.seconds))


@dataclass
class Subject:
    """A model, the arguments it is called with, and which of its weights get a gradient."""

    model: nn.Module
    setting: Setting
    arguments: tuple[Any, ...] | dict[str, Any]
    reached: frozenset[str] = frozenset()

    @torch.no_grad()
    def predict(self) -> Any:
        return self._run(self.model.eval())

    def train(self) -> None:
        """Forward and backward in training mode."""
        self.model.train().zero_grad()
        mean_square(self._run(self.model)).backward()
        self.model.eval()

    @torch.no_grad()
    def generate(self) -> list[Any] | None:
        """Texts with and without a cache; None of models that make none."""
        model: Any = self.model.eval()
        can_generate = getattr(model, "can_generate", bool)
        if not isinstance(self.arguments, dict) or not can_generate():
            return None
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return [
                    model.generate(**self.arguments, **settings, use_cache=use_cache)
                    for use_cache in (True, False)
                ]
        except Exception:  # not with this configuration and these inputs
            return None

    def _run(self, run: Callable[..., Any]) -> Any:
        torch.manual_seed(0)  # some draw numbers in eval mode too
        if isinstance(self.arguments, dict):
            return run(**self.arguments)
        return run(*self.arguments)


def check(name: str, send: Callable[[dict[str, Any]], None], wait: Callable[[], Any]) -> None:
    """Check one model.

    Args:
        name: ``"timm:NAME"``, ``"transformers:NAME"`` and so on.
        send: takes new fields of the model's record.
        wait: returns when the memory announced as ``needs_gib`` may be used.
    """
    report = Reporter(send)
    try:
        _check(name, report, wait)
        report.add(stage=None)
    except Exception as error:
        message = str(error).strip().splitlines()[:1]
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        report.add(
            error=f"{type(error).__name__}: {''.join(message)[:300]}",
            where=[f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames],
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    report.add(peak_mib=peak // 1024)


def _check(name: str, report: Reporter, wait: Callable[[], Any]) -> None:
    with report.stage("count"):
        parameters = count_parameters(name)
    dtype = torch.bfloat16 if parameters >= _HALF else torch.float32
    frozen = parameters >= _FROZEN
    needs = parameters * dtype.itemsize * (1 if frozen else 2) / _GIB + 1
    report.add(parameters=parameters, dtype=str(dtype).removeprefix("torch."), frozen=frozen)
    report.add(needs_gib=needs)
    wait()
    subject = _original(name, dtype, frozen, report)
    with report.stage("forward"):
        before = subject.predict()
        text = subject.generate()
    report.add(depends=depends_on_input(before), finite=finite_share(before))
    with report.stage("find"):
        plan = find_activations(subject.model, subject.arguments)
    report.add(**_findings(plan))
    with report.stage("convert"):
        convert(subject.model, "sin", plan=plan, seed=0)
    units = dict(gated_activations(subject.model))
    report.add(converted=len(units))
    with report.stage("compare"):
        report.add(identical=equal(subject.predict(), before))
        if text is not None:
            report.add(generates=equal(subject.generate(), text))
    with report.stage("target"):
        _set_gates(units, lambda gates: torch.full_like(gates, -8.0))
        report.add(changes=not equal(subject.predict(), before))
    with report.stage("train"):
        _train(subject, plan, units, report)
    with report.stage("bake"):
        _set_gates(units, _random_gates)
        gated = subject.predict()
        bake(subject.model)
        report.add(baked=equal(subject.predict(), gated))


def _original(name: str, dtype: torch.dtype, frozen: bool, report: Reporter) -> Subject:
    """The model in the first setting in which it runs, and trains unless it is frozen."""
    problem: Exception | None = None
    for setting in settings(name):
        try:
            torch.manual_seed(0)
            with report.stage("build"):
                model = _build(name, setting, dtype)
            subject = Subject(model, setting, setting.arguments(dtype))
            with report.stage("original"):
                if frozen:
                    model.requires_grad_(False)
                    subject.predict()
                else:
                    subject.train()
                    subject.reached = _reached(model)
                    model.zero_grad()
                    subject.predict()
            report.add(input=setting.text)
            return subject
        except Exception as error:  # too small for this model: the next size
            problem = problem or error
            model = subject = None
    raise problem or ValueError(f"no input is known for {name}")


def _build(name: str, setting: Setting, dtype: torch.dtype) -> nn.Module:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = build(name, setting.options)
    finally:
        torch.set_default_dtype(default)
    _perturb(model)
    return model


@torch.no_grad()
def _perturb(model: nn.Module) -> None:
    """Add noise to constant weights: zero gains, tiny layer scales would hide what they scale."""
    for parameter in model.parameters():
        ends = parameter.flatten()[[0, -1]] if parameter.numel() else parameter
        if parameter.numel() and ends[0] == ends[1] and parameter.min() == parameter.max():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _findings(plan: Plan) -> dict[str, Any]:
    live = [site for site in plan if site.reason != _NOT_LIVE]
    convertible = [site for site in plan if site.reason is None]
    left: dict[str, Counter[str]] = defaultdict(Counter)
    for site in plan:
        if site.reason is not None:
            left[site.role][site.reason] += 1
    return {
        "sites": dict(Counter(site.role for site in live)),
        "kinds": dict(Counter(site.kind for site in live)),
        "ways": dict(Counter(s.way for s in convertible if s.role == "hidden")),
        "sources": dict(Counter(site.source.name for site in live)),
        "eval_sites": sum("eval" in site.modes for site in live),
        "eval_calls": sum(site.calls for site in live if "eval" in site.modes),
        "train_only": sum("eval" not in site.modes for site in live),
        "left": left,
        "notes": list(plan.unexamined[:_SHOWN]),
    }


def _train(subject: Subject, plan: Plan, units: dict[str, Any], report: Reporter) -> None:
    """One backward pass with mixed gates, which have a slope; at the start they have none."""
    _set_gates(units, torch.zeros_like)
    trained = {site.path for site in plan if "train" in site.modes}
    reached: set[str] = set()

    def watch(unit: nn.Module, args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: reached.add(unit.path))

    hooks = [unit.register_forward_hook(watch) for unit in units.values()]
    subject.train()
    for hook in hooks:
        hook.remove()
    # An expert that no token chose has no gradient, nor has an index; so it is in the original.
    gates = {p: u.log_alpha.grad for p, u in units.items() if u.path in trained & reached}
    missing = [path for path, grad in gates.items() if grad is None or not grad.isfinite().all()]
    lost = sorted(subject.reached - _reached(subject.model))
    flat = [path for path, grad in gates.items() if grad is not None and not grad.any()]
    report.add(
        trained=not missing and not lost,
        gates_without_gradient=missing[:_SHOWN],
        weights_without_gradient=lost[:_SHOWN],
        gates_with_zero_gradient=flat[:_SHOWN],
        gates_not_reached=len(units) - len(gates),
    )
    subject.model.zero_grad()


def _reached(model: nn.Module) -> frozenset[str]:
    return frozenset(key for key, p in model.named_parameters() if p.grad is not None)


@torch.no_grad()
def _set_gates(units: dict[str, Any], value: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for unit in units.values():
        unit.log_alpha.copy_(value(unit.log_alpha))


def _random_gates(gates: torch.Tensor) -> torch.Tensor:
    """+8 or -8: mixed in half of the sites, all source in a quarter, all target in a quarter."""
    share = (0.0, 0.5, 0.5, 1.0)[int(torch.randint(4, ()))]
    return torch.where(torch.rand(gates.shape) < share, 8.0, -8.0)
