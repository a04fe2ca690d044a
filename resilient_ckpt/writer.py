"""A process of its own that writes checkpoints while training goes on.

Why not a thread: Orbax spends its time in Python (12 s of CPU for 10 000 small arrays) and
in compression and copying; a thread takes the interpreter lock and the cores from the
training loop. The arrays reach the process through shared memory, without a further copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resilient_ckpt.child import Child
from resilient_ckpt.record import Checkpoint
from resilient_ckpt.snapshot import HostBlock, LeafLayout
from resilient_ckpt.store import CheckpointStore, SaveJob


@dataclass(frozen=True)
class WriteRequest:
    """What the writer process is sent.

    Args:
        store: The store to write into.
        job: What to write.
        layouts: Where the arrays lie in the shared block; `None` for where they lay in
            the previous request.
        size: Size of the shared block in bytes.
    """

    store: CheckpointStore
    job: SaveJob
    layouts: tuple[LeafLayout, ...] | None
    size: int


class ProcessWriter(Child):
    """Hands the writer process one save after the other.

    The engine never has two saves under way; only `close` may be called meanwhile.
    """

    def __init__(self) -> None:
        super().__init__("resilient_ckpt.writer_process")
        self._layouts: Sequence[LeafLayout] | None = None
        self._descriptor: int | None = None

    def write(self, store: CheckpointStore, job: SaveJob, block: HostBlock) -> list[Checkpoint]:
        """Writes a job and waits for its commit.

        Args:
            store: The store to write into.
            job: What to write.
            block: The block that the arrays were copied into; not to be changed meanwhile.

        Returns:
            The committed checkpoints.

        Raises:
            ChildDiedError: If the process ended before it answered.
            Exception: What the save raised there.
        """
        self.start()
        layouts = tuple(block.layouts)
        same = layouts == self._layouts and block.fd == self._descriptor
        request = WriteRequest(store, job, None if same else layouts, block.size)
        committed: list[Checkpoint] = self.request(request, None if same else block.fd)
        self._layouts, self._descriptor = layouts, block.fd
        return committed

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        super().close()
        self._layouts = self._descriptor = None
