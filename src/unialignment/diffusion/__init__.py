"""The two diffusion processes, their solvers and decoders. Nothing here knows of networks, tasks or files."""

from unialignment.diffusion.base import DiffusionPath, PathSample, SeededNoise
from unialignment.diffusion.decoding import TextDecoding, decode, decoding_steps
from unialignment.diffusion.flow import FlowPath, shift_sigma
from unialignment.diffusion.guidance import Guidance
from unialignment.diffusion.masked import MaskedPath
from unialignment.diffusion.solvers import sigma_schedule, solve, solve_with_scheduler, solver_steps

__all__ = [
    "DiffusionPath",
    "FlowPath",
    "Guidance",
    "MaskedPath",
    "PathSample",
    "SeededNoise",
    "TextDecoding",
    "decode",
    "decoding_steps",
    "shift_sigma",
    "sigma_schedule",
    "solve",
    "solve_with_scheduler",
    "solver_steps",
]
