"""The library's: one thread per worker, a seed, no network, the folder of real data."""

from tests.conftest import _seed, data_folder

__all__ = ["_seed", "data_folder"]
