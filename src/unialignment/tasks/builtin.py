"""The eight tasks of DESIGN section 1, and ``rewrite``, one declaration each. Data, not code."""

from __future__ import annotations

from types import MappingProxyType

from unialignment.tasks.base import Task, TaskRegistry

TASKS = TaskRegistry()

_DRAW = MappingProxyType({"num_inference_steps": 20, "guidance_scale": 3.0, "image_guidance_scale": 1.0})
# Steps are an upper bound: words that the model is sure of are written together (benchmarks/quality.py).
_READ = MappingProxyType(
    {
        "num_inference_steps": 16,
        "guidance_scale": 1.0,
        "image_guidance_scale": 1.0,
        "confidence_threshold": 0.9,
    }
)
# Maps follow from their source alone: guidance would exaggerate, and a few steps are enough.
_MAP = MappingProxyType({"num_inference_steps": 10, "guidance_scale": 1.0, "image_guidance_scale": 1.0})

GENERATE = TASKS.register(Task("generate", "draw a picture from a prompt", "image", prompt="optional", sampling=_DRAW))
EDIT = TASKS.register(
    Task(
        "edit",
        "change a picture by an instruction",
        "image",
        min_sources=1,
        max_sources=1,
        sampling=MappingProxyType({"num_inference_steps": 20, "guidance_scale": 2.0, "image_guidance_scale": 1.0}),
        size_from_source=True,
    )
)
PERCEIVE = TASKS.register(
    Task(
        "perceive",
        "turn a picture into a map: segment, depth or edges",
        "image",
        min_sources=1,
        max_sources=1,
        templates=MappingProxyType(
            {"segment": "segment {prompt}", "depth": "estimate the depth", "edges": "detect the edges"}
        ),
        sampling=_MAP,
        size_from_source=True,
    )
)
CONTROL = TASKS.register(
    Task(
        "control",
        "draw a picture that fits a map: segment, depth or edges",
        "image",
        min_sources=1,
        max_sources=1,
        templates=MappingProxyType(
            {
                "depth": "depth map: {prompt}",
                "edges": "edge map: {prompt}",
                "segment": "mask of all objects: {prompt}",
            }
        ),
        sampling=_DRAW,
        size_from_source=True,
    )
)
COMPOSE = TASKS.register(
    Task(
        "compose",
        "draw a new picture with subjects taken from several pictures",
        "image",
        min_sources=1,
        max_sources=4,
        sampling=MappingProxyType({"num_inference_steps": 20, "guidance_scale": 2.0, "image_guidance_scale": 1.0}),
    )
)
CAPTION = TASKS.register(
    Task(
        "caption",
        "describe a picture",
        "text",
        prompt="optional",
        min_sources=1,
        max_sources=1,
        target_length=40,
        sampling=_READ,
    )
)
ANSWER = TASKS.register(
    Task(
        "answer",
        "answer a question about a picture",
        "text",
        min_sources=1,
        max_sources=1,
        target_length=8,
        sampling=MappingProxyType({**_READ, "num_inference_steps": 4}),
    )
)
INFILL = TASKS.register(
    Task(
        "infill",
        "fill the gaps (___) of a text about a picture",
        "text",
        prompt="none",
        min_sources=1,
        max_sources=1,
        templates=MappingProxyType({"": ""}),
        gaps=True,
        target_length=40,
        sampling=_READ,
    )
)
REWRITE = TASKS.register(
    Task(
        "rewrite",
        "say a prompt as the model's own captions do, with what it leaves open decided",
        "text",
        target_length=40,
        # Sampled, so that what is open (places, mostly) is decided otherwise by another seed.
        sampling=MappingProxyType({**_READ, "temperature": 1.0}),
    )
)
