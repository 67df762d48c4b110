"""The whole evaluation on contestants whose scores are known, its JSON, its card and its command line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from unialignment.errors import InputError
from unialignment.evaluation import card, cli
from unialignment.evaluation.contestants import CopySource, ModelContestant, RandomOther, Reconstruction, Truth
from unialignment.evaluation.judge import Judge
from unialignment.evaluation.metrics import Estimate
from unialignment.evaluation.results import METRICS, Results, summarise
from unialignment.evaluation.semgen_world import GROUPS, group_sample, turns
from unialignment.evaluation.world import TASKS, evaluate, held_out_samples, retrieval
from unialignment.world.stream import WorldStream

KEYS = {
    *("caption.objects", "vqa.accuracy", "generate.objects", "generate.relations", "generate.background"),
    *("generate.scenes", "caption.cider", "depth.abs_rel", "retrieval.r5", "semgen.overall", "semgen.edit_multi_turns"),
    *(f"semgen.{group}" for group in GROUPS),
    *("drift.psnr_1", "drift.psnr_2", "drift.psnr_3"),
    *(
        "edit.success",
        "edit.psnr_outside",
        "segment.iou",
        "depth.delta1",
        "edges.f",
        "compose.subjects",
        "retrieval.r1",
    ),
}


class Oracle:
    """Behaves like a pipeline and always gives the true result."""

    name = "oracle"

    def __init__(self, stream: WorldStream) -> None:
        self.stream = stream
        self.calls: list[dict] = []
        self.autoencoder = SimpleNamespace(encode=lambda x: x, decode=lambda z: z)

    def run(self, task, prompts, images, *, kind, seed, **options):
        self.calls.append({"task": task, "seed": seed, "images": images, **options})
        assert kind is None
        samples = next(
            found for found in self.known(task, len(prompts)) if [one.prompt or None for one in found] == prompts
        )
        if samples[0].target_image is None:
            return SimpleNamespace(texts=[sample.target_text for sample in samples])
        return SimpleNamespace(images=[Image.fromarray(sample.target_image) for sample in samples])

    def known(self, task, count):
        """Items of the task, and of the groups with their turns: each turn is answered with the result of all."""
        yield held_out_samples(self.stream, task, count)
        for group in GROUPS:
            items = [group_sample(self.stream, group, index) for index in range(count)]
            yield items
            if group == "edit_multi":
                yield from zip(*map(turns, items))

    def embed_image(self, images):
        return torch.eye(len(images))

    embed_text = embed_image


@pytest.fixture(scope="module")
def stream(pack, nano) -> WorldStream:
    if len(nano.styles) < 2:
        pytest.skip("held-out edits need two styles: the artwork of `unialign world build --source npm`")
    return WorldStream(pack, nano, "held_out", 3)


@pytest.fixture(scope="module")
def oracle(stream: WorldStream) -> Oracle:
    return Oracle(stream)


@pytest.fixture(scope="module")
def results(oracle: Oracle, stream: WorldStream, pack, nano) -> Results:
    return evaluate(oracle, stream, Judge(pack, nano), limit=8, seed=5, model="oracle", pool=10)


def test_an_oracle_scores_full_marks_on_every_key(results: Results) -> None:
    assert set(results.metrics) >= KEYS - {"generate.relations"}
    for key, item in results.metrics.items():
        full = {"dB": 60.0, "mark": pytest.approx(10, abs=0.1), "number": 10.0 if key == "caption.cider" else 0.0}
        if key == "caption.cider":  # an n-gram that all captions hold says nothing, so short ones can't reach ten
            assert 9 < item.value <= 10
            continue
        assert item.value == full.get(METRICS[key].unit, 1.0), key
    assert results.by_kind
    assert all(item.value == 1 for kinds in results.by_kind.values() for item in kinds.values())


def test_every_item_has_a_seed_of_its_own(oracle: Oracle, results: Results) -> None:
    groups = ["generate", "generate", "edit", "edit"]
    assert [call["task"] for call in oracle.calls] == [*TASKS, *groups, "edit", "edit", "edit"]  # the last three: turns
    assert all(call["seed"] == list(range(5, 13)) for call in oracle.calls[:-2])
    assert [call["seed"][0] for call in oracle.calls[-3:]] == [5, 1005, 2005]


def test_floors_are_below_ceilings(results: Results) -> None:
    for key in ("generate.objects", "edit.success", "segment.iou", "compose.subjects", "vqa.accuracy"):
        assert results.floors["random"][key] < results.ceilings["truth"][key] == 1
    assert results.floors["copy"]["edit.success"] == 0
    for group in GROUPS:
        assert results.ceilings["truth"][f"semgen.{group}"] >= 9.9
        assert results.floors["random"][f"semgen.{group}"] < 3
    assert results.floors["copy"]["semgen.edit_multi"] == results.floors["copy"]["semgen.edit_complex"] == 0
    assert results.floors["copy"]["semgen.edit_multi_turns"] == 0
    assert results.ceilings["truth"]["semgen.overall"] >= 9.9
    assert results.floors["random"]["retrieval.r1"] == 0.1


def test_json_has_the_keys_at_the_top_and_comes_back(results: Results, tmp_path) -> None:
    results.save(tmp_path / "evaluation.json")
    data = json.loads((tmp_path / "evaluation.json").read_text())
    assert data["caption.objects"] == 1.0
    assert data["vqa.by_kind"] == dict.fromkeys(results.by_kind["vqa.by_kind"], 1.0)
    assert data["edit.by_kind"] == dict.fromkeys(results.by_kind["edit.by_kind"], 1.0)
    assert data["intervals"]["caption.objects"] == [1.0, 1.0]
    assert data["intervals"]["vqa.by_kind"] == {kind: [1.0, 1.0] for kind in results.by_kind["vqa.by_kind"]}
    assert set(data["intervals"]) == set(data["counts"]) | {"vqa.by_kind", "edit.by_kind"}
    assert Results.load(tmp_path / "evaluation.json") == results
    data["by_kind_detail"] = data["by_kind_detail"]["vqa.by_kind"]  # as versions before edits by kind wrote it
    with pytest.raises(InputError, match="of another version"):
        Results.from_json(data)


def test_unusable_results_are_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="no evaluation at"):
        Results.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        Results.load(tmp_path / "broken.json")
    (tmp_path / "other.json").write_text('{"counts": {}}')
    with pytest.raises(InputError, match="is missing"):
        Results.load(tmp_path / "other.json")


def test_a_collapsed_embedding_retrieves_nothing(oracle: Oracle, stream: WorldStream) -> None:
    pipe = SimpleNamespace(embed_image=lambda images: torch.ones(len(images), 4))
    pipe.embed_text = pipe.embed_image
    assert retrieval(pipe, held_out_samples(stream, "generate", 5))["retrieval.r1"].value == 0


def test_references(oracle: Oracle, stream: WorldStream) -> None:
    samples = held_out_samples(stream, "edit", 4)
    assert all((a == b.target_image).all() for a, b in zip(Truth().outputs(samples, 0), samples, strict=True))
    assert all((a == b.sources[0]).all() for a, b in zip(CopySource().outputs(samples, 0), samples, strict=True))
    rebuilt = Reconstruction(oracle).outputs(samples, 0)
    assert all(np.abs(a.astype(int) - b.target_image).max() <= 1 for a, b in zip(rebuilt, samples, strict=True))
    assert Reconstruction(oracle).outputs(held_out_samples(stream, "caption", 2), 0) == [None, None]
    questions = held_out_samples(stream, "answer", 30)
    others = RandomOther().outputs(questions, 0)
    assert others == RandomOther().outputs(questions, 0)
    assert sum(other == item.target_text for other, item in zip(others, questions, strict=True)) < 25


def test_settings_reach_the_sampler(oracle: Oracle, stream: WorldStream) -> None:
    contestant = ModelContestant(oracle, batch_size=4, settings={"edit": {"num_inference_steps": 2}})
    contestant.outputs(held_out_samples(stream, "edit", 3), 0)
    assert oracle.calls[-1]["num_inference_steps"] == 2
    assert oracle.calls[-1]["batch_size"] == 4
    contestant.outputs(held_out_samples(stream, "caption", 3), 0)
    assert "num_inference_steps" not in oracle.calls[-1]


def test_a_key_counts_only_the_items_to_which_it_applies() -> None:
    summary = summarise([{"a": 1.0}, {"a": 0.0, "b": float("nan")}, {"b": 1.0}])
    assert summary["a"].count == 2
    assert summary["b"] == Estimate(1.0, 1.0, 1.0, 1)


def test_the_card_shows_every_metric_with_its_command(results: Results, tmp_path) -> None:
    path = card.write_card(tmp_path, results, None, {"transformer": "1 M parameters"})
    text = path.read_text()
    assert "unialign eval semgen-world --model oracle --seed 5 --limit 8" in text
    assert all(f"`{key}`" in text for key in results.metrics)
    assert all(kind in text for kinds in results.by_kind.values() for kind in kinds)
    assert (tmp_path / "evaluation.json").exists()


def test_the_contact_sheet_shows_sources_model_and_truth(oracle: Oracle, stream: WorldStream) -> None:
    rows = card.sheet_rows(oracle, {"compose": held_out_samples(stream, "compose", 2)}, 0)
    labels = [panel.label for panel in rows[0].panels]
    assert labels[0] == "image 1"
    assert labels.count("model") == labels.count("true result") == 2


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--tasks", "draw"], "unknown task 'draw'"), (["--limit", "0"], "--limit 0")]
)
def test_unusable_arguments_are_refused(arguments: list[str], message: str) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    with pytest.raises(InputError, match=message):
        cli.run(parser.parse_args(arguments))
