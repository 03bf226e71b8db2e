"""Ctrl-C at a chosen line: what the sweep over every call and the random orders of calls stop with."""

import sys
from pathlib import Path

import minilora

ROOT = str(Path(minilora.__file__).parent)


class Interrupt:
    """Inside the block ``KeyboardInterrupt`` comes before line number ``at`` of those in minilora's files; counts them.

    Lines of a destructor are passed over: Python itself swallows what is raised there.
    """

    def __init__(self, at=0):
        self.at, self.lines, self.where = at, 0, ""

    def __enter__(self):
        sys.settrace(self.call)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def call(self, frame, event, argument):
        callers = (frame, frame.f_back)
        if any(each is not None and each.f_code.co_name == "__del__" for each in callers):
            return None
        return self.line if frame.f_code.co_filename.startswith(ROOT) else None

    def line(self, frame, event, argument):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt  # a trace function that raises is taken off
        return self.line
