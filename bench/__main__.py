"""`python -m bench`: the same command as the console script `bench`."""

from bench.cli.main import main

if __name__ == "__main__":  # a worker process imports this module under another name and must not start the command
    main()
