"""Ctrl-C: the exit code of an interrupted command, and of one that only detached from a job."""

INTERRUPTED = 130  # what typer makes of Ctrl-C


class Detached(SystemExit):
    """Ctrl-C on a followed job: the command ends, and the job continues."""

    def __init__(self) -> None:
        super().__init__(INTERRUPTED)
