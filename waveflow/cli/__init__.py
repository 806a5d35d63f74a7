"""The command line: parses, calls the library, reports. Nothing heavy is imported for --help."""
