"""Samples prepared ahead of the training step, in background processes.

What step ``i`` sees is a pure function of ``i`` (the producer's contract), so the data position of a run is one
integer and does not depend on the number of workers. Knows nothing of models; imports no torch.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import traceback
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from unialignment.errors import UniAlignmentError

T = TypeVar("T")
Producer = Callable[[int], T]


def _work(factory: Callable[[], Producer[Any]], start: int, stride: int, out: Any, parent: int) -> None:
    """Body of a worker process: items ``start, start + stride, ...`` in order, until the parent goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        produce = factory()
        index = start
        while True:
            # Pickled here by value: queues would otherwise hand tensors over as file descriptors, which run out.
            item = (index, pickle.dumps(produce(index), protocol=5), None)
            while True:
                try:
                    out.put(item, timeout=5)
                    break
                except queue.Full:
                    if os.getppid() != parent:
                        return
            index += stride
    except BaseException as error:
        plain = error if isinstance(error, UniAlignmentError) else None
        out.put((start, None, (plain, traceback.format_exc())))


class Prefetcher(Generic[T]):
    """Iterates over ``produce(start), produce(start + 1), ...`` for ever, computed ahead of need.

    Args:
        factory: Picklable callable that builds the producer; run once inside each worker.
        start: First index.
        workers: Background processes; 0 computes in this one, when asked.
        depth: Items kept ready per worker.

    Raises:
        RuntimeError: on iteration, if a worker failed or was killed (its traceback is in the message).
    """

    def __init__(self, factory: Callable[[], Producer[T]], start: int = 0, workers: int = 1, depth: int = 4) -> None:
        self._next = start
        self._start = start
        self._workers = workers
        self._inline = factory() if workers == 0 else None
        self._queues: list[Any] = []
        self._processes: list[Any] = []
        context = multiprocessing.get_context("spawn")  # forking a process that runs OpenMP threads can deadlock
        for worker in range(workers):
            out = context.Queue(maxsize=depth)
            process = context.Process(
                target=_work, args=(factory, start + worker, workers, out, os.getpid()), daemon=True
            )
            process.start()
            self._queues.append(out)
            self._processes.append(process)

    @property
    def position(self) -> int:
        """Index of the item that comes next."""
        return self._next

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        if self._inline is not None:
            item = self._inline(self._next)
        else:
            item = self._receive((self._next - self._start) % self._workers)
        self._next += 1
        return item

    def _receive(self, worker: int) -> T:
        while True:
            try:
                index, item, failure = self._queues[worker].get(timeout=2)
                break
            except queue.Empty:
                process = self._processes[worker]
                if not process.is_alive() and self._queues[worker].empty():
                    raise RuntimeError(
                        f"A data worker ended unexpectedly (exit code {process.exitcode}), perhaps for lack of memory. "
                        "Resume the run, with data.workers=0 if it happens again."
                    ) from None
        if failure is not None:
            plain, trace = failure
            if plain is not None:
                raise plain
            raise RuntimeError(f"A data worker failed:\n{trace}")
        if index != self._next:
            raise RuntimeError(f"Data out of order: item {index} arrived where {self._next} was expected.")
        return pickle.loads(item)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Stop the workers; safe to call twice."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(timeout=5)
        for out in self._queues:
            out.close()
            out.cancel_join_thread()
        self._processes, self._queues = [], []

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
