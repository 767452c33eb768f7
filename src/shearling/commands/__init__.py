"""The command line, one file a verb; the only place where a flag has a name."""
