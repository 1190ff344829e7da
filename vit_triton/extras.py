"""How to install the packages of an extra."""


def install(extra: str) -> str:
    """Return how to install an extra, as the end of an error message."""
    return f"install the extra [{extra}], for example pip install '.[{extra}]' in a checkout"
