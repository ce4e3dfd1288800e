"""CPU time and memory of process trees, and CPU time of the machine, from /proc."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from pathlib import Path

_TICKS_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def tree(pid: int) -> list[int]:
    """Process ids of `pid` and its descendants."""
    children: dict[int, list[int]] = defaultdict(list)
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := _stat(int(folder.name))):
            children[int(fields[1])].append(int(folder.name))
    pids = [pid]
    for parent in pids:  # grows during the loop
        pids += children[parent]
    return pids


def cpu_seconds(pid: int) -> Counter[str]:
    """CPU seconds used by `pid` and its descendants so far, by process name."""
    used: Counter[str] = Counter()
    for process in tree(pid):
        if fields := _stat(process):
            used[name(process)] += (int(fields[11]) + int(fields[12])) / _TICKS_S  # type: ignore[assignment]
    return used


def memory_mib(pid: int) -> float:
    """Memory of `pid` and its descendants, MiB; shared pages count once (PSS)."""
    total = 0.0
    for process in tree(pid):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0)
    return total


def machine_seconds() -> float:
    """CPU seconds that all cores have been busy so far, including time stolen by the host."""
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, words[1:9])
    return (user + nice + system + irq + softirq + steal) / _TICKS_S


def _stat(pid: int) -> list[str] | None:
    """Fields after the name in /proc/PID/stat; None if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def name(pid: int) -> str:
    """Name of the program; of a Ray process its actor or task, such as `ray::ServeReplica:scalp:Grader`."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "?"
    word = words[0].split(" ")[0]
    if word.startswith("ray::"):
        kind = word.split(".")[0]  # without the method that runs now
        # Ray Train names the calls of a worker `execute.get_address_and_port`.
        return "ray::RayTrainWorker" if kind == "ray::execute" else kind
    return word.rpartition("/")[2] or "?"
