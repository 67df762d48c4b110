"""Generate, judge, summarise: the steps of a benchmark over one run folder, each restartable at any point.

``run.json`` holds the identity of what was drawn and ``generated.jsonl`` its records, with the pictures under
``pictures/``; ``judges/NAME/judge.json`` and ``judgements.jsonl`` the same for each judge. A judgement is tied to the
checksum of the picture that was judged. Knows nothing of any particular benchmark, model or judge.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol, cast

from PIL import Image

from unialignment.errors import InputError
from unialignment.evaluation.agreement import krippendorff_alpha
from unialignment.evaluation.benchmarks import Benchmark, Check, Item, select
from unialignment.evaluation.judges import Judge, JudgeRejected, folder_name
from unialignment.evaluation.judges.prompts import PromptSet, Question, yes_no_question
from unialignment.evaluation.metrics import estimate, mean_of_groups
from unialignment.evaluation.records import RecordLog, claim, versions
from unialignment.evaluation.scoring import ASPECTS, Aspect, Refusal, UnparsableAnswer, overall, parse, parse_yes_no
from unialignment.evaluation.scoring import Protocol as ScoringProtocol
from unialignment.images import load_image
from unialignment.metadata import save_image
from unialignment.model.folders import file_checksum
from unialignment.storage import write_json

ATTEMPTS = 3
"""How often a judge is asked before an aspect counts as refused or unparsable."""
MAX_SIDE = 1024
"""Longest side in pixels of pictures that judges see."""
Progress = Callable[[str, int, int], None]


class Model(Protocol):
    """Anything that draws; the whole adapter for a model of one's own."""

    def identity(self) -> dict[str, Any]:
        """Everything that decides its pictures, JSON-serialisable."""
        ...

    def draw(self, item: Item, seed: int) -> tuple[Image.Image, dict[str, Any]]:
        """A picture for an item, and facts worth recording. Raises :class:`InputError` for items it can't do."""
        ...


def generate(
    folder: Path,
    benchmark: Benchmark,
    model: Model,
    *,
    seed: int = 0,
    limit: int | None = None,
    accept_versions: bool = False,
    progress: Progress = lambda step, done, total: None,
) -> None:
    """Draw what is not drawn yet. A picture is on disk before its record, so a kill loses at most the one in flight.

    Raises:
        InputError: The folder holds another run.
    """
    identity = {
        "benchmark": {"name": benchmark.name, "fingerprint": benchmark.fingerprint},
        "model": model.identity(),
        "seed": seed,
        "versions": versions(),
    }
    items = select(benchmark.items, limit)
    claim(folder / "run.json", identity, accept_versions)
    log = RecordLog(folder / "generated.jsonl", ("item",))
    for done, item in enumerate(items):
        progress("generate", done, len(items))
        if _is_drawn(folder, log.get(item.id)):
            continue
        started = time.perf_counter()
        record: dict[str, Any] = {
            "item": item.id,
            "group": item.group,
            "prompt": item.prompt,
            "turns": list(item.turns),
            "seed": seed + item.offset,
        }
        try:
            picture, facts = model.draw(item, seed + item.offset)
            path = save_image(picture.convert("RGB"), folder / "pictures" / f"{item.id}.png")
            made = {"picture": str(path.relative_to(folder)), "sha256": file_checksum(path)}
            record |= {"status": "ok", **made, **facts}
        except InputError as error:
            record |= {"status": "error", "error": str(error)[:300]}
        log.append({**record, "seconds": round(time.perf_counter() - started, 4)})
    progress("generate", len(items), len(items))


def _is_drawn(folder: Path, record: dict[str, Any] | None) -> bool:
    if record is None:
        return False
    if record["status"] != "ok":
        return True
    path = folder / record["picture"]
    return path.is_file() and file_checksum(path) == record["sha256"]


def judge_folder(folder: Path, name: str) -> Path:
    """Where a judge's records are."""
    return folder / "judges" / folder_name(name)


def judge(
    folder: Path,
    benchmark: Benchmark,
    judge_: Judge,
    prompts: PromptSet,
    protocol: ScoringProtocol,
    *,
    limit: int | None = None,
    accept_versions: bool = False,
    progress: Progress = lambda step, done, total: None,
) -> None:
    """Ask one judge about every aspect of every picture that it has not judged yet.

    Raises:
        InputError: Nothing is drawn, or the judge's records come from other settings.
        JudgeUnavailable: It can't be reached; what it said is kept.
    """
    drawn = RecordLog(folder / "generated.jsonl", ("item",))
    if not len(drawn):
        raise InputError(f"nothing is drawn in {folder}; run the generate step first")
    claim(
        judge_folder(folder, judge_.name) / "judge.json", {**judge_identity(judge_, prompts, protocol)}, accept_versions
    )
    log = RecordLog(judge_folder(folder, judge_.name) / "judgements.jsonl", ("item", "aspect", "sha256"))
    tasks: list[tuple[Item, dict[str, Any], str]] = []
    for item in select(benchmark.items, limit):
        record = drawn.get(item.id)
        if record is not None and record["status"] == "ok":
            tasks += [(item, record, a) for a in aspects(item) if log.get(item.id, a, record["sha256"]) is None]

    def work(item: Item, record: dict[str, Any], aspect: str) -> None:
        texts = {check.id: check.text for check in item.checks}
        if texts:
            question = yes_no_question(texts[aspect])
        else:
            question = prompts.question(item.kind, cast(Aspect, aspect), item.prompt, protocol)
        pictures = shown(item.photo if question.with_source else None, folder / record["picture"], protocol, item.kind)
        found = ask(judge_, question, pictures, protocol.strict)
        shared = {name: record[name] for name in ("item", "group", "sha256", "picture", "seed")}
        log.append({**shared, "aspect": aspect, "prompt": question.text, **found})

    for done, _ in enumerate(_in_flight(work, tasks, judge_.in_flight), 1):
        progress(f"judge {judge_.name}", done, len(tasks))


def aspects(item: Item) -> tuple[str, ...]:
    """What a judge is asked about an item: the ids of its checks, or the two aspects."""
    return tuple(check.id for check in item.checks) or ASPECTS


def _in_flight(work: Callable[..., None], tasks: Sequence[tuple[Any, ...]], width: int) -> Iterator[None]:
    """Run tasks, a few at once. After a failure none is started, those under way finish and are recorded."""
    with ThreadPoolExecutor(max(1, width)) as pool:
        todo = iter(tasks)
        running: set[Future[None]] = set()
        failure: BaseException | None = None
        while True:
            while failure is None and len(running) < width and (task := next(todo, None)) is not None:
                running.add(pool.submit(work, *task))
            if not running:
                break
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                failure = failure or future.exception()
                if failure is None:
                    yield
    if failure is not None:
        raise failure


def judge_identity(judge_: Judge, prompts: PromptSet, protocol: ScoringProtocol) -> dict[str, Any]:
    """What decides a judge's scores."""
    return {
        "judge": judge_.identity(),
        "prompts": prompts.fingerprint,
        "protocol": protocol.name,
        "attempts": ATTEMPTS,
        "versions": versions(),
    }


def shown(source: Path | None, result: Path | Image.Image, protocol: ScoringProtocol, kind: str) -> list[Image.Image]:
    """The pictures that a judge sees, the result last."""
    pictures = [load_image(one) for one in (source, result) if one is not None]
    for index, picture in enumerate(pictures):
        if protocol.squash is not None and kind == "edit":
            pictures[index] = picture.resize((protocol.squash, protocol.squash))
        elif max(picture.size) > MAX_SIDE:
            picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return pictures


def ask(judge_: Judge, question: Question, pictures: Sequence[Image.Image], strict: bool) -> dict[str, Any]:
    """Ask until the answer can be read, at most :data:`ATTEMPTS` times; everything that was said is kept."""
    raw: list[str] = []
    status, note = "unparsable", ""
    started = time.perf_counter()
    scores: list[float] | None = None
    for attempt in range(ATTEMPTS):
        try:
            answer = judge_.ask(question.text, pictures, attempt)
            raw.append(answer.text)
            if answer.refused:
                raise Refusal("the endpoint declined")
            found = parse_yes_no(answer.text) if question.yes_no else parse(answer.text, question.count, strict)
            status, note, scores = "ok", found.note, list(found.values)
            break
        except JudgeRejected as error:
            status, note = "error", str(error)[:300]
            break
        except UnparsableAnswer as error:
            status, note = "refused" if isinstance(error, Refusal) else "unparsable", str(error)
    seconds = round(time.perf_counter() - started, 4)
    return {"status": status, "scores": scores, "note": note, "raw": raw, "attempts": len(raw), "seconds": seconds}


def item_scores(
    folder: Path, items: Sequence[Item], name: str, rule: str = "all", scale: float = 1.0
) -> dict[str, dict[str, Any]]:
    """By item id: ``status`` and, if that is ``"ok"``, ``ic``, ``pq`` and ``o``, or for items with checks ``score``."""
    drawn = RecordLog(folder / "generated.jsonl", ("item",))
    log = RecordLog(judge_folder(folder, name) / "judgements.jsonl", ("item", "aspect", "sha256"))
    found: dict[str, dict[str, Any]] = {}
    for item in items:
        record = drawn.get(item.id)
        if record is None or record["status"] != "ok":
            found[item.id] = {"status": "not drawn"}
            continue
        pair = [log.get(item.id, aspect, record["sha256"]) for aspect in aspects(item)]
        states = ["not judged" if one is None else one["status"] for one in pair]
        if set(states) != {"ok"}:
            found[item.id] = {"status": next(state for state in states if state != "ok")}
            continue
        if item.checks:
            answers = {check.id: one["scores"][0] > 0 for check, one in zip(item.checks, pair) if one is not None}
            found[item.id] = {"status": "ok", "score": scale * check_score(item.checks, answers, rule)}
            continue
        ic, pq = (min(one["scores"]) for one in pair if one is not None)
        found[item.id] = {"status": "ok", "ic": ic, "pq": pq, "o": overall(ic, pq)}
    return found


def check_score(checks: Sequence[Check], answers: Mapping[str, bool], rule: str) -> float:
    """Score of an item, 0-1, from the answers to its checks; a check counts only where all its parents hold too."""
    holds: dict[str, bool] = {}

    def settled(check: Check, seen: tuple[str, ...] = ()) -> bool:
        if check.id not in holds:
            above = [known[parent] for parent in check.parents if parent in known and parent not in seen]
            holds[check.id] = answers[check.id] and all(settled(one, (*seen, check.id)) for one in above)
        return holds[check.id]

    known = {check.id: check for check in checks}
    values = [settled(check) for check in checks]
    return float(all(values)) if rule == "all" else sum(values) / len(values)


def summarise(folder: Path, benchmark: Benchmark, judges: Sequence[str], limit: int | None = None) -> dict[str, Any]:
    """Means with bootstrap 95 % intervals for each judge and group, what is missing, and how far judges agree."""
    items = select(benchmark.items, limit)
    result: dict[str, Any] = {"benchmark": benchmark.name, "items": len(items), "judges": {}}
    result |= {"measures": list(benchmark.measures), "scale": benchmark.scale, "rule": benchmark.rule}
    result["notes"] = list(benchmark.notes)
    measures = benchmark.measures
    everything = {name: item_scores(folder, items, name, benchmark.rule, benchmark.scale) for name in judges}
    for name, scores in everything.items():
        groups: dict[str, Any] = {}
        columns: dict[str, list[list[float]]] = {key: [] for key in measures}
        for group in benchmark.groups:
            rows = [scores[item.id] for item in items if item.group == group]
            good = [row for row in rows if row["status"] == "ok"]
            states = [row["status"] for row in rows if row["status"] != "ok"]
            entry: dict[str, Any] = {"items": len(rows), "judged": len(good)}
            entry["failed"] = {state: states.count(state) for state in sorted(set(states))}
            if good:
                for key, column in columns.items():
                    values = [row[key] for row in good]
                    found = estimate(values)
                    entry[key] = [found.value, found.low, found.high]
                    column.append(values)
                main = benchmark.main
                entry[f"{main}_failures_as_zero"] = sum(row[main] for row in good) / len(rows)
            groups[group] = entry
        judged = {"groups": groups}
        if len(columns[benchmark.main]) == len(benchmark.groups):
            means = {key: mean_of_groups(column) for key, column in columns.items()}
            judged["mean"] = {key: [mean.value, mean.low, mean.high] for key, mean in means.items()}
        result["judges"][name] = judged
    result["agreement"] = {
        key: krippendorff_alpha([[everything[name][item.id].get(key) for name in judges] for item in items])
        for key in measures
    }
    drawn = list(RecordLog(folder / "generated.jsonl", ("item",)))
    result["shortened_prompts"] = sum(bool(record.get("shortened")) for record in drawn)
    return result


def save_summary(folder: Path, summary: dict[str, Any]) -> Path:
    """Write ``results.json``."""
    write_json(folder / "results.json", summary)
    return folder / "results.json"
