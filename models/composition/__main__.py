"""The command ``python -m models.composition``."""

from models.composition.command import main

if __name__ == "__main__":
    main()
