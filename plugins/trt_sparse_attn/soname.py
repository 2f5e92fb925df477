"""Makes a loaded shared library known under a second name.

The parser of TensorRT-RTX opens `libtensorrt_rtx.so` when it meets a plugin; its wheel has `libtensorrt_rtx.so.1` only, and the
process aborts. The dynamic linker compares names with the sonames of what is loaded: an empty library of the missing name that
needs the real one is found, and through it the real one's symbols.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import tempfile
from functools import cache
from pathlib import Path

__all__ = ["empty_library", "provide"]

_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NEEDED, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_SONAME = 1, 4, 5, 6, 10, 11, 14
_EM = {"x86_64": 62, "aarch64": 183}


@cache
def provide(name: str, real: str) -> None:
    """From now on `dlopen(name)` finds the loaded library whose soname is `real`. OSError when there is none."""
    with tempfile.TemporaryDirectory() as folder:  # the library stays when its file is gone
        file = Path(folder) / name
        file.write_bytes(empty_library(name, real, _EM[os.uname().machine]))
        ctypes.CDLL(str(file), ctypes.RTLD_GLOBAL)


def empty_library(name: str, needed: str, machine: int) -> bytes:
    """A 64-bit ELF shared object without symbols: its soname is `name`, and it needs `needed`. machine: e_machine of ELF."""
    if sys.byteorder != "little":
        raise OSError("only little-endian machines run TensorRT")
    header, program = 64, 2 * 56
    strings = b"\0" + name.encode() + b"\0" + needed.encode() + b"\0"
    symbols = bytes(24)  # the null symbol that every table begins with
    table = struct.pack("<IIII", 1, 1, 0, 0)  # one bucket, one chain
    at_hash = header + program
    at_symbols = at_hash + len(table)
    at_strings = at_symbols + len(symbols)
    at_dynamic = -(-(at_strings + len(strings)) // 8) * 8
    entries = [(_DT_SONAME, 1), (_DT_NEEDED, 2 + len(name)), (_DT_HASH, at_hash), (_DT_STRTAB, at_strings),
               (_DT_SYMTAB, at_symbols), (_DT_STRSZ, len(strings)), (_DT_SYMENT, 24), (0, 0)]  # fmt: skip
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    size = at_dynamic + len(dynamic)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    elf = ident + struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, header, 0, 0, header, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", _PT_LOAD, 6, 0, 0, 0, size, size, 1 << 16)  # writable: the linker writes to it
    where = struct.pack("<IIQQQQQQ", _PT_DYNAMIC, 6, at_dynamic, at_dynamic, at_dynamic, len(dynamic), len(dynamic), 8)
    body = (elf + load + where + table + symbols + strings).ljust(at_dynamic, b"\0")
    return body + dynamic
