"""What a benchmark ran on."""

import os
import platform


def described() -> dict[str, str | int | None]:
    return {
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
