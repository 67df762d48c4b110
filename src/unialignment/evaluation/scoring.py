"""From a judge's answer to scores: reading what it wrote, and the arithmetic of VIEScore (arXiv 2312.14867).

A judge is asked about two aspects of a picture, consistency with the instruction and perceptual quality, and gives
one or two numbers from 0 to 10 for each. IC and PQ are the lowest number of their aspect (for editing: IC =
min(editing success, preservation), PQ = min(naturalness, absence of artefacts)), and O = sqrt(IC x PQ) for every item.
Knows nothing of where answers come from.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from unialignment.errors import InputError

Aspect = Literal["consistency", "quality"]
ASPECTS: tuple[Aspect, ...] = ("consistency", "quality")
LOW, HIGH = 0.0, 10.0
_KEYS = ("score", "scores", "rating", "ratings")


@dataclass(frozen=True)
class Protocol:
    """Choices on which the meaning of scores depends.

    Attributes:
        name: What it is called.
        editing_prompts_everywhere: Text-to-image items are judged by the editing prompt, of the drawn picture alone.
        squash: Side in pixels to which sources are squashed, and results resized, before the judge sees them;
            ``None`` keeps their shapes.
        strict: Numbers outside 0-10 and lists of the wrong length are unparsable. Otherwise numbers are clamped and the
            lowest of however many there are counts.
    """

    name: str
    editing_prompts_everywhere: bool
    squash: int | None
    strict: bool


PROTOCOLS = {
    "corrected": Protocol("corrected", editing_prompts_everywhere=False, squash=None, strict=True),
    "published": Protocol("published", editing_prompts_everywhere=True, squash=512, strict=False),
}


def protocol(name: str) -> Protocol:
    """Look a protocol up.

    Raises:
        InputError: There is none of that name.
    """
    if name not in PROTOCOLS:
        raise InputError(f"unknown protocol {name!r}; expected one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


class UnparsableAnswer(ValueError):
    """An answer from which no scores can be read with certainty."""


class Refusal(UnparsableAnswer):
    """The judge declined to judge."""


@dataclass(frozen=True)
class Scores:
    """What was read from one answer.

    Attributes:
        values: Numbers, 0-10.
        note: What was unusual about the answer, or empty.
    """

    values: tuple[float, ...]
    note: str = ""

    @property
    def lowest(self) -> float:
        """The number that counts."""
        return min(self.values)


def overall(consistency: float, quality: float) -> float:
    """O = sqrt(IC x PQ) of one item, 0-10."""
    return math.sqrt(consistency * quality)


_REFUSAL = re.compile(
    r"\b(i['’]?m sorry|i am sorry|i apologi[sz]e|i (?:can['’]?t|cannot|can not|won['’]?t|am unable|am not able)\b|"
    r"as an ai\b|unable to (?:assist|help|comply|evaluate))",
    re.IGNORECASE,
)


def parse(text: str, count: int, strict: bool = True) -> Scores:
    """Read scores from a judge's answer.

    Looked for in this order: an object with a score among its keys (the last one, bare, in a code fence, amid prose,
    cut off, or with single quotes); ``score: [8, 7]`` in prose; a list that is the whole answer; one number that is the
    whole answer (``8``, ``8/10``, ``Score: 8``). A single number where two are asked for stands for the lowest, which
    is all that counts. Numbers that merely occur in a sentence are not scores.

    Args:
        text: The answer.
        count: Numbers asked for.
        strict: See :class:`Protocol`.

    Raises:
        Refusal: It declines instead.
        UnparsableAnswer: No scores, or impossible ones.
    """
    body = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).strip()
    values = _find(body)
    if values is None:
        if _REFUSAL.search(body):
            raise Refusal("the judge declined")
        raise UnparsableAnswer("no scores in the answer")
    return _checked(values, count, strict)


def parse_yes_no(text: str) -> Scores:
    """Read yes (1) or no (0), the first or the last word that says so.

    Raises:
        Refusal: It declines instead.
        UnparsableAnswer: It says neither, or both.
    """
    body = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).strip()
    words = re.findall(r"[a-z]+", body.lower())
    for word in (*words[:1], *words[-1:]):
        if word in ("yes", "no"):
            return Scores((float(word == "yes"),))
    said = {word for word in words if word in ("yes", "no")}
    if len(said) == 1:
        return Scores((float("yes" in said),), "amid prose")
    if not said and _REFUSAL.search(body):
        raise Refusal("the judge declined")
    raise UnparsableAnswer("both yes and no in the answer" if said else "neither yes nor no in the answer")


def _checked(values: list[float], count: int, strict: bool) -> Scores:
    if not values:
        raise UnparsableAnswer("an empty list of scores")
    if not all(math.isfinite(value) for value in values):
        raise UnparsableAnswer("a score that is not a finite number")
    notes = []
    if len(values) != count:
        if len(values) != 1 and strict:
            raise UnparsableAnswer(f"{len(values)} scores, {count} were asked for")
        notes.append(f"{len(values)} of {count} scores")
    if not all(LOW <= value <= HIGH for value in values):
        if strict:
            raise UnparsableAnswer(f"a score outside {LOW:g}-{HIGH:g}: {', '.join(f'{value:g}' for value in values)}")
        notes.append("clamped")
    return Scores(tuple(min(max(value, LOW), HIGH) for value in values), ", ".join(notes))


_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_RATED = re.compile(rf"({_NUMBER})(?:\s*/\s*10(?:\.0)?|\s+out of\s+10)?")
_IN_PROSE = re.compile(r"[\"']?\b(?:scores?|ratings?)\b[\"'*]*\s*[:=]\s*\**\s*\[([^\][]*)(?:\]|$)", re.IGNORECASE)
_WHOLE = re.compile(rf"\W*(?:(?:scores?|ratings?)\W+)?{_RATED.pattern}[\s.*`]*", re.IGNORECASE)


def _find(body: str) -> list[float] | None:
    found: list[float] | None = None
    for candidate in _objects(body):
        for key, value in candidate.items():
            if str(key).strip().lower() in _KEYS:
                numbers = _numbers(value)
                if numbers is not None:
                    found = numbers
    if found is not None:
        return found
    for match in _IN_PROSE.finditer(body):
        found = _split(match.group(1))
    if found is not None:
        return found
    bare = re.sub(r"^```\w*|```$", "", body).strip()
    if bare.startswith("[") and bare.endswith("]"):
        return _split(bare[1:-1])
    whole = _WHOLE.fullmatch(bare)
    if whole is None:
        return None
    sign = -1.0 if bare.startswith("-") and not whole.group(1).startswith("-") else 1.0
    return [sign * float(whole.group(1))]


def _objects(body: str) -> Iterator[dict[Any, Any]]:
    decoder = json.JSONDecoder()
    position = body.find("{")
    while position >= 0:
        end = position + 1
        try:
            value, end = decoder.raw_decode(body, position)
        except (ValueError, RecursionError):
            value, end = _literal(body, position)
        if isinstance(value, dict):
            yield value
        position = body.find("{", end)


def _literal(body: str, start: int) -> tuple[Any, int]:
    """An object as Python would write it (single quotes, trailing comma), up to some closing brace."""
    end = body.find("}", start)
    while 0 <= end < start + 20_000:
        try:
            return ast.literal_eval(body[start : end + 1]), end + 1
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            end = body.find("}", end + 1)
    return None, start + 1


def _numbers(value: Any) -> list[float] | None:
    """Numbers of a score's value; ``None`` if it holds anything else."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (int, float)):
        return [float(value)]
    if isinstance(value, str):
        match = _RATED.fullmatch(value.strip())
        return [float(match.group(1))] if match else _split(value.strip().strip("[]")) if "," in value else None
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        numbers: list[float] = []
        for entry in value:
            one = None if isinstance(entry, (list, tuple, dict)) else _numbers(entry)
            if one is None or len(one) != 1:
                return None
            numbers += one
        return numbers
    return None


def _split(text: str) -> list[float] | None:
    numbers = []
    for part in text.split(","):
        match = _RATED.fullmatch(part.strip().strip("\"'"))
        if match is None:
            return None
        numbers.append(float(match.group(1)))
    return numbers
