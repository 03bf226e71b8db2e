"""The course's exercises: files to fill in, graders that say in a sentence what is wrong, and broken code to find out.

Begin with ``course.py``; how a file is graded is ``grade.py``, and what a sentence says ``case.py``.
"""
