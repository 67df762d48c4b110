"""Semantic alignment: intrinsic and cross-modal losses, projectors, frozen teachers and their cache."""

from unialignment.alignment.cache import TeacherCache
from unialignment.alignment.losses import contrastive_loss, intrinsic_loss, mean_pool, retrieval_accuracy
from unialignment.alignment.projectors import AlignmentProjector
from unialignment.alignment.teachers import Teacher, load_teacher, package_teacher

__all__ = [
    "AlignmentProjector",
    "Teacher",
    "TeacherCache",
    "contrastive_loss",
    "intrinsic_loss",
    "load_teacher",
    "mean_pool",
    "package_teacher",
    "retrieval_accuracy",
]
