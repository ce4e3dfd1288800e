"""Ctrl-C: the exit code of an interrupted command, and of one that only detached from a job."""

INTERRUPTED = 130  # what typer makes of Ctrl-C


class Detached(SystemExit):
    """Ctrl-C: the job goes on without us."""

    def __init__(self) -> None:
        super().__init__(INTERRUPTED)
