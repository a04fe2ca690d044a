"""What runs in the process that uploads. It knows neither Keras nor JAX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from resilient_ckpt.child import serve
from resilient_ckpt.mirror import Mirror, Upload


@dataclass(frozen=True)
class UploadRequest:
    """What the process is sent.

    Args:
        mirror: Where to.
        directory: The run's directory.
        paths: The checkpoints in it.
    """

    mirror: Mirror
    directory: Path
    paths: tuple[Path, ...]


def main(descriptor: int) -> None:
    """Serves upload requests until the trainer closes the connection.

    Args:
        descriptor: The connection, inherited from the trainer.
    """

    def answer(request: UploadRequest, attached: int | None) -> list[Upload]:
        sent = []
        for path in request.paths:
            upload = request.mirror.upload(request.directory, path)
            if upload is not None:
                sent.append(upload)
        if sent:
            request.mirror.prune()
        return sent

    serve(descriptor, answer)
