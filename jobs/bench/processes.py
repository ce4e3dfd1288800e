"""CPU time from /proc: what a server's processes use, and what all of the machine does."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from pathlib import Path

_TICKS_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def tree(pid: int) -> list[int]:
    """This process and all that descend from it."""
    children: dict[int, list[int]] = defaultdict(list)
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := _stat(int(folder.name))):
            children[int(fields[1])].append(int(folder.name))
    found = [pid]
    for each in found:  # grows while it is gone through
        found += children[each]
    return found


def cpu_seconds(pid: int) -> Counter[str]:
    """CPU seconds that this process and its descendants have used so far, by their names."""
    used: Counter[str] = Counter()
    for each in tree(pid):
        if fields := _stat(each):
            used[name(each)] += (int(fields[11]) + int(fields[12])) / _TICKS_S  # type: ignore[assignment]
    return used


def memory_mib(pid: int) -> float:
    """That this process and its descendants hold; what they share is counted once."""
    total = 0.0
    for each in tree(pid):
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0)
    return total


def machine_seconds() -> float:
    """CPU seconds that all cores have been busy so far, by whomever; what the host took from us counts."""
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, words[1:9])
    return (user + nice + system + irq + softirq + steal) / _TICKS_S


def _stat(pid: int) -> list[str] | None:
    """What follows the name in /proc/PID/stat; None when the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def name(pid: int) -> str:
    """The program's name; of Ray's processes what they run, such as `ray::ServeReplica:scalp:Grader`."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "?"
    word = words[0].split(" ")[0]
    if word.startswith("ray::"):
        kind = word.split(".")[0]  # what follows is the method that it is in at the moment
        # Ray Train gives the calls of a worker names such as `execute.get_address_and_port`.
        return "ray::RayTrainWorker" if kind == "ray::execute" else kind
    return word.rpartition("/")[2] or "?"
