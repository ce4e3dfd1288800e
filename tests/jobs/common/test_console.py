import re
import time

import pytest

from jobs.common import console


def test_without_a_terminal_progress_is_printed_at_intervals(monkeypatch, capsys):
    monkeypatch.setattr(console, "_REPORT_INTERVAL_S", 0.0)
    with console.progress_bar("examining", 2000) as (progress, task):
        progress.update(task, completed=1500, note="3 failed")
    assert "examining: 1,500 of 2,000 3 failed" in capsys.readouterr().out
    monkeypatch.setattr(console, "_REPORT_INTERVAL_S", 60.0)
    with console.progress_bar("examining", 2000) as (progress, task):
        for done in range(100):
            progress.update(task, completed=done)
    assert capsys.readouterr().out == ""


@pytest.mark.medium
def test_items_of_earlier_runs_do_not_count_for_the_remaining_time(monkeypatch, capsys):
    monkeypatch.setattr(console, "_REPORT_INTERVAL_S", 0.0)
    with console.progress_bar("grading", 1010, done=900) as (progress, task):
        for _ in range(3):
            time.sleep(0.4)
            progress.update(task, advance=1, note="2/s")
    last = capsys.readouterr().out.splitlines()[-1]
    # 107 are left, of which two or three come each second.
    left = re.fullmatch(r"grading: 903 of 1,010 2/s, 0:(\d\d):(\d\d) left", last)
    assert left, last
    assert 60 * int(left[1]) + int(left[2]) > 30
