"""The gated unit as one Triton kernel each way, for a GPU."""
