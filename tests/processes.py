"""Starting tests/train.py as a real process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from resilient_ckpt.chaos import TrainingProcess

from resilient_ckpt.record import Checkpoint
from resilient_ckpt.store import CheckpointStore

SCRIPT = Path(__file__).with_name("train.py")


def start(directory: Path, *arguments: object, **options: Any) -> TrainingProcess:
    command = [sys.executable, str(SCRIPT), str(directory), *map(str, arguments)]
    if options:
        command += ["--options", json.dumps(options)]
    return TrainingProcess(command)


def moment(name: str, **details: object):
    def wanted(line: str) -> bool:
        event = _event(line)
        return event.get("moment") == name and all(event.get(k) == v for k, v in details.items())

    return wanted


def result(process: TrainingProcess) -> dict[str, Any]:
    code = process.wait()
    assert code == 0, process.output()
    return next(event for line in process.lines if "result" in (event := _event(line)))


def finish(directory: Path, *arguments: object, **options: Any) -> dict[str, Any]:
    with start(directory, *arguments, **options) as process:
        return result(process)


def newest(directory: Path) -> Checkpoint:
    return CheckpointStore(directory).checkpoints()[-1]


def garbage(directory: Path) -> list[str]:
    return [
        str(path)
        for path in directory.rglob("*")
        if path.name.startswith((".saving", ".deleting", ".replaced")) or "tmp" in path.name
    ]


def _event(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}
