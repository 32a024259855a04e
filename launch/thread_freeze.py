"""Stop one thread of a child process while its other threads go on (Linux).

SIGSTOP stops a whole process. For a scheduler that also stops ZeroMQ's I/O thread, so requests sent meanwhile stay in the
kernel's socket, and after SIGCONT the two threads race: measured here, the first batch often had 1 or 2 of 8 requests. With
ptrace only the thread that builds the batches stands still, the I/O thread takes the requests in, and all are there when
it goes on. The kernel frees the thread by itself when ours ends, whatever the reason.
"""

from __future__ import annotations

import ctypes
import os

# <linux/ptrace.h> and <sys/wait.h>
_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_WALL = 0x40000000


def freeze(thread_id: int) -> None:
    """Stop a thread of a descendant process; returns once it stands still.

    The same thread of ours must call `thaw`. Raises OSError: PermissionError where the system forbids ptrace.
    """
    _ptrace(_SEIZE, thread_id)
    _ptrace(_INTERRUPT, thread_id)
    os.waitpid(thread_id, _WALL)


def thaw(thread_id: int) -> None:
    """Let a frozen thread go on. Raises ProcessLookupError when it has ended meanwhile."""
    _ptrace(_DETACH, thread_id)


def _ptrace(request: int, thread_id: int) -> None:
    if _libc.ptrace(request, thread_id, None, None) == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"ptrace: {os.strerror(error)}")


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
