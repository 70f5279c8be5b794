"""The experiments of the paper, run with this library: ``transfer-surgery reproduce --help``.

Nothing in the core imports this package. Besides torch it needs the extras ``cli`` and ``plots``.
"""
