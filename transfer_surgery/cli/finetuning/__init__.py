"""What ``transfer-surgery finetune`` and the examples share: images, and a plain training loop."""
