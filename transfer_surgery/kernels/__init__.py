"""Fused forward and backward of the gated activation."""

from transfer_surgery.kernels.eager import gated, gated_plain

__all__ = ["gated", "gated_plain"]
