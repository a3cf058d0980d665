"""Batch sizes that grow when the gradient noise says so, and what goes with them."""

from distopt.batch.learning_rate import AdamScale, AdaScale, LearningRateRule, Linear, SquareRoot

__all__ = ["AdaScale", "AdamScale", "LearningRateRule", "Linear", "SquareRoot"]
