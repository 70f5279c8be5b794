"""`wrap_optimizer` for loops that a framework owns: Lightning, transformers' Trainer, timm.

All three take a `schedule`: a function that makes a `TransferSchedule` from the number of optimizer
steps, which the framework knows. For a constant gamma call `wrap_optimizer` itself.

Import what you need from its module. Importing this package loads no framework. Accelerate needs
nothing from here: `wrap_optimizer` takes the optimizer before or after ``accelerator.prepare``.
"""
