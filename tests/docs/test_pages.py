"""Commands of pages are found in fenced and in indented blocks."""

from __future__ import annotations

from tests.support.pages import blocks, page_commands

PAGE = """Text

<!-- run -->

```bash
scalp a --b  # c
$ scalp d
scalp … left out
```

<!-- prints -->
    other
    scalp e

1. In a list:

   ```bash
   scalp f
   ```
"""


def test_commands_of_fenced_and_indented_blocks_are_found():
    assert page_commands(PAGE) == ["scalp a --b", "scalp d", "scalp e", "scalp f"]


def test_a_block_has_the_comment_before_it_and_its_line():
    assert [(block.mark, block.line) for block in blocks(PAGE)] == [("run", 5), ("prints", 12), ("", 17)]
