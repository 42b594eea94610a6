"""`python -m parsim`: the command line, where no `parsim` script is on the path."""

from parsim.cli.main import main

if __name__ == "__main__":
    main()
