"""The file formats, each in a file of its own: how a program is written and how the written file is run to check it."""
