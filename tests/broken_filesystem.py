"""Stand-ins for file systems that lack a call, imported first by a child process; `BROKEN` says what is missing.

`fsync_dir`: a directory cannot be synced (EINVAL: some CIFS, FUSE and 9p mounts); `open_dir`: nor opened (EACCES); `flock_enosys`: no locks
(Lustre without `-o flock`); `flock_enolck`: no lock daemon (NFS); `flock_eio`: a lock fails otherwise; `rename_dir`: a directory cannot be
renamed (EXDEV: overlays); `fsync_eio`: a disk that fails.
"""

import errno
import fcntl
import os
import stat

WHAT = os.environ.get("BROKEN", "")
_fsync, _open, _replace = os.fsync, os.open, os.replace


def _fail(code):
    raise OSError(code, os.strerror(code))


def _fsync_dir(fd):
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        _fail(errno.EINVAL)
    return _fsync(fd)


def _open_dir(path, flags, *arguments, **options):
    if flags & os.O_DIRECTORY == os.O_DIRECTORY:
        _fail(errno.EACCES)
    return _open(path, flags, *arguments, **options)


def _rename_dir(old, new):
    if os.path.isdir(old):
        _fail(errno.EXDEV)
    return _replace(old, new)


if WHAT == "fsync_dir":
    os.fsync = _fsync_dir
elif WHAT == "open_dir":
    os.open = _open_dir
elif WHAT == "rename_dir":
    os.replace = _rename_dir
elif WHAT == "fsync_eio":
    os.fsync = lambda fd: _fail(errno.EIO)
elif WHAT.startswith("flock_"):
    fcntl.flock = lambda fd, operation: _fail(getattr(errno, WHAT.removeprefix("flock_").upper()))
