"""What runs in the writer process. It knows no Keras, and uses the CPU only."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import numpy as np

from resilient_ckpt.child import serve
from resilient_ckpt.record import Checkpoint
from resilient_ckpt.snapshot import LeafLayout, views
from resilient_ckpt.writer import WriteRequest


def main(descriptor: int) -> None:
    """Serves save requests until the trainer closes the connection.

    Args:
        descriptor: The connection, inherited from the trainer.
    """
    arrays: Sequence[np.ndarray] = []
    layouts: tuple[LeafLayout, ...] = ()

    def answer(request: WriteRequest, block: int | None) -> list[Checkpoint]:
        nonlocal arrays, layouts
        if request.layouts is not None:
            layouts = request.layouts
        if block is not None:
            memory = mmap.mmap(block, request.size, prot=mmap.PROT_READ)
            os.close(block)
            arrays = views(memory, layouts)
        return request.store.save(request.job, arrays)

    serve(descriptor, answer)
