"""The command line: one module per group of commands, each imported when it is used."""
