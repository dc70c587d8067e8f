"""What this machine says of itself."""

import functools
import os
import platform
import subprocess
import sys
from pathlib import Path

from handheld.runtimes.job import Device


@functools.cache
def device() -> Device:
    """This machine."""
    return Device(
        name=platform.node(),
        os=_operating_system(),
        machine=platform.machine(),
        processor=_processor(),
        cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def resident_memory_bytes() -> int | None:
    """What this process has resident now (Linux; None elsewhere)."""
    if sys.platform != "linux":
        return None
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _operating_system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        distribution = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        distribution = platform.system()
    return f"{distribution}, {platform.system()} {platform.release()}"


def _processor() -> str:
    if sys.platform == "darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):  # x86; Arm kernels give no name
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
