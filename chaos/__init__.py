"""Breaks training on purpose, and judges from outside what is left."""

from resilient_ckpt.chaos.process import TrainingProcess

__all__ = ["TrainingProcess"]
