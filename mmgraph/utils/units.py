"""Format sizes and durations for display."""


def duration(seconds: float) -> str:
    """Format a duration, such as ``45 s``, ``3.5 min`` or ``2.1 h``."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(number: float) -> str:
    """Format a number of bytes, such as ``45 MB`` or ``3.51 GB`` (1 GB is 10^9 bytes)."""
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.2g} MB"
