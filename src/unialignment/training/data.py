"""Samples prepared ahead of the training step, in background processes.

What step ``i`` sees is a pure function of ``i`` (the producer's contract), so the data position of a run is one
integer and does not depend on the number of workers, and a worker that dies is replaced without a trace. Knows nothing
of models; imports no torch.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from unialignment.errors import UniAlignmentError

T = TypeVar("T")
Producer = Callable[[int], T]


def _work(factory: Callable[[], Producer[Any]], start: int, stride: int, depth: int, out: Any) -> None:
    """Body of a worker process: items ``start, start + stride, ...`` in order, until the parent goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ready: queue.Queue[bytes | None] = queue.Queue(maxsize=depth)
    sender = threading.Thread(target=_send, args=(ready, out), daemon=True)
    sender.start()
    try:
        produce = factory()
        index = start
        while True:
            # Pickled by value: torch would otherwise hand tensors over as file descriptors, which run out.
            ready.put(pickle.dumps((index, produce(index), None), protocol=5))
            index += stride
    except BaseException as error:
        plain = error if isinstance(error, UniAlignmentError) else None
        ready.put(pickle.dumps((start, None, (plain, traceback.format_exc()))))
        ready.put(None)
        sender.join()


def _send(ready: queue.Queue[bytes | None], out: Any) -> None:
    try:
        while (item := ready.get()) is not None:
            out.send_bytes(item)
    except OSError:  # nobody reads any more: the parent has gone, perhaps without a word
        os._exit(1)


class Prefetcher(Generic[T]):
    """Iterates over ``produce(start), produce(start + 1), ...`` for ever, computed ahead of need.

    A worker that dies is replaced, and the items that died with it are made again; one that dies twice without
    delivering anything is an error.

    Args:
        factory: Picklable callable that builds the producer; run once inside each worker.
        start: First index.
        workers: Background processes; 0 computes in this one, when asked.
        depth: Items kept ready per worker.
        report: Told when a worker had to be replaced.

    Raises:
        UniAlignmentError: on iteration: a worker could do nothing but die, or met a mistake of the user's.
        RuntimeError: on iteration, if a worker failed (its traceback is in the message).
    """

    def __init__(
        self,
        factory: Callable[[], Producer[T]],
        start: int = 0,
        workers: int = 1,
        depth: int = 4,
        report: Callable[[str], None] = print,
    ) -> None:
        self._factory, self._workers, self._depth, self._report = factory, workers, depth, report
        self._next = start
        self._start = start
        self._lost_at = -1
        self._inline = factory() if workers == 0 else None
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        for worker in range(workers):
            process, pipe = self._hire(start + worker)
            self._processes.append(process)
            self._pipes.append(pipe)

    def _hire(self, first: int) -> tuple[Any, Any]:
        """A worker that begins with the item ``first``, and the pipe that its items come through."""
        context = multiprocessing.get_context("spawn")  # forking a process that runs OpenMP threads can deadlock
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_work, args=(self._factory, first, self._workers, self._depth, sender), daemon=True
        )
        process.start()
        sender.close()  # the worker has the only one, so that its death ends the pipe, also in the midst of an item
        return process, receiver

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
                message = self._pipes[worker].recv_bytes()
                break
            except (EOFError, OSError):
                self._replace(worker)
        index, item, failure = pickle.loads(message)
        if failure is not None:
            plain, trace = failure
            if plain is not None:
                raise plain
            raise RuntimeError(f"A data worker failed:\n{trace}")
        if index != self._next:
            raise RuntimeError(f"Data out of order: item {index} arrived where {self._next} was expected.")
        return item  # type: ignore[no-any-return]

    def _replace(self, worker: int) -> None:
        """Take a dead worker's place with another.

        Raises:
            UniAlignmentError: the one before it died at the same item.
        """
        process = self._processes[worker]
        process.join(timeout=30)
        died = f"A data worker ended unexpectedly (exit code {process.exitcode}), perhaps for lack of memory"
        if self._lost_at == self._next:
            raise UniAlignmentError(
                f"{died}, and so did the one that took its place, before either handed over micro-batch {self._next}. "
                "Nothing that was saved is lost: resume with the same command, with fewer data.workers, or with "
                "data.workers=0 to see what it does in the training process."
            )
        self._lost_at = self._next
        self._report(f"{died}; another takes its place and makes the same micro-batches again.")
        self._pipes[worker].close()
        self._processes[worker], self._pipes[worker] = self._hire(self._next)

    def close(self) -> None:
        """Stop the workers; safe to call twice."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(timeout=5)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
