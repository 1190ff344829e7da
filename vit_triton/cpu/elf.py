"""Load a relocatable ELF object into this process, without a linker or a file."""

import ctypes
import mmap
import struct

from vit_triton.cpu.ttir import Unsupported

_PC32, _PLT32, _R64, _R32S, _R32 = 2, 4, 1, 11, 10
_libm = None


def _libm_address(name: str) -> int:
    global _libm
    if _libm is None:
        _libm = ctypes.CDLL("libm.so.6")
    try:
        function = getattr(_libm, name)
    except AttributeError:
        function = getattr(ctypes.CDLL(None), name, None)
    if function is None:
        raise Unsupported(f"generated code calls {name}, which is not in libm")
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


class Code:
    """A loaded object; ``symbol(name)`` is the address of a function. The code is freed with this object."""

    def __init__(self, image: bytes) -> None:
        if image[:4] != b"\x7fELF" or struct.unpack_from("<HH", image, 16) != (1, 62):
            raise Unsupported("an object that is not relocatable ELF for x86-64")
        (table,) = struct.unpack_from("<Q", image, 40)
        size, count, _ = struct.unpack_from("<HHH", image, 58)
        headers = [struct.unpack_from("<IIQQQQIIQQ", image, table + i * size) for i in range(count)]
        offsets: dict[int, int] = {}
        total = 0
        for i, (_, _, flags, _, _, length, _, _, align, _) in enumerate(headers):
            if flags & 2 and length:  # SHF_ALLOC
                total = -(-total // max(align, 1)) * max(align, 1)
                offsets[i] = total
                total += length
        symbols, strings = [], b""
        for _, kind, _, _, offset, length, link, _, _, _ in headers:
            if kind == 2:
                strings = image[headers[link][4] : headers[link][4] + headers[link][5]]
                symbols = [struct.unpack_from("<IBBHQQ", image, offset + at) for at in range(0, length, 24)]
        undefined = [i for i, s in enumerate(symbols) if i and s[3] == 0]
        stubs = -(-total // 16) * 16
        total = stubs + 16 * len(undefined)
        self._memory = mmap.mmap(
            -1, max(total, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
        self._view = ctypes.c_char.from_buffer(self._memory)
        base = ctypes.addressof(self._view)
        for i, start in offsets.items():
            if headers[i][1] != 8:  # not SHT_NOBITS
                self._memory[start : start + headers[i][5]] = image[headers[i][4] : headers[i][4] + headers[i][5]]

        def text(at: int) -> str:
            return strings[at : strings.index(b"\0", at)].decode()

        addresses: dict[int, int] = {}
        for i, (_, _, _, section, value, _) in enumerate(symbols):
            if section in offsets:
                addresses[i] = base + offsets[section] + value
        for n, i in enumerate(undefined):
            # jmp [rip + 2], then the address: libm may be out of range of a 32-bit displacement
            at = stubs + 16 * n
            self._memory[at : at + 16] = b"\xff\x25\x02\0\0\0\0\0" + struct.pack(
                "<Q", _libm_address(text(symbols[i][0]))
            )
            addresses[i] = base + at
        for _, kind, _, _, offset, length, _, target, _, _ in headers:
            if kind == 4 and target in offsets:
                for at in range(offset, offset + length, 24):
                    place, info, addend = struct.unpack_from("<QQq", image, at)
                    self._relocate(base, offsets[target] + place, info & 0xFFFFFFFF, addresses[info >> 32] + addend)
        self._symbols = {text(s[0]): addresses[i] for i, s in enumerate(symbols) if i in addresses and s[0]}
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        if protect(ctypes.c_void_p(base), ctypes.c_size_t(total), mmap.PROT_READ | mmap.PROT_EXEC):
            raise OSError(ctypes.get_errno(), "the system does not allow executable memory")

    def _relocate(self, base: int, at: int, kind: int, value: int) -> None:
        if kind in (_PC32, _PLT32):
            self._memory[at : at + 4] = struct.pack("<i", value - (base + at))
        elif kind == _R64:
            self._memory[at : at + 8] = struct.pack("<Q", value)
        else:
            raise Unsupported(f"relocation type {kind} in generated code")

    def symbol(self, name: str) -> int:
        return self._symbols[name]
