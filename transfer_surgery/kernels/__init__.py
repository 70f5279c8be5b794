"""Fused forward and backward of the gated activation."""

from transfer_surgery.kernels.eager import gated

__all__ = ["gated"]
