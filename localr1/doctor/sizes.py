"""How the doctor writes amounts."""


def gib(count: float) -> str:
    return f"{count / (1 << 30):.1f} GiB"


def age(seconds: float) -> str:
    """How long ago, in the largest unit that fits."""
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(seconds // size)
        if count:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"
