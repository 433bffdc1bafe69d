"""The command line: arguments to one call to an exit code. The only room that prints or reads the environment."""
