"""Becomes tritonserver: sets what only a process itself can set, then executes it. Run by process.py.

    python -I -S launcher.py PARENT REPLY_FD MEMORY PROGRAM ARGUMENTS…

Under a program of its own, because a fork of rank 0 that runs Python would copy the page tables of all its weights. The
secret argument, which stands in the environment, never stands on the command line: see process.py. Only what the
standard library has may be imported.
"""

import ctypes
import os
import resource
import signal
import sys

PLACEHOLDER = "hidden"
SECRET = "TRITON_RESTRICTED_API"  # the environment's variable, which other users cannot read
_PR_SET_PDEATHSIG = 1
_PTRACE_TRACEME = 0
_MAX_FILES = 2**20  # where the hard limit is none: programs have tables of this size


def main(parent: int, reply_fd: int, memory: int, command: list[str]) -> None:
    """Prepare this process and execute the command.

    parent: the process whose thread started this one: tritonserver is killed when that thread ends. reply_fd: gets
    "t" where the parent's thread traces this process from its next program's start on, "v" where that is not allowed,
    so that the secret is visible. memory: bytes of data that tritonserver, and each stub, may have.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent has ended")
    # Its own process group: mpirun signals a rank's whole group, and tritonserver must outlive that to drain. A session
    # of its own would do as well, but Linux schedules sessions against one another (autogroup): with busy cores,
    # streams then stood still for 200 ms at a time.
    os.setpgid(0, 0)
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it would hold prompts
    _lower(resource.RLIMIT_DATA, memory)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    is_traced = libc.ptrace(_PTRACE_TRACEME, 0, None, None) == 0
    if not is_traced:
        command = [os.environ[SECRET] if word == PLACEHOLDER else word for word in command]
    os.write(reply_fd, b"t" if is_traced else b"v")
    os.close(reply_fd)
    os.execv(command[0], command)


def _lower(which: int, limit: int) -> None:
    soft, hard = resource.getrlimit(which)
    if soft == resource.RLIM_INFINITY or soft > limit:
        resource.setrlimit(which, (limit, hard))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
