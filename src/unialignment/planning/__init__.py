"""Predicts the memory of training and of inference from a configuration's sizes alone, and what makes it fit.

The model is built from fake tensors, which have shapes and types but no storage, and one real training step and one
real denoising step are run on them while live bytes are counted. So what is predicted is what the code does, not what a
formula says. Not counted: scratch memory inside operators, the allocator's reserve and fragmentation, and the CUDA
context; leave some room. Attention is counted as computed by fused kernels.
"""

from __future__ import annotations

from unialignment.planning.fitting import Plan, plan
from unialignment.planning.inference import InferenceMemory, folder_memory, inference_memory
from unialignment.planning.training import TrainingMemory, training_memory

__all__ = ["InferenceMemory", "Plan", "TrainingMemory", "folder_memory", "inference_memory", "plan", "training_memory"]
