"""The command ``python -m models.conformance``."""

from models.conformance.command import main

if __name__ == "__main__":
    main()
