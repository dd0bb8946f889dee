"""`python -m stepguardd`: the same as `stepguard`, for where the script is not on the PATH."""

from stepguardd.cli import main

if __name__ == "__main__":
    main()
