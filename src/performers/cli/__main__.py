"""`python -m performers.cli`, for launchers such as torchrun."""

from performers.cli.app import main

if __name__ == "__main__":
    main()
