"""Fused forward and backward of the gated activation."""

from transfer_surgery.units.kernels.eager import gated

__all__ = ["gated"]
