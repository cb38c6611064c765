"""Files: a path walked through the cache of names, open and close, a byte read and written, many descriptors polled.

What Linux finds by pointers is found by pointers here: a name's bucket, its dentry, its inode; a descriptor's file, its
operations, its socket. Names are words instead of strings. All is in memory: no device is waited for.

Each process has descriptors of its own, and names are the same for all. Threads that open and close beside each other
take the lock of their process's descriptors (file_lock in Linux, include/linux/fdtable.h).

Not modelled: mount points and symbolic links; read-copy-update's counters; waiting for a descriptor; a buffer for the
names of each call (threads of a process copy theirs to one); slabs of files: a process takes them from a list.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from vtsim.cpu import ops
from vtsim.cpu import slots as s
from vtsim.cpu.assembler import Assembler, Mem
from vtsim.guest.kernel import KernelOptions, path
from vtsim.guest.kernel import layout as at
from vtsim.guest.kernel.lengths import length

# fmt: off
# --- what is in the first page of a process --------------------------------------------------------------------
DESCRIPTORS: Final = 0                             # a file's address each
BUCKETS, BUCKET_COUNT = 0x800, 64           # of the cache of names: a dentry's address each
ROOT, SPARE = 0xC00, 0xC08                  # dentry of the root; the first free file
TICKET, SERVING = 0xC10, 0xC18              # with several CPUs: the lock of descriptors and free files
NAME_BUFFER: Final = 0xD00                         # what getname copies into
# --- words of a dentry, an inode, a file, a socket ---------------------------------------------------------------
(D_NEXT, D_PARENT, D_NAME, D_INODE, D_COUNT) = range(0, 40, 8)
INODE_WORDS: Final = 13                            # that stat reports
(F_OPERATIONS, F_OBJECT, F_COUNT, F_POSITION, F_NEXT, F_MODE) = range(0, 48, 8)
(READ, WRITE, POLL) = range(0, 24, 8)              # of the operations
(S_STATE, S_RECEIVE, S_SEND) = (0, 0x100, 0x200)   # lines of a socket that poll looks at
DENTRY_BYTES, INODE_BYTES, FILE_BYTES, SOCKET_BYTES = 192, 640, 256, 2368  # of the slabs of Linux, estimated
STAT_WORDS: Final = 18                             # struct stat has 144 bytes
SET_WORDS: Final = 6                               # three sets of 128 descriptors, and as many results
FIRST_SOCKET_DESCRIPTOR: Final = 4
READY: Final = 0x145                               # DEFAULT_POLLMASK
# fmt: on


def carry(a: Assembler, target: int, source: int, words: int, free: tuple[int, ...]) -> None:
    """Copy words from memory at one register to memory at another, through registers that are free."""
    for first in range(0, words, len(free)):
        part = free[: words - first]
        a.ldm(Mem(source, 8 * first), part)
        a.stm(Mem(target, 8 * first), part)


def _find(a: Assembler, kernel: KernelOptions, register: int, more: int = 0) -> None:
    """The register <- the address of the files of the process that runs, or of what is so far behind it."""
    if kernel.files:
        a.mov(register, kernel.files + more)
        return
    a.ld(register, at.cpu_word(at.CURRENT))
    a.ld(register, Mem(register, at.T_FILES))
    if more:
        a.add(register, more)


@path("path walk")
def walk(a: Assembler, kernel: KernelOptions) -> None:
    """`walk_path`: RSI names at RDI in user memory; RBX <- dentry of the last, or `no_entry`. R8 R9 R12 stay."""
    a.activity = ops.SYSCALL_PATH
    a.label("walk_path")
    a.work(length("getname"))
    _find(a, kernel, s.R10, NAME_BUFFER)
    a.copy(s.RCX, s.RSI)
    a.label("copy_name")
    a.ld(s.RAX, Mem(s.RDI))
    a.st(Mem(s.R10), s.RAX)
    a.add(s.RDI, 8)
    a.add(s.R10, 8)
    a.loop("copy_name")
    _find(a, kernel, s.R10, NAME_BUFFER)
    _find(a, kernel, s.R11)
    a.ld(s.RBX, Mem(s.R11, ROOT))
    a.label("walk_component")
    a.work(length("hash_name"))
    a.ld(s.RDX, Mem(s.R10))
    a.copy(s.RAX, s.RDX)
    a.and_(s.RAX, BUCKET_COUNT - 1)
    a.ld(s.RCX, Mem(s.R11, BUCKETS, index=s.RAX, scale=8))
    a.label("walk_chain")
    a.test(s.RCX, -1)
    a.jcc(ops.CC_Z, "no_entry")
    a.ld(s.RAX, Mem(s.RCX, D_PARENT))
    a.cmp(s.RAX, register=s.RBX)
    a.jcc(ops.CC_NZ, "walk_next")
    a.ld(s.RAX, Mem(s.RCX, D_NAME))
    a.cmp(s.RAX, register=s.RDX)
    a.jcc(ops.CC_Z, "walk_found")
    a.label("walk_next")
    a.ld(s.RCX, Mem(s.RCX, D_NEXT))
    a.jmp("walk_chain")
    a.label("walk_found")
    a.copy(s.RBX, s.RCX)
    a.ld(s.RAX, Mem(s.RBX, D_INODE))
    a.ld(s.RAX, Mem(s.RAX))
    a.work(length("permission"))
    a.add(s.R10, 8)
    a.sub(s.RSI, 1)
    a.jcc(ops.CC_NZ, "walk_component")
    a.ret()
    a.label("no_entry")
    a.add(s.RSP, 8)
    a.label("bad_descriptor")
    a.mov(s.RAX, -2, "ENOENT")
    a.ret()


@path("stat")
def stat(a: Assembler, kernel: KernelOptions) -> None:
    """System call: what is known of the file with RSI names at RDI, to RDX in user memory."""
    a.activity = ops.SYSCALL_PATH
    a.label("call_stat")
    a.copy(s.R9, s.RDX)
    a.call("walk_path")
    a.work(length("stat"))
    a.ld(s.RSI, Mem(s.RBX, D_INODE))
    a.sub(s.RSP, 8 * STAT_WORDS)
    carry(a, s.RSP, s.RSI, INODE_WORDS, at.CALLEE)
    carry(a, s.R9, s.RSP, STAT_WORDS, at.CALLEE)
    a.add(s.RSP, 8 * STAT_WORDS)
    a.mov(s.RAX, 0)
    a.ret()


@path("open and close")
def open_close(a: Assembler, kernel: KernelOptions) -> None:
    """System calls: a descriptor for the file with RSI names at RDI; and the end of descriptor RDI."""
    a.activity = ops.SYSCALL_PATH
    a.label("call_open")
    a.call("walk_path")
    a.work(length("open"))
    if kernel.files_locked:
        a.call("lock_files")
    a.ld(s.RDX, Mem(s.R11, SPARE))
    a.ld(s.RAX, Mem(s.RDX, F_NEXT))
    a.st(Mem(s.R11, SPARE), s.RAX)
    a.mov(s.RAX, 0)
    for line in range(0, FILE_BYTES, 64):
        a.st(Mem(s.RDX, line), s.RAX)
    a.st(Mem(s.RDX, F_OBJECT), s.RBX)
    a.mov(s.RCX, 1)
    a.xadd(Mem(s.RBX, D_COUNT), s.RCX)
    a.copy(s.RDI, s.R11)
    a.mov(s.RAX, 0)
    a.label("find_descriptor")
    a.ld(s.RCX, Mem(s.RDI, DESCRIPTORS))
    a.test(s.RCX, -1)
    a.jcc(ops.CC_Z, "descriptor_found")
    a.add(s.RDI, 8)
    a.add(s.RAX, 1)
    a.jmp("find_descriptor")
    a.label("descriptor_found")
    a.st(Mem(s.RDI, DESCRIPTORS), s.RDX)
    if kernel.files_locked:
        a.call("unlock_files")
    a.ret()

    a.label("call_close")
    _find(a, kernel, s.R11)
    a.ld(s.RDX, Mem(s.R11, DESCRIPTORS, index=s.RDI, scale=8))
    a.test(s.RDX, -1)
    a.jcc(ops.CC_Z, "bad_descriptor")
    a.work(length("close"))
    if kernel.files_locked:
        a.call("lock_files")
    a.mov(s.RAX, 0)
    a.st(Mem(s.R11, DESCRIPTORS, index=s.RDI, scale=8), s.RAX)
    a.ld(s.RBX, Mem(s.RDX, F_OBJECT))
    a.mov(s.RCX, -1)
    a.xadd(Mem(s.RBX, D_COUNT), s.RCX)
    a.ld(s.RAX, Mem(s.R11, SPARE))
    a.st(Mem(s.RDX, F_NEXT), s.RAX)
    a.st(Mem(s.R11, SPARE), s.RDX)
    if kernel.files_locked:
        a.call("unlock_files")
    a.mov(s.RAX, 0)
    a.ret()


@path("read and write")
def read_write(a: Assembler, kernel: KernelOptions) -> None:
    """System calls: a byte of /dev/zero to RSI in user memory; a byte from there to /dev/null."""
    a.activity = ops.SYSCALL_PATH
    for name, operation in (("read", READ), ("write", WRITE)):
        a.label(f"call_{name}")
        a.work(length("read_write"))
        _find(a, kernel, s.R11)
        a.ld(s.RDX, Mem(s.R11, DESCRIPTORS, index=s.RDI, scale=8))
        a.ld(s.RAX, Mem(s.RDX, F_MODE))
        a.ld(s.RCX, Mem(s.RDX, F_OPERATIONS))
        a.ld(s.RCX, Mem(s.RCX, operation))
        a.op(ops.CALL_REG, s.RCX)
        a.st(Mem(s.RDX, F_POSITION), s.RAX)
        a.ret()
    a.label("read_zero")
    a.work(length("read_zero"))
    a.st_value(Mem(s.RSI, size=1), 0)
    a.mov(s.RAX, 1)
    a.ret()
    a.label("write_null")
    a.mov(s.RAX, 1)
    a.ret()


@path("select")
def select(a: Assembler, kernel: KernelOptions) -> None:
    """System call: is any of RDI sockets ready, or with RDX of as many files? Sets of descriptors are at RSI in user
    memory; none is waited for. What has nothing to poll, as ordinary files, is ready."""
    a.activity = ops.SYSCALL_PATH
    a.label("call_select")
    a.work(length("select"))
    a.copy(s.R9, s.RDI)
    a.sub(s.RSP, 8 * SET_WORDS)
    a.mov(s.R8, FIRST_SOCKET_DESCRIPTOR)
    a.test(s.RDX, -1)
    a.jcc(ops.CC_Z, "poll_sets")
    a.mov(s.R8, kernel.first_file)
    a.label("poll_sets")
    carry(a, s.RSP, s.RSI, SET_WORDS, (s.RAX, s.RCX, s.RDX))
    _find(a, kernel, s.R11)
    a.mov(s.R12, 0)
    a.label("poll_next")
    a.work(length("select_descriptor"))
    a.ld(s.RDX, Mem(s.R11, DESCRIPTORS, index=s.R8, scale=8))
    a.ld(s.RAX, Mem(s.RDX, F_MODE))
    a.ld(s.RCX, Mem(s.RDX, F_OPERATIONS))
    a.ld(s.RCX, Mem(s.RCX, POLL))
    a.mov(s.RAX, READY)
    a.test(s.RCX, -1)
    a.jcc(ops.CC_Z, "polled")
    a.op(ops.CALL_REG, s.RCX)
    a.label("polled")
    a.or_(s.R12, register=s.RAX)
    a.add(s.R8, 1)
    a.sub(s.R9, 1)
    a.jcc(ops.CC_NZ, "poll_next")
    carry(a, s.RSI, s.RSP, SET_WORDS, (s.RAX, s.RCX, s.RDX))
    a.add(s.RSP, 8 * SET_WORDS)
    a.copy(s.RAX, s.R12)
    a.ret()
    a.label("poll_socket")
    a.work(length("poll_socket"))
    a.ld(s.RBX, Mem(s.RDX, F_OBJECT))
    for line in (S_STATE, S_RECEIVE, S_SEND):
        a.ld(s.RAX, Mem(s.RBX, line))
    a.mov(s.RAX, 0)
    a.ret()


# --- what is in memory before the guest starts ----------------------------------------------------------------------
@frozen(kw_only=True)
class Files:
    """How much there is: components of the longest path that is walked, sockets and ordinary files that are open.

    `threads`: how many may open a file at once.
    """

    components: int
    sockets: int
    ordinary: int = 0
    threads: int = 1

    @property
    def first_file(self) -> int:
        """The descriptor of the first ordinary file."""
        return FIRST_SOCKET_DESCRIPTOR + self.sockets

    @property
    def _count(self) -> int:
        return self.sockets + self.ordinary + 7 + self.threads

    @property
    def bytes(self) -> int:
        """How much memory that takes."""
        names, files = self.components + 1, self._count
        return 4096 + names * (DENTRY_BYTES + INODE_BYTES) + files * FILE_BYTES + self.sockets * SOCKET_BYTES + 128

    def words(self, base: int, first: int, labels: dict[str, int]) -> NDArray[np.int64]:
        """The contents of a process's, for the address at which they will be. At `first` are those with the names."""
        words = np.zeros(-(-self.bytes // 8), np.int64)
        here = 4096

        def place(size: int, base: int = base) -> int:
            nonlocal here
            here += size
            return base + here - size

        def put(address: int, value: int) -> None:
            if base <= address < base + self.bytes:
                words[(address - base) // 8] = value

        operations, of_files = place(64, first), place(64, first)
        for word, label in ((READ, "read_zero"), (WRITE, "write_null"), (POLL, "poll_socket")):
            put(operations + word, labels[label])
            if word != POLL:
                put(of_files + word, labels[label])
        parent = 0
        for name in range(self.components + 1):  # the root is name 0
            dentry, inode = place(DENTRY_BYTES, first), place(INODE_BYTES, first)
            put(dentry + D_PARENT, parent)
            put(dentry + D_NAME, name)
            put(dentry + D_INODE, inode)
            put(base + (BUCKETS + 8 * name if name else ROOT), dentry)
            parent = dentry
        spare = 0
        for number in range(self._count):
            file = place(FILE_BYTES)
            socket = number - FIRST_SOCKET_DESCRIPTOR
            put(file + F_OPERATIONS, operations if socket < self.sockets else of_files)
            if self.sockets <= socket < self.sockets + self.ordinary:
                put(base + DESCRIPTORS + 8 * number, file)
            elif socket < self.sockets:
                put(base + DESCRIPTORS + 8 * number, file)
                put(file + F_OBJECT, place(SOCKET_BYTES) if socket >= 0 else 0)
            else:
                put(file + F_NEXT, spare)
                spare = file
        put(base + SPARE, spare)
        return words
