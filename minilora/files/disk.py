"""What a disk can do, one method a system call or two: the only code of minilora that writes, and what a simulated disk replaces.

Nothing here decides anything; ``read.py`` and ``write.py`` do. Next file: ``files/read.py``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import sys
from dataclasses import dataclass
from typing import Any

try:
    import fcntl
except ImportError:  # pragma: no cover: Windows; no locks, so nothing is swept either
    fcntl = None  # type: ignore[assignment]

__all__ = ["Disk", "Held", "Opened"]

Path = str | os.PathLike[str]
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_AT_FDCWD = -100
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_LONGEST_LOCK = 32  # bytes; the number of a process
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}  # of flock, where a file system has none
_LARGEST_WRITE = 1 << 30  # Linux writes at most 2 GiB at once


@dataclass
class Opened:
    """A file that is open for reading: it keeps its content, whatever happens to its name. ``identity`` as ``Disk.identity``."""

    file: Any
    size: int
    identity: tuple[int, int]

    def read(self, begin: int = 0, size: int | None = None) -> bytearray:
        """``size`` bytes from ``begin`` on, or all of it, in one piece of memory; fewer where it ends before."""
        content = bytearray(self.size if size is None else size)
        self.file.seek(begin)
        view, count = memoryview(content), 0
        while count < len(view) and (got := self.file.readinto(view[count:])):
            count += got
        view.release()
        del content[count:]
        return content

    def close(self) -> None:
        self.file.close()


class Held:
    """A lock, held until ``close`` or until nobody has this object any more: an interrupt on any line gives it back.

    ``taken`` is False where the system has no locks (network file systems, Windows), and then nothing is held.
    """

    __slots__ = ("_handles", "taken")

    def __init__(self, handle: int | None) -> None:
        self._handles, self.taken = [handle] if handle is not None else [], handle is not None

    def close(self) -> None:
        if self._handles:
            os.close(self._handles.pop())  # on one line: never twice, as the number may be another file's by then

    def __del__(self) -> None:
        self.close()

    def lock(self) -> bool:
        """Whether the open file could be locked; False if another one has it."""
        try:
            fcntl.flock(self._handles[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    @property
    def handle(self) -> int:
        return self._handles[0]


class Disk:
    """The real one. Every method raises ``OSError`` with the path when the system refuses."""

    # ---- looking

    def kind(self, path: Path) -> str | None:
        """ "folder", "file", "link" or None; a link is not followed."""
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        return "folder" if stat.S_ISDIR(mode) else "link" if stat.S_ISLNK(mode) else "file"

    def names(self, folder: Path) -> list[str]:
        """What lies in a folder, sorted."""
        return sorted(os.listdir(folder))

    def inode(self, path: Path) -> int:
        """The number that the file system gave to a folder or file when it was made; a link is not followed."""
        return os.lstat(path).st_ino

    def identity(self, path: Path) -> tuple[int, int] | None:
        """Device and number of a file, or None if there is none: two paths with equal ones are one file."""
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_dev, found.st_ino

    def owner(self, path: Path) -> tuple[object, ...]:
        """Whose a folder is: user, group, access lists."""
        found = os.stat(path)
        listed: list[str] = getattr(os, "listxattr", lambda path: [])(path)
        return found.st_uid, found.st_gid, [(name, os.getxattr(path, name)) for name in listed if "posix_acl" in name]

    def open(self, path: Path) -> Opened:
        """A file to read from. A pipe or device is refused, and never waited for."""
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
        except OSError:
            os.close(handle)
            raise
        return Opened(os.fdopen(handle, "rb", buffering=0), found.st_size, (found.st_dev, found.st_ino))

    # ---- writing

    def write(self, path: Path, content: bytes | bytearray) -> None:
        """A new file, flushed to the disk; its mode follows the umask."""
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(handle, rest[:_LARGEST_WRITE]) :]
            _flush(handle)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        finally:
            os.close(handle)

    def append(self, path: Path, content: bytes) -> None:
        """Add to a file (made if need be, a link refused), unflushed: logs are not worth a wait."""
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_LINK | getattr(os, "O_BINARY", 0), 0o666)
        try:
            os.write(handle, content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        finally:
            os.close(handle)

    def flush(self, path: Path) -> None:
        """Bring a file's content, or a folder's names, to the disk."""
        if os.name == "nt" and os.path.isdir(path):  # pragma: no cover: Windows has no handle for this
            return
        handle = os.open(path, os.O_RDONLY | _NO_LINK)
        try:
            _flush(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no flush for folders
                raise OSError(error.errno, error.strerror, str(path)) from None
        finally:
            os.close(handle)

    def make_folder(self, path: Path) -> None:
        os.mkdir(path)

    def copy_mode(self, source: Path, target: Path) -> None:
        os.chmod(target, stat.S_IMODE(os.stat(source).st_mode))

    def set_mode(self, path: Path, mode: int) -> None:
        os.chmod(path, mode)

    def link(self, source: Path, target: Path) -> None:
        """A second name for one file; of a symbolic link, a second link."""
        if os.link in os.supports_follow_symlinks:
            os.link(source, target, follow_symlinks=False)
        else:  # pragma: no cover: Windows
            os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """Move within one folder or file system; a file that is there is replaced at once."""
        os.replace(source, target)

    def exchange(self, left: Path, right: Path) -> None:
        """Let two names change places in one step. Raises ``OSError`` (ENOSYS) where the system cannot."""
        if _renameat2 is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(left))
        if _renameat2(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _EXCHANGE):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(left))

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        os.rmdir(path)

    def remove_tree(self, path: Path) -> None:
        """A folder and all that is in it. Links are removed, never followed, even if somebody puts one in its place meanwhile.

        What resists keeps nothing else: the first error is raised when all others have gone.
        """
        errors: list[OSError] = []

        def keep(_function: object, _path: str, error: Any) -> None:
            errors.append(error if isinstance(error, OSError) else error[1])

        shutil.rmtree(path, **{"onexc" if sys.version_info >= (3, 12) else "onerror": keep})  # type: ignore[arg-type]
        if errors:
            raise errors[0]

    # ---- who is writing

    def lock(self, folder: Path) -> Held | None:
        """Hold a folder. None if another process holds it; not ``taken`` where folders cannot be locked, and for a link."""
        if fcntl is None:
            return Held(None)
        try:
            held = Held(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | _NO_LINK))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP):
                return Held(None)
            raise
        try:
            return held if held.lock() else None
        except OSError:
            return Held(None)

    def hold(self, path: Path, content: bytes) -> Held | None:
        """Hold a file, made if need be, and write into it. None if another one holds it; not ``taken`` where files cannot be locked.

        A file that holds more than a few bytes is somebody's, and raises. Whoever holds the file may unlink it.
        """
        while fcntl is not None:
            held = Held(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666))
            found = os.fstat(held.handle)
            if not stat.S_ISREG(found.st_mode) or found.st_size > _LONGEST_LOCK:
                raise OSError(errno.EEXIST, "another file of that name is there", str(path))
            try:
                if not held.lock():
                    return None
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return Held(None)
                raise
            if os.path.lexists(path) and os.path.samestat(found, os.lstat(path)):
                os.ftruncate(held.handle, 0)
                os.pwrite(held.handle, content, 0)
                return held
            held.close()  # its last holder has unlinked it just now
        return Held(None)


def _flush(handle: int) -> None:
    if sys.platform == "darwin" and fcntl is not None:  # pragma: no cover: fsync there stops at the drive's own memory
        fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
    else:
        os.fsync(handle)


def _find_renameat2() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
        function.restype = ctypes.c_int
    return function


_renameat2 = _find_renameat2()

used = Disk()  # by all of minilora; a test puts a simulated one here
