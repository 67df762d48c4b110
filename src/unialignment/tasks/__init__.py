"""Tasks: declarations of conditions and target, and their registry."""

from unialignment.tasks.base import Task, TaskRegistry
from unialignment.tasks.builtin import TASKS

__all__ = ["TASKS", "Task", "TaskRegistry"]
