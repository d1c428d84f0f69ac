"""Run the command line as ``python -m fruitdask``."""

from fruitdask.cli import main

if __name__ == "__main__":
    main()
