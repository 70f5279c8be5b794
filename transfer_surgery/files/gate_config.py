"""What a checkpoint of gates says about its sites, as JSON with a version."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from transfer_surgery.activations import get_activation, registered_activations
from transfer_surgery.files.site_config import SiteConfig, call_of_site
from transfer_surgery.sites import Plan
from transfer_surgery.units import gate_settings, registered_gates

_FORMAT = "transfer_surgery gates"
_VERSION = 2


@dataclass(frozen=True)
class GateConfig:
    """The gated sites of a model, in the order of its modules.

    Attributes:
        model: name of its class, for messages.
        sites: one entry per site.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from transfer_surgery import convert
        >>> from transfer_surgery.units import gated_activations
        >>> model = convert(nn.Sequential(nn.ReLU()), example_input=torch.zeros(1, 4))
        >>> sites = tuple(SiteConfig.of(path, u, model) for path, u in gated_activations(model))
        >>> config = GateConfig("Sequential", sites)
        >>> GateConfig.from_json(config.to_json()) == config
        True
    """

    model: str
    sites: tuple[SiteConfig, ...]

    def to_json(self) -> str:
        """Text with the version of this layout."""
        return json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> GateConfig:
        """The inverse of `to_json`.

        Raises:
            ValueError: no JSON, written by another program or a newer version, or damaged.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError("it was written by another program, not by save_gates")
        version = data.get("version")
        if type(version) is not int or not isinstance(data.get("sites"), list):
            raise ValueError("its version or its list of sites is missing")
        if version > _VERSION:
            raise ValueError(
                f"it has version {version}, this transfer_surgery reads up to {_VERSION}: upgrade"
            )
        sites = tuple(SiteConfig.from_dict(site) for site in data["sites"])
        if not sites or len({site.path for site in sites}) < len(sites):
            raise ValueError("it has no sites, or one of them twice")
        return cls(str(data.get("model")), sites)

    def refuse_unknown(self) -> None:
        """Raise where a gate or an activation is not registered in this process.

        Raises:
            ValueError: naming them.
        """
        gates = {site.gate["name"] for site in self.sites} - set(registered_gates())
        texts = {text for site in self.sites for text in (site.source, site.target)}
        names = {text.partition("(")[0] for text in texts} - set(registered_activations())
        for what, register, missing in (
            ("gate", "gate", gates),
            ("activation", "activation", names),
        ):
            if missing:
                raise ValueError(
                    f"the checkpoint of a {self.model} uses the {what} "
                    f"{', '.join(map(repr, sorted(missing)))}, which is not registered here: "
                    f"import the code that calls register_{register} for it first."
                )
        for text in texts:
            get_activation(text)
        for site in self.sites:
            gate_settings(site.gate)

    def at(self, plan: Plan) -> dict[str, SiteConfig | str]:
        """The sites as a plan of a model has them, or why it cannot have them."""
        wanted = {site.path: site for site in self.sites}
        found: dict[str, SiteConfig | str] = {}
        for site in plan:
            saved = wanted.get(site.path)
            if saved is None:
                continue
            if site.reason is not None:
                found[site.path] = f"cannot be converted here: {site.reason}"
            elif saved.granularity != "layer" and len(site.shape) < 2:
                found[site.path] = f"its input {site.shape} has no {saved.granularity} axis here"
            else:
                found[site.path] = replace(
                    saved,
                    source=str(site.source),
                    shape=site.gate_shape(saved.granularity),
                    channel_axis=site.channel_axis,
                    call=call_of_site(site.path, plan, wanted),
                )
        return found

    def refuse_other_sites(self, model: str, here: Mapping[str, SiteConfig | str]) -> None:
        """Raise where the sites of a model are not these.

        Args:
            model: name of the model's class.
            here: its sites, or why they cannot be had.

        Raises:
            ValueError: naming the sites that differ, and how.
        """
        saved = {site.path: site for site in self.sites}
        different = []
        for path in dict.fromkeys([*saved, *here]):
            found = here.get(path, "there is no such site here")
            if path not in saved:
                different.append(f"{path}: has gates here, none in the checkpoint")
            elif isinstance(found, str):
                different.append(f"{path}: {found}")
            elif why := saved[path].difference(found):
                different.append(f"{path}: {why}")
        if different:
            shown = different[:20]
            shown += [f"... and {len(different) - 20} more"] if len(different) > 20 else []
            lines = "\n  ".join(shown)
            raise ValueError(
                f"{len(different)} of the sites of this {model} are not those of the checkpoint, "
                f"which is of a {self.model} with {len(saved)} sites:\n  {lines}\nLoad it into the "
                "model that it was saved from: same class, arguments and example_input."
            )
