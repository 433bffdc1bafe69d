"""One file per paper, in a folder per question; found by file name, imported on first use (`core.registry`)."""
