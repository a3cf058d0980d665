"""Batch sizes that grow when the gradient noise says so, and what goes with them."""

from distopt.batch.adagrad_norm import AdaGradNorm
from distopt.batch.configuration import AdaptiveBatch
from distopt.batch.controller import BatchController
from distopt.batch.ghost_batch_norm import ghost_batch_norm_, plain_batch_norm_
from distopt.batch.learning_rate import AdamScale, AdaScale, LearningRateRule, Linear, SquareRoot
from distopt.batch.linear_decay import GradientNorms, LinearDecay, RefinedDecay, refined_decay
from distopt.batch.sampler import GrowingBatchSampler, StepPlan

__all__ = [
    "AdaGradNorm",
    "AdaScale",
    "AdamScale",
    "AdaptiveBatch",
    "BatchController",
    "GradientNorms",
    "GrowingBatchSampler",
    "LearningRateRule",
    "Linear",
    "LinearDecay",
    "RefinedDecay",
    "SquareRoot",
    "StepPlan",
    "ghost_batch_norm_",
    "plain_batch_norm_",
    "refined_decay",
]
