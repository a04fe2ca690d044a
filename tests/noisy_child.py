"""A child process whose threads go on logging while it answers; see test_units.py."""

from __future__ import annotations

import logging
import threading

from resilient_ckpt.child import serve

logger = logging.getLogger("resilient_ckpt.noisy")


def main(descriptor: int) -> None:
    def make_noise() -> None:
        while True:
            logger.warning("noise " * 200)

    for _ in range(3):
        threading.Thread(target=make_noise, daemon=True).start()

    serve(descriptor, lambda request, attached: [request] * 2000)
