"""Reads and writes the pair of files of an adapter in PEFT's format: atomic writes, and reads that verify the files."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from cotolora.wording import cut, shown

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# keys in the metadata of the weights: the config that they were saved with, and a checksum
_SAVED_CONFIG = "cotolora_config"
_CHECKSUM = "cotolora_sha256"  # of the tensors: names, dtypes, shapes and bytes
_NO_CHECKSUM = "0" * 64  # placeholder until the bytes are known
_ATTEMPTS = 50  # attempts to read a pair while other processes save
_PATIENCE = 5  # hundredths of a second to wait for a concurrent saver to write the config that belongs to its weights
_TEMPORARY = re.compile(r"\..+-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.new")
_ABANDONED_SECONDS = 24 * 3600  # age at which a temporary file of an unknown process is removed
_DENSE = torch.contiguous_format
# exceptions that reading damaged weights may raise
_UNREADABLE = (SafetensorError, OSError, ValueError, RuntimeError, MemoryError, KeyError)


def write(directory: Path, fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes config and weights, in a distributed run on rank 0; the weights contain a copy of their config.

    Raises:
        OSError: the files cannot be written; the old ones are unchanged.
    """
    config = json.dumps(fields, indent=2, sort_keys=True)
    metadata = {"format": "pt", _SAVED_CONFIG: config, _CHECKSUM: _NO_CHECKSUM}

    def write_pair() -> None:
        # clones, because safetensors refuses tensors that share memory
        whole = {key: tensor.cpu().clone(memory_format=_DENSE) for key, tensor in tensors.items()}
        _write(directory, config.encode(), _with_checksum(serialize(whole, metadata)))

    _on_rank_zero(write_pair)


def _with_checksum(data: bytes) -> bytes:
    """A safetensors file with its checksum in the metadata."""
    end = _header_end(data)
    before, after = (f'"{_CHECKSUM}":"{value}"'.encode() for value in (_NO_CHECKSUM, _checksum(data)))
    assert data.count(before, 0, end) == 1  # quotes inside other names and values are escaped
    return data[:end].replace(before, after) + data[end:]


def _checksum(data: bytes) -> str:
    """The checksum of a safetensors file, which its metadata holds if `write` wrote it."""
    end = _header_end(data)
    tensors = {key: value for key, value in json.loads(data[8:end]).items() if key != "__metadata__"}
    digest = hashlib.sha256(json.dumps(tensors, sort_keys=True).encode())
    digest.update(memoryview(data)[end:])
    return digest.hexdigest()


def _header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _on_rank_zero(write: Callable[[], None]) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        return write()
    caught: Exception | None = None
    if dist.get_rank() == 0:
        try:
            write()
        except Exception as error:  # the other ranks wait for the outcome, whatever it is
            caught = error
    outcome = [caught and f"rank 0 could not write: {caught}"]
    dist.broadcast_object_list(outcome)  # also a barrier: no rank reads before the files are written
    if caught is not None:
        raise caught
    if outcome[0] is not None:
        raise OSError(outcome[0])


def _write(directory: Path, config: bytes, weights: bytes) -> None:
    """Replaces the weights, and the config if it differs.

    Concurrent savers into one folder need no lock: each has its own temporary names, the weights contain their config,
    and a saver that has renamed weights ensures that the config next to them is the one they contain.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _finish_killed_saves(directory)
    new_config, new_weights = _temporary(directory, CONFIG), _temporary(directory, WEIGHTS)
    try:
        _write_durably(new_config, config)
        _write_durably(new_weights, weights)
    except BaseException:
        new_config.unlink(missing_ok=True)
        raise
    try:
        # weights first: between the two renames the new config exists under its temporary name
        os.replace(new_weights, directory / WEIGHTS)
    except BaseException:
        if new_weights.exists():  # the rename has not happened
            new_config.unlink(missing_ok=True)
            new_weights.unlink(missing_ok=True)
        raise
    _put_config(new_config, config, directory)
    # another saver may have put its weights, and before our config its own config, in the meantime
    while (theirs := _saved_config(directory / WEIGHTS)) not in (None, _content(directory / CONFIG)):
        assert theirs is not None
        new_config = _temporary(directory, CONFIG)
        _write_durably(new_config, theirs)
        _put_config(new_config, theirs, directory)


def _put_config(temporary: Path, config: bytes, directory: Path) -> None:
    if _content(directory / CONFIG) == config:
        temporary.unlink(missing_ok=True)
    else:
        with suppress(FileNotFoundError):  # another saver assumed that this save was killed, and renamed the config
            os.replace(temporary, directory / CONFIG)


def _finish_killed_saves(directory: Path) -> None:
    """Completes a save that was killed between its two renames, and removes abandoned temporary files."""
    config = _saved_config(directory / WEIGHTS)
    if config is not None and _content(directory / CONFIG) != config:
        # this save must not remove the only copy of that config
        for path in _temporaries(directory, CONFIG):
            if _content(path) == config:
                _put_config(path, config, directory)
    for path in (*_temporaries(directory, CONFIG), *_temporaries(directory, WEIGHTS)):
        if _is_abandoned(path):
            path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    """Whether the saver of a temporary file has ended, by its process id, or by age if the process is unknown."""
    match = _TEMPORARY.fullmatch(path.name)
    if match and match["host"] == _host() and os.name == "posix":
        try:
            os.kill(int(match["pid"]), 0)
        except ProcessLookupError:
            return True
        except OSError:  # the process belongs to another user
            pass
        return False
    try:
        return time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
    except FileNotFoundError:
        return False


def _temporary(directory: Path, name: str) -> Path:
    """A name that no other save uses, which contains the host and process of this save."""
    return directory / f".{name}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}.new"


def _temporaries(directory: Path, name: str) -> list[Path]:
    return sorted(directory.glob(f".{name}-*.new"))


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() else None  # reading a pipe would wait for a writer
    except OSError:
        return None


def _saved_config(weights: Path) -> bytes | None:
    """The config that `weights` was saved with; None if there is none or it cannot be read."""
    if not weights.is_file():
        return None
    try:
        with weights.open("rb") as file:
            length = file.read(8)
            most = os.fstat(file.fileno()).st_size  # a damaged length may be larger
            header = file.read(min(int.from_bytes(length, "little"), most))
        return _metadata(length + header)[_SAVED_CONFIG].encode()
    except (OSError, ValueError, OverflowError, MemoryError, RecursionError, LookupError, AttributeError, TypeError):
        return None  # a file from another library, or an incomplete one


def _write_durably(path: Path, data: bytes) -> None:
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


class Pair(NamedTuple):
    """The contents of both files: tensors by key, the fields of the config, and whether `write` wrote the files."""

    tensors: dict[str, Tensor]
    fields: dict[str, Any]
    ours: bool


class Look(NamedTuple):
    """The readable parts of a pair; None for a part that cannot be read.

    tensors: the tensors by their keys in the file.
    fields: the fields of the config, or of its copy in the weights if there is no config file.
    checksum: whether the checksum of the weights is right; None without a checksum.
    """

    tensors: dict[str, Tensor] | None
    fields: dict[str, Any] | None
    checksum: bool | None


class _MismatchError(ValueError):
    """The config is not the one that the weights were saved with."""


def read(directory: Path, is_same: Callable[[Any, Any], bool]) -> Pair:
    """A consistent pair, also while other processes save into the directory.

    Args:
        directory: the directory of the files.
        is_same: says whether the fields of two configs mean the same.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or a pickle, or the config is not the one that the weights were saved with.
    """
    patience = _PATIENCE
    for _ in range(_ATTEMPTS):
        before = _stamps(directory)
        try:
            pair = _read(directory, is_same)
        except (FileNotFoundError, ValueError) as error:
            if _stamps(directory) == before:
                if not isinstance(error, _MismatchError) or not patience:
                    raise
                patience -= 1
                time.sleep(0.01)
            continue
        # our weights contain their config; for files of other libraries, check that neither changed during the read
        if pair.ours or _stamps(directory) == before:
            return pair
    raise ValueError(f"{directory} must not change while it is read; another process kept writing to it")


def _stamps(directory: Path) -> list[tuple[int, ...] | None]:
    """Values that change when one of the files is replaced or written to."""
    stamps: list[tuple[int, ...] | None] = []
    for name in (WEIGHTS, CONFIG):
        try:
            stat = (directory / name).stat()
            stamps.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
        except OSError:
            stamps.append(None)
    return stamps


def _read(directory: Path, is_same: Callable[[Any, Any], bool]) -> Pair:
    path = directory / WEIGHTS
    if not path.is_file():
        if (directory / "adapter_model.bin").exists():
            raise ValueError(
                f"{directory} must hold {WEIGHTS}; it holds adapter_model.bin, which is not read, because a pickle can "
                "run code; load it with PEFT and save it again with safe_serialization=True"
            )
        raise FileNotFoundError(f"directory must hold {WEIGHTS}; there is none in {directory}")
    try:
        data = path.read_bytes()  # only once: the file may be replaced before a second read
        tensors = dict(sorted(deserialize(data).items()))  # deserialize returns no fixed order
    except _UNREADABLE as error:
        raise ValueError(f"{path} must be a whole safetensors file; reading it failed: {cut(str(error))}") from error
    metadata = _metadata(data)
    if _CHECKSUM in metadata and metadata[_CHECKSUM] != _checksum(data):
        raise ValueError(f"{path} must be as it was saved; its bytes do not match the checksum in its metadata")
    saved_config = metadata.get(_SAVED_CONFIG)
    return Pair(tensors, _read_config(directory, saved_config, is_same), saved_config is not None)


def look(directory: Path) -> Look:
    """The readable content of a directory, even a damaged one; `read` reports what is wrong with it."""
    tensors, fields, checksum, saved_config = None, None, None, None
    with suppress(*_UNREADABLE):
        if (path := directory / WEIGHTS).is_file():  # reading a pipe could block
            data = path.read_bytes()
            tensors, metadata = dict(sorted(deserialize(data).items())), _metadata(data)
            checksum = metadata[_CHECKSUM] == _checksum(data) if _CHECKSUM in metadata else None
            saved_config = metadata.get(_SAVED_CONFIG)
    with suppress(ValueError, RecursionError, OSError):
        if (path := directory / CONFIG).is_file():
            fields = _fields(path)
        elif saved_config is not None:
            saved = json.loads(saved_config)
            fields = saved if isinstance(saved, dict) else None
    return Look(tensors, fields, checksum)


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file; `data` must contain at least its header."""
    return json.loads(data[8 : _header_end(data)]).get("__metadata__") or {}


def _read_config(directory: Path, saved_config: str | None, is_same: Callable[[Any, Any], bool]) -> dict[str, Any]:
    """The fields of the config that the weights were saved with, which a killed save leaves under a temporary name."""
    path = directory / CONFIG
    if saved_config is None:
        if not path.is_file():
            raise FileNotFoundError(f"directory must hold {CONFIG}; there is none in {directory}")
        return _fields(path)
    for candidate in (path, *_temporaries(directory, CONFIG)):
        # skips candidates that are damaged or were renamed in the meantime
        with suppress(ValueError, RecursionError, OSError):
            if is_same(fields := _fields(candidate), json.loads(saved_config)):
                return fields
    raise _MismatchError(
        f"{path} must be the config that {WEIGHTS} was saved with, stored as {_SAVED_CONFIG} in its metadata; "
        + _difference(path, saved_config)
    )


def _difference(path: Path, saved_config: str) -> str:
    """Describes how a config differs from the saved one."""
    try:
        fields, saved = _fields(path), json.loads(saved_config)
    except FileNotFoundError:
        return "it is missing"
    except (ValueError, RecursionError, OSError) as error:
        return cut(str(error))
    saved = saved if isinstance(saved, dict) else {}
    changed = sorted(key for key in {*fields, *saved} if fields.get(key) != saved.get(key))
    now, before = ({key: of.get(key) for key in changed} for of in (fields, saved))
    return f"it has {shown(now)}, the saved one has {shown(before)}"


def _fields(path: Path) -> dict[str, Any]:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} must be a regular file; it is a pipe or a device")
    try:
        fields = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON; reading it failed: {cut(str(error))}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(fields).__name__}")
    return fields
