"""Commands in a virtual machine, with the manners of :mod:`subprocess`."""

from __future__ import annotations

import os
import subprocess
from subprocess import DEVNULL, PIPE, STDOUT
from typing import IO, TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack, overload

from microvm.config import SandboxConfig, encode_env, encode_path, encode_words, parse_duration
from microvm.exceptions import ConfigError, ExecError, WorkdirError
from microvm.launch import launch
from microvm.process import CompletedProcess, ExecTimeout

if TYPE_CHECKING:
    from types import TracebackType

    from microvm._microvm import Exited
    from microvm._microvm import Sandbox as Machine
    from microvm.config import Command, Duration, Environment, Size, StrPath
    from microvm.launch import Progress

    Stream = int | IO[Any] | None
    GuestPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

    class SandboxOptions(TypedDict, total=False):
        """The arguments of :class:`Sandbox`, but for its `env` and `timeout`, which :func:`run` has of its own."""

        cpus: int
        memory: Size
        workdir: StrPath | None
        kernel: StrPath | None
        cmdline: str
        initrd: StrPath | None
        rootfs: StrPath | None
        console: int | None
        boot_timeout: Duration
        progress: Progress | None


__all__ = ["Sandbox", "run"]


class Sandbox:
    """A virtual machine that runs commands; several threads may :meth:`run` some at once.

    It starts when it is made and ends with the ``with`` block, with :meth:`stop` or :meth:`kill`, or with
    this process. It belongs to the process that made it: after a ``fork``, the child may not use it.

    * ``memory``: bytes, or ``"512M"``.
    * ``env``: added to :data:`microvm.DEFAULT_ENV`. ``workdir``: where commands run.
    * ``timeout``: the limit of commands that have none of their own. ``boot_timeout``: the start's.
    * ``kernel``: a vmlinux or bzImage instead of our own. ``cmdline``: added to the kernel's command line.
    * ``initrd``: a cpio archive that is unpacked before ours: its files are there, but our ``/init`` comes first.
    * ``rootfs``: a directory, which is packed, or an image file with an EROFS file system (ext4 if its name ends
      in ``.ext4``).
    * ``console``: a descriptor that gets the serial console.
    * ``progress``: called with what is being done, units done and units in all, while something long happens.
    """

    def __init__(
        self,
        *,
        cpus: int = 1,
        memory: Size = "512M",
        env: Environment | None = None,
        workdir: StrPath | None = None,
        timeout: Duration | None = None,
        kernel: StrPath | None = None,
        cmdline: str = "",
        initrd: StrPath | None = None,
        rootfs: StrPath | None = None,
        console: int | None = None,
        boot_timeout: Duration = 60.0,
        progress: Progress | None = None,
    ) -> None:
        self._timeout = None if timeout is None else parse_duration(timeout)
        self.config = SandboxConfig.of(
            cpus=cpus,
            memory=memory,
            env=env,
            workdir=workdir,
            kernel=kernel,
            cmdline=cmdline,
            initrd=initrd,
            rootfs=rootfs,
            console=console,
            boot_timeout=boot_timeout,
        )
        self._machine: Machine = launch(self.config, progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def __repr__(self) -> str:
        return f"<microvm.Sandbox {self.status}>"

    @overload
    def run(
        self,
        cmd: Command,
        *,
        input: str | bytes | None = None,
        stdin: Stream = None,
        stdout: Stream = PIPE,
        stderr: Stream = PIPE,
        cwd: GuestPath | None = None,
        env: Environment | None = None,
        timeout: Duration | None = None,
        check: bool = False,
        text: Literal[True] = True,
        encoding: str | None = None,
        errors: str | None = None,
    ) -> CompletedProcess[str]: ...
    @overload
    def run(
        self,
        cmd: Command,
        *,
        input: bytes | None = None,
        stdin: Stream = None,
        stdout: Stream = PIPE,
        stderr: Stream = PIPE,
        cwd: GuestPath | None = None,
        env: Environment | None = None,
        timeout: Duration | None = None,
        check: bool = False,
        text: Literal[False],
        encoding: None = None,
        errors: None = None,
    ) -> CompletedProcess[bytes]: ...
    def run(
        self,
        cmd: Command,
        *,
        input: str | bytes | None = None,
        stdin: Stream = None,
        stdout: Stream = PIPE,
        stderr: Stream = PIPE,
        cwd: GuestPath | None = None,
        env: Environment | None = None,
        timeout: Duration | None = None,
        check: bool = False,
        text: bool = True,
        encoding: str | None = None,
        errors: str | None = None,
    ) -> CompletedProcess[str] | CompletedProcess[bytes]:
        """Runs a command in the guest and waits for it, as :func:`subprocess.run` does on the host.

        ``cmd`` is a list of words, or a string for ``sh -c``. ``env`` is the command's whole environment, as in
        :mod:`subprocess`; without it, the sandbox's. Output is captured unless ``stdout`` or ``stderr`` say
        otherwise (a file, a descriptor, ``DEVNULL``), and decoded unless ``text`` is false: UTF-8 where no
        ``encoding`` is given, with replacement characters where no ``errors`` are. Standard input is empty
        unless ``input`` or ``stdin`` are given.

        Raises :class:`FileNotFoundError` and :class:`PermissionError` as :mod:`subprocess` does for a program
        that is not there (:class:`microvm.exceptions.CommandNotFound` and others),
        :class:`subprocess.CalledProcessError` with ``check``, :class:`microvm.exceptions.ExecTimeout` (also
        a :class:`TimeoutError` and a :class:`subprocess.TimeoutExpired`) when the time is over, after the
        command and all it started were killed, and :class:`microvm.exceptions.SandboxExited` when the machine
        ends meanwhile.
        """
        encoding = encoding or "utf-8"
        errors = errors or "replace"
        limit = self._timeout if timeout is None else parse_duration(timeout)
        words = encode_words(cmd)
        directory = encode_path(self.config.workdir if cwd is None else cwd, "cwd")
        try:
            exited = self._machine.exec(
                words,
                encode_env(self.config.env if env is None else env),
                directory,
                limit,
                _source(input, stdin, text, encoding, errors),
                _sink(stdout, "stdout"),
                _sink(stderr, "stderr"),
                None,
            )
        except ExecError as error:
            error.filename = os.fsdecode(directory or b"/" if isinstance(error, WorkdirError) else words[0])
            raise
        if text:
            return _completed(
                cmd,
                exited,
                limit,
                check,
                _decode(exited.stdout, encoding, errors) if stdout == PIPE else None,
                _decode(exited.stderr, encoding, errors) if stderr == PIPE else None,
            )
        return _completed(
            cmd,
            exited,
            limit,
            check,
            exited.stdout if stdout == PIPE else None,
            exited.stderr if stderr == PIPE else None,
        )

    def stop(self, timeout: Duration = 10.0) -> None:
        """Ends the machine in order: commands are killed, file systems written; after ``timeout`` it is killed."""
        self._machine.stop(parse_duration(timeout))

    def kill(self) -> None:
        """Ends the machine at once. Doing so twice is no error."""
        self._machine.kill()

    @property
    def status(self) -> str:
        """``"running"``, ``"ended"`` or ``"crashed"``."""
        return self._machine.status

    @property
    def kernel_release(self) -> str:
        """The guest kernel's release, as ``uname -r`` prints it."""
        return self._machine.kernel

    @property
    def timings(self) -> dict[str, float]:
        """How long starting took, in seconds.

        ``spawned`` and ``launched`` count from the beginning of the launch; ``started`` (the vCPUs run) and
        ``ready`` (the agent speaks) from the start of the machine's process.
        """
        return dict(zip(("spawned", "started", "ready", "launched"), self._machine.timings, strict=True))

    def console(self) -> str:
        """The last 16 KiB of the serial console, once the machine has ended."""
        return self._machine.console_tail().decode("utf-8", "replace")


def _source(given: str | bytes | None, stdin: Stream, text: bool, encoding: str, errors: str) -> bytes | int | None:
    """Standard input as the extension takes it: bytes, a descriptor, or nothing."""
    if given is not None:
        if stdin is not None:
            raise ValueError("stdin and input arguments may not both be used.")
        if isinstance(given, str):
            if not text:
                raise TypeError("a bytes-like object is required for input with text=False, not 'str'")
            return given.encode(encoding, errors)
        return bytes(given)
    if stdin is None or stdin == DEVNULL:
        return None
    if stdin in (PIPE, STDOUT):
        raise ConfigError("stdin", repr(stdin), "a file, a descriptor or DEVNULL; give bytes as input=")
    return stdin if isinstance(stdin, int) else stdin.fileno()


def _sink(stream: Stream, field: str) -> int | None | Literal[True]:
    """An output as the extension takes it: a descriptor, nothing, or ``True`` to capture."""
    if stream == PIPE:
        return True
    if stream == STDOUT:
        raise ConfigError(field, "STDOUT", "PIPE, DEVNULL, a file or a descriptor", hint="use sh -c '… 2>&1'")
    if stream == DEVNULL:
        return None
    if stream is None:
        return 1 if field == "stdout" else 2
    return stream if isinstance(stream, int) else stream.fileno()


def _decode(data: bytes, encoding: str, errors: str) -> str:
    """Text as :mod:`subprocess` makes it: decoded, with universal newlines."""
    return data.decode(encoding, errors).replace("\r\n", "\n").replace("\r", "\n")


def _completed(
    cmd: Command, exited: Exited, limit: float | None, check: bool, stdout: Any, stderr: Any
) -> CompletedProcess[Any]:
    if exited.timed_out:
        raise ExecTimeout(cmd, limit or exited.duration, stdout, stderr)
    returncode = exited.code if exited.code is not None else -(exited.signal or 0)
    if check and returncode:
        raise subprocess.CalledProcessError(returncode, cmd, stdout, stderr)
    return CompletedProcess(cmd, returncode, stdout, stderr, exited.duration)


@overload
def run(
    cmd: Command,
    *,
    input: str | bytes | None = None,
    stdin: Stream = None,
    stdout: Stream = PIPE,
    stderr: Stream = PIPE,
    cwd: GuestPath | None = None,
    env: Environment | None = None,
    timeout: Duration | None = None,
    check: bool = False,
    text: Literal[True] = True,
    encoding: str | None = None,
    errors: str | None = None,
    **sandbox: Unpack[SandboxOptions],
) -> CompletedProcess[str]: ...
@overload
def run(
    cmd: Command,
    *,
    input: bytes | None = None,
    stdin: Stream = None,
    stdout: Stream = PIPE,
    stderr: Stream = PIPE,
    cwd: GuestPath | None = None,
    env: Environment | None = None,
    timeout: Duration | None = None,
    check: bool = False,
    text: Literal[False],
    encoding: None = None,
    errors: None = None,
    **sandbox: Unpack[SandboxOptions],
) -> CompletedProcess[bytes]: ...
def run(
    cmd: Command,
    *,
    input: Any = None,
    stdin: Stream = None,
    stdout: Stream = PIPE,
    stderr: Stream = PIPE,
    cwd: GuestPath | None = None,
    env: Environment | None = None,
    timeout: Duration | None = None,
    check: bool = False,
    text: Any = True,
    encoding: Any = None,
    errors: Any = None,
    **sandbox: Unpack[SandboxOptions],
) -> Any:
    """Runs one command in a virtual machine of its own: ``with Sandbox(**sandbox) as sb: sb.run(cmd, …)``.

    ``timeout`` is the command's; starting the machine has its own, ``boot_timeout``.
    """
    encode_words(cmd)
    if env is not None:
        encode_env(env)
    if timeout is not None:
        parse_duration(timeout)
    with Sandbox(**sandbox) as machine:
        return machine.run(
            cmd,
            input=input,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env=env,
            timeout=timeout,
            check=check,
            text=text,
            encoding=encoding,
            errors=errors,
        )
