"""Contrastive loss over separate passes and processes: equal to the loss, and its gradient, of one large batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from unialignment.alignment.losses import contrastive_loss
from unialignment.alignment.pairs import Exchange, Side, cached_gradients, matched, shared_contrastive_loss

PAIRS, WIDTH = 12, 6


def towers() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(5, WIDTH) for name in ("image", "text")}).double()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(PAIRS, 5, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def embed(model: nn.ModuleDict, name: str, x: Tensor) -> Tensor:
    return F.normalize(model[name](x), dim=-1).float()


def large_batch() -> tuple[float, list[Tensor]]:
    model, (images, texts) = towers(), inputs()
    loss = contrastive_loss(embed(model, "image", images), embed(model, "text", texts))
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in model.parameters()]


def test_pairs_meet_by_id_whatever_their_order() -> None:
    assert matched([7, -1, 3, 5], [3, 9, 7, -1]) == ([2, 0], [0, 2])
    assert matched([4, 4], [4]) == ([1], [0])  # the last of equal ones
    assert matched([-1, -1], [-1]) == ([], [])


def test_the_parts_add_up_to_the_loss_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(5, 4, generator=generator) for _ in range(2))
    parts = [shared_contrastive_loss(images, texts, 0.07, Exchange(None, 3, part)) for part in range(3)]
    torch.testing.assert_close(sum(p[0] for p in parts), contrastive_loss(images, texts))
    right = (F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T).argmax(1) == torch.arange(5)
    torch.testing.assert_close(sum(p[1] for p in parts), right.float().mean())


def test_accumulated_micro_batches_have_the_gradient_of_one_large_batch() -> None:
    """GradCache: pictures and texts in other orders, split over three micro-batches, some rows unpaired."""
    expected_loss, expected = large_batch()
    model, (images, texts) = towers(), inputs()
    order = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(2))
    micros = [
        (torch.arange(start, start + 4), order[start : start + 4]) for start in range(0, PAIRS, 4)
    ]  # ids of pictures and of texts
    features = []
    with torch.no_grad():
        for image_ids, text_ids in micros:
            features.append(
                [
                    (image_ids, embed(model, "image", images[image_ids]), None),
                    (text_ids, None, embed(model, "text", texts[text_ids])),
                    (torch.tensor([-1]), embed(model, "image", images[:1]), None),
                ]
            )
    found = cached_gradients(features, 0.07, Exchange())
    assert found is not None and found.pairs == PAIRS
    assert float(found.loss) == pytest.approx(expected_loss, rel=1e-6)
    for (image_ids, text_ids), gradients in zip(micros, found.gradients, strict=True):
        surrogate = (embed(model, "image", images[image_ids]) * gradients[0][0]).sum()
        surrogate = surrogate + (embed(model, "text", texts[text_ids]) * gradients[1][1]).sum()
        assert not gradients[2][0].any()  # of an unpaired picture
        surrogate.backward()
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-5, atol=1e-8)


def test_fewer_than_two_pairs_teach_nothing() -> None:
    lone = [[(torch.tensor([3]), torch.ones(1, 2), None), (torch.tensor([3]), None, torch.ones(1, 2))]]
    assert cached_gradients(lone, 0.07, Exchange()) is None
    assert cached_gradients([[(torch.tensor([3]), None, None)]], 0.07, Exchange()) is None


def _process(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    exchange = Exchange(None, 2, rank)
    images, texts = inputs()
    # Through the gather: pictures in order, texts turned round, so that no pair lies in one process.
    model = towers()
    mine = torch.arange(PAIRS)[rank * 6 : rank * 6 + 6]
    other = torch.arange(PAIRS).flip(0)[rank * 6 : rank * 6 + 6]
    image_side, text_side = Side(), Side()
    image_side.add(mine, embed(model, "image", images[mine]))
    text_side.add(other, embed(model, "text", texts[other]))
    image_ids, all_images = image_side.gathered(exchange)
    text_ids, all_texts = text_side.gathered(exchange)
    first, second = matched(image_ids, text_ids)
    part, _ = shared_contrastive_loss(all_images[first], all_texts[second], 0.07, exchange)
    part.backward()
    gathered = [part.detach(), *(p.grad for p in model.parameters())]
    # GradCache with as many pictures here as there, but all texts in one process.
    model = towers()
    features = [[(mine, embed(model, "image", images[mine]).detach(), None)]]
    if rank:
        features.append([(torch.arange(PAIRS), None, embed(model, "text", texts).detach())])
    found = cached_gradients(features, 0.07, exchange)
    surrogate = (embed(model, "image", images[mine]) * found.gradients[0][0][0]).sum()
    if rank:
        surrogate = surrogate + (embed(model, "text", texts) * found.gradients[1][0][1]).sum()
    surrogate.backward()
    cached = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    for tensor in [*gathered, *cached]:
        dist.all_reduce(tensor)
    if rank == 0:
        torch.save({"gathered": gathered, "cached": [found.loss, *cached]}, Path(folder) / "result.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_loss_and_gradient_of_one(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(port), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=600) for process in running] == [0, 0]
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    expected_loss, expected = large_batch()
    for loss, *gradients in result.values():
        assert float(loss) == pytest.approx(expected_loss, rel=1e-6)
        for gradient, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)  # sums in float32, in another order


if __name__ == "__main__":  # one of the two processes
    _process(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
