"""The command line: one thin module a command. Parses, calls one library function, prints."""
