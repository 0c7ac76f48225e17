"""The command line `sylva-compile`: fine-tune, trace, inspect, merge and export without writing Python.

`main.py` holds the table of subcommands. Its help imports neither torch nor transformers: `options.py` holds settings
alone, and the module of a subcommand is imported when it runs.
"""
