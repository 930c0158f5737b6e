"""Lightning's own test suite, with a CPQCallback given to every Trainer in it.

It fetches nothing: give it a checkout of Lightning's repository, of the version that is installed, in an environment
that has what those tests need (`requirements/pytorch/test.txt` there, and pytest-xdist).
"""
