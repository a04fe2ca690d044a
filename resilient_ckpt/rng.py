"""The process-wide random states that training draws from."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np

from resilient_ckpt import codec

# The Mersenne Twister's state as `random.getstate` gives it: words and position.
_WORDS = np.uint32


def capture() -> dict[str, Any]:
    """The states of `random`, `numpy.random` and, if it is imported, torch.

    Returns:
        JSON values.
    """
    version, words, gauss = random.getstate()
    states = {
        "python": codec.encode([version, np.array(words, _WORDS), gauss]),
        "numpy": codec.encode(np.random.get_state(legacy=False)),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        states["torch"] = codec.encode(torch.get_rng_state().numpy())
    return states


def restore(states: dict[str, Any]) -> None:
    """Sets the states that `capture` gave.

    Args:
        states: JSON values.
    """
    version, words, gauss = codec.decode(states["python"])
    random.setstate((version, tuple(int(word) for word in words), gauss))
    np.random.set_state(codec.decode(states["numpy"]))
    torch = sys.modules.get("torch")
    if torch is not None and "torch" in states:
        torch.set_rng_state(torch.from_numpy(codec.decode(states["torch"])))
