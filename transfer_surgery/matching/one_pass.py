"""Fits all sites and layers of a model in one pass of both networks, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transfer_surgery._running import device_of, hooked
from transfer_surgery.matching.fitting.fitted_range import share_outside
from transfer_surgery.matching.fitting.target_families import family_of
from transfer_surgery.matching.fitting.target_fit import Inputs, Solution, TargetFit
from transfer_surgery.matching.match_report import MatchRow
from transfer_surgery.matching.output_check import OutputCheck
from transfer_surgery.matching.progress import Shown, progress_line
from transfer_surgery.matching.ranks import (
    check_the_same,
    failing_together,
    number_of_ranks,
    on_any_rank,
)
from transfer_surgery.matching.refit.layer_refit import LayerFit
from transfer_surgery.matching.refit.refit_rules import layers_to_refit, subclasses_judged
from transfer_surgery.matching.samples import Samples
from transfer_surgery.matching.two_networks.forward_state import ForwardState
from transfer_surgery.matching.two_networks.memory import batches_that_wait
from transfer_surgery.matching.two_networks.probe import Probe, probe
from transfer_surgery.matching.two_networks.side_by_side import SideBySide
from transfer_surgery.matching.two_networks.two_networks import TwoNetworks
from transfer_surgery.units import GatedActivation

RIDGE = 1e-4
"""Added to the diagonal of the fits, as a share of the features' mean squares."""


@dataclass(kw_only=True)
class OnePass:
    """The fit of a model; `run` does it once.

    Attributes:
        networks: both networks.
        paths: of the sites that are fitted.
        weights, max_bytes, logits, progress, offset: as in `match_targets`.
        refit: whether layers are refitted, too.
        refitted: gets the layers behind a site, with the reason where one was left alone.
        held: bytes that the waiting forward passes held at most, by the look at the first batch.
        waited: number of batches whose forward passes waited.
    """

    networks: TwoNetworks
    paths: dict[GatedActivation, str]
    weights: str | None = None
    refit: bool = False
    max_bytes: int | None = None
    logits: bool = False
    progress: Shown = False
    offset: bool = True
    refitted: dict[nn.Module, str | None] = field(default_factory=dict)
    held: int = 0
    waited: int = 0

    def run(self) -> list[MatchRow]:
        """Fit each site, and each layer behind one; a row per site.

        After an error the weights are as they were; the fitted targets are the caller's to restore.
        """
        state = ForwardState(self.networks.model)
        layers, left = layers_to_refit(self.networks.model) if self.refit else ([], {})
        with failing_together():
            seen = self.networks.with_gradients_if_needed(lambda: self._look(state, layers, left))
        left |= dict.fromkeys(seen.read_elsewhere, "has a weight that something else reads, too")
        summed = [module for module in seen.calls if module in seen.sums]
        check_the_same([*map(self._names, (seen.calls, summed))], "the order of their modules")

        # What stands before the first site gets the same inputs as ever.
        order = list(seen.calls)
        first = next((i for i, m in enumerate(order) if m in self.paths), len(order))
        behind = order[first:]
        self.refitted |= {m: left[m] for m in behind if m in left}
        calls = {m: seen.calls[m] for m in behind if m not in left}
        trained = {n for n in seen.norms.values() if all(p.requires_grad for p in n.parameters())}
        norms = {m: norm for m, norm in seen.norms.items() if norm in trained}
        fits = {
            m: LayerFit(m, offset=m in norms) for m in calls if not isinstance(m, GatedActivation)
        }
        samples = Samples(self.networks, calls, fits)
        if self.weights == "gradient":
            samples.weigh(self.logits)
        check = OutputCheck(self.networks, state, seen.output, len(self.paths), self.logits)
        number, device = len(self.networks.batches), device_of(self.networks.model)
        self.waited = batches_that_wait(number, seen.held, device, self.max_bytes)
        self.held = 2 * seen.held * self.waited
        both = SideBySide(
            self.networks, calls, seen.sums, state, self.waited, samples.behind, samples.before
        )
        missed: set[nn.Module] = set()
        unseen = [unit for unit in self.paths if unit not in calls]
        hooks = hooked(*(u.register_forward_pre_hook(lambda m, _: missed.add(m)) for u in unseen))
        with both, hooks, progress_line(self.progress, "match", len(calls)) as tell:
            rows = list(self._fit_all(both, samples, fits, norms, check, tell))
            tell(len(calls), "")
        # List what the first batch did not come to.
        return rows + [
            replace(_row(self.paths[unit], unit), values=0 if on_any_rank(unit in missed) else None)
            for unit in unseen
        ]

    def _look(
        self, state: ForwardState, layers: list[nn.Module], left: dict[nn.Module, str]
    ) -> Probe:
        networks, first = self.networks, self.networks.batches[0]
        modules = [*networks.units, *layers, *left]
        with state.watch(), subclasses_judged(layers, left):
            return probe(networks.model, modules, layers, lambda: networks.run(first))

    def _fit_all(
        self,
        both: SideBySide,
        samples: Samples,
        fits: dict[nn.Module, LayerFit],
        norms: dict[nn.Module, nn.Module],
        check: OutputCheck,
        tell: Callable[[int, str], None],
    ) -> Iterator[MatchRow]:
        done: set[GatedActivation] = set()
        paths = self._names(samples.modules)
        try:
            for number, module in enumerate(samples.modules):
                tell(number, paths[number])
                if isinstance(module, GatedActivation):
                    made_up = any(other in fits for other in samples.modules[number + 1 :])
                    found = _fit_site(module, samples, both, self.offset, made_up)
                    if found is None:  # the network that changes takes another way
                        both.passed(module)
                        yield _row(self.paths[module], module)
                        continue
                    if not all(bool(p.isfinite().all()) for p in found.solution.parameters):
                        raise ValueError(
                            f"{self.paths[module]}: NaN or infinity comes in there. Look for it in "
                            "the batches; a network that overflows in half precision is matched in "
                            "float32."
                        )
                    _write(module, found.solution)
                    both.fitted(module)
                    done.add(module)
                    outputs = check.compare(done)
                    yield _row(self.paths[module], module, found, *outputs)
                else:
                    fit = fits[module]
                    with failing_together():
                        for pair in samples.layer_pairs(module, both):
                            fit.add(pair.now, pair.wanted)
                    if on_any_rank(fit.is_empty or module in samples.routed):
                        self.refitted[module] = "gets other inputs in the two networks"
                    else:
                        _refit(both, module, fit, norms.get(module))
                        self.refitted[module] = None
                    both.passed(module)
        except BaseException:
            both.restore()
            raise

    def _names(self, modules: Iterable[nn.Module]) -> list[str]:
        paths = {module: path for path, module in self.networks.model.named_modules()}
        return [paths[module] for module in modules]


class SiteFit(NamedTuple):
    """What was found at one site; `outside` as in `MatchRow`."""

    solution: Solution
    inputs: Inputs
    outside: float


def _fit_site(
    unit: GatedActivation, samples: Samples, both: SideBySide, offset: bool, made_up: bool
) -> SiteFit | None:
    """The least squares of one site; None where no batch comes to it."""
    inputs = Inputs()
    with failing_together():
        pairs = [pair for pair in samples.site_pairs(unit, both) if pair.now.numel()]
        if not pairs and number_of_ranks() > 1:
            raise ValueError("the batches of a rank do not come to each site; give it more.")
        for pair in pairs:
            inputs.add(pair.now, pair.ends)
    if not pairs:
        return None
    inputs.add_over_ranks()
    fit = TargetFit(family_of(unit.target), inputs, RIDGE, offset, made_up)
    with failing_together():
        for pair in pairs:
            fit.add(pair.now, pair.wanted, pair.weights)
    fit.add_over_ranks()
    if not unit.source.operands:
        fit.add_range(inputs, unit.source)
    return SiteFit(fit.solve(), inputs, share_outside([pair.now for pair in pairs]))


def _write(unit: GatedActivation, solution: Solution) -> None:
    target = unit.add_fitted_target()
    a, w, c, b, *k = solution.parameters
    numbers = [(target.a, a), (target.w, w), (target.c, c), (target.b, b)]
    if target.k is not None:
        numbers.append((target.k, torch.stack(k)))
    for parameter, values in numbers:
        parameter.data = values.to(parameter).reshape(parameter.shape)


def _refit(both: SideBySide, layer: nn.Module, fit: LayerFit, norm: nn.Module | None) -> None:
    """Give a layer its new weights; a batch norm takes the offset of one without a bias."""
    found = fit.solve()
    if norm is not None and layer.bias is None:
        # In training the statistics of the batch do what this does in evaluation.
        mean = norm.running_mean
        assert isinstance(mean, Tensor)
        both.assign(norm, {"running_mean": mean - found.pop("bias")})
    both.assign(layer, found)


def _row(
    path: str,
    unit: GatedActivation,
    found: SiteFit | None = None,
    errors: dict[str, float] | None = None,
    divergence: float | None = None,
) -> MatchRow:
    names = path, str(unit.source), str(unit.target)
    if found is None:
        return MatchRow(*names, None, None, None, None, where=unit.where)
    solution, inputs, outside = found
    total = solution.total.sum()
    explained = 1 - solution.residual.sum() / total if total > 0 else torch.ones(())
    w = solution.parameters[1]
    periods = (w.abs() * inputs.span * inputs.std / (2 * torch.pi)).median()
    lowest, highest = torch.as_tensor(inputs.lowest).min(), torch.as_tensor(inputs.highest).max()
    return MatchRow(
        *names,
        explained.item(),
        periods.item() if family_of(unit.target).periodic else None,
        errors,
        inputs.count,
        divergence,
        where=unit.where,
        range=(lowest.item(), highest.item()),
        outside=outside,
    )
