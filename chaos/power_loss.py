"""Every state in which a loss of power may leave a directory: recorded, enumerated, made real.

A program is run under strace, and what it does to a directory is recorded. Then the power is
taken away after every single operation, and what the disk may hold at that point is built
anew, for a check to be run on it. The method is that of ALICE (Pillai et al., "All File
Systems Are Not Created Equal", OSDI 2014); docs/durability.md says what is assumed:

- The content of a file is on the disk when the file was synced; before that the disk may
  have none of it, a part, all of it, or zeros in its place.
- A name is on the disk when its directory was synced; before that any of the changes to
  the names may be on the disk, with or without those before it.
- A rename is atomic, also between two directories, and on the disk when either was synced.
"""

from __future__ import annotations

import ast
import hashlib
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_CALLS = (
    "open,openat,creat,close,write,writev,pwrite64,fsync,fdatasync,ftruncate,rename,renameat,"
    "renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,link,linkat"
)
_UNFINISHED = re.compile(r"^(\d+) +(.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. \w+ resumed>(.*)$")
_CALL = re.compile(r"^\d+ +(\w+)\((.*)\) += (-?\d+)")
_DESCRIPTOR = re.compile(r"^(\d+|AT_FDCWD)<((?:[^<>\\]|\\.)*)>")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"(\.\.\.)?')
_LONGEST_WRITE = 1 << 20


def has_strace() -> bool:
    """Whether strace is installed, without which nothing can be recorded."""
    return shutil.which("strace") is not None


@dataclass(frozen=True)
class Operation:
    """One thing done to the recorded directory.

    Attributes:
        name: `"mkdir"`, `"create"`, `"truncate"`, `"write"`, `"sync"`, `"rename"`, `"link"`,
            `"unlink"`, `"rmdir"`, or `"mark"`, which is the program's own word.
        path: What it was done to, relative to the directory.
        other: The new name of a rename or link; the text of a mark.
        offset: Where a write begins, in bytes; the new length, of a truncation.
        data: What was written.
    """

    name: str
    path: str
    other: str = ""
    offset: int = 0
    data: bytes = b""


def record(command: Sequence[str], directory: Path, marks: Path) -> list[Operation]:
    """Runs a program and records what it does to a directory.

    Args:
        command: The program and its arguments.
        directory: The directory, which must exist and be empty.
        marks: Another directory: making a folder in it is recorded as a mark.

    Returns:
        The operations, in the order in which they ended.

    Raises:
        RuntimeError: If the program fails, or does what this model does not know.
    """
    with tempfile.TemporaryDirectory() as temporary:
        log = Path(temporary) / "strace"
        tracer = ["strace", "-f", "-y", "-xx", "-s", str(_LONGEST_WRITE), "-o", str(log)]
        done = subprocess.run(
            [*tracer, "-e", f"trace={_CALLS}", *command], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"The program failed: {done.stderr}")
        return list(_Parser(directory, marks).parse(log.read_text().splitlines()))


class _Parser:
    def __init__(self, directory: Path, marks: Path) -> None:
        self._root = str(directory.resolve())
        self._marks = str(marks.resolve())
        self._files: dict[int, str] = {}  # descriptors that are open for writing
        self._offsets: dict[int, int] = {}
        self._known: set[str] = set()

    def parse(self, lines: Sequence[str]) -> Iterator[Operation]:
        pending: dict[str, str] = {}
        for line in lines:
            if found := _UNFINISHED.match(line):
                pending[found[1]] = found[2]
                continue
            if found := _RESUMED.match(line):
                line = f"{found[1]} {pending.pop(found[1])}{found[2]}"
            if (found := _CALL.match(line)) and int(found[3]) >= 0:
                yield from self._operation(found[1], found[2], int(found[3]))

    def _operation(self, call: str, arguments: str, result: int) -> Iterator[Operation]:
        if call == "close":
            number = int(arguments.split("<")[0])
            self._files.pop(number, None)
            self._offsets.pop(number, None)
        elif call in ("open", "openat", "creat"):
            yield from self._open(arguments, result)
        elif call in ("write", "writev", "pwrite64"):
            yield from self._write(call, arguments, result)
        elif call in ("fsync", "fdatasync"):
            path = self._inside(_text(_DESCRIPTOR.match(arguments)[2]))  # type: ignore[index]
            if path is not None:
                yield Operation("sync", path)
        elif call == "ftruncate":
            path = self._files.get(int(arguments.split("<")[0]))
            if path is not None:
                yield Operation("truncate", path, offset=int(arguments.rsplit(",", 1)[1]))
        else:
            yield from self._change_names(call, arguments)

    def _open(self, arguments: str, result: int) -> Iterator[Operation]:
        (path,) = self._paths(arguments)
        if path is None or not re.search(r"O_WRONLY|O_RDWR", arguments):
            return
        if path not in self._known:
            self._known.add(path)
            yield Operation("create", path)
        elif "O_TRUNC" in arguments:
            yield Operation("truncate", path)
        if "O_APPEND" in arguments:
            raise RuntimeError(f"Appending to {path} is not modelled.")
        self._files[result] = path
        self._offsets[result] = 0

    def _write(self, call: str, arguments: str, result: int) -> Iterator[Operation]:
        number = int(arguments.split("<")[0])
        path = self._files.get(number)
        if path is None:
            return
        strings = _STRING.findall(arguments)
        data = b"".join(_bytes(text) for text, _ in strings)
        if any(cut for _, cut in strings) or len(data) < result:
            raise RuntimeError(f"A write to {path} is too long to be recorded.")
        offset = self._offsets[number]
        if call == "pwrite64":
            offset = int(arguments.rsplit(",", 1)[1])
        else:
            self._offsets[number] += result
        yield Operation("write", path, offset=offset, data=data[:result])

    def _change_names(self, call: str, arguments: str) -> Iterator[Operation]:
        absolute = self._absolute(arguments)
        if call.startswith("mkdir") and absolute[0].startswith(f"{self._marks}/"):
            yield Operation("mark", "", absolute[0].rsplit("/", 1)[1])
            return
        paths = [self._inside(path) for path in absolute]
        if all(path is None for path in paths):
            return
        if any(path is None for path in paths):
            raise RuntimeError(f"{call} into or out of the directory is not modelled: {absolute}")
        path, other = str(paths[0]), str(paths[1]) if len(paths) > 1 else ""
        name = "rmdir" if "AT_REMOVEDIR" in arguments else call.removesuffix("2").removesuffix("at")
        if name == "rename":
            self._rename(path, other)
        elif name == "link":
            self._known.add(other)
        elif name in ("unlink", "rmdir"):
            self._known.discard(path)
        yield Operation(name, path, other)

    def _rename(self, path: str, other: str) -> None:
        def moved(name: str) -> str:
            return other + name[len(path) :] if _is_below(name, path) else name

        self._known = {moved(name) for name in self._known if not _is_below(name, other)}
        self._files = {number: moved(name) for number, name in self._files.items()}

    def _absolute(self, arguments: str) -> list[str]:
        """The paths among the arguments, each with the directory it is relative to."""
        found = []
        while arguments:
            folder = _DESCRIPTOR.match(arguments)
            if folder is not None:
                arguments = arguments[folder.end() :].removeprefix(", ")
            text = _STRING.match(arguments)
            if text is None:
                break
            path = os.fsdecode(_bytes(text[1]))
            found.append(os.path.join(_text(folder[2]) if folder is not None else "/", path))
            arguments = arguments[text.end() :].removeprefix(", ")
        return found

    def _paths(self, arguments: str) -> list[str | None]:
        return [self._inside(path) for path in self._absolute(arguments)]

    def _inside(self, path: str) -> str | None:
        path = os.path.normpath(path)
        if path == self._root:
            return "."
        return path[len(self._root) + 1 :] if path.startswith(f"{self._root}/") else None


def _is_below(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}/")


def _bytes(text: str) -> bytes:
    """Undoes strace's escapes."""
    value: bytes = ast.literal_eval(f'b"{text}"')
    return value


def _text(text: str) -> str:
    return os.fsdecode(_bytes(text))


@dataclass
class _File:
    now: bytearray = field(default_factory=bytearray)
    synced: bytes = b""


@dataclass(frozen=True)
class _Change:
    """Of names: each is (directory, name, inode), with no inode where the name goes away."""

    names: tuple[tuple[int, str, int | None], ...]


class Disk:
    """The directory as the program sees it, and what of it is on the disk."""

    def __init__(self) -> None:
        self.files: dict[int, _File] = {}
        self.now: dict[int, dict[str, int]] = {0: {}}
        self.synced: dict[int, dict[str, int]] = {0: {}}
        self.pending: list[_Change] = []
        self._next = 1

    def apply(self, operation: Operation) -> None:
        """Carries one operation out."""
        match operation.name:
            case "mkdir":
                inode = self._new()
                self.now[inode], self.synced[inode] = {}, {}
                self._name(operation.path, inode)
            case "create":
                inode = self._new()
                self.files[inode] = _File()
                self._name(operation.path, inode)
            case "write":
                file = self.files[self._find(operation.path)]
                end = operation.offset + len(operation.data)
                file.now.extend(bytes(max(0, end - len(file.now))))
                file.now[operation.offset : end] = operation.data
            case "truncate":
                file = self.files[self._find(operation.path)]
                del file.now[operation.offset :]
                file.now.extend(bytes(operation.offset - len(file.now)))
            case "sync":
                self._sync(self._find(operation.path))
            case "rename":
                inode = self._find(operation.path)
                self._change(
                    (*self._place(operation.path), None), (*self._place(operation.other), inode)
                )
            case "link":
                self._name(operation.other, self._find(operation.path))
            case "unlink" | "rmdir":
                self._change((*self._place(operation.path), None))

    def tree(self, changes: Sequence[_Change], content: str) -> dict[str, bytes | None]:
        """What the disk may hold.

        Args:
            changes: Which of the pending changes of names are on it.
            content: What it has of files that were not synced: `"none"`, `"half"`,
                `"zeros"` or `"all"`.

        Returns:
            By path: the content of a file, `None` for a directory.
        """
        names = {inode: dict(entries) for inode, entries in self.synced.items()}
        for change in changes:
            for folder, name, inode in change.names:
                if inode is None:
                    names[folder].pop(name, None)
                else:
                    names[folder][name] = inode
        found: dict[str, bytes | None] = {}

        def walk(folder: int, prefix: str, above: frozenset[int]) -> None:
            for name, inode in names[folder].items():
                path = f"{prefix}{name}"
                if inode in self.files:
                    found[path] = _remains(self.files[inode], content)
                elif inode not in above:
                    found[path] = None
                    walk(inode, f"{path}/", above | {inode})

        walk(0, "", frozenset({0}))
        return found

    def _new(self) -> int:
        self._next += 1
        return self._next

    def _place(self, path: str) -> tuple[int, str]:
        folder, _, name = path.rpartition("/")
        return self._find(folder or "."), name

    def _find(self, path: str) -> int:
        inode = 0
        for name in () if path == "." else path.split("/"):
            inode = self.now[inode][name]
        return inode

    def _name(self, path: str, inode: int) -> None:
        self._change((*self._place(path), inode))

    def _change(self, *names: tuple[int, str, int | None]) -> None:
        for folder, name, inode in names:
            if inode is None:
                self.now[folder].pop(name, None)
            else:
                self.now[folder][name] = inode
        self.pending.append(_Change(names))

    def _sync(self, inode: int) -> None:
        if inode in self.files:
            self.files[inode].synced = bytes(self.files[inode].now)
            return
        left = []
        for change in self.pending:
            if any(folder == inode for folder, _, _ in change.names):
                for folder, name, target in change.names:
                    if target is None:
                        self.synced[folder].pop(name, None)
                    else:
                        self.synced[folder][name] = target
            else:
                left.append(change)
        self.pending = left


def _remains(file: _File, content: str) -> bytes:
    now = bytes(file.now)
    if now == file.synced or content == "all":
        return now
    if content == "zeros":
        return bytes(len(now))
    return now[: len(now) // 2] if content == "half" else file.synced


@dataclass(frozen=True)
class CrashState:
    """What the disk may hold if the power goes at a certain moment.

    Attributes:
        after: How many operations were done.
        marks: The program's marks up to then.
        variant: Which of the possibilities it is, for people.
        tree: By path: the content of a file, `None` for a directory.
    """

    after: int
    marks: tuple[str, ...]
    variant: str
    tree: Mapping[str, bytes | None]

    def build(self, directory: Path) -> None:
        """Makes it real, in an empty directory."""
        for path, content in self.tree.items():
            target = directory / path
            if content is None:
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)

    @property
    def digest(self) -> bytes:
        """Tells states apart that differ."""
        hasher = hashlib.sha256()
        for path, content in sorted(self.tree.items()):
            hasher.update(f"{path}\0".encode())
            hasher.update(b"-" if content is None else hashlib.sha256(content).digest())
        return hasher.digest()


def crash_states(operations: Sequence[Operation], subsets: int, seed: int) -> Iterator[CrashState]:
    """Takes the power away after every operation.

    At each point the pending changes of names are on the disk: none; all; all but one, for
    each; one alone, for each; and some random subsets. Each with the four possibilities for
    the content of files.

    Args:
        operations: What was recorded.
        subsets: How many random subsets.
        seed: Their seed.

    Yields:
        The states; those that are the same as one before are left out.
    """
    chance = random.Random(seed)
    disk = Disk()
    marks: list[str] = []
    seen: set[tuple[bytes, int]] = set()
    for after, operation in enumerate(operations, 1):
        if operation.name == "mark":
            marks.append(operation.other)
        else:
            disk.apply(operation)
        for variant, changes in _choices(disk.pending, subsets, chance):
            for content in ("none", "half", "zeros", "all"):
                tree = disk.tree(changes, content)
                state = CrashState(
                    after, tuple(marks), f"names: {variant}; content: {content}", tree
                )
                key = (state.digest, len(marks))
                if key not in seen:
                    seen.add(key)
                    yield state


def _choices(
    pending: Sequence[_Change], subsets: int, chance: random.Random
) -> Iterator[tuple[str, Sequence[_Change]]]:
    yield "none", ()
    yield "all", pending
    for index in range(len(pending)):
        yield f"all but {index}", [*pending[:index], *pending[index + 1 :]]
        yield f"only {index}", [pending[index]]
    for number in range(subsets):
        yield f"random {number}", [change for change in pending if chance.random() < 0.5]
