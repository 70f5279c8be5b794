"""What ``finetune``, examples and benchmarks share: images, and a plain training loop."""
