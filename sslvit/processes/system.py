"""What training needs of the operating system: Linux. Most works on macOS too; Windows has WSL."""

import os
import sys

from sslvit.errors import NeedsLinux

try:
    import fcntl as fcntl
    import resource as resource
except ImportError as error:
    raise NeedsLinux(
        f"sslvit trains and reads images on Linux only, and Python has no {error.name} on {sys.platform}: on Windows "
        "install it in WSL, https://learn.microsoft.com/windows/wsl"
    ) from None


def cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS
