"""`wrap_optimizer` for loops that a framework owns: Lightning, transformers' Trainer, timm.

Import what you need from its module; nothing is loaded before. Accelerate needs nothing from here:
`wrap_optimizer` takes the optimizer before or after ``accelerator.prepare``.
"""
