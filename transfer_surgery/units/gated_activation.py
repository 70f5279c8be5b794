"""The module at a site: source and target activation with the gates between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from transfer_surgery.activations import Activation, degree_of, get_target
from transfer_surgery.units.fitted_target import TargetParameters
from transfer_surgery.units.gates import Gate
from transfer_surgery.units.granularity import Granularity, PerLayer
from transfer_surgery.units.kernels import gated
from transfer_surgery.units.module_settings import ModuleSettings, warn_of_setting
from transfer_surgery.units.recompute import with_remakes
from transfer_surgery.units.strided_copy import copy_with_strides
from transfer_surgery.units.walkers import runs_in


class GatedActivation(nn.Module):
    """``z * source(x) + (1 - z) * target(x)`` (Eq. 1): sampled gates in training, Eq. 16 in eval.

    Args:
        source: the activation that the network had.
        target: the activation it is transferred to.
        gate: the gates, of shape ``(1,)``, ``(C,)`` or the feature shape.
        granularity: which elements of the input share a gate.
        neurons: elements of the feature shape (per example), for reports and risk weights.
        path: where the unit lives, for messages.
        overwrites_input: the original worked in place and its input is read again later; the
            result is then written back to the input.
        inplace: the original worked in place; in training the result may take the input's memory.
        input_changes: the network writes to the input afterwards: a copy is kept for backward.
        dims: number of axes of the input; None: not known.
        position: its place in the order in which the model's activations run.
        stage: the part of the model that it belongs to, such as ``"layer1"``.
        call: which of the activation calls in the code of its caller it is, as (number, of how
            many); None where it took the place of a module.
        where: source file and line of the call, for reports; empty where it is not known.

    Examples:
        >>> import torch
        >>> from transfer_surgery import PerChannel, get_activation
        >>> from transfer_surgery.units import make_gate
        >>> unit = GatedActivation(
        ...     get_activation("relu"),
        ...     get_activation("sin"),
        ...     make_gate("hard_concrete", (3,)),
        ...     granularity=PerChannel(1),
        ...     neurons=3,
        ... ).eval()
        >>> unit(torch.tensor([[-1.0, 0.0, 2.0]])).detach()
        tensor([[0., 0., 2.]])
    """

    def __init__(
        self,
        source: Activation,
        target: Activation,
        gate: Gate,
        *,
        granularity: Granularity,
        neurons: int = 1,
        path: str = "",
        overwrites_input: bool = False,
        inplace: bool = False,
        input_changes: bool = False,
        dims: int | None = None,
        position: int = 0,
        stage: str = "",
        call: tuple[int, int] | None = None,
        where: str = "",
    ) -> None:
        super().__init__()
        self.source, self.target, self.gate = source, get_target(target), gate
        self.granularity, self.neurons, self.path = granularity, neurons, path
        self.overwrites_input, self.inplace = overwrites_input, inplace
        self.input_changes, self.dims = input_changes, dims
        self.position, self.stage, self.call, self.where = position, stage, call, where
        self.fitted: TargetParameters | None = None
        self.bounded = False
        """Whether a fitted polynomial stays on the range of its fit as in training mode."""
        self.watchers: tuple[Callable[[GatedActivation, Tensor], object], ...] = ()
        """They see each input; see `watched_inputs`."""
        self.is_out = False
        """Whether `bake` or `revert` has taken it out of its network."""
        # The module that this unit stands in for, in a tuple: it is not a child of the unit.
        self.replaced: tuple[nn.Module, ...] = ()
        self.hidden_from = frozenset[str]()
        """Classes whose forward walks over modules or parameters: it does not see the gates."""
        self.settings: ModuleSettings | None = None
        """Those of the module that the network called."""

    def follow_settings(self) -> str | None:
        """A setting of the network's module that is another than at the conversion, if any."""
        if self.settings is None:
            return None
        return self.settings.follow(self if self.replaced else None)

    def add_fitted_target(self) -> TargetParameters:
        """Make the target ``a * target(w*x + c) + b``, with parameters of the unit.

        They have the shape of the gates and start at the target as it is. Where the unit has them
        already, the same ones are returned. See `transfer_surgery.match_targets`.
        """
        if self.fitted is None:
            degree = degree_of(self.target)
            parameters = TargetParameters(self.gate.shape, self.granularity, degree)
            device = next(self.gate.parameters(), torch.zeros(())).device
            self.fitted = parameters.to(device)
        return self.fitted

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As of any module; but forwards of the network's own find only what they had."""
        if not (self.hidden_from and runs_in(self.hidden_from)):
            yield from super().named_modules(memo, prefix, remove_duplicate)
        elif self.replaced and self not in (memo or ()):
            if memo is not None and remove_duplicate:
                memo.add(self)
            yield prefix, self

    def __getstate__(self) -> dict[str, Any]:
        # Whoever watches this unit does not watch its copies, nor what is loaded from a file.
        return vars(self) | {"watchers": ()}

    def config(self) -> dict[str, Any]:
        """What the unit is, as JSON can hold it: all that a file says about it but its values.

        What depends on the code around it is not part of this, since `find_activations` finds it
        again: its path, the number of axes, and how the input is written to.
        """
        return {
            "source": str(self.source),
            "target": str(self.target),
            "gate": self.gate.settings.to_dict(),
            "granularity": self.granularity.to_dict(),
            "shape": list(self.gate.shape),
            "neurons": self.neurons,
            "position": self.position,
            "stage": self.stage,
            "call": self.call and list(self.call),
            "fitted": self.fitted is not None,
            "offset": self.fitted is None or self.fitted.offset,
        }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A model that was only converted takes the checkpoint of a matched one: the unit gets the
        # parameters that are in it before torch asks the children for theirs.
        if f"{prefix}fitted.a" in state_dict:
            self.add_fitted_target()
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def log_alpha(self) -> nn.Parameter:
        """The gates' parameter; AttributeError for gates without one (line, copy)."""
        return self.gate.log_alpha

    def forward(self, input: Tensor | None = None, *operands: Tensor, **renamed: Tensor) -> Tensor:
        # A module of the user's own may have given its input another name.
        x = next(iter(renamed.values())) if input is None else input
        if isinstance(x, torch.fx.Proxy):  # a unit is one node of a graph, as torch's modules are
            path = x.tracer.path_of_module(self)
            return x.tracer.create_proxy("call_module", path, (x, *operands), {})
        for look in self.watchers:
            look(self, x)
        if self.settings is not None and (name := self.follow_settings()) is not None:
            warn_of_setting(self.path, name)
            result: Tensor = self.settings.module.forward(x, *operands)  # its hooks are the unit's
            return result
        self._check_size(x)
        copied = self.overwrites_input or self.input_changes
        z = self.gate(x.shape[0] if x.dim() else 1)
        given = copy_with_strides(x) if copied else x
        y = self._gated(given, operands[: len(self.source.operands)], z)
        return x.copy_(y) if self.overwrites_input else y

    def _gated(self, x: Tensor, operands: tuple[Tensor, ...], z: Tensor) -> Tensor:
        function = partial(
            gated,
            source=self.source,
            target=self.target,
            straight_through=self.gate.straight_through,
            operands=operands,
            numbers=None if self.fitted is None else self.fitted(x),
            bounded=self.training or self.bounded,
            in_place=self.training and self.inplace,
        )
        return with_remakes(function, x, self.granularity.expand(z, x))

    def _check_size(self, x: Tensor) -> None:
        """Raise a ValueError where the input has another size than the gates were made for."""
        if isinstance(self.granularity, PerLayer):
            return
        axis = getattr(self.granularity, "axis", -1)
        if axis >= 0 and self.dims not in (None, x.dim()):
            raise ValueError(
                f"{self.path}: the input has {x.dim()} axes {tuple(x.shape)}, and {self.dims} when "
                f"the model was converted; the gates belong to the channels on axis {axis} of "
                "these. Add the missing axis of the batch: x[None]."
            )
        found = self.granularity.gate_shape(x.shape)
        if found != self.gate.shape and self.gate.learned and found == self.log_alpha.shape:
            self.gate.shape = found  # a pruner has taken gates away along with channels
        if found != self.gate.shape:
            alternative = (
                ", or use granularity='channel'" if self.granularity.name == "neuron" else ""
            )
            raise ValueError(
                f"{self.path}: gates were made for {self.granularity}s {self.gate.shape}, the "
                f"input has {found}. Fix: convert with an example_input of this "
                f"size{alternative}. A model that was pruned since is converted after pruning."
            )

    def __prepare_scriptable__(self) -> None:
        raise TypeError(
            f"{self.path}: gates draw random numbers in training and cannot be scripted. Call "
            "bake(model) first, or use torch.jit.trace in evaluation mode."
        )

    def extra_repr(self) -> str:
        target = str(self.target) if self.fitted is None else f"a * {self.target}(w*x + c) + b"
        return f"{self.source} -> {target}, {self.granularity}"
