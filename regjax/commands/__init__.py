"""The commands of the command line, each `command(arguments)`; `regjax.cli` chooses and reports."""
