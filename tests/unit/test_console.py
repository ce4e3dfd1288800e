from jobs import console


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
