"""The tests. A package, so that `from tests.x import y` finds these and no other folder of that name."""
