"""Uploading committed checkpoints while training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from resilient_ckpt.child import Child
from resilient_ckpt.mirror import Mirror, Upload
from resilient_ckpt.mirror_process import UploadRequest
from resilient_ckpt.record import Checkpoint
from resilient_ckpt.store import CheckpointStore

logger = logging.getLogger(__name__)


class Uploads:
    """Hands committed checkpoints to the process that uploads, the newest first.

    What waits is replaced by what is newer, so a slow mirror is behind, but never far behind.
    A checkpoint that is being uploaded, or waits, is pinned in the store. One upload that
    fails for good is logged and counted; the next commit is uploaded all the same.

    Args:
        mirror: Where to.
        store: Where from.
    """

    def __init__(self, mirror: Mirror, store: CheckpointStore) -> None:
        self.mirror = mirror
        self.failed = 0
        self.last_error: BaseException | None = None
        self.uploaded: Checkpoint | None = None
        self._store = store
        self._child = Child("resilient_ckpt.mirror_process")
        self._changed = threading.Condition()
        self._waiting: tuple[Checkpoint, ...] = ()
        self._current: tuple[Checkpoint, ...] = ()
        self._closing = False
        self._thread: threading.Thread | None = None

    def submit(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Uploads checkpoints as soon as possible, instead of those that wait.

        Args:
            checkpoints: Committed ones, to be uploaded together.
        """
        if not checkpoints:
            return
        with self._changed:
            self._waiting = tuple(checkpoints)
            self._pin()
            self._changed.notify_all()
        if self._thread is None:
            self._closing = False
            self._thread = threading.Thread(
                target=self._run, name="resilient-ckpt-mirror", daemon=True
            )
            self._thread.start()

    def submit_first(self, checkpoint: Checkpoint) -> None:
        """Uploads one checkpoint before all others, unless it is there or on its way.

        Args:
            checkpoint: A committed one; the files that have arrived need not be sent again.
        """
        with self._changed:
            current = self._current
            if checkpoint in current or checkpoint == self.uploaded:
                return
            self._waiting = (checkpoint,)
            self._pin()
        if current:
            logger.info("Breaking off the upload of step %d.", current[-1].step)
            self._child.close()
        self.submit([checkpoint])

    def wait(self, seconds: float | None) -> bool:
        """Waits until nothing is left to upload.

        Args:
            seconds: At most so long; `None` for as long as it takes.

        Returns:
            Whether nothing is left.
        """
        with self._changed:
            return self._changed.wait_for(lambda: not (self._waiting or self._current), seconds)

    def close(self) -> None:
        """Breaks off what is left; the next process on this disk continues it."""
        with self._changed:
            self._closing = True
            self._waiting = ()
            self._changed.notify_all()
        self._child.close()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._store.pinned.clear()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return
                self._current, self._waiting = self._waiting, ()
            self._upload(self._current)
            with self._changed:
                self._current = ()
                self._pin()
                self._changed.notify_all()

    def _upload(self, checkpoints: tuple[Checkpoint, ...]) -> None:
        paths = tuple(checkpoint.path for checkpoint in checkpoints)
        newest = checkpoints[-1]
        request = UploadRequest(self.mirror, self._store.directory, paths)
        try:
            sent: list[Upload] = self._child.request(request)
        except Exception as error:  # noqa: BLE001 - logged, counted, raised at the end
            with self._changed:
                if self._closing or self._waiting:
                    return  # It was broken off.
            self.failed += 1
            self.last_error = error
            logger.error(
                "Mirroring step %d to %s failed (%d in all): %s",
                newest.step,
                self.mirror.url,
                self.failed,
                error,
            )
            return
        self.last_error = None
        self.uploaded = newest
        for upload in sent:
            logger.info(
                "Mirrored step %d to %s: %d files, %.1f MB in %.1f s (%d were there already).",
                newest.step,
                self.mirror.url,
                upload.files,
                upload.nbytes / 1e6,
                upload.seconds,
                upload.skipped,
            )

    def _pin(self) -> None:
        pinned: set[Path] = {c.path for c in (*self._current, *self._waiting)}
        self._store.pinned = pinned
