"""Adapters on disk when a process is killed, a disk is full, or two processes save at the same time."""

import errno
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cotolora import adapters, load_adapter, save_adapter
from cotolora.saving import files
from tests.support.repository import ROOT, module_of
from tests.support.saving import CONFIG, WEIGHTS, base, logits, tuned

# kills and full disks


def variants():
    """Three adapters of one model that differ in rank, targets and values."""
    return [
        tuned(base(), ["fc"], rank=2, seed=1),
        tuned(base(), ["fc", "head.0"], rank=3, alpha=7.0, seed=2),
        tuned(base(), ["head.2"], rank=1, trainable=["token"], seed=3),
    ]


def which(directory, models):
    """The index in `models` of the adapter that the directory holds; None if it holds none of them completely."""
    model = base()
    try:
        load_adapter(model, directory)
    except (ValueError, FileNotFoundError):
        return None
    return next((i for i, other in enumerate(models) if torch.equal(logits(model), logits(other))), None)


class Steps:
    """Runs `act` at the nth boundary between two file operations of `save_adapter`."""

    def __init__(self, at, act):
        self.at, self.act, self.count = at, act, 0

    def step(self):
        self.count += 1
        if self.count == self.at:
            self.act()

    def around(self, operation):
        def run(*args, **kwargs):
            self.step()
            result = operation(*args, **kwargs)
            self.step()
            return result

        return run

    def open(self, path, mode):
        self.step()
        return Torn(open(path, mode), self)


class Torn:
    """A file that writes in two halves, with a step between them."""

    def __init__(self, file, steps):
        self.file, self.steps = file, steps
        self.flush, self.fileno = file.flush, file.fileno

    def write(self, data):
        self.steps.step()
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.steps.step()
        self.file.write(data[len(data) // 2 :])
        self.file.flush()
        self.steps.step()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.steps.step()


@contextmanager
def stepping(at, act):
    steps, fsync, replace = Steps(at, act), os.fsync, os.replace
    files.open, os.fsync, os.replace = steps.open, steps.around(fsync), steps.around(replace)
    try:
        yield steps
    finally:
        del files.open
        os.fsync, os.replace = fsync, replace


def forked(act):
    """Runs `act` in a forked child; returns its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except OSError:
            os._exit(3)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_save(model, directory, at):
    """Saves in a child that is killed at the given boundary; returns whether it reached it."""

    def save():
        with stepping(at, lambda: os._exit(9)):
            save_adapter(model, directory)

    return forked(save) == 9


def main_kills(directory):
    """Kills a save at every boundary, then a second save at every boundary, and checks the files."""
    old, first, second = models = variants()
    os.fsync = lambda _: None  # needed for power failures, not for killed processes
    outcomes = set()
    for at in itertools.count(1):
        save_adapter(old, directory)
        reached = killed_save(first, directory, at)
        found = which(directory, models)
        assert found in (0, 1), f"killed at {at}: neither adapter is complete"
        outcomes.add(found)
        if not reached:
            break
        for again in itertools.count(1) if found == 1 or at == 5 else ():
            reached = killed_save(second, directory, again)
            after = which(directory, models)
            assert after in (found, 2), f"killed at {at}, then at {again}: had {found}, found {after}"
            save_adapter(old, directory)
            assert which(directory, models) == 0
            if not reached:
                break
            killed_save(first, directory, at)
    assert at > 15, at
    assert outcomes == {0, 1}
    save_adapter(first, directory)
    assert sorted(p.name for p in Path(directory).iterdir()) == [CONFIG, WEIGHTS]


def main_signals(directory, seconds=4.0):
    """Kills, at random times, a process that saves repeatedly."""
    models, generator = variants(), random.Random(0)
    os.fsync = lambda _: None
    found, end = set(), time.monotonic() + seconds
    while time.monotonic() < end:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                for count, model in enumerate(models * 1000):  # finite, because the parent may be killed too
                    save_adapter(model, directory)
                    if count == 1:
                        os.write(writer, b".")
            finally:
                os._exit(0)
        os.close(writer)
        assert os.read(reader, 1), "the child could not save"  # waits for two saved adapters, even on a busy machine
        time.sleep(generator.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        found.add(which(directory, models))
        assert found <= {0, 1, 2}, found
    assert len(found) > 1


def main_limit(directory):
    """A file size limit makes the write fail halfway."""
    old, new, _ = models = variants()
    save_adapter(old, directory)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = (Path(directory) / WEIGHTS).stat().st_size

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        save_adapter(new, directory)

    assert forked(save) == 3
    assert which(directory, models) == 0
    assert sorted(p.name for p in Path(directory).iterdir()) == [CONFIG, WEIGHTS]


def in_a_process(*args):
    """Runs a `main_…` of this file in a new process, because a process that forks must not have threads."""
    return subprocess.Popen(
        [sys.executable, "-m", module_of(__file__), *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finished(*processes):
    try:
        for process in processes:
            output, _ = process.communicate(timeout=100)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_a_kill_leaves_the_old_pair_or_the_new_one(tmp_path):
    names = ("kills", "signals", "limit")
    finished(*(in_a_process(name, tmp_path / name) for name in names))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_an_error_leaves_the_old_pair(number, tmp_path):
    old, new, _ = models = variants()

    def fail():
        raise OSError(number, os.strerror(number))

    reached = []
    for at in itertools.count(1):
        save_adapter(old, tmp_path)
        with stepping(at, fail) as steps:
            try:
                save_adapter(new, tmp_path)
                break
            except OSError as error:
                seen = error.errno
        assert seen == number
        reached.append(which(tmp_path, models))
        assert reached[-1] is not None
    # the old pair until the weights are renamed, then the new one
    renamed = reached.index(1)
    assert reached == [0] * renamed + [1] * (len(reached) - renamed)
    assert renamed > 12
    assert steps.count == len(reached)


def test_a_failed_write_leaves_no_temporary_files(tmp_path, monkeypatch):
    old, new, _ = variants()
    save_adapter(old, tmp_path)

    def fail(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save_adapter(new, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_saving_onto_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_adapter(variants()[0], tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""


# two processes save at the same time


def main_writers(directory, seconds=4.0):
    """Two processes save repeatedly into one folder; a third always reads complete adapters, and one remains."""
    models, directory = variants()[:2], Path(directory)
    os.fsync = lambda _: None
    end, children = time.monotonic() + seconds, []
    save_adapter(models[0], directory)
    for i in range(2):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                while time.monotonic() < end:
                    save_adapter(models[i], directory)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(pid)
    found = set()
    while time.monotonic() < end:
        found.add(which(directory, models))
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
    assert found == {0, 1}, found
    assert sorted(p.name for p in directory.iterdir()) == [CONFIG, WEIGHTS]
    last = which(directory, models)
    assert last is not None
    assert (directory / CONFIG).read_bytes() == files._saved_config(directory / WEIGHTS)  # PEFT reads this config


@pytest.mark.slow
def test_two_processes_save_at_the_same_time(tmp_path):
    finished(in_a_process("writers", tmp_path))


@pytest.mark.parametrize("same", [False, True], ids=["another-config", "same-config"])
def test_a_save_during_another_leaves_one_complete_pair(same, tmp_path):
    """At every boundary another process saves completely before the first one continues."""
    models = variants()
    if same:
        models[1] = tuned(base(), ["fc"], rank=2, seed=9)
    for at in itertools.count(1):
        save_adapter(models[2], tmp_path)
        with stepping(at, lambda: save_adapter(models[1], tmp_path)) as steps:
            save_adapter(models[0], tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS], at
        assert which(tmp_path, models) in ((0, 1) if at <= steps.count else (0,)), at
        assert (tmp_path / CONFIG).read_bytes() == files._saved_config(tmp_path / WEIGHTS), at
        if at > steps.count:
            break
    assert at > 15


def test_a_save_whose_config_did_not_change_renames_one_file(tmp_path, monkeypatch):
    save_adapter(variants()[0], tmp_path)
    renamed, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (renamed.append(Path(paths[1]).name), replace(*paths)))
    save_adapter(tuned(base(), ["fc"], rank=2, seed=9), tmp_path)
    assert renamed == [WEIGHTS]
    save_adapter(variants()[1], tmp_path)
    assert renamed == [WEIGHTS, WEIGHTS, CONFIG]
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_files_of_killed_saves_are_removed_and_files_in_use_are_kept(tmp_path):
    save_adapter(variants()[0], tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = files._host()
    left = [f".{WEIGHTS}-{host}-{dead.pid}-00000000.new", f".{CONFIG}-{'0' * 8}-1-00000001.new"]
    busy = [f".{WEIGHTS}-{host}-{os.getpid()}-00000000.new", f".{CONFIG}-{'0' * 8}-1-00000002.new", ".mine.new"]
    for name in (*left, *busy):
        (tmp_path / name).write_text("half")
    os.utime(tmp_path / left[1], (0, 0))  # from another machine, so only its age shows that it is abandoned
    save_adapter(variants()[1], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*busy, CONFIG, WEIGHTS])
    assert which(tmp_path, variants()) == 1


# reading while others save


@pytest.mark.parametrize("by", ["us", "peft"])
@pytest.mark.parametrize("step", ["deserialize", "_metadata", "_read_config", "_fields"])
def test_both_files_are_read_from_the_same_save(step, by, tmp_path, monkeypatch):
    """Another adapter is saved just before or just after a step of reading."""
    models = variants()
    for i, model in enumerate(models):
        save_adapter(model, tmp_path / str(i))
        if by == "peft":  # without our metadata
            save_file(load_file(tmp_path / str(i) / WEIGHTS), tmp_path / str(i) / WEIGHTS, {"format": "pt"})

    def save(i, directory):
        for name in (WEIGHTS, CONFIG):
            shutil.copy(tmp_path / str(i) / name, directory / "new")
            os.replace(directory / "new", directory / name)

    for when in ("before", "after"):
        directory = tmp_path / when
        directory.mkdir()
        save(0, directory)
        function, left = getattr(files, step), iter([1, 2])

        def meanwhile(*args, when=when, directory=directory, function=function, left=left):
            i = next(left, None)
            if i is not None and when == "before":
                save(i, directory)
            result = function(*args)
            if i is not None and when == "after":
                save(i, directory)
            return result

        monkeypatch.setattr(files, step, meanwhile)
        found = which(directory, models)
        monkeypatch.undo()
        assert found is not None


def test_files_that_keep_changing_are_an_error(tmp_path, monkeypatch):
    save_adapter(variants()[0], tmp_path)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, {"format": "pt"})
    read_config = files._read_config

    def touched(*args):
        (tmp_path / CONFIG).write_bytes((tmp_path / CONFIG).read_bytes() + b" ")
        return read_config(*args)

    monkeypatch.setattr(files, "_read_config", touched)
    with pytest.raises(ValueError, match="must not change while it is read"):
        load_adapter(base(), tmp_path)


# two ranks


def main_rank(rank, directory):
    """All ranks call, rank 0 writes, its errors are raised on all ranks, and sharded parameters are gathered."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    rank, directory = int(rank), Path(directory)
    dist.init_process_group("gloo", init_method=f"file://{directory / 'meeting'}", rank=rank, world_size=2)
    model, _, other = variants()
    write = files._write
    if rank == 1:

        def write_elsewhere(*_):
            raise AssertionError("only rank 0 writes")

        files._write = write_elsewhere
    save_adapter(model, directory / "whole")
    assert which(directory / "whole", [model]) == 0  # on both ranks immediately

    (directory / "file").touch()
    with pytest.raises(OSError, match="file"):
        save_adapter(other, directory / "file")

    if rank == 0:

        def break_down(*_):
            raise RuntimeError("not an OSError")

        files._write = break_down
    with pytest.raises(RuntimeError if rank == 0 else OSError, match="not an OSError"):
        save_adapter(other, directory / "whole")
    if rank == 0:
        files._write = write
    assert which(directory / "whole", [model]) == 0

    mesh = init_device_mesh("cpu", (2,))
    for layer in adapters(model).values():
        for name in ("lora_a", "lora_b"):
            sharded = distribute_tensor(getattr(layer, name).detach(), mesh, [Shard(0)])
            setattr(layer, name, nn.Parameter(sharded))
    save_adapter(model, directory / "sharded")
    whole, gathered = (load_file(directory / name / WEIGHTS) for name in ("whole", "sharded"))
    assert set(whole) == set(gathered)  # not the bytes, because safetensors orders its metadata randomly
    assert all(torch.equal(whole[key], gathered[key]) for key in whole)
    expected = {name: layer.lora_b.full_tensor() for name, layer in adapters(model).items()}
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_b.zero_()
    load_adapter(model, directory / "sharded")
    for name, layer in adapters(model).items():
        assert isinstance(layer.lora_b, DTensor)
        assert torch.equal(layer.lora_b.full_tensor(), expected[name])
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that exits normally


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks(tmp_path):
    finished(in_a_process("rank", 0, tmp_path), in_a_process("rank", 1, tmp_path))


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[f"main_{sys.argv[1]}"](*sys.argv[2:])
