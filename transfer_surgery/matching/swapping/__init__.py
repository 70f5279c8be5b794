"""Swap all sites at once, decide which keep their source, and see what it costs."""
