"""Everything that is applied to the model from outside: device, activation checkpointing, compilation, DDP, FSDP2.

Also how the processes of a run talk: who is first, what they agree on, what they gather. Hugging Face Accelerate reads
the launcher's environment (``torchrun``, ``accelerate launch``, on CPUs and GPUs) and forms the process group; the
wrapping is PyTorch's own, since Accelerate offers FSDP on accelerators only, and what is tested on two CPU processes
should be what runs on many GPUs. With one process nothing is applied and nothing is imported. Knows nothing of losses
or data.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unialignment.alignment.pairs import Exchange
from unialignment.errors import ConfigError, StorageError, UniAlignmentError
from unialignment.training.config import OptimizerSection, RunSection
from unialignment.training.runtime import choose_device, compile_if_faster
from unialignment.training.sharing import Layout

T = TypeVar("T")


def launched_processes() -> int:
    """Number of processes that the launcher says there are."""
    return int(os.environ.get("WORLD_SIZE", "1") or "1")


def local_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor's own part, sharing its memory; other tensors as they are."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else cast(Tensor, to_local())


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is one process's part of a larger one."""
    return hasattr(tensor, "device_mesh")


def place_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in every process, sharded as ``like`` is (or as it is, where ``like`` isn't)."""
    if not is_sharded(like) or is_sharded(value) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded = cast(Any, like)
    return distribute_tensor(value.to(like.device), sharded.device_mesh, sharded.placements, src_data_rank=None)


class Parallel:
    """The processes of a run, as seen from one of them.

    Attributes:
        kind: ``"none"``, ``"ddp"`` (every process has the model) or ``"fsdp"`` (every process has a shard of it).
        rank: Number of this process.
        processes: How many there are.
        local_processes: How many of them share this machine.
        device: What this process computes on.
    """

    def __init__(self, kind: str = "none", device: torch.device | None = None, control: Any = None) -> None:
        self.kind = kind
        self.device = device or torch.device("cpu")
        self.rank = dist.get_rank() if kind != "none" else 0
        self.processes = dist.get_world_size() if kind != "none" else 1
        self.local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", self.processes)) if kind != "none" else 1
        self.control = control
        self._module: Any = None

    @classmethod
    def start(cls, run: RunSection) -> Parallel:
        """Join the other processes, if a launcher has started any.

        Raises:
            ConfigError: no such device.
            UniAlignmentError: the others can't be reached.
        """
        if launched_processes() == 1:
            return cls(device=choose_device(run.device))
        if run.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(
                f"run.device={run.device} names one device for all of {launched_processes()} processes; use auto, cpu "
                "or cuda, and every process takes its own."
            )
        cpu = choose_device(run.device).type == "cpu"
        timeout = timedelta(minutes=run.timeout_minutes)
        try:
            from accelerate import PartialState

            state = PartialState(cpu=cpu, timeout=timeout, **_own_store(timeout))
            # Decisions and metadata travel between processors: an accelerator would have to stop for them.
            control = dist.new_group(backend="gloo", timeout=timeout)
        except ImportError as error:
            raise UniAlignmentError(
                "several processes need Hugging Face Accelerate: pip install 'unialignment[train]'."
            ) from error
        except (RuntimeError, ValueError) as error:
            raise UniAlignmentError(
                f"the {launched_processes()} processes of this run did not find each other "
                f"({_first_line(error)}); check MASTER_ADDR, MASTER_PORT and the launcher's arguments."
            ) from error
        kind = run.parallel
        if kind == "auto":
            kind = "fsdp" if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" else "ddp"
        return cls(kind, state.device, control)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether parameters are sharded."""
        return self.kind == "fsdp"

    # ------------------------------------------------------------------------------------------------ the model

    def apply(self, objective: Any, run: RunSection, layout: Layout) -> Any:
        """Apply all of it to an objective: afterwards its parameters are what an optimizer may take.

        Args:
            objective: Written for one device.
            run: What to apply.
            layout: How steps are shared out.

        Returns:
            What to call instead of the objective.
        """
        objective.transformer.gradient_checkpointing = run.activation_checkpointing
        objective.to(self.device)
        self._module = objective
        if self.kind == "none":
            return objective
        objective.exchange = self.exchange(layout)
        if self.kind == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            # A step need not use every parameter: which ones depends on the tasks and pairs of its rows.
            self._module = DistributedDataParallel(objective, find_unused_parameters=True, forward_sync_buffers=False)
        else:
            self._shard(objective, run)
        return self._module

    @staticmethod
    def compile(objective: Any, mode: str, step: Callable[[], None], say: Callable[[str], None]) -> None:
        """Compile the transformer as ``run.compile`` says, see :func:`compile_if_faster`."""
        # Block by block: all blocks share one compiled code, which keeps compilation short.
        compile_if_faster(mode, list(objective.transformer.transformer_blocks), step, say, dynamic=None)

    def _shard(self, objective: Any, run: RunSection) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        # A block's outputs are parts of one tensor. The warning is about adding to them in place, which nothing does.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
        mesh = init_device_mesh(self.device.type, (self.processes,))
        frozen = {parameter for parameter in objective.parameters() if not parameter.requires_grad}
        # Blocks travel in the type that they compute in; gradients are summed in float32. Activations keep the types
        # that autocast gives them on one device.
        low = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if run.precision == "bf16" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for block in objective.transformer.transformer_blocks:
            fully_shard(block, mesh=mesh, mp_policy=low, ignored_params=frozen)
        fully_shard(objective, mesh=mesh, ignored_params=frozen)
        for method in ("within", "pair_features"):
            register_fsdp_forward_method(objective, method)

    def exchange(self, layout: Layout) -> Exchange:
        """How the processes that share a micro-batch's rows exchange embeddings."""
        if layout.parts == 1:
            return Exchange()
        own = None
        for group in range(layout.groups):
            made = dist.new_group(layout.members(group)) if layout.groups > 1 else None
            if group == layout.group:
                own = made
        return Exchange(own, layout.parts, layout.part)

    def everyone(self) -> Exchange:
        """How all processes exchange embeddings."""
        return Exchange(None, self.processes, self.rank)

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; gradients are averaged over processes after the last.

        Shards are reduced after each: whole gradients would not fit where the whole model doesn't.
        """
        if self.kind == "ddp" and not last:
            with self._module.no_sync():
                yield
        else:
            yield

    @contextlib.contextmanager
    def gathered(self, objective: Any) -> Iterator[None]:
        """Within the block, and a pass of the objective, every process has the whole blocks; for looking, not training.

        Sampling asks blocks for parts of their work, outside the passes for which shards are gathered.
        """
        blocks = list(objective.transformer.transformer_blocks) if self.sharded else []
        for block in blocks:
            block.set_reshard_after_forward(False)
            block.unshard()
        try:
            yield
        finally:
            for block in blocks:
                block.set_reshard_after_forward(True)
                block.reshard()

    def gradient_norm(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        """Clip gradients to a norm of ``limit``; returns the norm before, the same in every process."""
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        full = getattr(norm, "full_tensor", None)
        return norm if full is None else cast(Tensor, full())

    def check_optimizer(self, options: OptimizerSection) -> None:
        """Refuse optimizers that can't update shards.

        Raises:
            ConfigError: this one can't.
        """
        if self.sharded and options.name != "adamw":
            raise ConfigError(
                f"optimizer.name={options.name} needs whole matrices, run.parallel=fsdp shards them; use adamw or "
                "run.parallel=ddp."
            )

    @torch.no_grad()
    def whole_state(self, module: nn.Module) -> dict[str, Tensor]:
        """A module's state with every tensor whole, on the CPU, in the main process; ``{}`` in the others."""
        result = {}
        for name, value in module.state_dict().items():
            full = value.full_tensor() if is_sharded(value) else value
            if self.is_main:
                result[name] = full.detach().cpu()
        return result

    # -------------------------------------------------------------------------------------------- conversations

    def agree(self, *values: float) -> list[float]:
        """The largest of each value over all processes; exactly the given ones where there is only one."""
        if self.kind == "none":
            return list(values)
        reduced = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=self.control)
        return [float(value) for value in reduced]

    def gather(self, item: T) -> list[T]:
        """Every process's item, in order of rank, in all of them."""
        if self.kind == "none":
            return [item]
        items: list[Any] = [None] * self.processes
        dist.all_gather_object(items, item, group=self.control)
        return items

    def broadcast(self, item: T) -> T:
        """The main process's item."""
        if self.kind == "none":
            return item
        items = [item]
        dist.broadcast_object_list(items, src=0, group=self.control)
        return items[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """Run an action in the main process while the others wait; its result, or its error, is everyone's.

        Raises:
            UniAlignmentError: the action failed.
        """
        if self.kind == "none":
            return action()
        result: Any = None
        failure: BaseException | None = None
        if self.is_main:
            try:
                result = action()
            except Exception as error:
                failure = error
        told = None if failure is None else (isinstance(failure, StorageError), str(failure))
        result, told = self.broadcast((result, told))
        if failure is not None:
            raise failure
        if told is not None:
            raise (StorageError if told[0] else UniAlignmentError)(f"in the first process: {told[1]}")
        return cast(T, result)

    def close(self) -> None:
        """Leave the other processes; call when a run has ended well."""
        if self.kind != "none" and dist.is_initialized():
            dist.barrier(group=self.control)
            dist.destroy_process_group()
            from accelerate import PartialState

            PartialState._reset_state()

    @contextlib.contextmanager
    def watching(self, step: Callable[[], int], folder: Any) -> Iterator[None]:
        """Within the block, the loss of another process is an error that says what to do.

        Raises:
            UniAlignmentError: another process ended, or did not answer in time.
        """
        try:
            yield
        except RuntimeError as error:
            network = isinstance(error, dist.DistError) or any(
                word in str(error) for word in ("gloo", "Gloo", "NCCL", "Connection", "Socket", "process group")
            )
            if self.kind == "none" or isinstance(error, UniAlignmentError) or not network:
                raise
            raise UniAlignmentError(
                f"process {self.rank} lost another process of this run after step {step()} ({_first_line(error)}); "
                "that process says why. Nothing that was saved is lost: run the same command again, on as many "
                f"processes as there are, and it resumes from the last checkpoint in {folder}."
            ) from error


def _own_store(timeout: timedelta) -> dict[str, Any]:
    """Where processes that ``torchrun`` has started again find one another.

    Without ``--rdzv-backend``, it keeps one store over all its attempts, in which the addresses of the dead still lie
    (PyTorch 2.13); so each attempt gets names of its own. Over several machines attempts are counted by each for
    itself, and the rendezvous that they need (``c10d``) begins with an empty store.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    processes = launched_processes()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "0") or "0")
    if attempt == "0" or here != processes or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, processes, is_master=False, timeout=timeout)
    named = dist.PrefixStore(f"attempt-{attempt}", store)
    return {"store": named, "rank": int(os.environ["RANK"]), "world_size": processes}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
