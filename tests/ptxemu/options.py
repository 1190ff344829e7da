"""What a launch in the emulator checks, and in which order it runs."""

from dataclasses import dataclass, fields

CHOICES = {
    "order": ("linear", "reverse", "shuffle"),
    "schedule": ("lockstep", "warps"),
    "async_copy": ("deferred", "immediate"),
    "shared_fill": ("poison", "zero"),
    "shared_uninit": (None, "record", "error"),
    "global_uninit": (None, "record", "error"),
    "bounds": ("storage", "view"),
    "race": (None, "record", "error"),
}


@dataclass
class Options:
    """Checks set to "record" count what they find in the ``LaunchStats``; set to "error" they raise.

    batch_threads, batch_ctas: how many threads, or CTAs, run together.
    order: in which CTAs run; "shuffle" also permutes atomics. seed: of every random choice.
    schedule: "warps" runs each warp alone up to the next barrier, in random order, which shows a missing bar.sync.
    async_copy: when the data of cp.async lands: "deferred" to wait_group, which shows a missing wait, or "immediate" at
        issue, which shows a write into what is still read.
    poison_masked: a masked-off load without ``other`` gives NaN or a huge integer, through cp.async too.
    shared_fill, shared_uninit: what shared memory holds first; the check of reads of bytes that nothing wrote.
    global_uninit: the same check for tensors given to ``track_uninit``.
    bounds: what a tensor argument allows, its "storage" or its own extent ("view").
    race: the check of global bytes for two CTAs, of which one writes. Data behind a lock is reported too.
    mem_stats: count distinct bytes, 32-byte sectors and bank conflicts; slower.
    max_blocks: basic blocks of a batch before the launch is taken to hang.
    print_limit: lines of ``tl.device_print`` in a launch.

    Raises ValueError for a value that is none of an option's choices.
    """

    batch_threads: int = 16384
    batch_ctas: int | None = None
    order: str = "linear"
    seed: int = 0
    schedule: str = "lockstep"
    async_copy: str = "deferred"
    poison_masked: bool = True
    shared_fill: str = "poison"
    shared_uninit: str | None = None
    global_uninit: str | None = "record"
    bounds: str = "storage"
    race: str | None = None
    mem_stats: bool = False
    max_blocks: int = 20_000_000
    print_limit: int = 1000

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, not {getattr(self, name)!r}")

    @classmethod
    def names(cls):
        return [field.name for field in fields(cls)]
