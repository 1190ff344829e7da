"""Functions of the CUDA runtime that Triton's code calls."""

import re

from ptxemu.errors import DeviceAssert, UnsupportedInstruction
from ptxemu.frame import Frame
from ptxemu.ops import F8, I4, I8, full


def call(X, F, name, args):
    """Run a function called by a kernel: ``tl.device_assert`` or ``tl.device_print``."""
    if name == "__assertfail":
        s = [_text(X, int(F.callparams[a][0])) for a in (args[0], args[1], args[3])]
        line = int(F.callparams[args[2]][0])
        tid = int(F.tids[0])
        raise DeviceAssert(
            f"{s[1]}:{line}: device assertion `{s[0]}` failed in {X.K.name} "
            f"(CTA {int(X.ctas[tid // X.nthreads])}, thread {tid % X.nthreads}; "
            f"{F.T} threads)"
        )
    if name == "vprintf":
        _print(X, F, F.callparams[args[0]], F.callparams[args[1]])
        return
    raise UnsupportedInstruction(f"call to {name}")


def _print(X, F, fmt, buf):
    """Print a line per thread of the frame, at most ``Options.print_limit`` per launch."""
    text = _text(X, int(fmt[0]))
    spec = re.compile(r"%[-+ #0]*(?:\*|\d+)?(?:\.\d+)?(ll|l|h)?([diuxXcpsfgeE%])")
    buf = full(buf, F.T)
    for n in range(F.T):
        if X.L.printed >= X.opt.print_limit:
            return
        X.L.printed += 1
        off, vals, pyfmt = 0, [], text
        for m in spec.finditer(text):
            if m.group(2) == "%":
                continue
            nb = 8 if m.group(2) in "fgeEps" or (m.group(1) or "").startswith("l") else 4
            off = -(-off // nb) * nb
            one = Frame(X, F.pc, F.tids[n : n + 1], F.R, F.grp)
            w = X.ld_x(one, buf[n : n + 1], off, nb, 1, None, None, 0)[0]
            off += nb
            k = m.group(2)
            if k in "fgeE":
                vals.append(float(w.view(F8)[0]))
            elif k in "di":
                vals.append(int(w.view(I8 if nb == 8 else I4)[0]))
            elif k == "s":
                vals.append(_text(X, int(w[0])))
            else:
                vals.append(int(w[0]))
        pyfmt = spec.sub(lambda m: m.group(0).replace("ll", "").replace("p", "x").replace("u", "d"), text)
        try:
            print(pyfmt % tuple(vals), end="")
        except (TypeError, ValueError):
            print(text, vals)


def _text(X, addr):
    for arr in X.K.symbol_data.values():
        p = arr.ctypes.data
        if p <= addr < p + arr.nbytes:
            return bytes(arr[addr - p :]).split(b"\0")[0].decode()
    return hex(addr)
