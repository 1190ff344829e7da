"""Reads Triton's intermediate code for masked loads without ``other``."""

import re


def loads_without_other(ttir: str):
    """{(file name, line, column)} of the masked tt.load operations that have no `other`.

    The PTX is `mov %r, 0x0` both without `other` and for an integer other=0. A position that also occurs with an
    `other` (one source line, several instantiations) is excluded.
    """
    table = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.M))

    def resolve(ref, depth=0):
        body = table.get(ref, ref) if ref.startswith("#") else ref
        m = re.match(r'^"([^"]*)":(\d+):(\d+)', body)
        if m:
            return m.group(1).rsplit("/", 1)[-1], int(m.group(2)), int(m.group(3))
        m = re.match(r"^(?:callsite\(|fused(?:<[^>]*>)?\[|\"[^\"]*\"\()(.*)", body)
        if m and depth < 20:
            inner = m.group(1)
            r = re.match(r"^(#loc\d*)", inner)
            return resolve(r.group(1) if r else inner, depth + 1)
        return None

    without, with_ = set(), set()
    for m in re.finditer(r"tt\.load (%[\w#.]+(?:, %[\w#.]+)*)[^\n]*?loc\((.*)\)$", ttir, re.M):
        n = m.group(1).count(",") + 1
        where = resolve(m.group(2))
        if where is not None:
            (without if n == 2 else with_).add(where)
    return frozenset(without - with_)
