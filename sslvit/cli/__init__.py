"""The command line: words to a configuration, help on one screen, an error as one sentence and an exit code.

Importing this loads no torch, so that help and mistyped commands take no time.
"""

from sslvit.cli.run import run_cli as run_cli
