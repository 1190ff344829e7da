"""Options of the emulator: checks and execution order."""

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
    """Checks set to "record" count findings in the ``LaunchStats``; checks set to "error" raise.

    batch_threads, batch_ctas: maximum number of threads or CTAs that run together.
    order: order of the CTAs; "shuffle" also permutes atomics. seed: seed of all random choices.
    schedule: "warps" runs each warp alone up to the next barrier, in random order; reveals a missing bar.sync.
    async_copy: time at which cp.async writes its data: "deferred" to wait_group reveals a missing wait; "immediate" at
        issue reveals a write to data that is still in use.
    poison_masked: a masked-off load without ``other`` returns NaN or a huge integer, including loads by cp.async.
    shared_fill, shared_uninit: initial content of shared memory; check for reads of unwritten bytes.
    global_uninit: check for reads of unwritten bytes in tensors passed to ``track_uninit``.
    bounds: memory that a tensor argument gives access to: its "storage" or its own extent ("view").
    race: check for global bytes that two CTAs access and at least one writes, including data protected by a lock.
    mem_stats: count distinct bytes, 32-byte sectors and bank conflicts; slower.
    max_blocks: maximum number of basic blocks per batch; a launch that exceeds it counts as hung.
    print_limit: maximum lines of ``tl.device_print`` per launch.

    Raises ValueError for an invalid value.
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
