"""What a cubin says of its kernel: registers, stack and static shared memory, read from the ELF file."""

import struct
from dataclasses import dataclass

_NOBITS = 8
_ATTRIBUTE_WITH_BYTES = 4  # EIFMT_SVAL
_REGISTERS, _FRAME, _MIN_STACK = 0x2F, 0x11, 0x12  # EIATTR_REGCOUNT, EIATTR_FRAME_SIZE, EIATTR_MIN_STACK_SIZE


@dataclass(frozen=True)
class Resources:
    """Registers of a thread; bytes of its stack, spills included; bytes of static shared memory of a block."""

    registers: int
    stack: int
    shared: int


def resources(cubin: bytes) -> Resources:
    """The largest of each over the functions of a cubin, which has one kernel."""
    found, shared = {_REGISTERS: [], _FRAME: [0], _MIN_STACK: [0]}, 0
    for name, data, size in _sections(cubin):
        if name == ".nv.info":
            for attribute, value in _attributes(data):
                if attribute in found:
                    found[attribute].append(struct.unpack("<II", value)[1])
        elif name.startswith(".nv.shared."):
            shared = max(shared, size)
    return Resources(max(found[_REGISTERS]), max(*found[_FRAME], *found[_MIN_STACK]), shared)


def _sections(elf: bytes):
    assert elf[:5] == b"\x7fELF\x02", "not a 64-bit ELF file"
    (start,) = struct.unpack_from("<Q", elf, 40)
    entry, count, of_names = struct.unpack_from("<HHH", elf, 58)
    heads = [struct.unpack_from("<IIQQQQ", elf, start + i * entry) for i in range(count)]
    names = heads[of_names][4]
    for name, kind, _, _, at, size in heads:
        end = elf.index(b"\0", names + name)
        yield elf[names + name : end].decode(), b"" if kind == _NOBITS else elf[at : at + size], size


def _attributes(data: bytes):
    at = 0
    while at < len(data):
        kind, attribute, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if kind == _ATTRIBUTE_WITH_BYTES:
            yield attribute, data[at : at + size]
            at += size
