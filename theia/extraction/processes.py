"""The processes that share one extraction."""

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from theia.errors import ConfigError, TheiaError

if TYPE_CHECKING:
    from lightning import Trainer

T = TypeVar("T")

# After an interruption one process may have days of work left while another has none: a long wait is not an error.
_PATIENCE = timedelta(days=365)


class Processes:
    """Rank and number of the processes, and how they wait for each other.

    Args:
        fabric: The Fabric or trainer that launched this process; or a device, on which this process does all work.

    Raises:
        ConfigError: If more processes were started than Fabric knows of, so that each would do all of the work.

    The processes talk over a gloo group of their own, whatever the device: it can wait without a timeout, and a process
    that dies closes its connections. Processes that wait for the dead one stop at once; those at work first finish
    their own shards.

    Attributes:
        rank: Number of this process among those of all nodes.
        world: Number of processes.
        device: Device of this process.
    """

    def __init__(self, fabric: "Fabric | Trainer | torch.device") -> None:
        self._group: dist.ProcessGroup | None = None
        self.rank, self.world = 0, 1
        if isinstance(fabric, torch.device):
            self.device = fabric
            return
        self.rank, self.world, self.device = fabric.global_rank, fabric.world_size, fabric.strategy.root_device
        for environment in (TorchElasticEnvironment, SLURMEnvironment):
            if environment.detect() and (started := environment().world_size()) != self.world:
                raise ConfigError(
                    f"{started} processes were started, but Lightning Fabric was told of {self.world}. Give as "
                    "--devices the processes on each node, and as --num_nodes the nodes."
                )
        if self.world > 1:
            # torch's type allows for processes outside the group; this one holds all.
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))

    def mine(self, count: int) -> range:
        """Indices of this process's shards, out of ``count``."""
        return range(self.rank, count, self.world)

    def wait(self) -> None:
        """Waits until every process has called this method.

        Raises:
            TheiaError: If another process has died.
        """
        if self._group is not None:
            self._together(lambda: dist.barrier(group=self._group))

    def first(self, work: Callable[[], T]) -> T:
        """Calls a function in process 0 only and gives its result to all processes.

        Args:
            work: Function whose result can be pickled. If it raises a TheiaError, only process 0 raises it; the others
                exit, so that the message appears once.
        """
        if self._group is None:
            return work()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except TheiaError as error:
                outcome[1] = error
        self._together(lambda: dist.broadcast_object_list(outcome, src=0, group=self._group))
        if outcome[1] is not None:
            raise outcome[1] if self.rank == 0 else SystemExit(1)
        result: T = outcome[0]
        return result

    def _together(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise TheiaError(
                f"Process {self.rank} lost another one, which says above why it stopped. Whole shards are kept; "
                "remove the cause and run the same command again."
            ) from error
