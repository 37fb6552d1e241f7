"""The commands of the command line, a file each with `main(words) -> exit code`; each has its name in `running.COMMANDS`."""
