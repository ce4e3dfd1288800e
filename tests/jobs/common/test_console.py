import re
import time

from jobs.common import console


def test_in_a_log_a_line_now_and_then_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(console, "_CALM_S", 0.0)
    with console.progress_bar("examining", 2000) as (progress, task):
        progress.update(task, completed=1500, note="3 failed")
    assert "examining: 1,500 of 2,000 3 failed" in capsys.readouterr().out
    monkeypatch.setattr(console, "_CALM_S", 60.0)
    with console.progress_bar("examining", 2000) as (progress, task):
        for done in range(100):
            progress.update(task, completed=done)
    assert capsys.readouterr().out == ""


def test_what_was_done_before_makes_nobody_believe_in_a_fast_end(monkeypatch, capsys):
    monkeypatch.setattr(console, "_CALM_S", 0.0)
    with console.progress_bar("grading", 1010, done=900) as (progress, task):
        for _ in range(3):
            time.sleep(0.4)
            progress.update(task, advance=1, note="2/s")
    last = capsys.readouterr().out.splitlines()[-1]
    # 107 are left, of which two or three come each second.
    left = re.fullmatch(r"grading: 903 of 1,010 2/s, 0:(\d\d):(\d\d) left", last)
    assert left, last
    assert 60 * int(left[1]) + int(left[2]) > 30
