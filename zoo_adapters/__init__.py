"""Adapters for model zoos; each registers itself through an entry point."""
